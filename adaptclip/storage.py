"""Files and folders written whole or not at all, and digests of what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import yaml
from torch import Tensor

from adaptclip.errors import StorageError


def digest(*parts: bytes | str | Iterable[str]) -> str:
    """Returns the SHA-256 of the parts as 64 hexadecimal digits; every piece is length-prefixed, so none can run on."""
    sha = hashlib.sha256()
    for part in parts:
        for piece in [part] if isinstance(part, bytes | str) else part:
            raw = piece.encode() if isinstance(piece, str) else piece
            sha.update(len(raw).to_bytes(8, "big") + raw)
    return sha.hexdigest()


def _replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary sibling, forces it to disk and moves it over `path`."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, pa.ArrowException, safetensors.SafetensorError) as error:
        raise StorageError(
            f"cannot write {path}: {error}. Nothing was left half-written; free some space, or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` atomically. Raises StorageError when the folder is full or read-only."""
    _replace_file(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, content: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically; NaN and infinity become null, which JSON does have."""
    write_text(path, json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    elif hasattr(value, "tolist"):
        return _jsonable(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises StorageError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a mapping as YAML in its own order, atomically."""
    write_text(path, yaml.safe_dump(_jsonable(value), sort_keys=False, allow_unicode=True))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping. Raises StorageError when the file is missing, damaged or holds something else."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} should hold a YAML mapping (name: value lines), got {type(value).__name__}")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, atomically."""
    # Saved here and not by save_file, so that a full disk leaves only the temporary file, which is removed.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(whole, dict(metadata) if metadata else None))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads safetensors. Raises StorageError when the file is missing, truncated or not safetensors."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}. It is missing or damaged.") from error


def write_parquet(path: Path, table: pa.Table, metadata: Mapping[str, Any]) -> None:
    """Writes an Arrow table as Parquet with `metadata` as JSON under the key "adaptclip", atomically."""
    packed = {b"adaptclip": json.dumps(_jsonable(metadata), ensure_ascii=False).encode()}
    _replace_file(path, lambda temporary: pq.write_table(table.replace_schema_metadata(packed), temporary))


def read_parquet(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Reads a Parquet file and the metadata of `write_parquet` ({} when it has none).

    Raises:
        StorageError: the file is missing or damaged.
    """
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    return table, json.loads((table.schema.metadata or {}).get(b"adaptclip", b"{}"))


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes `path` when the block ends without an error.

    Raises:
        StorageError: `path` exists and `overwrite` is false, or the folder cannot be written.
    """
    if path.exists() and not overwrite:
        raise StorageError(f"{path} exists already; choose another folder or overwrite it on purpose")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            # Two renames instead of a removal: a kill in between leaves the old folder whole beside it.
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
