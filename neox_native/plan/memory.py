"""Peak memory of a rank as a closed form. Pure arithmetic, [Note: letters].

What a rank holds between steps is exact. During a step the peak is the largest of a few phases: of every backward pass
during which a rank may hold most ([Note: turns]) the loss, the head, two blocks and the embedding, and a gather of
parameters. Each is a sum of what the microbatches in flight keep and of what is in work. Bytes are those of eager
code; allocators add rounding and fragments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from neox_native.config.schema import Config
from neox_native.dtypes import ELEMENT_BYTES, FP32_BYTES
from neox_native.parallel.cuts import share_of_vocabulary
from neox_native.plan.flight import Moment, moments
from neox_native.plan.shares import (
    Share,
    activation_bytes,
    elements_of,
    key_share,
    num_microbatches,
    rows_of,
    share_of,
    stream_bytes,
    zero_stage_of,
)

ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv")
MOMENTS = {"adamw": 2, "sgd": 1}


def block_bytes(config: Config) -> int:
    """What the forward pass of one block keeps for its backward pass, eager, with flash attention.

    The count, term by term, is that of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
    Models", §4.1, and what tensor and sequence parallelism divide is their §4.2. It differs where this code does: flash
    attention keeps no scores, so that their 5 a s / h (a heads, s positions) is gone but for one fp32 number for each
    head and position; masks of dropout are left out; queries and keys are kept also as rotary embedding turned them;
    and with sequence parallelism what a projection reads stays whole, where theirs keeps a part and gathers it again.

    In activations [b, T, h]: its input; x̂ and the affine parts before each projection, whole even with sequence
    parallelism; divided by t: queries, keys and values, turned copies of the first two, the attention's output, and the
    feed-forward layer before and after its activation.
    """
    model, training = config.model, config.training
    whole, stream, e = activation_bytes(config), stream_bytes(config), ELEMENT_BYTES[training.precision]
    heads, keys = 1.0, key_share(config)
    turned = heads + keys if model.pos_emb == "rotary" else 0.0
    wide = (4 if model.gated else 2) * model.ffn_size / model.hidden_size
    cut = (heads + 2 * keys) + turned + heads + wide
    steps, norms = (1, 3) if model.parallel_residual else (2, 4)
    inputs = stream if model.norm == "layernorm" else stream * FP32_BYTES // e  # RMSNorm keeps an fp32 copy
    scores = FP32_BYTES * training.micro_batch_size * model.num_heads * model.seq_length // config.parallel.tp
    masks = e * training.micro_batch_size * model.seq_length**2 if config.data.document_attention else 0
    return steps * inputs + norms * whole + int(cut * whole) // config.parallel.tp + scores + masks


def resident(config: Config, pp_rank: int) -> dict[str, int]:
    """What a rank holds between steps. See `zero.layout.ZeroStage`."""
    stage, e = zero_stage_of(config.parallel), ELEMENT_BYTES[config.training.precision]
    elements = elements_of(config, pp_rank)
    has_master = e < FP32_BYTES or stage == 3
    masters = FP32_BYTES * elements.rows if has_master else 0
    parallel = config.parallel
    stages, waiting = share_of(config, pp_rank).stages, num_microbatches(config) * stream_bytes(config)
    others = set(range(parallel.pp * parallel.virtual_stages)) - set(stages)
    receives = sum((number - 1 in others) + (number + 1 in others) for number in stages) if parallel.pp > 1 else 0
    return {
        "parameters": e * elements.padded if stage < 3 else (e * elements.rows if e < FP32_BYTES else 0),
        # Stages 2 and 3 give the last step's rows back when the first forward pass begins.
        "gradients": FP32_BYTES * elements.matrices if stage < 2 else 0,
        "optimizer_state": masters + MOMENTS[config.optimizer.name] * FP32_BYTES * elements.owned,
        "activations": 0,
        # torch's stages have a buffer for each microbatch that they will receive from another rank.
        "communication": receives * waiting,
    }


def memory(config: Config, pp_rank: int) -> dict[str, int]:
    """Bytes by kind at the peak of a step, as the dry run counts them."""
    sizes, rest = _Sizes.of(config, pp_rank), resident(config, pp_rank)
    phases = [_gather(sizes)]
    for moment in moments(config.parallel, num_microbatches(config), pp_rank):
        phases += _backward(sizes, moment)
    peak = max(phases, key=lambda phase: sum(phase.values()))
    return {kind: rest[kind] + peak.get(kind, 0) for kind in rest}


@dataclass(frozen=True)
class _Sizes:
    """What the phases of a rank's step are made of, in bytes; units in elements of their matrices."""

    config: Config
    share: Share
    zero: int
    e: int
    piped: bool
    """Whether torch's stages run it, which keep their outputs until a microbatch is through."""
    whole: int
    """An activation [b, T, h]."""
    stream: int
    block: int
    """What a block keeps of a microbatch between its passes."""
    input: int
    """The part of it that is the block's input as it came; RMSNorm keeps an fp32 copy instead."""
    recomputed: int
    """What comes back during a block's backward pass."""
    head: int
    """What the head keeps, logits left out: its input, x̂ and the affine part."""
    logits: int
    """Elements."""
    units: tuple[int, int, int]
    """A rank's first unit, which is the embedding where it has it; a block; its last unit, the head where it has it."""

    @classmethod
    def of(cls, config: Config, pp_rank: int) -> _Sizes:
        """The sizes of a rank."""
        model, training, parallel = config.model, config.training, config.parallel
        share, layouts = share_of(config, pp_rank), rows_of(config, pp_rank)
        places = (0, 1 if share.first else 0, -1)
        whole, stream, kept = activation_bytes(config), stream_bytes(config), block_bytes(config)
        full = training.activation_checkpointing == "full"
        return cls(
            config=config,
            share=share,
            zero=zero_stage_of(parallel),
            e=ELEMENT_BYTES[training.precision],
            piped=parallel.pp > 1,
            whole=whole,
            stream=stream,
            block=stream if full else kept,
            input=stream if full or model.norm == "layernorm" else 0,
            recomputed=kept - (stream if model.norm == "layernorm" else 0) if full else 0,
            head=stream + 2 * whole,
            logits=training.micro_batch_size * model.seq_length * share_of_vocabulary(model.padded_vocab_size, parallel.tp),
            units=tuple(layouts[place].world * layouts[place].size for place in places),
        )

    @property
    def splits(self) -> bool:
        """Whether backward passes are split in two."""
        return self.piped and self.config.parallel.pipeline_schedule in ZERO_BUBBLE

    def is_last(self, turn: int) -> bool:
        """Whether a stage has the head and the loss."""
        return self.share.last and self.share.stages[turn] == max(self.share.stages)

    def is_first(self, turn: int) -> bool:
        """Whether a stage has the embedding."""
        return self.share.stages[turn] == 0

    def kept(self, turn: int) -> int:
        """What a stage keeps of a microbatch between its passes: its blocks, whose first input is a receive buffer
        where no embedding made it, and its output; with the head instead what that keeps, the fp32 log-probabilities
        included."""
        size = self.share.layers[turn] * self.block - (0 if self.is_first(turn) else self.input)
        if not self.is_last(turn):
            return size + self.stream
        return size + self.head + self.log_probabilities

    @property
    def log_probabilities(self) -> int:
        """What the loss keeps of a microbatch."""
        return FP32_BYTES * self.logits

    def held(self, moment: Moment) -> int:
        """Activations of all microbatches in flight. The input half of a backward pass frees the loss alone, recomputes what
        blocks had forgotten ([Note: recomputing once] in `parallel/recompute.py`), and leaves gradients for the weight half, and that of its input at the receive buffer, where it stays until the step is
        over."""
        size = sum(number * self.kept(turn) for turn, number in enumerate(moment.held))
        for turn, stage in enumerate(self.share.stages):
            if self.splits and stage > 0:
                loss = self.log_probabilities if self.is_last(turn) else 0
                again = self.share.layers[turn] * self.recomputed
                size += moment.waiting[turn] * (again + _operands(self, turn) - loss)
                received = stage - 1 not in self.share.stages
                size += self.stream * (moment.halved[turn] if received else moment.waiting[turn])
        return size

    def lingering(self, turn: int) -> int:
        """The unit whose gradients a stage reduces last: its matrix stays until the stage's next reduction."""
        return self.units[0] if self.is_first(turn) else self.units[1]


