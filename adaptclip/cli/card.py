# SPDX-License-Identifier: Apache-2.0
"""`adaptclip card`: data cards listed, checked and begun."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from adaptclip.terminal import say


def list_names() -> int:
    """List the data cards by name."""
    from adaptclip.data.card import list_cards

    for name in list_cards():
        say(name)
    return 0


def check(
    card: str,
    /,
    *,
    data_root: Path | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
) -> int:
    """Check a data card and the images behind it: columns, classes, leaks between splits, unreadable images.

    Args:
        card: name in data_cards/, path of a card, or path of an image folder.
        data_root: folder that holds the card's files.
        on_bad_image: stop at the first unreadable image, or list what was skipped.
    """
    from adaptclip.data.card import load_card
    from adaptclip.data.scaffold import understood
    from adaptclip.data.sources import open_data

    data = open_data(load_card(card), data_root=data_root, on_bad_image=on_bad_image)
    counts = [
        sum(column) for column in zip(*(part.class_counts().tolist() for part in data.parts.values()), strict=True)
    ]
    words = understood(dict(zip(data.class_names, counts, strict=True))) if data.has_classes else "no classes"
    say(f"{data.card.name}: {words}")
    for part, split in data.parts.items():
        say(f"  {part:<11}{len(split):>8} images")
    for name in data.test.groups:
        values = sorted(set(data.test.groups[name]))
        counts = ", ".join(f"{v} {data.test.groups[name].count(v)}" for v in values)
        say(f"  test by {name}: {counts}")
    for row in data.skipped:
        say(f"  not used: {row}")
    if data.unused_columns:
        listed = ", ".join(f"{name} ({number:,} values)" for name, number in data.unused_columns.items())
        say(f"  columns that the card does not use: {listed}")
    for note in data.notes:
        say(f"  {'to worry about' if note in data.worries else 'note'}: {note}")
    for issue in data.card.known_issues:
        say(f"  known issue: {issue}")
    say("no problem found that the card does not allow")
    return 0


def new(folder: Path, /, *, out: Path = Path("card.md"), classes: Literal["auto", "folders"] = "auto") -> int:
    """Write a data card for a folder of images or a table of image paths, to be filled in.

    Args:
        folder: class folders, train/test folders of class folders, a folder with a CSV, TSV or JSONL table, or the
            table itself.
        out: the card to write; an existing file is never overwritten.
        classes: "folders" takes the folders for classes even where they look like splits or hold only folders.
    """
    from adaptclip.data.scaffold import new_card

    path = new_card(folder, out, classes=classes, say=lambda sentence: say(f"  {sentence}"))
    say(f"wrote {path}. Fill in what it asks for, then: adaptclip card check {path}")
    return 0
