# SPDX-License-Identifier: Apache-2.0
"""adaptclip: adapt a pretrained CLIP to a custom domain and judge, with statistics, whether it may be released.

The public names below are imported when they are first used, so that `import adaptclip` stays cheap.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

# albumentations asks the package index for updates when it is imported; a library must not do that unasked.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.2.0"

_HOMES = {
    "Judgement": "gates.judging",
    "Metric": "metrics",
    "GateRule": "gate_rules",
    "Variant": "methods.method",
    "Schedule": "methods.method",
    "AdaptclipError": "errors",
    "AdaptedModel": "artifact",
    "CaptionLoader": "data.captions",
    "FeatureCache": "features",
    "FeatureLoader": "training.steps",
    "Features": "types",
    "PixelLoader": "training.pixels",
    "Predictions": "predictions",
    "backward_and_step": "training.steps",
    "FeatureClip": "feature_clip",
    "clip_of": "clip",
    "wrap_clip": "clip",
    "build_mitigation": "training.mitigation",
    "build_optimizer": "training.optim",
    "build_report": "reports.full",
    "build_scheduler": "training.optim",
    "check_gates": "gates",
    "choose_gates": "artifact.finishing",
    "compare_groups": "reports.compare",
    "finish_run": "artifact.finishing",
    "full_report": "reports.full",
    "is_due": "training.steps",
    "judge": "gates.judging",
    "launch": "entrypoint",
    "load": "artifact",
    "load_backbone": "clip",
    "load_card": "data.card",
    "load_clip": "clip",
    "load_checkpoint": "training.checkpoint",
    "make_accelerator": "training.tracking",
    "nearest_words": "methods.prompt_reading",
    "open_data": "data.sources",
    "parse_objective": "training.criterion",
    "predict": "methods.predicting",
    "predict_validation": "artifact.finishing",
    "read_prompt": "methods.prompt_reading",
    "sample_few_shot": "data.shots",
    "save_artifact": "artifact",
    "save_model": "artifact",
    "DataSettings": "settings",
    "RunSettings": "settings",
    "refuse_settings": "settings",
    "Support": "training.support",
    "Training": "training.support",
    "train_by_steps": "training.support",
    "save_checkpoint": "training.checkpoint",
    "seed_everything": "seeding",
    "start_run": "training.tracking",
    "train_augment": "data.transforms",
    "train_steps": "training.steps",
    "training_crop": "features",
}

_RENAMED = {"predict_held_out": "predict_validation"}
"""Names of version 0.1 -> today's; they still work, with a warning."""

__all__ = [
    "GDA",
    "AdaptclipError",
    "AdaptedModel",
    "CaptionLoader",
    "ClipAdapter",
    "ClipSVD",
    "CoCoOp",
    "CoOp",
    "ContrastiveTuning",
    "CrossModal",
    "DataSettings",
    "FeatureCache",
    "FeatureClip",
    "FeatureLoader",
    "Features",
    "GateRule",
    "Judgement",
    "LinearProbe",
    "LoRA",
    "MaPLe",
    "Method",
    "Metric",
    "PixelLoader",
    "Predictions",
    "ProLIP",
    "PromptSRC",
    "RunSettings",
    "SSText",
    "Schedule",
    "Support",
    "TaskResidual",
    "TipAdapter",
    "TowerTuning",
    "Training",
    "TwoStage",
    "Variant",
    "WiseFT",
    "ZeroShotClassifier",
    "__version__",
    "backward_and_step",
    "build_mitigation",
    "build_optimizer",
    "build_report",
    "build_scheduler",
    "check_gates",
    "choose_gates",
    "clip_of",
    "compare_groups",
    "finish_run",
    "full_report",
    "is_due",
    "judge",
    "launch",
    "load",
    "load_backbone",
    "load_card",
    "load_checkpoint",
    "load_clip",
    "make_accelerator",
    "nearest_words",
    "open_data",
    "parse_objective",
    "predict",
    "predict_validation",
    "read_prompt",
    "refuse_settings",
    "sample_few_shot",
    "save_artifact",
    "save_checkpoint",
    "save_model",
    "seed_everything",
    "start_run",
    "train_augment",
    "train_by_steps",
    "train_steps",
    "training_crop",
    "wrap_clip",
]

if TYPE_CHECKING:
    from adaptclip.artifact import AdaptedModel, load, save_artifact, save_model
    from adaptclip.artifact.finishing import choose_gates, finish_run, predict_validation
    from adaptclip.clip import clip_of, load_backbone, load_clip, wrap_clip
    from adaptclip.data.captions import CaptionLoader
    from adaptclip.data.card import load_card
    from adaptclip.data.shots import sample_few_shot
    from adaptclip.data.sources import open_data
    from adaptclip.data.transforms import train_augment
    from adaptclip.entrypoint import launch
    from adaptclip.errors import AdaptclipError
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.features import FeatureCache, training_crop
    from adaptclip.gate_rules import GateRule
    from adaptclip.gates import check_gates
    from adaptclip.gates.judging import Judgement, judge
    from adaptclip.methods import (
        GDA,
        CoCoOp,
        ContrastiveTuning,
        CoOp,
        LinearProbe,
        LoRA,
        Method,
        SSText,
        TipAdapter,
        TowerTuning,
        TwoStage,
        ZeroShotClassifier,
    )
    from adaptclip.methods.clip_adapter import ClipAdapter
    from adaptclip.methods.clip_svd import ClipSVD
    from adaptclip.methods.cross_modal import CrossModal
    from adaptclip.methods.maple import MaPLe
    from adaptclip.methods.method import Schedule, Variant
    from adaptclip.methods.predicting import predict
    from adaptclip.methods.prolip import ProLIP
    from adaptclip.methods.prompt_reading import nearest_words, read_prompt
    from adaptclip.methods.prompt_src import PromptSRC
    from adaptclip.methods.task_residual import TaskResidual
    from adaptclip.methods.wise_ft import WiseFT
    from adaptclip.metrics import Metric
    from adaptclip.predictions import Predictions
    from adaptclip.reports.compare import compare_groups
    from adaptclip.reports.full import build_report, full_report
    from adaptclip.seeding import seed_everything
    from adaptclip.settings import DataSettings, RunSettings, refuse_settings
    from adaptclip.training.checkpoint import load_checkpoint, save_checkpoint
    from adaptclip.training.criterion import parse_objective
    from adaptclip.training.mitigation import build_mitigation
    from adaptclip.training.optim import build_optimizer, build_scheduler
    from adaptclip.training.pixels import PixelLoader
    from adaptclip.training.steps import FeatureLoader, backward_and_step, is_due, train_steps
    from adaptclip.training.support import Support, Training, train_by_steps
    from adaptclip.training.tracking import make_accelerator, start_run
    from adaptclip.types import Features


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module 'adaptclip' has no attribute {name!r}")
    if name in _RENAMED:
        warnings.warn(f"adaptclip.{name} is now adaptclip.{_RENAMED[name]}", FutureWarning, stacklevel=2)
        name = _RENAMED[name]
    # What is not named above is a method, or nothing.
    return getattr(importlib.import_module(f"adaptclip.{_HOMES.get(name, 'methods')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
