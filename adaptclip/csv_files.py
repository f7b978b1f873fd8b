"""How a CSV or TSV file is written: spreadsheets of many countries take semicolons and other encodings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adaptclip.errors import DataError, shown

_DELIMITERS = ",;\t|"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Dialect:
    """How a file is written.

    Attributes:
        encoding: for `open`; the byte order mark is dropped.
        before: lines before the header: blank ones, and Excel's `sep=;`.
        delimiter: what stands between cells.
        header: the text of the header's first line.
    """

    encoding: str
    before: int
    delimiter: str
    header: str


def encoding_of(path: Path) -> str:
    """Returns the encoding that a file's first bytes say: UTF-16 by its mark, else UTF-8.

    Raises:
        DataError: NUL bytes without a mark.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(512)
    marked = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    if not marked and b"\0" in start:
        raise DataError(f"{shown(path)} holds NUL bytes: it is damaged, or UTF-16 without its mark; save it as UTF-8")
    return "utf-16" if marked else "utf-8-sig"


def dialect_of(path: Path) -> Dialect:
    """Returns how a CSV or TSV file is written, after all its bytes were decoded once.

    Raises:
        DataError: it is neither UTF-8 nor UTF-16 with a mark.
        OSError: it cannot be read.
    """
    encoding = encoding_of(path)
    with path.open(encoding=encoding, newline="") as file:
        try:
            before, head, told = 0, file.readline(), None
            while head and (not head.strip() or (told is None and (told := _separator_line(head)))):
                before, head = before + 1, file.readline()
            while file.read(_BLOCK):
                pass
        except UnicodeDecodeError as error:
            raise DataError(not_utf_8(path, error)) from error
    bare = re.sub(r'"[^"]*"', "", head)
    return Dialect(encoding, before, told[1] if told else max(_DELIMITERS, key=bare.count), head)


def _separator_line(head: str) -> re.Match[str] | None:
    """Matches Excel's own first line, which is no header."""
    return re.fullmatch(r'"?sep=(.)"?', head.strip("\r\n "), re.I)


def not_utf_8(path: Path, error: UnicodeDecodeError) -> str:
    """Words what is wrong with a table in another encoding, and how to mend it."""
    return (
        f"{shown(path)} is not UTF-8 text (byte 0x{error.object[error.start]:02x}, {error.reason}); it may be "
        "Windows-1252 or Latin-1. Save it as UTF-8: in Excel as `CSV UTF-8`, elsewhere with "
        "`iconv -f WINDOWS-1252 -t UTF-8`"
    )