def _phase(
    sizes: _Sizes, moment: Moment, work: int, matrices: int = 0, rows: int = 0, present: int = 0, gathered: int = 0
) -> dict[str, int]:
    """One sum.

    Args:
        work: bytes beside what is held at the moment; negative where the pass has freed more than it made.
        matrices: elements of gradient matrices of this stage, where ZeRO frees them.
        rows: elements of the matrices that this pass has reduced, whose rows it leaves, if it is the stage's first.
        present, gathered: elements of the parameters that stage 3 has gathered, and has on their way.
    """
    phase = {"activations": sizes.held(moment) + work}
    if sizes.zero >= 2:
        others = [turn for turn in range(len(moment.held)) if turn != moment.turn and moment.reduced[turn]]
        matrices += sum(sizes.lingering(turn) for turn in others)
        reduced = sum(_stage_elements(sizes, turn) for turn in others)
        reduced += _stage_elements(sizes, moment.turn) if moment.reduced[moment.turn] else rows
        phase["gradients"] = FP32_BYTES * (matrices + reduced // sizes.config.parallel.dp)
    if sizes.zero == 3:
        phase |= {"parameters": sizes.e * present, "communication": sizes.e * gathered}
    return phase


def _stage_elements(sizes: _Sizes, turn: int) -> int:
    """Elements of the matrices of a stage."""
    first, block, last = sizes.units
    return sizes.share.layers[turn] * block + sizes.is_first(turn) * first + sizes.is_last(turn) * last


def _backward(sizes: _Sizes, moment: Moment) -> Iterator[dict[str, int]]:
    """The phases of a backward pass that may be the largest."""
    lingering = sizes.lingering(moment.turn) if moment.reduced[moment.turn] else 0
    before, freed, rows = lingering, 0, 0
    if sizes.is_last(moment.turn):
        yield _phase(sizes, moment, _loss(sizes), lingering)
        yield from _head(sizes, moment, lingering)
        before = rows = sizes.units[2]
        freed = sizes.head - sizes.stream + sizes.log_probabilities
    layers = sizes.share.layers[moment.turn]
    if sizes.splits and not sizes.is_first(moment.turn):
        yield _phase(sizes, moment, _input_half(sizes, moment.turn))
        return
    for number in range(min(layers, 2)):
        follows = sizes.units[1] if number + 1 < layers else sizes.units[0] if sizes.is_first(moment.turn) else 0
        alone = layers == 1 and not sizes.is_first(moment.turn) and not sizes.is_last(moment.turn)
        yield from _block(sizes, moment, freed, before, rows, follows, alone)
        before, freed, rows = sizes.units[1], freed + sizes.block, rows + sizes.units[1]
    if sizes.is_first(moment.turn):
        yield _embedding(sizes, moment, before)


def _loss(sizes: _Sizes) -> int:
    """The loss, whose intermediate results are fp32, beyond what it keeps. Whole vocabulary: log-softmax and two
    gradients of its size. Cut vocabulary: logits, the same in fp32 (a copy, if they are not), shifted, and their
    exponentials."""
    copies = 2 * FP32_BYTES
    if sizes.config.parallel.tp > 1:
        copies += sizes.e if sizes.e < FP32_BYTES else 0
    return copies * sizes.logits


def _head(sizes: _Sizes, moment: Moment, lingering: int) -> Iterator[dict[str, int]]:
    """The head's matrix product: gradients of logits, of its weight and of its input; then the gradient of the logits
    is gone and the unit's matrix begins."""
    model, (_, block, head) = sizes.config.model, sizes.units
    weight_gradient = sizes.e * share_of_vocabulary(model.padded_vocab_size, sizes.config.parallel.tp) * model.hidden_size
    work = weight_gradient + sizes.whole - sizes.log_probabilities
    yield _phase(sizes, moment, work + sizes.e * sizes.logits, lingering, present=head, gathered=block)
    yield _phase(sizes, moment, work, lingering + head, gathered=block)


def _block(
    sizes: _Sizes, moment: Moment, freed: int, before: int, rows: int, follows: int, alone: bool
) -> Iterator[dict[str, int]]:
    """The end of a block's feed-forward layer, where its activations are whole and the gradients of the widest begin;
    then its weight's gradient lies in the unit's matrix, while the matrix before it is on its way, and a gated layer
    has one more.

    Args:
        freed: bytes that the pass has freed since it began.
        before: elements of the matrix that was reduced before.
        rows: see `_phase`.
        follows: elements of the unit whose backward pass is next.
        alone: whether the stage is this block, so that the matrix before it was its own, which it waits for.
    """
    model, t = sizes.config.model, sizes.config.parallel.tp
    wide = sizes.whole * model.ffn_size // model.hidden_size // t
    weight_gradient = sizes.e * model.hidden_size * model.ffn_size // t
    work = sizes.recomputed + sizes.whole + wide - freed
    block = sizes.units[1]
    yield _phase(sizes, moment, work + weight_gradient, before, rows, present=block, gathered=follows)
    matrices = block if alone else before + block
    yield _phase(sizes, moment, work + wide * model.gated, matrices, rows, present=block, gathered=follows)


def _operands(sizes: _Sizes, turn: int) -> int:
    """Split backward passes: gradients that the weight half needs, of the output of every projection and of every
    norm's affine part in a stage's blocks, and of the logits."""
    model, layers = sizes.config.model, sizes.share.layers[turn]
    steps = 1 if model.parallel_residual else 2
    projected = 1 + 2 * key_share(sizes.config)
    wide = (2 if model.gated else 1) * model.ffn_size / model.hidden_size
    block = int((projected + wide) * sizes.whole) // sizes.config.parallel.tp + (steps + 2) * sizes.whole
    return layers * block + (sizes.e * sizes.logits + sizes.whole if sizes.is_last(turn) else 0)


def _input_half(sizes: _Sizes, turn: int) -> int:
    """The end of the input half of a split backward pass, which has freed nothing: what the weight half needs, and the
    last block's attention, whose queries, keys and values each come back as wide as all three. With tensor parallelism
    the gradient of fp32 logits takes the place of their probabilities."""
    tp = sizes.config.parallel.tp
    in_place = sizes.log_probabilities if sizes.is_last(turn) and tp > 1 and sizes.e == FP32_BYTES else 0
    attention = 2 * (1 + 2 * key_share(sizes.config)) * sizes.whole
    again = sizes.share.layers[turn] * sizes.recomputed
    return again + _operands(sizes, turn) + int(attention) // tp + sizes.whole - in_place


def _embedding(sizes: _Sizes, moment: Moment, before: int) -> dict[str, int]:
    """The embedding's gradient, dense and of the whole vocabulary, when the microbatch has left the blocks."""
    model, first = sizes.config.model, sizes.units[0]
    work = sizes.e * model.padded_vocab_size * model.hidden_size + sizes.whole - sizes.kept(moment.turn)
    rows = _stage_elements(sizes, moment.turn) - first
    return _phase(sizes, moment, work, before + first, rows, present=first)


def _gather(sizes: _Sizes) -> dict[str, int]:
    """Two units' parameters on their way, before the first microbatch has left activations."""
    if not sizes.zero:
        return {}
    largest = max(sizes.units)
    return {
        "communication": sizes.e * (largest + sizes.units[1]),
        "parameters": sizes.e * largest if sizes.zero == 3 else 0,
    }
