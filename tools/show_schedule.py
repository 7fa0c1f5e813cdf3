"""Draw the pipeline schedule of a config: rank x time, with its bubble and its peak of microbatches in flight.

    python tools/show_schedule.py --config configs/20b.toml --format text
    python tools/show_schedule.py --config configs/20b.toml --format svg > schedule.svg
    python tools/show_schedule.py --config configs/20b.toml --format svg --gpu H100 > to_scale.svg

With --gpu the times are those that the planner predicts on that device, stage by stage.
`--config FILE` is needed, and settings may follow, as --parallel.pp 4; `python train.py --help` lists them.
"""

from __future__ import annotations

import sys
from xml.sax.saxutils import escape

from neox_native.config.check import on_device, require
from neox_native.config.load import from_command_line
from neox_native.config.schema import Config
from neox_native.errors import report_user_errors
from neox_native.options import Parser, whole
from neox_native.parallel.timeline import Timeline, lay_out, order_of, timeline
from neox_native.plan.hardware import find_gpu
from neox_native.plan.speed import Machine, stage_passes
from neox_native.units import share_of_step

COLOURS = {"F": "#7aa6da", "B": "#8fc98b", "I": "#f0c674", "W": "#c397d8", "idle": "#eeeeee"}
FONT = 'font-family="sans-serif"'
NAMES = {"F": "forward", "B": "backward", "I": "input backward", "W": "weight backward", "idle": "idle"}


def text(drawn: Timeline, unit: float) -> str:
    """One line per rank, one cell per `unit` of time: kind and microbatch at the start of an action, then dots."""
    width = 1 + max(len(str(span.action.microbatch)) for spans in drawn.ranks for span in spans)
    lines = []
    for rank, spans in enumerate(drawn.ranks):
        cells = [" " * width] * round(drawn.duration / unit)
        for span in spans:
            start, end = round(span.start / unit), round(span.end / unit)
            cells[start] = f"{span.action.kind}{span.action.microbatch}".ljust(width)
            cells[start + 1 : end] = [".".ljust(width, ".")] * (end - start - 1)
        lines.append(f"rank {rank} |" + "|".join(cells) + "|")
    return "\n".join(lines)


def to_scale(config: Config, gpu: str, gpus_per_node: int, microbatches: int) -> tuple[Timeline, float]:
    """The schedule in predicted seconds, and a forward pass of the fastest stage."""
    parallel, stages = config.parallel, stage_passes(on_device(config, "cuda"), Machine(find_gpu(gpu), gpus_per_node))
    order = order_of(parallel.pipeline_schedule, parallel.pp, parallel.virtual_stages, microbatches)
    durations = [
        {"F": stage.forward, "B": stage.backward, "I": stage.backward / 2, "W": stage.backward / 2} for stage in stages
    ]
    drawn = lay_out(order, lambda action: durations[action.stage][action.kind])
    return drawn, min(stage.forward for stage in stages)


def svg(drawn: Timeline, caption: str, unit: str) -> str:
    """The same as a picture: colour by kind, microbatch numbers inside, later stages of a rank darker."""
    scale, height, left, top = 1000 / drawn.duration, 28, 60, 50
    width, bottom = left + 1010, top + height * len(drawn.ranks)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 40}" {FONT} font-size="11">',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="18" font-size="13">{escape(caption)}</text>',
    ]
    for number, (kind, colour) in enumerate(COLOURS.items()):
        x = left + number * 130
        parts.append(f'<rect x="{x}" y="28" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="38">{NAMES[kind]}</text>')
    for rank, spans in enumerate(drawn.ranks):
        y = top + rank * height
        parts.append(f'<text x="8" y="{y + 18}">rank {rank}</text>')
        parts.append(f'<rect x="{left}" y="{y + 2}" width="{1000}" height="{height - 4}" fill="{COLOURS["idle"]}"/>')
        turns = sorted({span.action.stage for span in spans})
        for span in spans:
            x, length = left + span.start * scale, (span.end - span.start) * scale
            shade = 1 - 0.35 * turns.index(span.action.stage) / max(len(turns) - 1, 1)
            title = f"stage {span.action.stage}, {NAMES[span.action.kind]} of microbatch {span.action.microbatch}"
            parts.append(
                f'<g><title>{title}</title><rect x="{x:.2f}" y="{y + 2}" width="{length:.2f}" height="{height - 4}" '
                f'fill="{COLOURS[span.action.kind]}" fill-opacity="{shade:.2f}" stroke="white" stroke-width="0.5"/>'
                + (
                    f'<text x="{x + length / 2:.2f}" y="{y + 18}" text-anchor="middle">{span.action.microbatch}</text>'
                    if length > 9
                    else ""
                )
                + "</g>"
            )
    parts.append(f'<text x="{left}" y="{bottom + 20}">{escape(unit)}</text></svg>')
    return "\n".join(parts)


def caption(config: Config, drawn: Timeline, microbatches: int) -> str:
    """What the picture shows, in one line."""
    parallel = config.parallel
    return (
        f"{parallel.pipeline_schedule}: pp {parallel.pp}, dp {parallel.dp}, {parallel.virtual_stages} stages per rank, "
        f"{microbatches} microbatches; bubble {share_of_step(drawn.bubble_fraction):.1%} of the step; peak microbatches "
        f"in flight by rank {[drawn.peak_in_flight(rank) for rank in range(parallel.pp)]}"
    )


def main(arguments: list[str]) -> None:
    """Print the drawing."""
    parser = Parser(description=__doc__)
    parser.add_argument("--format", choices=("text", "svg"), default="text", help="(default: text)")
    parser.add_argument("--gpu", metavar="NAME", help="draw to scale with the times predicted on this device, such as H100")
    parser.add_argument(
        "--gpus-per-node",
        type=whole(1),
        default=8,
        metavar="N",
        help="with --gpu: GPUs that fast links join (default: 8)",
    )
    options, rest = parser.parse_known_args(arguments)
    config = from_command_line(rest)
    # The number of microbatches depends on dp; where it is left open, the schedule of dp 1 is drawn.
    config = require(config, config.parallel.pp * config.parallel.tp * max(config.parallel.dp, 1))
    parallel = config.parallel
    microbatches = config.training.num_microbatches(parallel.dp)
    if options.gpu:
        drawn, unit = to_scale(config, options.gpu, options.gpus_per_node, microbatches)
        note = f"predicted on {options.gpu}: {drawn.duration * 1e3:,.0f} ms, the update left out"
    else:
        drawn = timeline(parallel.pipeline_schedule, parallel.pp, parallel.virtual_stages, microbatches)
        unit, note = 1 / parallel.virtual_stages, "time; a forward pass of a rank's layers is 1, a backward pass 2"
    if options.format == "svg":
        print(svg(drawn, caption(config, drawn, microbatches), note))
    else:
        print(text(drawn, unit))
        print(caption(config, drawn, microbatches) + (f"\n{note}" if options.gpu else ""))


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
