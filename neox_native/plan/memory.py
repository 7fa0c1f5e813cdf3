"""Peak memory of a rank as a closed form. Pure arithmetic, [Note: letters].

What a rank holds between steps is exact. During a step the peak is the largest of a few phases: of every backward pass
during which a rank may hold most ([Note: turns]) the loss, the head, two layers of each sort and the embedding, and a
gather of parameters. Each phase adds up what the microbatches in flight keep and what is in work. Bytes are those of
eager code, but for the loss and what selective recomputation keeps where blocks are compiled; allocators add rounding and fragments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from neox_native.config.layout_rules import ZERO_BUBBLE, head_gradients_in_forward
from neox_native.config.schema import Config
from neox_native.dtypes import ELEMENT_BYTES, FP32_BYTES
from neox_native.parallel.cuts import share_of_vocabulary
from neox_native.plan.flight import Moment, moments
from neox_native.plan.kept import Layer, Stage, stages_of
from neox_native.plan.shares import activation_bytes, gradient_bytes, num_microbatches, share_of, stream_bytes, zero_stage_of

MOMENTS = {"adamw": 2, "sgd": 1}


def resident(config: Config, pp_rank: int) -> dict[str, int]:
    """What a rank holds between steps. See `zero.layout.ZeroStage`."""
    parallel, e = config.parallel, ELEMENT_BYTES[config.training.precision]
    stage, share = zero_stage_of(parallel), share_of(config, pp_rank)
    masters = FP32_BYTES * share.row if e < FP32_BYTES or stage == 3 else 0
    return {
        "parameters": e * share.padded if stage < 3 else (e * share.row if e < FP32_BYTES else 0),
        # Stages 2 and 3 give the last step's rows back when the first forward pass begins.
        "gradients": gradient_bytes(config) * share.world * share.row if stage < 2 else 0,
        "optimizer_state": masters + MOMENTS[config.optimizer.name] * FP32_BYTES * share.owned,
        "activations": 0,
        "communication": 0,
    }


def memory(config: Config, pp_rank: int) -> dict[str, int]:
    """Bytes by kind at the peak of a step, as the dry run counts them."""
    sizes, rest = _Sizes(config, pp_rank), resident(config, pp_rank)
    phases = [_gather(sizes)]
    for moment in moments(config.parallel, num_microbatches(config), pp_rank):
        phases += _backward(sizes, moment)
    peak = max(phases, key=lambda phase: sum(phase.values()))
    return {kind: rest[kind] + peak.get(kind, 0) for kind in rest}


def peak_bytes(config: Config) -> int:
    """Most memory on any rank. All are looked at: the first has most microbatches in flight and the last the logits,
    but with uneven stages or split backward passes one in the middle may need more."""
    return max(sum(memory(config, rank).values()) for rank in range(config.parallel.pp))


class _Sizes:
    """What the phases of a rank's step are made of, in bytes; units in elements of their matrices."""

    def __init__(self, config: Config, pp_rank: int):
        model, training, parallel = config.model, config.training, config.parallel
        tokens = training.micro_batch_size * model.seq_length
        self.config, self.zero, self.e = config, zero_stage_of(parallel), ELEMENT_BYTES[training.precision]
        self.splits = parallel.pp > 1 and parallel.pipeline_schedule in ZERO_BUBBLE  # backward passes in two halves
        self.whole, self.stream = activation_bytes(config), stream_bytes(config)
        rows = share_of_vocabulary(model.padded_vocab_size, parallel.tp)
        self.slice_logits = min(tokens, training.loss_slice_tokens) * rows  # elements
        self.head_gradient = self.e * rows * model.hidden_size  # in the type of the weights
        # The fp32 gradients of the head's input and matrix, which the forward pass makes or the backward pass.
        self.made = (self.whole + self.head_gradient) * FP32_BYTES // self.e
        self.early = head_gradients_in_forward(parallel)
        # What the head keeps: its input, x̂, the affine part, and gradients.
        self.head = self.stream + 2 * self.whole + (self.made if self.early else 0)
        self.stages, self.num_stages = stages_of(config, share_of(config, pp_rank)), parallel.pp * parallel.virtual_stages

    def kept(self, stage: Stage) -> int:
        """What a stage keeps of a microbatch between its passes: what its layers keep, but for the first one's input where
        that is a receive buffer; and its output, or, with the head, what that keeps."""
        size = stage.kept - (0 if stage.embedding else stage.layers[0].input)
        if not stage.readout:
            return size + self.stream
        return size + self.head

    def held(self, moment: Moment) -> int:
        """Activations of all microbatches in flight. The input half of a backward pass frees the head's fp32 gradients alone,
        recomputes what layers had forgotten ([Note: recomputing once] in `parallel/recompute.py`), and leaves gradients for the
        weight half."""
        size = sum(number * self.kept(stage) for number, stage in zip(moment.held, self.stages))
        if not self.splits:
            return size
        for stage, waiting in zip(self.stages, moment.waiting):
            if stage.number > 0:
                size += waiting * (stage.recomputed + self.waiting(stage) - (self.made if stage.readout else 0))
        return size

    def received(self, moment: Moment) -> int:
        """Buffers of messages from other ranks, see [Note: receive buffers] in `parallel/pipeline.py`: the inputs of microbatches
        in flight, and gradients, of the pass itself and those that weight halves read."""
        own = {-1, self.num_stages, *(stage.number for stage in self.stages)}
        count = 0
        for turn, (stage, held, waiting) in enumerate(zip(self.stages, moment.held, moment.waiting)):
            count += held * (stage.number - 1 not in own)
            count += (waiting + (turn == moment.turn)) * (stage.number + 1 not in own)
        return count * self.stream

    def waiting(self, stage: Stage) -> int:
        """Gradients that the weight half of a backward pass needs: those of the outputs of every projection and of every
        norm's learned half, and that of the head's matrix, which is there already."""
        return stage.waiting + (self.head_gradient + self.whole if stage.readout else 0)


