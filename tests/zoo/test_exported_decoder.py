# SPDX-License-Identifier: Apache-2.0
"""The decoder that an export carries reads and refuses every kind of the zoo as the model does."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from zoo import test_dicom, test_images

from adaptclip.artifact.export.decoding import DECODER_FILE, PARTS, load_decoder, write_decoder
from adaptclip.data.transforms import decode_image
from adaptclip.errors import DataError

HOW: list[dict[str, Any]] = [
    {"window": None, "frames": None},
    {"window": (0.0, 4095.0), "frames": "middle"},
    {"window": (9.0, 99.0), "frames": "all"},
]


def files() -> dict[str, bytes]:
    kinds = {**test_images.READ, **test_images.REFUSED, **test_images.STACKS, **test_dicom.READ, **test_dicom.REFUSED}
    return {name: row[0] for name, row in kinds.items() if "deflated" not in name}


def outcome(decode: Any, content: bytes, **how: Any) -> bytes | str:
    """The pixels, or why there are none."""
    try:
        return decode(content, **how).tobytes()
    except (DataError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_every_kind_is_decoded_alike(tmp_path, how):
    write_decoder(tmp_path, cast(Any, SimpleNamespace(manifest=how)))
    decoder = load_decoder(tmp_path)
    found = {
        kind: (outcome(decode_image, content, row="", **how), outcome(decoder, content))
        for kind, content in files().items()
    }
    for kind, (own, other) in found.items():
        assert type(own) is type(other), kind
        assert own == other if isinstance(own, bytes) else str(other) in own, kind
    assert len(files()) >= 120
    assert sum(isinstance(own, bytes) for own, _ in found.values()) >= 45


def test_it_names_nothing_of_the_package_and_nothing_twice(tmp_path):
    write_decoder(tmp_path, cast(Any, SimpleNamespace(manifest=HOW[1])))
    code = (tmp_path / DECODER_FILE).read_text()
    tree = ast.parse(code)
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    needed = {str(name).split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert needed == {"numpy", "PIL", "cv2", "pydicom", "pi_heif", "tifffile"}
    named = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    targets = [node.targets[0] if isinstance(node, ast.Assign) else node.target
               for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]  # fmt: skip
    named += [target.id for target in targets if isinstance(target, ast.Name)]
    assert [name for name, count in Counter(named).items() if count > 1] == []
    assert len(PARTS) == 4
