"""Adapters: what is put on a frozen CLIP to fit it to a domain, each behind the operations of `base.Adapter`."""

from __future__ import annotations

from typing import Any

from adaptclip.adapters.base import Adapter
from adaptclip.adapters.coop import CoOp
from adaptclip.adapters.zero_shot import ZeroShotClassifier

ADAPTERS: dict[str, type[Any]] = {"zero_shot": ZeroShotClassifier, "coop": CoOp}
"""Method name -> adapter class; an artifact names its method by these."""

__all__ = ["ADAPTERS", "Adapter", "CoOp", "ZeroShotClassifier"]
