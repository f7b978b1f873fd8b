# SPDX-License-Identifier: Apache-2.0
"""`adaptclip export`: an artifact as something that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from adaptclip.settings import ExistingPath
from adaptclip.terminal import say


def export(
    artifact: ExistingPath,
    /,
    *,
    to: Literal["open_clip", "classifier", "onnx", "hf"],
    out: Path,
    images: ExistingPath | None = None,
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
        overwrite: replace an earlier export in that folder.
    """
    from adaptclip.artifact.export import export_artifact
    from adaptclip.data.image_files import find_images

    pictures = find_images([images])[0] if images else None
    found = export_artifact(
        artifact, to, out, pictures=pictures, licence=license, allow_failed_gates=allow_failed_gates,
        overwrite=overwrite, inputs=[images] if images else [],
    )  # fmt: skip
    say(str(found))
    say(f"wrote {out}; its README.md says how it is used")
    if to == "hf" and license is None:
        say("the model card names no licence: give --license, or fill it in before the upload")
    return 0
