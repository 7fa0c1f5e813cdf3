"""What the tools that run a trained model share: their options, and the model that these name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import destroy_process_group as leave_process_group

from neox_native.checkpoint.tokenizer_files import fitting_tokenizer
from neox_native.data.tokenizers import Tokenizer
from neox_native.dtypes import DTYPES
from neox_native.errors import UserError, named_as
from neox_native.inference.load import Loaded, inference_mesh, load_model
from neox_native.launch import Launch, pick_device, start_process_group
from neox_native.options import whole


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which model to run, and how."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        required=True,
        metavar="FOLDER",
        help="a checkpoint, a run's folder (its newest checkpoint is taken) or a Hugging Face folder",
    )
    group.add_argument(
        "--tokenizer",
        default="",
        metavar="NAME",
        help='"byte", the path of a tokenizer.json, or "tiktoken:NAME" (default: the checkpoint\'s own)',
    )
    group.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of weights and activations (default: fp32)")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what to run on (default: auto, a GPU where there is one)",
    )
    group.add_argument(
        "--tp",
        type=whole(1),
        metavar="RANKS",
        help="tensor-parallel degree; more than one needs torchrun (default: the processes divided by --pp)",
    )
    group.add_argument("--pp", type=whole(1), default=1, metavar="RANKS", help="pipeline-parallel degree (default: 1)")
    group.add_argument("--batch-size", type=whole(1), default=8, metavar="N", help="sequences of one forward pass (default: 8)")


@contextmanager
def model_from(options: argparse.Namespace) -> Iterator[Loaded]:
    """Join the other processes, load this one's part of the model, and leave again."""
    launch = Launch.from_environment()
    with named_as("run.device", "--device"):
        device = pick_device(options.device, launch)
    start_process_group(device, launch)
    try:
        tp = options.tp or max(1, launch.world_size // options.pp)
        yield load_model(options.checkpoint, inference_mesh(options.pp, tp, launch.world_size, device), options.dtype, device)
    finally:
        leave_process_group()


def tokenizer_of(options: argparse.Namespace, loaded: Loaded) -> Tokenizer:
    """The tokenizer that was asked for, else the checkpoint's. Raises `UserError` where there is none that fits."""
    if options.tokenizer:
        with named_as("data.tokenizer", "--tokenizer"):
            return fitting_tokenizer(options.tokenizer, loaded.model)
    if not loaded.tokenizer:
        raise UserError(f"{options.checkpoint} does not say which tokenizer its model reads; name it with --tokenizer.")
    return fitting_tokenizer(loaded.tokenizer, loaded.model, f"the tokenizer of {options.checkpoint}")