def _phase(
    sizes: _Sizes, moment: Moment, work: int, matrices: int = 0, rows: int = 0, present: int = 0, gathered: int = 0
) -> dict[str, int]:
    """Bytes by kind at one moment of a step.

    Args:
        work: bytes beside what is held at the moment; negative where the pass has freed more than it made.
        matrices: elements of gradient matrices of this stage, where ZeRO frees them.
        rows: elements of the matrices that this pass has reduced so far; where it is the stage's first pass, their rows appear.
        present, gathered: elements of the parameters that stage 3 has gathered, and has on their way.
    """
    phase = {"activations": sizes.held(moment) + work, "communication": sizes.received(moment)}
    if sizes.zero >= 2:
        now = sizes.stages[moment.turn]
        others = [stage for stage, reduced in zip(sizes.stages, moment.reduced) if reduced and stage is not now]
        matrices += sum(stage.lingering for stage in others)
        reduced = sum(stage.elements for stage in others) + (now.elements if moment.reduced[moment.turn] else rows)
        phase["gradients"] = gradient_bytes(sizes.config) * (matrices + reduced // sizes.config.parallel.shard_ranks)
    if sizes.zero == 3:
        phase["parameters"] = sizes.e * present
        phase["communication"] += sizes.e * gathered
    return phase


def _backward(sizes: _Sizes, moment: Moment) -> Iterator[dict[str, int]]:
    """The phases of a backward pass that may be the largest."""
    stage = sizes.stages[moment.turn]
    lingering = stage.lingering if moment.reduced[moment.turn] else 0
    before, freed, rows = lingering, 0, 0
    if stage.readout:
        yield from _head(sizes, moment, lingering)
        before = rows = stage.readout
        freed = sizes.head - sizes.stream
    if sizes.splits and not stage.embedding:
        yield _phase(sizes, moment, _input_half(sizes, stage))
        return
    seen = Counter[Layer]()
    for layer, follows in zip(reversed(stage.layers), [*(layer.unit for layer in stage.layers[-2::-1]), 0]):
        seen[layer] += 1
        if seen[layer] <= 2:  # a third of a sort is as the second
            yield from _layer(sizes, moment, layer, freed, before, rows, follows)
        before, freed, rows = layer.unit, freed + layer.kept, rows + layer.unit
    if stage.embedding:
        yield _embedding(sizes, moment, before)


def _head(sizes: _Sizes, moment: Moment, lingering: int) -> Iterator[dict[str, int]]:
    """Head and loss, [Note: slices] in `model/cross_entropy.py`: a slice's softmax in fp32, in low precision a rounded copy of its
    gradient, too (compiled, its logits alone), and its product with x; then the backward pass converts the sums; then they
    have taken the place of what was made in fp32, and the unit's matrix begins."""
    stage = sizes.stages[moment.turn]
    follows, converted = stage.layers[-1].unit, sizes.head_gradient + sizes.whole
    made, low = (0 if sizes.early else sizes.made), sizes.e < FP32_BYTES
    of_a_logit = sizes.e if sizes.config.compile.on else FP32_BYTES + sizes.e * low
    work = made + of_a_logit * sizes.slice_logits + sizes.head_gradient * low
    yield _phase(sizes, moment, work, lingering, present=stage.readout, gathered=0 if sizes.early else follows)
    yield _phase(sizes, moment, made + converted * low, lingering, present=stage.readout, gathered=follows)
    work = converted - sizes.whole - (sizes.made if sizes.early else 0)
    yield _phase(sizes, moment, work, lingering + stage.readout, gathered=follows)


def _layer(
    sizes: _Sizes, moment: Moment, layer: Layer, freed: int, before: int, rows: int, follows: int
) -> Iterator[dict[str, int]]:
    """The backward pass of a layer begins at the end of its last kind: all its activations are there, and the widest
    gradient begins. Then the gradient of the output projection lies in the unit's matrix, while the matrix before it is on
    its way, and gradients may have become wider.

    Args:
        freed: bytes that the pass has freed since it began.
        before: elements of the matrix that was reduced before; where that is the layer's own, it waits for it.
        rows: see `_phase`.
        follows: elements of the unit whose backward pass is next.
    """
    work = layer.recomputed + sizes.whole + layer.widest - freed
    yield _phase(sizes, moment, work + layer.weight_gradient, before, rows, present=layer.unit, gathered=follows)
    stage = sizes.stages[moment.turn]
    alone = len(stage.layers) == 1 and not stage.embedding and not stage.readout
    matrices = layer.unit + (0 if alone else before)
    yield _phase(sizes, moment, work + layer.wider, matrices, rows, present=layer.unit, gathered=follows)


def _input_half(sizes: _Sizes, stage: Stage) -> int:
    """A split backward pass has freed nothing when its input half ends: there are the gradients that the weight half needs,
    and what is in work in the stage's first layer. The gradients of the head have taken the place of what was made in fp32."""
    return stage.recomputed + sizes.waiting(stage) + stage.layers[0].returning - (sizes.made if stage.readout else 0)


def _embedding(sizes: _Sizes, moment: Moment, before: int) -> dict[str, int]:
    """When the microbatch has left the layers, the embedding's gradient appears, dense and of the whole vocabulary."""
    model, stage = sizes.config.model, sizes.stages[moment.turn]
    work = sizes.e * model.padded_vocab_size * model.hidden_size + sizes.whole - sizes.kept(stage)
    rows = stage.elements - stage.embedding
    return _phase(sizes, moment, work, before + stage.embedding, rows)


def _gather(sizes: _Sizes) -> dict[str, int]:
    """The parameters of two units on their way, before the first microbatch has left activations."""
    if not sizes.zero:
        return {}
    layer = max(layer.unit for stage in sizes.stages for layer in stage.layers)
    largest = max(layer, *(end for stage in sizes.stages for end in (stage.embedding, stage.readout)))
    return {"communication": sizes.e * (largest + layer), "parameters": sizes.e * largest if sizes.zero == 3 else 0}
