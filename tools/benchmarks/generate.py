"""Tokens per second of generation with and without the cache, beside Hugging Face's on the same weights."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from neox_native.config.schema import Model
from neox_native.dtypes import DTYPES
from neox_native.inference.generator import Generator, Limits
from neox_native.inference.load import inference_mesh, load_model
from neox_native.inference.runner import Runner
from neox_native.interop.checkpoints import parameter_shapes
from neox_native.interop.hugging_face import write_folder
from neox_native.launch import Launch, pick_device, start_process_group, Ranks
from neox_native.model import initialize
from neox_native.model.transformer import cards

PYTHIA_70M = Model(num_layers=6, hidden_size=512, num_heads=8, vocab_size=50304)


class NoText:
    """Stands in for a tokenizer: prompts and answers are ids."""

    name, eod_id = "none", 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Nothing."""
        return np.empty(0, np.uint32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Nothing."""
        return ""


def run(
    model: Model = PYTHIA_70M,
    dtype: str = "",
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch_sizes: tuple[int, ...] = (1, 8),
    rounds: int = 7,
) -> str:
    """Measure in one run, alternating; returns a markdown table of medians over `rounds`, speed-ups round by round.

    Greedy, each answer `new_tokens` long; a second counts from the prompt to the last token. Weights are drawn as for
    training, since speed does not depend on them; both implementations read the same Hugging Face folder.

    Args:
        dtype: "fp32", "bf16" or "fp16"; "" takes bf16 on a GPU and fp32 on a CPU.
        rounds: repetitions after one that is not counted; without a cache, once.
    """
    device = pick_device("auto", Launch(0, 0, 1))
    dtype = dtype or ("bf16" if device.type == "cuda" else "fp32")
    start_process_group(device, Launch(0, 0, 1))
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            shapes = parameter_shapes(model)
            write_folder(folder, model, shapes, lambda n: initialize.draw(n, cards(model)[n], 0), Ranks(), DTYPES[dtype])
            cached = {"ours": ours(folder, dtype, device, True), **hugging_face(folder, dtype, device)}
            uncached = {"ours without a cache": ours(folder, dtype, device, False)}
        columns = []
        for size in batch_sizes:
            prompts = draw_prompts(model, size, prompt_tokens)
            columns.append(measure(cached, prompts, new_tokens, rounds) | measure(uncached, prompts, new_tokens, 1))
    finally:
        dist.destroy_process_group()
    return table(columns, batch_sizes, f"tokens/s, {prompt_tokens} + {new_tokens} tokens, {dtype}", new_tokens)


def table(columns: list[dict[str, list[float]]], batch_sizes: tuple[int, ...], title: str, new_tokens: int) -> str:
    """Tokens per second, all rows together, and speed-ups; each the median of its rounds.

    Args:
        columns: for each batch size, seconds of every round by contender.
    """
    lines = [
        f"| {title} | " + " | ".join(f"batch {size}" for size in batch_sizes) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in columns[0]:
        medians = [statistics.median(column[name]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(f"{b * new_tokens / m:,.1f}" for b, m in zip(batch_sizes, medians)) + " |")
    for name in list(columns[0])[1:]:
        ratios = [statistics.median(t / o for t, o in zip(column[name], column["ours"])) for column in columns]
        lines.append(f"| speed-up over {name} | " + " | ".join(f"{ratio:.2f} x" for ratio in ratios) + " |")
    return "\n".join(lines)


Contender = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and a number of tokens -> the new tokens of each."""


def draw_prompts(model: Model, batch_size: int, length: int) -> list[list[int]]:
    """Random prompts of `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocab_size, (batch_size, length), generator=generator).tolist()


def ours(folder: Path, dtype: str, device: torch.device, use_cache: bool) -> Contender:
    """Our generator."""
    runner = Runner(load_model(folder, inference_mesh(1, 1, 1, device), dtype, device))
    generator = Generator(runner, NoText(runner.model.vocab_size), use_cache)

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        rows = generator.continue_tokens(prompts, limits=Limits(new_tokens, ignore_end=True))
        return [row.new_tokens for row in rows]

    return answer


def hugging_face(folder: Path, dtype: str, device: torch.device) -> dict[str, Contender]:
    """`transformers`' own generation, where it is installed."""
    try:
        import transformers
    except ImportError:
        return {}
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).to(device).eval()

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        inputs = torch.tensor(prompts, device=device)
        found = theirs.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return found[:, inputs.shape[1] :].tolist()

    return {f"transformers {transformers.__version__}": answer}


def measure(contenders: dict[str, Contender], prompts: list[list[int]], new_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in every round; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, answer in contenders.items():
            start = time.perf_counter()
            found = answer(prompts, new_tokens)  # lists: the device has finished
            if number:
                seconds[name].append(time.perf_counter() - start)
            assert all(len(tokens) == new_tokens for tokens in found), name
    return seconds
