"""Peak memory of a rank as a closed form. Pure arithmetic, [Note: letters].

What a rank holds between steps is exact. During a step the peak is the largest of a few moments, each a sum of
activations of the microbatches in flight and of what is in work: a block's backward pass, the loss, the head's backward
pass, the embedding's, and a gather of parameters. Bytes are those of eager code; allocators add rounding and fragments.
"""

from __future__ import annotations

from neox_native.config.schema import Config, Parallel
from neox_native.plan.shares import (
    ELEMENT_BYTES,
    activation_bytes,
    elements_of,
    num_microbatches,
    rows_of,
    share_of,
    stream_bytes,
    zero_stage_of,
)
from neox_native.zero.layout import FP32_BYTES

ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv")
MOMENTS = {"adamw": 2, "sgd": 1}


def in_flight(parallel: Parallel, num_microbatches: int, pp_rank: int) -> int:
    """(stage, microbatch) pairs whose activations a rank holds at most (Narayanan et al. 2021 §2.2; Qi et al. 2023 §5)."""
    p, v, m, behind = parallel.pp, parallel.virtual_stages, num_microbatches, parallel.pp - pp_rank - 1
    if p == 1:
        return 1
    most = {
        "gpipe": m,
        "1f1b": behind + 1,
        "interleaved_1f1b": (v - 1) * p + 2 * behind + 1,
        "looped_bfs": v * m,
        "interleaved_zero_bubble": v * p,
        "zbv": 2 * p,
    }[parallel.pipeline_schedule]
    return min(most, v * m)


def block_bytes(config: Config) -> int:
    """What the forward pass of one block keeps for its backward pass, eager, with flash attention.

    In activations [b, T, h]: its input; x̂ and the affine parts before each projection, whole even with sequence
    parallelism; divided by t: queries, keys and values, turned copies of the first two, the attention's output, and the
    feed-forward layer before and after its activation.
    """
    model, training = config.model, config.training
    whole, stream, e = activation_bytes(config), stream_bytes(config), ELEMENT_BYTES[training.precision]
    heads, keys = 1.0, model.kv_heads / model.num_heads
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
    share, waiting = share_of(config, pp_rank), num_microbatches(config) * stream_bytes(config)
    last = parallel.pp * parallel.virtual_stages - 1
    receives = sum((number > 0) + (number < last) for number in share.stages) if parallel.pp > 1 else 0
    return {
        "parameters": e * elements.padded if stage < 3 else (e * elements.rows if e < FP32_BYTES else 0),
        "gradients": FP32_BYTES * (elements.rows if stage >= 2 else elements.matrices),
        "optimizer_state": masters + MOMENTS[config.optimizer.name] * FP32_BYTES * elements.owned,
        "activations": 0,
        # torch's stages have a buffer for each microbatch that they will receive.
        "communication": receives * waiting,
    }


def memory(config: Config, pp_rank: int) -> dict[str, int]:
    """Bytes by kind at the peak of a step, as the dry run counts them."""
    rest = resident(config, pp_rank)
    moments = [_block_backward(config, pp_rank), _embedding_backward(config, pp_rank), _gather(config, pp_rank)]
    moments += [_loss(config, pp_rank), _head_backward(config, pp_rank)] if share_of(config, pp_rank).last else []
    peak = max(moments, key=lambda moment: sum(moment.values()))
    return {kind: rest[kind] + peak.get(kind, 0) for kind in rest}


def _held(config: Config, pp_rank: int) -> int:
    """Activations of all microbatches in flight, between passes."""
    share, parallel = share_of(config, pp_rank), config.parallel
    passes = in_flight(parallel, num_microbatches(config), pp_rank)
    block = stream_bytes(config) if config.training.activation_checkpointing == "full" else block_bytes(config)
    # A later stage's first input is a receive buffer, and its output is kept until it is sent.
    embedded = stream_bytes(config) if share.first and parallel.pp > 1 else 0
    return passes * (share.num_layers * block + embedded) // len(share.stages)


def _sharded(config: Config, present: int, gathered: int, reduced: int) -> dict[str, int]:
    """What ZeRO adds during a backward pass, in elements: stage 3 has a unit present and gathers the next, stages 2 and 3
    have matrices of gradients that are reduced."""
    stage, e = zero_stage_of(config.parallel), ELEMENT_BYTES[config.training.precision]
    return {
        "gradients": FP32_BYTES * reduced if stage >= 2 else 0,
        "parameters": e * present if stage == 3 else 0,
        "communication": e * gathered if stage == 3 else 0,
    }


def _elements(config: Config, pp_rank: int) -> tuple[int, int, int]:
    """Elements of the matrices of a rank's first unit, of a block and of its last unit."""
    layouts = rows_of(config, pp_rank)
    places = (0, 1 if share_of(config, pp_rank).first else 0, -1)
    first, block, last = (layouts[place].world * layouts[place].size for place in places)
    return first, block, last


