# SPDX-License-Identifier: Apache-2.0
"""Methods: ways to fit a frozen CLIP to a domain, one file each, all behind the operations of `method.Method`.

A class is found by its name in the files of this folder and imported when it is first used, so that a method costs what
it needs and no more. `registry` has all of them by key, those of other packages too.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptclip.methods.cache_model import TipAdapter as TipAdapter
    from adaptclip.methods.closed_form import GDA as GDA
    from adaptclip.methods.closed_form import SSText as SSText
    from adaptclip.methods.cocoop import CoCoOp as CoCoOp
    from adaptclip.methods.contrastive import ContrastiveTuning as ContrastiveTuning
    from adaptclip.methods.coop import CoOp as CoOp
    from adaptclip.methods.linear import LinearProbe as LinearProbe
    from adaptclip.methods.lora import LoRA as LoRA
    from adaptclip.methods.method import Method as Method
    from adaptclip.methods.tower_tuning import TowerTuning as TowerTuning
    from adaptclip.methods.two_stage import TwoStage as TwoStage
    from adaptclip.methods.zero_shot import ZeroShotClassifier as ZeroShotClassifier


@cache
def class_homes() -> dict[str, str]:
    """Returns name -> module of the classes that are modules to train or use, without importing any."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for name, base in re.findall(r"^class ([A-Z]\w+)\(([\w.]+)\):", text, flags=re.M):
            found[name] = base, f"{__name__}.{path.stem}"

    def is_module(name: str) -> bool:
        return name in ("Method", "nn.Module") or (name in found and is_module(found[name][0]))

    return {name: home for name, (_, home) in found.items() if is_module(name)}


def __getattr__(name: str) -> Any:
    if name not in class_homes():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(class_homes()[name]), name)
