"""Adapters: what is put on a frozen CLIP to fit it to a domain, each behind the operations of `base.Adapter`."""

from __future__ import annotations

from typing import Any

from adaptclip.adapters.base import Adapter
from adaptclip.adapters.cache_model import TipAdapter
from adaptclip.adapters.closed_form import GDA, SSText
from adaptclip.adapters.cocoop import CoCoOp
from adaptclip.adapters.contrastive import ContrastiveTuning
from adaptclip.adapters.coop import CoOp
from adaptclip.adapters.linear import LinearProbe
from adaptclip.adapters.lora import LoRA
from adaptclip.adapters.two_stage import TwoStage
from adaptclip.adapters.zero_shot import ZeroShotClassifier

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
