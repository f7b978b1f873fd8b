# SPDX-License-Identifier: Apache-2.0
"""`onnx`: image tower and head as one graph that needs neither torch nor open_clip."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

import adaptclip
from adaptclip.artifact.export.checking import Outputs, Reader
from adaptclip.artifact.export.decoding import frames_of, window_of, write_decoder
from adaptclip.artifact.export.stock import CHECK, CLASSES_FILE, ImageClassifier, head_of, merged_model, write_classes
from adaptclip.errors import ArtifactError, ConfigError
from adaptclip.files import read_json, write_json

if TYPE_CHECKING:
    from adaptclip.artifact import AdaptedModel

GRAPH_FILE, PREPROCESSING_FILE = "model.onnx", "preprocessing.json"

OPSET = 17
"""Old enough for every runtime of the last years, new enough for layer normalisation as one node."""

OUTPUTS = ("features", "logits", "probabilities")

_RESIZE = {
    "shortest": """\
short = min(image.size)
width, height = (side if n == short else int(side * n / short) for n in image.size)
image = image.resize((width, height), Image.Resampling.{filter})
left, top = round((width - side) / 2), round((height - side) / 2)
image = image.crop((left, top, left + side, top + side))
""",
    "squash": "image = image.resize((side, side), Image.Resampling.{filter})\n",
    "longest": """\
ratio = max(n / side for n in image.size)
image = image.resize(tuple(round(n / ratio) for n in image.size), Image.Resampling.{filter})
square = Image.new("RGB", (side, side), ({fill}, {fill}, {fill}))
square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
image = square
""",
}
"""Resize mode of the evaluation transform -> the same in Pillow, from `image` (RGB) to `side` x `side` pixels."""


_ONE, _SEVERAL = (
    """\
print(classes["class_names"][probabilities[0].argmax()])
""",
    """\
rows = zip(classes["class_names"], probabilities[0].tolist(), classes["thresholds"])
print([name for name, probability, threshold in rows if probability >= threshold])
""",
)
"""Last lines of the example: the most probable class, or all that are named by themselves."""


def example(folder: Path) -> str:
    """Returns how the graph is used with onnxruntime, Pillow and numpy alone, for the preprocessing of this export."""
    answer = _SEVERAL if "thresholds" in read_json(folder / CLASSES_FILE) else _ONE
    spec = read_json(folder / PREPROCESSING_FILE)
    resize = _RESIZE[spec["resize_mode"]].format(filter=_filter(spec), fill=spec["fill"])
    return f"""\
import hashlib, json, numpy as np, onnxruntime
from PIL import Image

