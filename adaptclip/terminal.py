# SPDX-License-Identifier: Apache-2.0
"""The one place where text goes to a terminal or into a table for a spreadsheet.

Names of files and classes, words of cards and messages of other libraries come from strangers. On a terminal a control
character in them could hide or forge what is said; in a spreadsheet a cell that begins with `=` would be run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from copy import copy
from typing import TYPE_CHECKING, Any, TextIO

from adaptclip.errors import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TABLE_COLUMNS = 120
"""Width of tables where no terminal is, as in a file or a pipe, and COLUMNS names no other."""

_UNWRAPPED = 100_000
"""Columns of sentences where no terminal is: each stays on its line, so that it can be searched for."""


def say(text: str = "", *, to: TextIO | None = None, several_lines: bool = False) -> None:
    """Writes one line, without harmful characters, to standard output or `to`.

    Args:
        text: what is said.
        to: another stream.
        several_lines: line ends in the text stay, and the lines after the first are set in by two blanks, so that a
            line end in a name can never begin a line that looks like one of ours.
    """
    stream = to or sys.stdout
    said = shown(text, keep="\n" if several_lines else "")
    if several_lines:
        said = re.sub(r"\n(?!  |\n|$)", "\n  ", said)
    stream.write(encodable(said, stream) + "\n")


def json_line(value: Any) -> str:
    """Returns JSON on one line that reads back as it is, and in which every harmful character is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if shown(c) == c else json.dumps(c)[1:-1] for c in text)


def encodable(text: str, stream: Any) -> str:
    """Returns text with what the stream's encoding does not have as escapes, so that printing never ends a run."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def is_terminal(stream: Any) -> bool:
    """Says whether a stream is a terminal that can show a bar; some that batch systems make are 0 columns wide."""
    try:
        if not stream.isatty():
            return False
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):  # it says that it is one, and not how wide it is
        return True


def guard_messages() -> None:
    """Makes warnings of this process (`warnings` and `logging`) printable, as they name files and classes too."""
    own = warnings.formatwarning

    def format_warning(message: Any, category: Any, *place: Any, **more: Any) -> str:
        if category is UserWarning:  # where in the code it was noticed is nothing to its reader
            return f"warning: {shown(message)}\n"
        return shown(own(message, category, *place, **more), keep="\n")

    class Plain(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return shown(super().format(record), keep="" if record.exc_info is None else "\n")

    warnings.formatwarning = format_warning
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(Plain())


def console(file: TextIO | None = None) -> Console:
    """Returns a rich console: no markup is read from text.

    Where no terminal is, tables are as wide as COLUMNS says, or up to `TABLE_COLUMNS`, and no sentence is wrapped.
    """
    import rich.console
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

    class PlainConsole(rich.console.Console):
        """Shows no harmful character, whoever gives it: plain text is measured and rendered with escapes."""

        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(shown(text), **how)

        def render(self, renderable: Any, options: Any = None) -> Any:
            if isinstance(renderable, Text) and shown(renderable.plain, keep="\n\t") != renderable.plain:
                renderable = Text(shown(renderable.plain, keep="\n"), renderable.style)
            if isinstance(renderable, Table):
                if renderable.title:  # above the table, and not wrapped to its width
                    title = renderable.title
                    yield from self.render(title if isinstance(title, Text) else Text(str(title), "italic"), options)
                    renderable = copy(renderable)
                    renderable.title = None
                if not self.is_terminal:
                    options = (options or self.options).update(max_width=table_columns())
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(encodable(shown(segment.text, keep="\n"), self.file), segment.style)

    made = PlainConsole(file=file, markup=False, emoji=False, highlight=False)
    if not made.is_terminal:
        made = PlainConsole(file=file, markup=False, emoji=False, highlight=False, width=_UNWRAPPED)
    return made


def table_columns() -> int:
    """Returns how wide a table may be where no terminal is."""
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else TABLE_COLUMNS


def table(*heads: str, **how: Any) -> Table:
    """Returns a rich table in which what is too long for a column goes on in the next line.

    Rich would cut it at its end, and with it the number of an image.

    Args:
        *heads: of the columns.
        **how: of `rich.table.Table`.
    """
    import rich.table

    return rich.table.Table(*(rich.table.Column(head, overflow="fold") for head in heads), **how)


_RUN_BY_SPREADSHEETS = re.compile("'*[=+\\-@\t\r＝＋－＠]")

QUOTED = "^'('*[=+\\-@\t\r＝＋－＠])"
"""What `plain_cell` replaces by its group, as a regular expression for whole columns."""


def safe_cell(value: Any) -> Any:
    """Returns a cell for CSV that no spreadsheet runs: text that begins with = + - @, a tab or CR gets a ' before it.

    Numbers stay as they are, be they text or not. `plain_cell` undoes it exactly.
    """
    if not isinstance(value, str) or not _RUN_BY_SPREADSHEETS.match(value) or _is_number(value):
        return value
    return "'" + value


def plain_cell(value: Any) -> Any:
    """Returns what `safe_cell` was given."""
    return re.sub(QUOTED, r"\1", value) if isinstance(value, str) else value


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII) is not None
