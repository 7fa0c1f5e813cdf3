"""Print the tensor-parallel plan of a config as a table.

    python tools/show_plan.py --config configs/20b.toml
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from neox_native.config.check import require
from neox_native.config.load import from_command_line
from neox_native.config.schema import Config
from neox_native.dtypes import ELEMENT_BYTES
from neox_native.errors import report_user_errors
from neox_native.parallel.cuts import held, rows_of_whole, share_of_vocabulary, sharers
from neox_native.parallel.tensor import plan

HEADER = ("module", "weight", "input", "output", "forward", "backward", "bytes per microbatch")


def rows(config: Config) -> list[tuple[str, ...]]:
    """The table's rows: module, placement of weight, input and output, collectives, and bytes of one activation [B, T, D]
    times the number of times that the module communicates one, forward and backward together: none on one rank."""
    model, training = config.model, config.training
    activation = training.micro_batch_size * model.seq_length * model.hidden_size * ELEMENT_BYTES[training.precision]
    passes = 1 if model.parallel_residual else 2
    table = []
    for name, rule in plan(model, config.parallel.sequence_parallel).items():
        collectives = sum(collective != "-" for collective in (rule.forward, rule.backward))
        times = collectives * (passes * model.num_layers if name.startswith("layers.") else 1) * (config.parallel.tp > 1)
        table.append((name, rule.weight, rule.input, rule.output, rule.forward, rule.backward, f"{times * activation:,}"))
    return table


def uneven(config: Config) -> Iterator[str]:
    """A sentence for what tp does not cut into equal parts of its own."""
    model, tp = config.model, config.parallel.tp
    rows, ranks_per_head = model.padded_vocab_size, sharers(model, tp)
    if rows % tp:
        most = share_of_vocabulary(rows, tp)
        yield f"Of the padded vocabulary's {rows:,} rows the last rank has {rows - (tp - 1) * most:,}, the others {most:,}."
    if ranks_per_head > 1:
        yield (
            f"Each of the {model.kv_heads} key-value heads lies on {ranks_per_head} ranks, which sum its gradient once a step; "
            f"query_key_value has {rows_of_whole(held(model, tp)) // tp:,} of {rows_of_whole(model):,} rows on each."
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
    residual = "parallel residual: once" if config.model.parallel_residual else "sequential residual: twice"
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
