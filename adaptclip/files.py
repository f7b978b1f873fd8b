# SPDX-License-Identifier: Apache-2.0
"""Files written whole or not at all, one reader for YAML and JSON, the dialects of CSV, and digests."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from adaptclip.errors import DataError, StorageError, did_you_mean, nearest, shown

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

MAX_JSON_BYTES = 64 * 2**20
_LINES = "`key: value` lines"
MAX_YAML_BYTES = 4 * 2**20
MAX_DEPTH = 64
"""Lists and mappings in each other, in YAML and JSON."""

MAX_YAML_VALUES = 100_000
"""Keys, values, lists and mappings of a YAML text, those that aliases repeat counted as if they were written out."""


def digest(*parts: bytes | str | Iterable[str]) -> str:
    """Returns the SHA-256 of the parts as 64 hexadecimal digits; every piece is length-prefixed, so none can run on."""
    sha = hashlib.sha256()
    for part in parts:
        for piece in [part] if isinstance(part, bytes | str) else part:
            raw = piece.encode("utf-8", "surrogateescape") if isinstance(piece, str) else piece  # any file name
            sha.update(len(raw).to_bytes(8, "big") + raw)
    return sha.hexdigest()


def _replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary sibling, forces it to disk and moves it over `path`."""
    check_plain(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
        # Not mkstemp: the file should have the permissions that the user's umask gives it.
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary = name
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error}. Nothing was left half-written; free some space, or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_plain(path: Path) -> None:
    """Raises StorageError where no file may be written: at a link, a folder or a device."""
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError):
        return  # nothing is there, or writing will say what is wrong
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise StorageError(f"cannot write {path}: it is {what}, and only a plain file is replaced; choose another name")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` atomically. Raises StorageError when the folder is full or read-only."""
    _replace_file(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, content: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically; NaN and infinity become null, which JSON does have."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def jsonable(value: Any) -> Any:
    """Returns a value as it is read back from JSON, numbers that JSON does not have as null."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    elif hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a mapping as YAML in its own order, atomically."""
    write_text(path, yaml.safe_dump(jsonable(value), sort_keys=False, allow_unicode=True))


def read_text(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Reads a UTF-8 text file; a byte order mark is dropped.

    Raises:
        StorageError: the file is missing, no plain file, larger than `max_bytes`, or not UTF-8.
    """
    check_is_file(path, max_bytes=max_bytes)
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def check_is_file(path: Path, *, max_bytes: int | None = None) -> None:
    """Refuses what is no plain file before it is opened: whoever opens a pipe waits for its writer, maybe for ever.

    Raises:
        StorageError: the file is missing, is a folder, pipe or device, or is larger than `max_bytes`.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise StorageError(no_such_path(path)) from None
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        raise StorageError(f"cannot read {path}: it is {what}, no file")
    if max_bytes is not None:
        _check_length(status.st_size, max_bytes, str(path))


_MOST_BESIDE = 10_000


def no_such_path(path: Path | str) -> str:
    """Words that nothing is at a path: the nearest name beside it, and what is there.

    Args:
        path: where there is nothing. Where folders above it are missing too, the first of them is what is looked for.

    Returns:
        For example `there is no file or folder runs/cop. Did you mean "runs/coop"? In runs: coop, lora.`
    """
    asked = Path(path)
    missing, said = asked, f"there is no file or folder {asked}."
    while not os.path.lexists(missing.parent) and missing.parent != missing:
        missing = missing.parent
    if os.path.lexists(missing):  # a link to nothing
        return f"{said} {missing} is a link, and nothing is where it leads."
    if missing != asked:
        said = f"there is no file or folder {asked}, nor a folder {missing}."
    folder, where = missing.parent, "this folder" if missing.parent == Path() else str(missing.parent)
    try:
        with os.scandir(folder) as found:
            names = [e.name for e in itertools.islice(found, _MOST_BESIDE) if not e.name.startswith(".")]
    except OSError:
        return said
    if not names:
        return f"{said} {'This folder' if folder == Path() else folder} is empty."
    near = nearest(missing.name, names)
    hint = "" if near is None else f'Did you mean "{folder / near / asked.relative_to(missing)}"? '
    beside = did_you_mean("", names, limit=8, lead=f"In {where}")
    return f"{said} {hint}{beside}"


def _check_length(length: int, max_bytes: int, where: str) -> None:
    if length > max_bytes:
        raise StorageError(f"{where} is too large to be read: {length:,} bytes, allowed are {max_bytes:,}")


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        kind = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte 0x{raw[error.start]:02x} on line {line}"
        raise StorageError(f"{where} is not UTF-8 text ({kind}); save it as UTF-8") from error


def read_json(path: Path, *, nan: bool = False, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Reads a JSON file as `parse_json` does. Raises StorageError when it is missing or damaged too."""
    return parse_json(read_text(path, max_bytes=max_bytes), where=str(path), nan=nan, max_bytes=max_bytes)


def parse_json(text: str | bytes, *, where: str, nan: bool = False, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parses JSON from a file that may be anyone's.

    Args:
        text: text, or UTF-8 bytes.
        where: what is read, the subject of messages ("runs/a/run.json", "line 3 of images.jsonl").
        nan: NaN and infinities are meant here; they are no JSON and refused otherwise.
        max_bytes: the longest text that is read.

    Raises:
        StorageError: it is not JSON, too long, nested deeper than MAX_DEPTH, or has a key twice in one object; the
            message names the key and the line.
    """
    _check_length(len(text), max_bytes, where)
    text = (_decoded(text, where) if isinstance(text, bytes) else text).removeprefix("\ufeff")

    def constant(name: str) -> float:
        if nan:
            return float(name)
        raise StorageError(f"{where} holds {name}, which is no JSON; write null or a number")

    def number(digits: str) -> float:
        value = float(digits)
        return constant(digits) if math.isinf(value) else value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise StorageError(f"{where}: {_json_key_twice(text)}")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=number)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair could be written nowhere
    except json.JSONDecodeError as error:
        place = f"at line {error.lineno}, column {error.colno}"
        raise StorageError(f"cannot read {where}: it is not valid JSON {place}: {error.msg}") from error
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise StorageError(f"cannot read {where}: it is not valid JSON: {error}") from error
    level, depth = [value], 0
    while level := [item for held in level for item in _items(held) if isinstance(item, dict | list)]:
        depth += 1
        if depth >= MAX_DEPTH:
            raise _too_deep(where)
    return value


def _items(held: Any) -> Iterable[Any]:
    return held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()


def _too_deep(where: str) -> StorageError:
    return StorageError(f"{where} is nested too deeply: lists and mappings may lie in each other {MAX_DEPTH} times")


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(?P<key>\s*:)?|[{}]')


def _json_key_twice(text: str) -> str:
    """Words the first key that stands twice in one object of valid JSON, with its lines."""
    objects: list[dict[str, int]] = []
    for token in _JSON_TOKEN.finditer(text):
        if token[0] == "{":
            objects.append({})
        elif token[0] == "}":
            objects.pop()
        elif token["key"]:
            key, line = json.loads(token[0].removesuffix(token["key"])), text.count("\n", 0, token.start()) + 1
            if key in objects[-1]:
                return f"the key {key!r} is given twice, on line {objects[-1][key]} and on line {line}"
            objects[-1][key] = line
    return "a key is given twice"


def read_yaml(path: Path, *, shape: str = _LINES) -> dict[str, Any]:
    """Reads a YAML mapping as `parse_yaml` does. Raises StorageError when the file is missing or damaged too."""
    return parse_yaml(read_text(path, max_bytes=MAX_YAML_BYTES), where=str(path), shape=shape)


def parse_yaml(
    text: str | bytes, *, where: str, max_bytes: int = MAX_YAML_BYTES, shape: str = _LINES
) -> dict[str, Any]:
    """Parses a YAML mapping from a file that may be anyone's.

    Args:
        text: text, or UTF-8 bytes.
        where: what is read, the subject of messages.
        max_bytes: the longest text that is read.
        shape: what is said to belong there, where it is no mapping.

    Raises:
        StorageError: it is no YAML, no mapping, too long, nested deeper than MAX_DEPTH, has more than MAX_YAML_VALUES
            values, or has a key twice in one mapping (through `<<` too); the message names the key and the line.
    """
    _check_length(len(text), max_bytes, where)
    text = _decoded(text, where) if isinstance(text, bytes) else text
    try:
        _check_events(text, where)
        value = yaml.load(text, Loader=_YamlLoader)
    except yaml.MarkedYAMLError as error:
        if "nesting depth" in str(error.problem):  # libyaml's own limit, met before ours where it reads ahead
            raise _too_deep(where) from error
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        own = isinstance(error, yaml.constructor.ConstructorError)
        hint = "" if own else ". Text with a colon, bracket, star or quote needs quotes; indent with blanks, not tabs."
        raise StorageError(f"cannot read {where}: it is not valid YAML{place}: {error.problem}{hint}") from error
    except StorageError:
        raise
    except Exception as error:  # a value that does not fit its explicit tag fails in many ways inside PyYAML
        raise StorageError(f"cannot read {where}: it is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        got = "nothing" if value is None else type(value).__name__
        raise StorageError(f"{where} is no YAML mapping: it should be {shape}, got {got}")
    return value


def _check_events(text: str, where: str) -> None:
    """Refuses YAML that is nested too deeply or grows by its aliases, before anything is made of it."""
    sizes: dict[str, int] = {}  # anchor -> values below it
    open_ones: list[tuple[str | None, int]] = []  # anchor and where the count stood
    count = 0
    for event in yaml.parse(text, Loader=_YamlLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_ones]:
                raise StorageError(f"{where}: *{event.anchor} on line {event.start_mark.line + 1} holds itself")
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            sizes |= {anchor: count - before} if anchor else {}
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_ones.append((event.anchor, count - 1))
            elif event.anchor:
                sizes[event.anchor] = 1
        if len(open_ones) > MAX_DEPTH:
            raise _too_deep(where)
        if count > MAX_YAML_VALUES:
            raise StorageError(
                f"{where} holds more than {MAX_YAML_VALUES:,} values by line {event.start_mark.line + 1}, counting "
                "what its aliases (*name) repeat"
            )


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _YamlLoader(_SafeLoader):
    """SafeLoader, in C where there is one, that refuses a key given twice, which YAML parsers else drop silently."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        self._refuse_twice(node)
        super().flatten_mapping(node)
        self._refuse_twice(node)

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            plain = key_node.tag in ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
            key = key_node.value if plain else self.construct_object(key_node, deep=True)
            problem = None
            if not isinstance(key, Hashable):
                problem = f"a key must be text or a number, got a {type(key).__name__}"
            elif plain and key == "<<" and not isinstance(value_node, yaml.MappingNode):
                problem = "`<<` takes one mapping"  # which of several wins, releases of PyYAML disagree
            elif key in lines:
                problem = f"the key {key!r} is given twice (first on line {lines[key]})"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            lines[key] = key_node.start_mark.line + 1


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, atomically."""
    from safetensors.torch import save

    # Saved here and not by save_file, so that a full disk leaves only the temporary file, which is removed.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, dict(metadata) if metadata else None))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads safetensors. Raises StorageError when the file is missing, truncated or not safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_is_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}. It is missing or damaged.") from error


def write_parquet(path: Path, table: pa.Table, metadata: Mapping[str, Any]) -> None:
    """Writes an Arrow table as Parquet, its pages with checksums and `metadata` as JSON with a digest, atomically."""
    import pyarrow as pa
    from pyarrow import parquet

    def write(temporary: Path) -> None:
        try:
            parquet.write_table(whole, temporary, write_page_checksum=True)
        except pa.ArrowException as error:
            raise OSError(str(error)) from error

    packed = json.dumps(jsonable(metadata), ensure_ascii=False).encode()
    whole = table.replace_schema_metadata({b"adaptclip": packed, b"adaptclip_sha256": digest(packed).encode()})
    _replace_file(path, write)


def read_parquet(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Reads a Parquet file and the metadata of `write_parquet` ({} when it has none), and checks what has checksums.

    Raises:
        StorageError: the file is missing or damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    check_is_file(path)
    try:
        table = parquet.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    known = table.schema.metadata or {}
    packed, stated = known.get(b"adaptclip", b"{}"), known.get(b"adaptclip_sha256")
    if stated is not None and stated.decode(errors="replace") != digest(packed):
        raise StorageError(f"cannot read {path}: what it says of its columns was changed after it was written")
    metadata = parse_json(packed, where=f"the metadata of {path}")
    if not isinstance(metadata, dict):
        raise StorageError(f"the metadata of {path} should be a mapping, got {type(metadata).__name__}")
    return table, metadata


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
            before, head, info = 0, file.readline(), None
            while head and (not head.strip() or (info is None and (info := _separator_line(head)))):
                before, head = before + 1, file.readline()
            while file.read(_BLOCK):
                pass
        except UnicodeDecodeError as error:
            raise DataError(not_utf_8(path, error)) from error
    bare = re.sub(r'"[^"]*"', "", head)
    return Dialect(encoding, before, info[1] if info else max(_DELIMITERS, key=bare.count), head)


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