folder = "."
{CHECK}from read_image import read_image  # the file beside this one
side, mean, std = {spec["size"]}, {spec["mean"]}, {spec["std"]}
image = read_image("image.jpg")
{resize}pixels = (np.asarray(image, np.float32) / 255 - np.float32(mean)) / np.float32(std)
session = onnxruntime.InferenceSession(f"{{folder}}/{GRAPH_FILE}", providers=["CPUExecutionProvider"])
probabilities = session.run(["probabilities"], {{"pixels": pixels.transpose(2, 0, 1)[None]}})[0]
classes = json.load(open(f"{{folder}}/classes.json", encoding="utf-8"))
{answer}"""


def _filter(spec: Mapping[str, Any]) -> str:
    # open_clip itself evaluates with the bicubic filter where "random" is written.
    return "BILINEAR" if spec["interpolation"] == "bilinear" else "BICUBIC"


def preprocess(picture: Image.Image, spec: Mapping[str, Any]) -> np.ndarray:
    """Turns an RGB image into (3, H, W) float32 pixels with Pillow and numpy alone, as open_clip's transform does.

    Args:
        picture: RGB, any size.
        spec: size, mean, std, interpolation, resize_mode and fill of preprocessing.json.
    """
    side, resample = spec["size"], Image.Resampling[_filter(spec)]
    if spec["resize_mode"] == "squash":
        picture = picture.resize((side, side), resample)
    elif spec["resize_mode"] == "longest":
        ratio = max(n / side for n in picture.size)
        small = picture.resize((round(picture.width / ratio), round(picture.height / ratio)), resample)
        picture = Image.new("RGB", (side, side), (spec["fill"],) * 3)
        picture.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    else:
        short = min(picture.size)
        width, height = (side if n == short else int(side * n / short) for n in picture.size)
        left, top = round((width - side) / 2), round((height - side) / 2)
        picture = picture.resize((width, height), resample).crop((left, top, left + side, top + side))
    pixels = (np.asarray(picture, np.float32) / 255 - np.float32(spec["mean"])) / np.float32(spec["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def write(folder: Path, model: AdaptedModel) -> None:
    """Writes model.onnx (`pixels` (B, 3, H, W) to features, logits, probabilities), its preprocessing and the names.

    Raises:
        ArtifactError: the method has no fixed head, or the tower cannot be written as a graph.
        ConfigError: onnx or onnxruntime is not installed.
    """
    require("onnxruntime")
    onnx: Any = require("onnx")
    side = model.backbone.image_size
    classifier = ImageClassifier(merged_model(model).visual, head_of(model))
    # Two images: what was traced with one could hold on to it.
    sample = torch.zeros(2, 3, side, side)
    dynamic = {name: {0: "batch"} for name in ("pixels", *OUTPUTS)}
    quiet = logging.getLogger("torch.onnx")
    level, fast = quiet.level, torch.backends.mha.get_fastpath_enabled()
    quiet.setLevel(logging.ERROR)
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation that ONNX does not have
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Traces on shapes that are the same for every image, and the age of the exporter. It takes a second
            # where the newer one takes half a minute, and every tower passes it; the comparison afterwards decides.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                classifier, (sample,), str(folder / GRAPH_FILE), dynamo=False, opset_version=OPSET,
                input_names=["pixels"], output_names=list(OUTPUTS), dynamic_axes=dynamic,
            )  # fmt: skip
    except Exception as error:  # the exporter raises whatever the first operation that it does not know leads to
        raise ArtifactError(
            f"the image tower of {model.backbone.name} cannot be written as an ONNX graph ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}); `--to classifier` needs no graph"
        ) from error
    finally:
        quiet.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(fast)
    spec = {
        **model.backbone.transform_spec,
        "layout": "float32 (batch, 3, height, width), RGB, 0 to 1 normalised",
        "window": window_of(model),
        "frames": frames_of(model),
    }
    graph = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    info = {"class_names": list(model.class_names), "preprocessing": spec, "adaptclip": adaptclip.__version__}
    if model.thresholds is not None:
        info |= {"objective": "sigmoid", "thresholds": model.thresholds.values.tolist()}
    for key, value in info.items():
        graph.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.save(graph, folder / GRAPH_FILE)
    write_json(folder / PREPROCESSING_FILE, spec)
    write_classes(folder, model)
    write_decoder(folder, model)


def require(package: str) -> Any:
    """Imports a package of the `onnx` extra. Raises ConfigError where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f'export to ONNX needs {package}, which is not installed: python -m pip install "adaptclip[onnx]"'
        ) from error


def read(folder: Path, *, threads: int = 0) -> Reader:
    """Loads the folder with onnxruntime on the CPU; images are made ready with Pillow and numpy.

    Args:
        folder: what `write` wrote.
        threads: of onnxruntime; 0 leaves them to it.
    """
    options = require("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads
    session = require("onnxruntime").InferenceSession(
        str(folder / GRAPH_FILE), options, providers=["CPUExecutionProvider"]
    )
    spec = read_json(folder / PREPROCESSING_FILE)

    def classify(pictures: Sequence[Image.Image]) -> Outputs:
        pixels = np.stack([preprocess(picture, spec) for picture in pictures])
        return Outputs(*(torch.from_numpy(value) for value in session.run(list(OUTPUTS), {"pixels": pixels})))

    return classify
