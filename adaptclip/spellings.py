"""Values that are spelt in several ways: "P003" and "p003 ", "3" and "3.0"."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable

_NUMBER = re.compile(r"([+-]?)0*(\d+)(?:[.,]0+)?")


def plain(text: str) -> str:
    """Returns what all spellings of a value share: no case, single blanks, whole numbers without zeros around them.

    Numbers stay texts, so that ids of twenty digits that differ in the last one differ here too; "1.10" is not "1.1".
    """
    text = " ".join(text.split()).casefold()
    number = _NUMBER.fullmatch(text)
    return text if number is None else number[1].replace("+", "") + number[2]


def several_spellings(values: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the values that are spelt in two or more ways, each as its sorted spellings."""
    return _several(values, plain)


def numbers_twice(values: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the whole numbers that are spelt in two or more ways, as `several_spellings` does."""
    return several_spellings(value for value in values if _NUMBER.fullmatch(value.strip()))


def blanks_apart(values: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the values that are one without outer blanks and in Unicode form NFC, each as its sorted spellings."""
    return _several(values, lambda value: unicodedata.normalize("NFC", value).strip())


def _several(values: Iterable[str], key: Callable[[str], str]) -> list[tuple[str, ...]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for value in values:
        found[key(value)].add(value)
    return sorted(tuple(sorted(spelt)) for spelt in found.values() if len(spelt) > 1)


def spelt(several: list[tuple[str, ...]], most: int = 3) -> str:
    """Words spellings for a message: 'P003' = 'p003', 'P004' = 'p004' and 2 more."""
    look_alike = any(len({unicodedata.normalize("NFC", text) for text in texts}) < len(texts) for texts in several)
    told = ", ".join(" = ".join(map(ascii if look_alike else repr, spellings)) for spellings in several[:most])
    return told + (f" and {len(several) - most} more" if len(several) > most else "")
