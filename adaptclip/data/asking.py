# SPDX-License-Identifier: Apache-2.0
"""What `adaptclip card new` is told beside the data, and what it asks: on a terminal one by one, else all at once."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from adaptclip.errors import CardError


@dataclass(frozen=True)
class Given:
    """What the flags say, and what was answered.

    Attributes:
        image_column: column of the images' paths, or of the encoded images.
        label_column: column of the classes.
        cluster_column: column of who or what must never be in two parts.
        group: columns by whose values results are reported.
        level: names of the folders above the class folders, coarse to fine.
        shared: columns whose values may be in several parts.
        join: second tables, as FILE, FILE:COLUMN or FILE:COLUMN=ITS_COLUMN.
        sheet: of an Excel file that has several.
        uncertain: what -1 stands for in a column of 0 and 1 for each class: "negative", "positive" or "ignore".
        blank: what an empty cell stands for there: "negative" or "ignore".
        classes: how folders are taken: "auto", "folders" (those at the top), "nested" (the innermost).
    """

    image_column: str | None = None
    label_column: str | None = None
    cluster_column: str | None = None
    group: tuple[str, ...] = ()
    level: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    join: tuple[str, ...] = ()
    sheet: str | None = None
    uncertain: str | None = None
    blank: str | None = None
    classes: str = "auto"

    def with_answer(self, flag: str, value: str) -> Given:
        """Returns this with one flag more."""
        name = flag.removeprefix("--").replace("-", "_")
        old = getattr(self, name)
        if flag == "--join":  # the same table, now with its key
            old = tuple(one for one in old if not value.startswith(f"{one}:"))
        return replace(self, **{name: (*old, value) if isinstance(old, tuple) else value})

    def command(self) -> list[str]:
        """The flags as they are typed."""
        words: list[str] = []
        for one in fields(self):
            value = getattr(self, one.name)
            if value and value != one.default:
                words += [f"--{one.name.replace('_', '-')}", *([value] if isinstance(value, str) else value)]
        return words


@dataclass(frozen=True)
class Question:
    """Something that cannot be guessed.

    Attributes:
        words: what is unclear, a sentence without its full stop.
        choices: flag -> values that it may get.
        guess: flag and value of the likeliest answer, for the command line that is shown.
    """

    words: str
    choices: dict[str, tuple[str, ...]]
    guess: tuple[str, str]


Ask = Callable[[str, Sequence[str]], "str | None"]
"""Asks a person: question, and answers to choose from -> the answer; None for none."""


class Unclear(CardError):  # noqa: N818 - what it says is a question
    """Questions whose answers decide what a card says.

    Attributes:
        questions: all of them.
    """

    def __init__(self, questions: Sequence[Question], message: str = "") -> None:
        super().__init__(message or ". ".join(question.words for question in questions))
        self.questions = tuple(questions)

    def with_command(self, given: Given, folder: Path, out: Path) -> Unclear:
        """Returns the same with the command line to type."""
        for question in self.questions:
            given = given.with_answer(*question.guess)
        line = shlex.join(["adaptclip", "card", "new", str(folder), "--out", str(out), *given.command()])
        own = "; ".join(f"{q.words} ({_flags(q)})" for q in self.questions)
        return Unclear(self.questions, f"{own}. Correct what is wrong in this, and type: {line}")


def _flags(question: Question) -> str:
    return " or ".join(question.choices)


def answered(given: Given, unclear: Unclear, ask: Ask) -> Given:
    """Returns what was given with the answers of a person. Raises the error where one is not answered."""
    for question in unclear.questions:
        answers = {
            (value if len(question.choices) == 1 else f"{flag} {value}"): (flag, value)
            for flag, values in question.choices.items()
            for value in values
        }
        answer = ask(question.words, list(answers))
        if answer is None:
            raise unclear
        given = given.with_answer(*answers[answer])
    return given
