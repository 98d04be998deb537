"""Numbers with their units, as people read them."""

import math

_BYTES = ("B", "KB", "MB", "GB", "TB")


def in_bytes(number: float) -> str:
    """A number of bytes, in powers of 1,000: `1.5 GB`."""
    size, unit = float(number), 0
    while size >= 999.5 and unit < len(_BYTES) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} {_BYTES[unit]}" if unit == 0 or size >= 99.5 else f"{size:.3g} {_BYTES[unit]}"


def unit_of_bytes(most: float) -> tuple[float, str]:
    """The unit in which sizes up to `most` are read best: its bytes, and its name."""
    place = min(len(_BYTES) - 1, max(0, int(math.log10(most) // 3))) if most >= 1 else 0
    return 1000.0**place, _BYTES[place]


def in_time(seconds: float) -> str:
    """A span of time: `12.3 s`, `4 min 5 s`, `2 h 3 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def percent(share: float) -> str:
    """A share in percent, to a tenth: `71.3 %`."""
    return f"{100 * share:.1f} %"


def in_short(number: float) -> str:
    """A large count, such as of parameters: `494 M`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
