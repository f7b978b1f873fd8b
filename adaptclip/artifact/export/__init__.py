# SPDX-License-Identifier: Apache-2.0
"""Ways out of the toolkit: an artifact as a folder that other programs load, checked against its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from adaptclip.artifact import AdaptedModel, artifact_folder, load
from adaptclip.artifact.export import classifier, hub_folder, onnx_graph, stock
from adaptclip.artifact.export.checking import Difference, Reader, check_pictures, compare
from adaptclip.artifact.export.decoding import check_decoding, frames_of, window_of
from adaptclip.artifact.export.hub_folder import how_to_use, write_readme
from adaptclip.clip.loading import local_folders
from adaptclip.data.transforms import decode_image
from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.outputs import atomic_folder, check_folder
from adaptclip.seals import CHECK_FILE, describe_files, write_sealed

Kind = Literal["open_clip", "classifier", "onnx", "hf"]


@dataclass(frozen=True)
class Format:
    """One way out.

    Attributes:
        write: fills a folder.
        read: loads it again with stock libraries alone.
        tolerance: largest difference from the adapter of features, logits / scale and probabilities.
    """

    write: Callable[[Path, AdaptedModel], None]
    read: Callable[[Path], Reader]
    tolerance: float


FORMATS: dict[str, Format] = {
    "open_clip": Format(stock.write, stock.read, 1e-5),
    "classifier": Format(classifier.write, classifier.read, 1e-5),
    "onnx": Format(onnx_graph.write, onnx_graph.read, 1e-4),
    "hf": Format(hub_folder.write, hub_folder.read, 1e-5),
}
"""Name of a way out -> how it is written, read and judged. Floating point is not associative: hence no 0."""


def export_artifact(
    artifact: Path | str,
    to: Kind,
    out: Path | str,
    *,
    pictures: Sequence[Image.Image | Path] | None = None,
    licence: str | None = None,
    allow_failed_gates: bool = False,
    backbone: str | None = None,
    pretrained: str | None = None,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
) -> Difference:
    """Writes an artifact as a folder that needs no adaptclip, and keeps it only if it answers as the adapter does.

    Args:
        artifact: the artifact folder, or a run folder that holds one.
        to: `open_clip`, a stock checkpoint with the update merged (methods whose result is a CLIP); `classifier`,
            image tower and head as safetensors; `onnx`, the same as one graph; `hf`, for upload, with the model card.
        out: the new folder.
        pictures: RGB pictures, or image files, it is compared on; None takes digits, noise, and a picture of each
            kind that is read (modes, depths, encodings), which must be decoded alike in any case.
        licence: identifier for the model card's front matter (`hf`).
        allow_failed_gates: export although a gate failed.
        backbone: see `adaptclip.load`.
        pretrained: see `adaptclip.load`.
        overwrite: replace an earlier export.
        inputs: further files and folders that are read, which the export must keep clear of.

    Returns:
        The largest differences found.

    Raises:
        ArtifactError: the artifact cannot be loaded, its method cannot leave this way, or the export differs.
        BackboneError: open_clip could not build the backbone from a folder.
        ConfigError: an unknown way, no images, or a missing package.
        StorageError: the folder exists already, may not be replaced (see `adaptclip.outputs`), or cannot be written.
            Nothing is left half-written.
    """
    if to not in FORMATS:
        raise ConfigError(f"unknown export {to!r}. {did_you_mean(str(to), get_args(Kind))}")
    if pictures is not None and not len(pictures):
        raise ConfigError("an export is compared with the adapter on images, got none; give some, or leave them out")
    read = [*inputs, artifact_folder(artifact)]
    check_folder(Path(out), "export", overwrite=overwrite, inputs=read)
    model = load(artifact, backbone=backbone, pretrained=pretrained, allow_failed_gates=allow_failed_gates)
    read += local_folders(model.backbone.name)
    with atomic_folder(Path(out), "export", overwrite=overwrite, inputs=read) as folder:
        way = FORMATS[to]
        way.write(folder, model)
        kinds = check_decoding(folder, model)
        if pictures is None:
            shown = [*check_pictures(), *kinds.values()]
        else:
            how = {"window": window_of(model), "frames": frames_of(model)}
            shown = [p if isinstance(p, Image.Image) else decode_image(p, row=str(p), **how) for p in pictures]
        found = compare(model, way.read(folder), shown, tolerance=way.tolerance)
        use = how_to_use(folder, to, model)
        if to == "hf":
            hub_folder.write_card(folder, model, [*use, f"Checked when it was made: {found}."], licence)
        else:
            write_readme(folder, to, model, use, found)
        (folder / CHECK_FILE).unlink(missing_ok=True)  # of the weights alone
        info = {**vars(found), "tolerance": way.tolerance, "kinds_decoded_alike": list(kinds)}
        write_sealed(folder / CHECK_FILE, {**info, "files": describe_files(folder)})
    return found


__all__ = ["FORMATS", "Difference", "Format", "Kind", "export_artifact"]
