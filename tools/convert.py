"""Convert checkpoints from and to other programs' formats, with one shard of the weights in memory at a time.

    python tools/convert.py to-hf runs/quickstart OUT                       ours -> Hugging Face GPTNeoXForCausalLM
    python tools/convert.py from-hf FOLDER OUT                              Hugging Face -> ours
    python tools/convert.py from-neox global_step150000 OUT --config configs/20b.toml    GPT-NeoX (DeepSpeed) -> ours

`python tools/convert.py to-hf --help` lists the options of to-hf, and so on. Weights that are not finite are refused by name.
OUT of the last two is a checkpoint; train from it with --checkpoint.initialize_from OUT.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from neox_native.checkpoint.tokenizer_files import fitting_tokenizer, own_tokenizer, tokenizer_facts
from neox_native.config.load import load
from neox_native.config.schema import Model
from neox_native.data.tokenizers import load_tokenizer
from neox_native.dtypes import DTYPES
from neox_native.durable import clear_away, writing
from neox_native.errors import UserError, named_as, report_user_errors
from neox_native.interop import checkpoints
from neox_native.interop.gpt_neox import NeoxReader, step_folder
from neox_native.interop.gpt_neox_config import find_yaml, model_from_yaml
from neox_native.interop.hugging_face import HuggingFaceReader, write_folder
from neox_native.launch import Ranks
from neox_native.options import Parser, number_above, whole


def to_hf(options: argparse.Namespace) -> None:
    """Our checkpoint -> a Hugging Face folder."""
    reader = checkpoints.CheckpointReader(checkpoints.find_checkpoint(options.source))
    tokenizer, dtype = options.tokenizer or there_is(own_tokenizer(reader.path, reader.metadata)), DTYPES[options.dtype]
    shard_bytes = max(1, int(options.shard_gb * 1e9))
    whose = "--tokenizer" if options.tokenizer else f"the tokenizer of {options.source}"
    with writing(options.out), named_as("data.tokenizer", whose):
        weights = checked(reader, options, dtype)
        remarks = write_folder(options.out, reader.model, reader.shapes, weights, Ranks(), dtype, tokenizer, shard_bytes)
    print(*remarks, sep="\n", end="\n" if remarks else "")


def there_is(tokenizer: str) -> str:
    """A checkpoint's own tokenizer, or "" with a notice where it is gone."""
    try:
        if tokenizer:
            load_tokenizer(tokenizer)
        return tokenizer
    except UserError as error:
        print(f"The checkpoint's own tokenizer cannot be read, name it with --tokenizer: {error}")
        return ""


def from_hf(options: argparse.Namespace) -> None:
    """A Hugging Face folder -> our checkpoint."""
    checkpoints.require_new(options.out)
    reader = HuggingFaceReader(options.source)
    tokenizer = options.tokenizer
    if reader.tokenizer and not tokenizer:
        try:
            fitting_tokenizer(reader.tokenizer, reader.model)
            tokenizer = reader.tokenizer
        except UserError as error:
            print(f"The folder's own tokenizer is left out: {error}")
    write(options, reader.model, reader, tokenizer)


def from_neox(options: argparse.Namespace) -> None:
    """A checkpoint of GPT-NeoX -> our checkpoint."""
    checkpoints.require_new(options.out)
    reader = NeoxReader(options.source, neox_model(options))
    write(options, reader.model, reader, options.tokenizer)


def neox_model(options: argparse.Namespace) -> Model:
    """What a folder of GPT-NeoX's holds: as `--config` says, else as the YAML files beside it say."""
    if options.config:
        return load(options.config).model
    folder = step_folder(options.source)
    files = find_yaml(folder)
    if not files:
        raise UserError(
            f"{folder} does not say what model it holds and has no configs/*.yml beside it; describe it with --config, "
            "such as --config configs/20b.toml."
        )
    if options.vocab_size:
        return model_from_yaml(files, options.vocab_size)
    if options.tokenizer:
        with named_as("data.tokenizer", "--tokenizer"):
            return model_from_yaml(files, load_tokenizer(options.tokenizer).vocab_size)
    # Nothing says where padding begins: keep every row.
    smallest = replace(model_from_yaml(files, 1), vocab_multiple_of=1)
    rows = NeoxReader(folder, smallest).vocabulary_rows()
    return replace(smallest, vocab_size=rows)


def write(options: argparse.Namespace, model: Model, read: checkpoints.Read, tokenizer: str) -> None:
    """Write our checkpoint, with the tokenizer in it where it is known."""
    with named_as("data.tokenizer", "--tokenizer"):
        about, beside = tokenizer_facts(tokenizer, fitting_tokenizer(tokenizer, model) if tokenizer else None)
    with writing(options.out):
        checkpoints.write_checkpoint(options.out, model, checked(read, options), about, beside)


def checked(read: checkpoints.Read, options: argparse.Namespace, dtype: torch.dtype = torch.float32) -> checkpoints.Read:
    """The same tensors, of which the first that is not finite in `dtype` is refused, or told with `--allow-nonfinite`."""
    told = False

    def read_checked(name: str) -> Tensor:
        nonlocal told
        tensor = read(name)
        if not told and not tensor.to(dtype).isfinite().all():
            way_out = "take another --dtype" if tensor.isfinite().all() else "take a checkpoint from before they broke"
            found = f"{name} of {options.source} holds numbers that are not finite in {dtype}"
            if not options.allow_nonfinite:
                raise UserError(f"{found}; {way_out}, or convert it as it is with --allow-nonfinite.")
            told = True
            print(f"{found}; it is converted as it is.")
        return tensor

    return read_checked


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="to-hf | from-hf | from-neox")

    def command(name: str, function, source: str, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(function=function)
        added.add_argument("source", metavar=source, type=Path, help=what)
        added.add_argument("out", metavar="OUT", type=Path, help="a new folder")
        added.add_argument(
            "--tokenizer",
            default="",
            metavar="NAME",
            help='"byte", the path of a tokenizer.json, or "tiktoken:NAME" (default: the one that the source names)',
        )
        added.add_argument(
            "--allow-nonfinite", action="store_true", help="convert weights that are infinite or no numbers, too"
        )
        return added

    export = command("to-hf", to_hf, "CHECKPOINT", "a checkpoint of ours, or a run's folder: its newest one")
    export.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of the written weights (default: fp32, exact)")
    export.add_argument(
        "--shard-gb",
        type=number_above(0),
        default=2.0,
        metavar="GB",
        help="size of the largest file, which bounds memory [GB] (default: 2)",
    )
    command("from-hf", from_hf, "FOLDER", "a folder with config.json and .safetensors files")
    neox = command("from-neox", from_neox, "FOLDER", "a global_stepN folder, or the one around it")
    neox.add_argument(
        "--config",
        metavar="FILE",
        help="our config file whose [model] section describes the checkpoint (default: as the .yml files beside it say)",
    )
    neox.add_argument(
        "--vocab-size",
        type=whole(1),
        metavar="IDS",
        help="ids of the tokenizer; the padding above is cut (default: as --config or --tokenizer says, else all rows are kept)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Convert, and say where the result is."""
    options = parse(arguments)
    clear_away(options.out)
    options.function(options)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
