"""Prepares text for training, or joins prepared files.

    python tools/prepare_data.py --input "pile/*.jsonl.zst" --tokenizer 20B_tokenizer.json --append-eod --workers 16 \\
        --output data/pile
    python tools/prepare_data.py --input dolly.jsonl --prompt "### Instruction: {instruction}\\n### Response: " \\
        --response-key response --tokenizer 20B_tokenizer.json --append-eod --output data/dolly
    python tools/prepare_data.py --merge data/a data/b --output data/ab

Writes OUTPUT.idx and OUTPUT.bin, OUTPUT.about.json, which names the tokenizer, so that training, evaluation and --merge can
check it, and with --prompt also OUTPUT_labels.idx and .bin. A killed preparation goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from neox_native.data.indexed import SUFFIX
from neox_native.data.preparation import documents
from neox_native.data.preparation.part import Recipe, Report
from neox_native.data.preparation.prepare import merge, prepare
from neox_native.errors import UserError, named_as, report_user_errors
from neox_native.options import Parser, number, number_above, whole
from neox_native.units import counted


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = Parser(description=__doc__)
    source = options.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="files, folders or globs: .jsonl (a document a line), others"
    )
    source.add_argument("--merge", nargs="+", metavar="PREFIX", help="prepared files to join, in this order")
    options.add_argument("--output", required=True, metavar="PREFIX", help="where to write, without .idx or .bin")
    options.add_argument(
        "--tokenizer",
        default="byte",
        metavar="NAME",
        help='"byte", the path of a tokenizer.json, or "tiktoken:gpt2" (default: byte)',
    )
    options.add_argument(
        "--key", default="text", metavar="KEY", help="key of a .jsonl line that holds the document (default: text)"
    )
    options.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    options.add_argument("--allow-special", action="store_true", help="let texts that spell special tokens have their ids")
    options.add_argument(
        "--prompt",
        default="",
        metavar="TEMPLATE",
        help="text before the response, with keys of the line in braces; the model does not learn to predict it "
        "(default: none, documents are plain text)",
    )
    options.add_argument(
        "--response-key", default="response", metavar="KEY", help="with --prompt: key of the response (default: response)"
    )
    options.add_argument(
        "--max-line-mb",
        type=number_above(0),
        metavar="MB",
        default=documents.LONGEST_LINE_BYTES / 1e6,
        help="a longer .jsonl line is faulty [MB] (default: %(default)g)",
    )
    options.add_argument(
        "--workers", type=whole(1), default=1, metavar="N", help="processes (default: 1); the result is the same for any"
    )
    options.add_argument(
        "--max-bad",
        type=number(0, most=1),
        default=0.001,
        metavar="SHARE",
        help="share of faulty lines that is let pass, 0 to 1 (default: 0.001)",
    )
    return options


def summary(report: Report, seconds: float) -> str:
    """What was read and written, in lines."""
    per_token = report.text_bytes / max(1, report.tokens)
    lines = [
        f"{counted(report.documents, 'document')}, {report.tokens:,} tokens, {per_token:.3f} bytes per token, {seconds:.1f} s",
        *report.dropped(),
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Runs one command."""
    options = parser().parse_args(arguments)
    output = Path(options.output)
    if not output.name or options.output.endswith("/") or output.is_dir():
        raise UserError(
            f"--output {options.output!r} is a folder; give the common prefix of the files, such as {output / 'text'}."
        )
    if options.merge:
        tokens = merge([Path(prefix) for prefix in options.merge], output)
        told = "" if Path(f"{output}{SUFFIX}").exists() else "; not each of them tells its tokenizer, so the result does not"
        print(f"{output}: {tokens:,} tokens of {len(options.merge)} files{told}")
        return
    recipe = Recipe(
        tokenizer=options.tokenizer,
        text_key=options.key,
        append_eod=options.append_eod,
        allow_special=options.allow_special,
        prompt=options.prompt.replace("\\n", "\n"),
        response_key=options.response_key,
        max_line_bytes=max(1, int(options.max_line_mb * 1e6)),
    )
    start = time.monotonic()
    with named_as("data.tokenizer", "--tokenizer"):
        report = prepare(options.input, output, recipe, workers=options.workers, max_bad_share=options.max_bad)
    print(summary(report, time.monotonic() - start))


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
