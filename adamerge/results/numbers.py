"""Numbers as people read them: in tables, in figures and in messages."""

import math
from typing import Any


def number(value: Any) -> str:
    """Return a number in four digits; nothing for None, and what is no number as it is.

    >>> number(0.123456), number(None), number(12345.6), number(3)
    ('0.1235', '', '12,346', '3')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def decimal(value: float, digits: int, sign: str = "") -> str:
    """Return a number with so many decimals, and never a zero with a minus.

    >>> decimal(-0.0004, 2), decimal(-0.04, 1, "+"), decimal(1.25, 1, "+")
    ('0.00', '+0.0', '+1.2')
    """
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in percent, such as ``84.1``; nothing for None."""
    return "" if value is None else decimal(100 * value, digits)


def size(count: float | None) -> str:
    """Return a number of bytes with its unit; nothing for None."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Return a time with its unit.

    >>> duration(0.0213), duration(4.56), duration(75), duration(7300)
    ('21 ms', '4.6 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
