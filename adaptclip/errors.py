# SPDX-License-Identifier: Apache-2.0
"""Every error adaptclip raises on purpose: what is wrong, what was got, what is allowed, how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class AdaptclipError(Exception):
    """Base of all deliberate errors; recipes and the command line print its message without a traceback."""


class ConfigError(AdaptclipError):
    """A flag, configuration file or combination of settings is not valid."""


class CardError(AdaptclipError):
    """A data card is missing or not valid."""


class DataError(AdaptclipError):
    """Images, labels or other columns are missing, unreadable or out of range."""


class ResourceError(AdaptclipError):
    """Memory, open files, a disk or a decoder gave out; the data may be fine, and another try may succeed."""


class SplitError(AdaptclipError):
    """A split leaks, lacks a class, or cannot be drawn as asked."""


class BackboneError(AdaptclipError):
    """A CLIP model cannot be found, loaded or used in this way."""


class TrainingError(AdaptclipError):
    """Training cannot start or go on (non-finite loss, occupied run folder, damaged checkpoint)."""


class StorageError(AdaptclipError):
    """A file cannot be written, or what was read is damaged."""


class GateError(AdaptclipError):
    """A gate is not valid for these predictions."""


class ArtifactError(AdaptclipError):
    """An artifact cannot be loaded, or may not be (failed gates, other backbone or templates)."""


class Stopped(KeyboardInterrupt):
    """A signal ended the program; no Exception, as Ctrl-C is none, so that nothing takes it for a failure.

    Attributes:
        signum: SIGINT or SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


def nearest(got: str, options: Iterable[str]) -> str | None:
    """Returns the option that an unknown name was probably meant to be, or None where none is alike."""
    by_lower = {name.lower(): name for name in options}
    near = difflib.get_close_matches(got.lower(), list(by_lower), n=1, cutoff=0.5)
    return by_lower[near[0]] if near else None


def did_you_mean(got: str, options: Iterable[str], *, limit: int = 20, lead: str = "Allowed") -> str:
    """Words the end of an error about an unknown name: the nearest name and what there is.

    Args:
        got: the unknown name.
        options: the names that there are.
        limit: how many names are listed before the list is cut.
        lead: what the list begins with: "Allowed" where names are fixed, "It has" and the like where they are found.

    Returns:
        For example `Did you mean "coop"? Allowed: coop, zero_shot.`
    """
    names = sorted(set(options))
    near = nearest(got, names)
    listed = ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
    return (f'Did you mean "{near}"? ' if near else "") + f"{lead}: {listed or 'none'}."


def agree(number: int, one: str, many: str) -> str:
    """Returns the word that goes with a number: `agree(n, "class has", "classes have")`."""
    return one if number == 1 else many


def listed(names: Sequence[str], what: str, most: int = 3) -> str:
    """Returns how many there are and the first of them, such as "10 classes (zero, one, two, …)"."""
    first = ", ".join(shown(name) for name in names[:most])
    return f"{len(names):,} {what} ({first}{', …' if len(names) > most else ''})" if names else f"no {what}"


def shown(text: object, *, keep: str = "") -> str:
    """Returns text that can be printed anywhere: control characters and bytes that are no UTF-8 as escapes.

    A file name may be any bytes on disk: one that was written in Latin-1 is shown with the number of its "é".
    """
    raw = str(text)
    if raw.isprintable():
        return raw
    return "".join(c if c.isprintable() or c in _HARMLESS or c in keep else _escaped(c) for c in raw)


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape").decode()


_HARMLESS = "\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
"""What names of some languages are written with, although Python counts it as not printable."""
