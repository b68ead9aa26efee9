"""Numbers as people read them."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Bytes in decimal units: ``1_500_000`` → ``1.50 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{significant(count / scale, 3)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """``75.3`` → ``1 min 15 s``; below a minute in seconds."""
    if seconds >= 3600:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours} h {rest} min"
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{significant(seconds, 2 if seconds < 10 else 3)} s"


def significant(value: float, digits: int) -> str:
    """Decimal notation with that many significant digits (all digits before the point are kept)."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 12)}f}"


def percent(share: float) -> str:
    """``0.5`` → ``50 %``; one decimal where it says something."""
    text = f"{100 * share:.1f}"
    return f"{text.removesuffix('.0')} %"


def error(value: float) -> str:
    """A relative error: ``0.00123`` → ``1.2e-03``."""
    return "0" if value == 0 else f"{value:.1e}"
