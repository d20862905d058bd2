"""Reads and writes lists of shard numbers such as ``0-3,7``."""

import re
from collections.abc import Iterable

from census_tf_dagster.errors import UserError


def parse_shards(text: str) -> tuple[int, ...]:
    """Return the numbers in a text such as ``3,7-12``, ascending, each once.

    Raises
    ------
    UserError
        When a part is neither a number nor an ascending range.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        # A shard number has at most four digits. A longer range is a mistake, and would only cost memory.
        if first > last or last - first > 9999:
            raise UserError(f"--shards has {part!r}; expected numbers and ascending ranges such as 3,7-12. Correct it.")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the ranges of consecutive numbers, as (first, last)."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def compact(numbers: Iterable[int]) -> str:
    """Return numbers as text such as ``0-3,7``; an empty text when there are none."""
    return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in ranges(numbers))
