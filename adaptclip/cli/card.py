# SPDX-License-Identifier: Apache-2.0
"""`adaptclip card`: data cards listed, checked and begun."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from adaptclip.settings import ExistingPath
from adaptclip.terminal import is_terminal, say


def list_names() -> int:
    """List the data cards by name, each with what it is about and where its images come from."""
    from adaptclip.data.card import describe_card, list_cards

    names = list_cards()
    width = max(map(len, names), default=0)
    for name in names:
        say(f"{name:<{width}}  {describe_card(name)}")
    return 0


def check(
    card: str,
    /,
    *,
    data_root: ExistingPath | None = None,
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
    from adaptclip.gates import check_rules
    from adaptclip.gates.sample_size import too_few

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
    rules = data.card.gates if data.has_classes else ()
    check_rules(rules, data.test)
    for sentence in too_few(rules, data.test, data.card.outcomes):
        say(f"  to worry about: {sentence}")
    for issue in data.card.known_issues:
        say(f"  known issue: {issue}")
    say("no problem found that the card does not allow")
    return 0


def new(
    folder: ExistingPath,
    /,
    *,
    out: Path = Path("card.md"),
    image_column: str | None = None,
    label_column: str | None = None,
    cluster_column: str | None = None,
    group: tuple[str, ...] = (),
    shared: tuple[str, ...] = (),
    join: tuple[str, ...] = (),
    sheet: str | None = None,
    uncertain: Literal["negative", "positive", "ignore"] | None = None,
    blank: Literal["negative", "ignore"] | None = None,
    classes: Literal["auto", "folders", "nested"] = "auto",
    level: tuple[str, ...] = (),
) -> int:
    """Write a data card for a folder of images or a table of image paths, to be filled in.

    Args:
        folder: class folders, train/test folders of class folders, nested folders, a folder with a table (CSV, TSV,
            JSONL, Excel, Parquet), that table, or a folder of Parquet files.
        out: the card to write; an existing file is never overwritten.
        image_column: column of the images' paths, where its name does not say so.
        label_column: column of the classes.
        cluster_column: column of who or what must never be in two parts, such as patients.
        group: columns by whose values results are reported; numbers are put into bins.
        shared: columns whose values may be in several parts although they look like patients.
        join: second tables: FILE, FILE:COLUMN or FILE:COLUMN=ITS_COLUMN for the key.
        sheet: of an Excel file that has several.
        uncertain: what -1 stands for where each class has a column of 0 and 1; "ignore" is neither learnt nor judged.
        blank: what an empty cell stands for there.
        classes: "folders" takes the folders for classes even where they look like splits or hold only folders, "nested"
            the innermost folders, with those above as levels of a taxonomy.
        level: names of the folders above the innermost, coarse to fine.
    """
    from adaptclip.data.asking import Given
    from adaptclip.data.scaffold import new_card

    given = Given(
        image_column, label_column, cluster_column, group, level, shared, join, sheet, uncertain, blank, classes
    )
    ask = _ask if is_terminal(sys.stdin) and is_terminal(sys.stdout) else None
    path = new_card(folder, out, given=given, ask=ask, say=lambda sentence: say(f"  {sentence}"))
    say(f"wrote {path}. Fill in what it asks for, then: adaptclip card check {path}")
    return 0


def _ask(question: str, answers: Sequence[str]) -> str | None:
    """Asks on the terminal; None for an empty answer."""
    say(f"{question}.")
    for number, answer in enumerate(answers, 1):
        say(f"  {number}  {answer}")
    while True:
        sys.stdout.write(f"1 to {len(answers)}, or Enter to stop: ")
        sys.stdout.flush()
        text = sys.stdin.readline().strip()
        if not text:
            return None
        if text in answers or (text.isdecimal() and 1 <= int(text) <= len(answers)):
            return text if text in answers else answers[int(text) - 1]
