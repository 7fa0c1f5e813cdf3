"""Numbers for people: one unit for sizes everywhere, one meaning of a pipeline's bubble."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Bytes in binary units, three digits: "24.4 GiB", "513 MiB", "96 B"."""
    amount, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1000:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" or abs(amount) >= 100 else f"{amount:.3g} {unit}"


def count(number: float) -> str:
    """A number of parameters or tokens, three digits: "0.93M", "20.6B"."""
    for least, factor, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e5, 1e6, "M")):
        if number >= least:
            return f"{number / factor:.3g}{unit}"
    return f"{number:,.0f}"


def counted(number: int, thing: str) -> str:
    """A number of things: "1 rank", "8 ranks"."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def share_of_step(idle_over_compute: float) -> float:
    """A pipeline's idle time as a share of the step, from its ratio to the compute time, (p - 1) / m in the papers."""
    return idle_over_compute / (1 + idle_over_compute)
