# SPDX-License-Identifier: Apache-2.0
"""Frames of video files, by PyAV: how many there are at a stride, and the one that is shown at a time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from adaptclip.data.read_values import MAX_FRAMES, DamagedImage, ImageProblem, check_size, needs

VIDEO_SUFFIXES = frozenset((
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv"),
    ".ogv",
))  # fmt: skip
"""Endings (lower case) of what counts as a video in a folder."""

_SIGNATURES: dict[str, Callable[[bytes], object]] = {
    "mov": lambda b: (
        (b[4:8] == b"ftyp" and b[8:11] not in {b"hei", b"hev", b"avi", b"mif"}) or b[4:8] in {b"moov", b"wide"}
    ),
    "matroska": lambda b: b.startswith(b"\x1aE\xdf\xa3"),
    "avi": lambda b: b[:4] == b"RIFF" and b[8:12] == b"AVI ",
    "mpeg": lambda b: b.startswith(b"\0\0\1\xba"),
    "mpegts": lambda b: re.match(rb"(?s)(....)?G.{187}", b) and b[188:189] in b"G",
    "asf": lambda b: b.startswith(b"0&\xb2u\x8ef\xcf\x11"),
    "flv": lambda b: b.startswith(b"FLV\1"),
    "ogg": lambda b: b.startswith(b"OggS"),
}
"""Name of FFmpeg's reader -> whether the first bytes look like its files. It is never left to guess, as it knows kinds
of lists that make it open other files and addresses."""


def video_kind(start: bytes) -> str:
    """Returns which reader's a file is by its first bytes (192 are enough); "" for no video."""
    return next((kind for kind, fits in _SIGNATURES.items() if fits(start)), "")


def frame_count(file: BinaryIO, every_seconds: float) -> int:
    """Returns how many frames a clip has at 0, s, 2 s, ... seconds, until its end.

    Raises:
        ImageProblem: it is no video, damaged, or has too many or too large frames.
        ImportError: PyAV is not installed.
    """
    with _stream(file) as (container, stream):
        if container.format.name.startswith("mpeg"):  # its duration is a guess from the length of the file
            length = _by_packets(container, stream)
        elif stream.duration is not None:
            length = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            length = container.duration / 1e6
        else:
            length = _by_packets(container, stream)
        count = max(1, int(np.ceil(round(length / every_seconds, 6))))
    if count > MAX_FRAMES:
        raise ImageProblem(
            f"a clip of {length:,.0f} seconds has {count:,} frames at one every {every_seconds:g} seconds, more than "
            f"{MAX_FRAMES:,}: raise `video: {{every_seconds: ...}}` in the card, or cut the clip"
        )
    return count


def _by_packets(container: Any, stream: Any) -> float:
    """Seconds from the first frame to the end of the last, from all packets without decoding them."""
    first, last = stream.start_time or 0, 0.0
    for packet in container.demux(stream):
        if packet.pts is not None:
            last = max(last, float((packet.pts - first + (packet.duration or 0)) * stream.time_base))
    return last


def frame_at(file: BinaryIO, seconds: float) -> Image.Image:
    """Returns the frame that is shown at a time of a clip, upright, as RGB.

    Raises:
        ImageProblem: it is no video, damaged, or ends before.
        ImportError: PyAV is not installed.
    """
    with _stream(file) as (container, stream):
        start = stream.start_time or 0
        at = start + round(seconds / stream.time_base)
        shown = None
        if seconds and not container.format.name.startswith("mpeg"):  # which is entered anywhere
            container.seek(at, stream=stream, backward=True)
            shown = _last_until(container, stream, at)
        if shown is None:  # some kinds of files are entered behind the time that is asked for
            container.seek(start, stream=stream, backward=True)
            shown = _last_until(container, stream, at)
        if shown is None:
            raise DamagedImage(f"the clip has no frame at {seconds:g} seconds")
        check_size(shown.width, shown.height)
        image = Image.fromarray(shown.to_ndarray(format="rgb24"))
        turn = round(getattr(shown, "rotation", 0) / 90) % 4  # counter-clockwise
        return image if not turn else image.transpose(Image.Transpose(turn + 1))


def _last_until(container: Any, stream: Any, at: int) -> Any:
    """The last frame that begins at `at` or before; None where the first one begins later."""
    shown = None
    for frame in container.decode(stream):
        if frame.pts is not None and frame.pts > at:
            break
        shown = frame
    return shown


@contextlib.contextmanager
def _stream(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """Opens the first video stream, and words what FFmpeg raises."""
    try:
        import av
    except ImportError as error:
        raise ImportError(needs("PyAV", "video", "a video")) from error
    start = file.read(192)
    file.seek(0)
    kind = video_kind(start)
    if not kind:
        raise ImageProblem(f"no video of a known kind (it starts with {start[:8]!r})")
    try:
        with av.open(file, format=kind, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ImageProblem("the file holds no pictures, only sound")
            stream = container.streams.video[0]
            stream.thread_count = 1
            context = stream.codec_context
            if context is None:
                raise ImageProblem("a video whose coding is not read")
            if context.width and context.height:
                check_size(context.width, context.height)
            yield container, stream
    except (ImageProblem, MemoryError):
        raise
    except Exception as error:  # FFmpeg raises whatever the damage leads to
        raise DamagedImage(f"the video is damaged or truncated ({type(error).__name__}: {error})") from error
