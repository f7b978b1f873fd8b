"""The one way from an encoded image to RGB pixels, for training, evaluation and serving alike, and its errors."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from PIL import Image

from adaptclip.data.read_image import DamagedImage, ImageProblem, read_image
from adaptclip.errors import DataError, ResourceError, shown

_OF_THE_FILE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip
"""What a file itself is to blame for; any other failure to read (a full table of open files, a disk, a network) is
none of its properties, so it must not make the image a bad one."""


def read_file(path: Path) -> bytes:
    """Returns a file's bytes.

    Raises:
        DataError: there is no such file, or it may not be read.
        ResourceError: the machine could not read it now.
    """
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # whoever opens a pipe waits for its writer, maybe for ever
            raise DataError(f"cannot read {shown(path)}: it is a pipe, no file")
        return path.read_bytes()
    except OSError as error:
        said = f"cannot read {shown(path)}: {error.strerror or error}"
        raise (DataError(said) if error.errno in _OF_THE_FILE else ResourceError(said)) from error
    except (MemoryError, ValueError) as error:
        kind = ResourceError if isinstance(error, MemoryError) else DataError  # ValueError: a name with a NUL
        raise kind(f"cannot read {shown(path)}: {str(error) or 'it does not fit into memory'}") from error


def decode_image(data: bytes | Path, *, row: str, window: tuple[float, float] | None = None) -> Image.Image:
    """Decodes one image to 8-bit RGB, upright, at its own size: `read_image`, with errors that name the row.

    Args:
        data: the encoded image, or the file that holds it.
        row: what to call the image in an error.
        window: (black, white) values for images of more than 8 bits; None refuses them.

    Returns:
        A loaded PIL image in mode RGB.

    Raises:
        DataError: the image is missing, empty, truncated, animated, too large, of an unknown kind, or has more than 8
            bits and no window.
        ResourceError: memory, open files or a decoder are missing here; the image may be fine.
    """
    try:
        return read_image(read_file(data) if isinstance(data, Path) else data, window)
    except (DataError, ResourceError) as error:
        raise type(error)(f"{row}: {error}") from error
    except ImageProblem as error:
        more = ". Fetch it again, or leave such images out with `--on-bad-image skip`."
        raise DataError(f"{row}: {error}{more if isinstance(error, DamagedImage) else ''}") from error
    except MemoryError as error:
        raise ResourceError(
            f"{row}: there is not enough memory to decode it; this says nothing against the image. Give the program "
            "more memory or fewer workers, or scale the image down."
        ) from error
    except (OSError, ImportError) as error:
        raise ResourceError(f"{row}: it cannot be decoded here: {error}") from error
