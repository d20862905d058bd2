"""Writes time spans for people. Parsing them does not belong here."""


def duration(seconds: float) -> str:
    """Return a time span as text: seconds below 2 minutes, then minutes, then hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
