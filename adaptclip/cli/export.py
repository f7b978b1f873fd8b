"""`adaptclip export`: an artifact as something that other programs load."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from adaptclip.cli.images import find_images


def export(
    artifact: Path,
    /,
    *,
    to: Literal["open_clip", "classifier", "onnx", "hf"],
    out: Path,
    images: Path | None = None,
    license: str | None = None,
    allow_failed_gates: bool = False,
    overwrite: bool = False,
) -> int:
    """Write an artifact for use without adaptclip, checked against the adapter it comes from.

    Args:
        artifact: the artifact folder, or a run folder that holds one.
        to: open_clip (stock checkpoint, update merged), classifier (image tower and head), onnx, or hf (for upload).
        out: the new folder.
        images: an image or a folder of them to compare on; without, digits and noise that come with the package.
        license: identifier for the model card of hf, for example apache-2.0.
        allow_failed_gates: export a model although one of its gates failed.
        overwrite: replace an existing folder.
    """
    from adaptclip.data.decode import decode_image
    from adaptclip.export import export_artifact

    pictures = [decode_image(path, row=str(path)) for path in find_images([images])] if images else None
    found = export_artifact(
        artifact, to, out, pictures=pictures, licence=license, allow_failed_gates=allow_failed_gates,
        overwrite=overwrite,
    )  # fmt: skip
    sys.stdout.write(f"{found}\nwrote {out}; its README.md says how it is used\n")
    if to == "hf" and license is None:
        sys.stdout.write("the model card names no licence: give --license, or fill it in before the upload\n")
    return 0