def _block_backward(config: Config, pp_rank: int) -> dict[str, int]:
    """The end of a block's feed-forward layer, where its activations are whole and the gradients of the widest begin."""
    model, t, e = config.model, config.parallel.tp, ELEMENT_BYTES[config.training.precision]
    recomputed = block_bytes(config) - stream_bytes(config) if config.training.activation_checkpointing == "full" else 0
    whole, wide = activation_bytes(config), activation_bytes(config) * model.ffn_size // model.hidden_size // t
    weight_gradient = e * model.hidden_size * model.ffn_size // t
    work = whole + wide + weight_gradient
    share = share_of(config, pp_rank)
    if config.parallel.pp > 1 and config.parallel.pipeline_schedule in ZERO_BUBBLE:
        work += _operands(config, max(share.layers))
    _, block, _ = _elements(config, pp_rank)
    return _sharded(config, present=block, gathered=block, reduced=block) | {
        "activations": _held(config, pp_rank) + recomputed + work
    }


def _operands(config: Config, layers: int) -> int:
    """Split backward passes: gradients that wait for the weight half, of every projection's output in a stage's blocks, and
    the last block's attention, whose queries, keys and values each come back as wide as all three."""
    model, whole = config.model, activation_bytes(config)
    projected = 1 + 2 * model.kv_heads / model.num_heads
    wide = (2 if model.gated else 1) * model.ffn_size / model.hidden_size
    return int((layers * (projected + wide) + 2 * projected) * whole) // config.parallel.tp + layers * whole


def _head_bytes(config: Config) -> int:
    """What the head keeps for its backward pass, logits left out: its input, x̂ and the affine part."""
    return stream_bytes(config) + 2 * activation_bytes(config)


def _logits(config: Config) -> int:
    """Elements of the logits of a microbatch on a rank."""
    model, training = config.model, config.training
    return training.micro_batch_size * model.seq_length * model.padded_vocab_size // config.parallel.tp


def _loss(config: Config, pp_rank: int) -> dict[str, int]:
    """The loss, whose intermediate results are fp32. Whole vocabulary: log-softmax and two gradients of its size. Cut
    vocabulary: logits, the same in fp32, shifted, and their exponentials."""
    e = ELEMENT_BYTES[config.training.precision]
    copies = 3 * FP32_BYTES
    if config.parallel.tp > 1:
        copies += e if e < FP32_BYTES else 0
    elif config.parallel.pp > 1:  # torch's stages keep their outputs
        copies += e
    late = zero_stage_of(config.parallel) >= 2 and num_microbatches(config) > 1  # the matrix that was reduced last
    first, _, _ = _elements(config, pp_rank)
    return _sharded(config, present=0, gathered=0, reduced=first if late else 0) | {
        "activations": _held(config, pp_rank) + _head_bytes(config) + copies * _logits(config),
    }


def _head_backward(config: Config, pp_rank: int) -> dict[str, int]:
    """The head's matrix product: gradients of logits, of its weight and of its input."""
    model, e = config.model, ELEMENT_BYTES[config.training.precision]
    kept = e if config.parallel.pp > 1 else 0
    weight_gradient = e * model.padded_vocab_size * model.hidden_size // config.parallel.tp
    work = (e + kept) * _logits(config) + weight_gradient + activation_bytes(config)
    first, block, head = _elements(config, pp_rank)
    return _sharded(config, present=head, gathered=block, reduced=first) | {
        "activations": _held(config, pp_rank) + _head_bytes(config) + work
    }


def _embedding_backward(config: Config, pp_rank: int) -> dict[str, int]:
    """The embedding's gradient, dense and of the whole vocabulary, when the microbatch has left the blocks."""
    model, share, e = config.model, share_of(config, pp_rank), ELEMENT_BYTES[config.training.precision]
    if not share.first:
        return {}
    passes = in_flight(config.parallel, num_microbatches(config), pp_rank)
    gradient = e * model.padded_vocab_size * model.hidden_size
    embedding, block, _ = _elements(config, pp_rank)
    return _sharded(config, present=embedding, gathered=0, reduced=embedding + block) | {
        "activations": _held(config, pp_rank) * (passes - 1) // passes + gradient + activation_bytes(config)
    }


def _gather(config: Config, pp_rank: int) -> dict[str, int]:
    """Two units' parameters on their way, before the first microbatch has left activations."""
    stage, e = zero_stage_of(config.parallel), ELEMENT_BYTES[config.training.precision]
    first, block, last = _elements(config, pp_rank)
    largest = max(first, block, last)
    return {"communication": e * (largest + block), "parameters": e * largest if stage == 3 else 0} if stage else {}
