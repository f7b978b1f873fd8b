"""Judging classes that an adapter has never seen, by their names: the second half of the base-to-new protocol."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from adaptclip.adapters.zero_shot import ZeroShotClassifier
from adaptclip.backbone import ClipBackbone
from adaptclip.data.base_new import harmonic_mean
from adaptclip.data.dataset import DomainData
from adaptclip.evaluation.intervals import wilson
from adaptclip.evaluation.predict import predict
from adaptclip.features import FeatureCache
from adaptclip.types import Predictions


def judge_new_classes(
    encoder: ClipBackbone,
    backbone: ClipBackbone,
    new: DomainData,
    base: Predictions,
    zero_shot: Predictions,
    *,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Compares an adapted model with the backbone on new classes, each set of classes judged among itself.

    Args:
        encoder: the adapted towers.
        backbone: the frozen model.
        new: the new classes (`base_and_new`); their test images are read.
        base: the adapted model's predictions on the base classes' test images.
        zero_shot: the backbone's on the same.
        accelerator: divides the encoding among its processes.

    Returns:
        "adapted" and "zero_shot", each with "base", "new" and "harmonic_mean" (rates from 0 to 1), "base_n", "new_n"
        and the 95 % Wilson interval "new_interval".
    """
    result = {}
    for name, model, judged in (("adapted", encoder, base), ("zero_shot", backbone, zero_shot)):
        features = FeatureCache(None).get(model, new.test, accelerator=accelerator)
        classifier = ZeroShotClassifier(model, new.prompt_names, new.card.templates).to(model.device)
        own = predict(classifier, features, new.test, accelerator=accelerator)
        right, count = int((own.pred == own.labels).sum()), len(own)
        accuracy = float((judged.pred == judged.labels).mean())
        result[name] = {
            "base": accuracy, "base_n": len(judged), "new": right / count, "new_n": count,
            "new_interval": list(wilson(right, count)), "harmonic_mean": harmonic_mean(accuracy, right / count),
        }  # fmt: skip
    return result
