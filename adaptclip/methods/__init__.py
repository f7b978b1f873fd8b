"""Adapters: what is put on a frozen CLIP to fit it to a domain, each behind the operations of `base.Adapter`."""

from __future__ import annotations

from typing import Any

from adaptclip.methods.base import Adapter
from adaptclip.methods.cache_model import TipAdapter
from adaptclip.methods.closed_form import GDA, SSText
from adaptclip.methods.cocoop import CoCoOp
from adaptclip.methods.contrastive import ContrastiveTuning
from adaptclip.methods.coop import CoOp
from adaptclip.methods.linear import LinearProbe
from adaptclip.methods.lora import LoRA
from adaptclip.methods.two_stage import TwoStage
from adaptclip.methods.zero_shot import ZeroShotClassifier

ADAPTERS: dict[str, type[Any]] = {
    "zero_shot": ZeroShotClassifier,
    "coop": CoOp,
    "cocoop": CoCoOp,
    "linear_probe": LinearProbe,
    "tip_adapter": TipAdapter,
    "gda": GDA,
    "ss_text": SSText,
    "lora": LoRA,
    "two_stage": TwoStage,
}
"""Method name -> adapter class; an artifact names its method by these."""

__all__ = [
    "ADAPTERS",
    "GDA",
    "Adapter",
    "CoCoOp",
    "CoOp",
    "ContrastiveTuning",
    "LinearProbe",
    "LoRA",
    "SSText",
    "TipAdapter",
    "TwoStage",
    "ZeroShotClassifier",
]
