"""How fast data is prepared, indexed, blended, read and resumed, in one run on this machine.

Text is the Python sources of this machine; the big corpus has real sizes over a sparse file, which reads as zeros.
"""

from __future__ import annotations

import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neox_native.data.blend import Blend
from neox_native.data.dataset import Reading, TokenDataset
from neox_native.data.indexed import HEADER, MAGIC, VERSION, IndexedDataset
from neox_native.data.loader import build_loader
from neox_native.data.order import ENDLESS
from neox_native.data.preparation.part import Recipe
from neox_native.data.preparation.prepare import prepare

TEXT_BYTES = 50_000_000
ROUNDS = 3
NEOX_MB_PER_SECOND = {1: 2.42, 2: 4.40}
"""GPT-NeoX's preprocess_data.py on 50 MB of jsonl with the 20B tokenizer, two cores of this kind, by workers."""
NUM_DOCUMENTS, TOKENS_PER_DOCUMENT = 1_000_000, 1000
SEQ_LENGTH, BATCH = 2048, 256
FAR_SAMPLE = 100_000_000
PILE_SETS, PILE_SAMPLES = 22, 150_000_000


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write_text(path: Path) -> None:
    """Python sources as jsonl, `TEXT_BYTES` of them."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    written = 0
    with path.open("w") as file:
        while written < TEXT_BYTES:
            for source in sources:
                written += file.write(json.dumps({"text": source.read_text(errors="replace")}) + "\n")
                if written >= TEXT_BYTES:
                    break


def write_big_corpus(prefix: Path) -> None:
    """A million documents with a billion tokens."""
    sizes = np.random.RandomState(0).geometric(1 / TOKENS_PER_DOCUMENT, NUM_DOCUMENTS).astype("<i4")
    ends = np.cumsum(sizes, dtype="<i8")
    with open(f"{prefix}.idx", "wb") as idx:
        idx.write(HEADER.pack(MAGIC, VERSION, 8, len(sizes), len(sizes) + 1))
        for part in (sizes, 2 * (ends - sizes), np.arange(len(sizes) + 1, dtype="<i8")):
            idx.write(part.tobytes())
    Path(f"{prefix}.bin").touch()
    os.truncate(f"{prefix}.bin", 2 * int(ends[-1]))


def open_big_corpus(prefix: Path, order: str, num_samples: int, kept_orders: str = "") -> TokenDataset:
    """The index of the whole corpus in an order."""
    files = IndexedDataset(prefix)
    reading = Reading("train", SEQ_LENGTH, 50277, 1234, order, "packed", kept_orders=kept_orders)
    return TokenDataset(files, range(len(files)), reading, num_samples)


def first_batch(dataset: TokenDataset, sample: int) -> object:
    """Resumes at a sample and takes one step."""
    return next(read(dataset, sample, 1))


def read(dataset: TokenDataset, sample: int, steps: int) -> object:
    """A loader of one process."""
    return build_loader(
        dataset,
        consumed_samples=sample,
        global_batch_size=BATCH,
        micro_batch_size=8,
        dp_rank=0,
        dp_size=1,
        stop_after_steps=steps,
    )


def preparation(folder: Path, tokenizer: str) -> list[tuple[str, str]]:
    """Rows on preparing text."""
    write_text(folder / "text.jsonl")
    recipe, source = Recipe(tokenizer=tokenizer, append_eod=True), [str(folder / "text.jsonl")]
    times: dict[int, list[float]] = {1: [], 2: []}
    for number in range(ROUNDS):
        for workers in times:
            start = time.perf_counter()
            report = prepare(source, folder / f"{workers}workers{number}", recipe, workers=workers, log=lambda _: None)
            times[workers].append(time.perf_counter() - start)
    rows = []
    for workers in times:
        seconds = statistics.median(times[workers])
        speed, neox = TEXT_BYTES / 1e6 / seconds, NEOX_MB_PER_SECOND[workers]
        plural = "" if workers == 1 else "s"
        name = f"prepare {TEXT_BYTES / 1e6:.0f} MB of jsonl, {Path(tokenizer).stem}, {workers} worker{plural}"
        figure = f"{speed:.1f} MB/s, {report.tokens / seconds / 1e6:.2f}M tokens/s ({speed / neox:.1f} x GPT-NeoX's)"
        rows.append((name, figure))
    return rows


def reading(folder: Path) -> list[tuple[str, str]]:
    """Rows on indexing, reading and resuming a big corpus."""
    big = folder / "big"
    write_big_corpus(big)
    made: list[TokenDataset] = []
    seconds = min(seconds_of(lambda: made.append(open_big_corpus(big, "neox", 400_000))) for _ in range(3))
    rows = [("index 1e6 documents / 1e9 tokens", f"{1000 * seconds:.0f} ms")]
    steps = 100
    list(read(made[0], 0, steps))
    seconds = min(seconds_of(lambda: list(read(made[0], 0, steps))) for _ in range(2))
    tokens = steps * BATCH * SEQ_LENGTH
    rows.append(("loader, one process, warm, hashes included", f"{tokens / seconds / 1e6:.0f}M tokens/s"))
    far = f"sample {FAR_SAMPLE:,}"
    epoch = seconds_of(lambda: first_batch(open_big_corpus(big, "epoch", ENDLESS), FAR_SAMPLE))
    rows.append((f"resume at {far}, order epoch: index and first batch", f"{epoch:.2f} s"))

    def neox() -> None:
        first_batch(open_big_corpus(big, "neox", FAR_SAMPLE + BATCH, str(folder / "orders")), FAR_SAMPLE)

    rows.append((f"first start of a run of {far.removeprefix('sample ')} samples, order neox", f"{seconds_of(neox):.0f} s"))
    rows.append((f"resume at {far}, order neox: index and first batch", f"{seconds_of(neox):.2f} s"))
    return rows


def blending() -> list[tuple[str, str]]:
    """The row on mixtures."""
    weights = np.random.RandomState(0).dirichlet(np.ones(PILE_SETS)).tolist()
    seconds = seconds_of(lambda: Blend(weights, PILE_SAMPLES))
    return [(f"blend {PILE_SETS} datasets, {PILE_SAMPLES / 1e6:.0f}M samples", f"{seconds:.1f} s")]


def run(tokenizer: str = "") -> str:
    """A Markdown table of all figures; `tokenizer` is the tokenizer.json to prepare with.

    Empty takes the path in the variable NEOX_20B_TOKENIZER, and without that the byte tokenizer.
    """
    tokenizer = tokenizer or os.environ.get("NEOX_20B_TOKENIZER") or "byte"
    with tempfile.TemporaryDirectory() as name:
        rows = [*preparation(Path(name), tokenizer), *reading(Path(name)), *blending()]
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)])
