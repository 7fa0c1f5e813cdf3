"""Print the tensor-parallel plan of a config as a table.

    python tools/show_plan.py --config configs/20b.toml
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch.distributed.tensor import Placement, Shard

from neox_native.config.check import require
from neox_native.config.load import from_command_line
from neox_native.config.schema import Config
from neox_native.dtypes import ELEMENT_BYTES
from neox_native.errors import report_user_errors
from neox_native.model.kinds import dealt, kinds_of, kinds_of_layers, residual_steps
from neox_native.parallel.cuts import share_of_vocabulary, sharers
from neox_native.parallel.tensor import plan

HEADER = ("module", "weight", "input", "output", "forward", "backward", "bytes per microbatch")


def rows(config: Config) -> list[tuple[str, ...]]:
    """The table's rows: module, placement of weight, input and output, collectives, and bytes of one activation [B, T, D]
    times the number of times that the module communicates one, forward and backward together: none on one rank. Layers that
    are alike share a row."""
    model, training, tp = config.model, config.training, config.parallel.tp
    activation = training.micro_batch_size * model.seq_length * model.hidden_size * ELEMENT_BYTES[training.precision]
    steps = [len(residual_steps(kinds, model)) for kinds in kinds_of_layers(model)]
    found: dict[tuple[str, ...], int] = {}
    for name, rule in plan(model, config.parallel.sequence_parallel).items():
        first, _, rest = name.partition(".")
        number, _, inside = rest.partition(".")
        shown = f"layers.*.{inside}" if first == "layers" else name
        placed = "-" if rule.weight is None else spelled(rule.weight), spelled(rule.input), spelled(rule.output)
        times = (steps[int(number)] if first == "layers" else 1) * (bool(rule.forward) + bool(rule.backward)) * (tp > 1)
        row = shown, *placed, rule.forward or "-", rule.backward or "-"
        found[row] = found.get(row, 0) + times * activation
    return [(*row, f"{sent:,}") for row, sent in found.items()]


def spelled(placement: Placement) -> str:
    """Such as "Replicate" or "Shard(0)"."""
    return f"Shard({placement.dim})" if isinstance(placement, Shard) else type(placement).__name__


def uneven(config: Config) -> Iterator[str]:
    """A sentence for what tp does not cut into equal parts of its own."""
    model, tp = config.model, config.parallel.tp
    rows = model.padded_vocab_size
    if rows % tp:
        most = share_of_vocabulary(rows, tp)
        yield f"The last rank has {rows - (tp - 1) * most:,} of the padded vocabulary's {rows:,} rows, the others {most:,}."
    for kind in kinds_of(model):
        for name, card in kind.cards(model).items():
            if sharers(card, tp) > 1 and card.role == "matrix":
                held = kind.cards(dealt(model, tp))[name].shape[0] // tp
                yield (
                    f"{kind.module}.{name}: each of the {card.groups.count} key-value heads lies on {sharers(card, tp)} ranks, "
                    f"which sum its gradient once a step; each has {held:,} of {card.shape[0]:,} rows."
                )


def main(arguments: list[str]) -> None:
    """Print the plan and what it communicates."""
    config = from_command_line(arguments, about=__doc__)
    config = require(config, config.parallel.pp * config.parallel.tp * max(config.parallel.dp, 1))
    table = [HEADER, *rows(config)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    total = sum(int(row[-1].replace(",", "")) for row in table[1:])
    steps = {len(residual_steps(kinds, config.model)) for kinds in kinds_of_layers(config.model)}
    residual = "once in each residual step"
    if len(steps) == 1:
        residual = {1: "parallel residual: once", 2: "sequential residual: twice"}.get(max(steps), residual)
    print(
        f"\ntp {config.parallel.tp}, sequence parallelism {'on' if config.parallel.sequence_parallel else 'off'}; "
        f"{config.model.num_layers} layers, {residual} per block and direction.\n"
        f"{total:,} bytes of activations enter collectives per microbatch of "
        f"{config.training.micro_batch_size} x {config.model.seq_length} tokens, all layers together "
        "(a ring moves (tp - 1) / tp of an all-gather or reduce-scatter, twice that of an all-reduce; a pipeline rank has its\n"
        "own layers' share). Beside them: three all-reduces of [B, T] numbers in the loss, and one of the norms' gradients per step."
    )
    for sentence in uneven(config):
        print(sentence)


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
