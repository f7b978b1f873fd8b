"""Judging classes that an adapter has never seen, by their names: the second half of the base-to-new protocol."""

from __future__ import annotations

from accelerate import Accelerator

from adaptclip.backbone import ClipBackbone
from adaptclip.data.dataset import DomainData
from adaptclip.evaluation.predict import predict
from adaptclip.features import FeatureCache
from adaptclip.methods.zero_shot import ZeroShotClassifier
from adaptclip.types import Predictions


def predict_new_classes(
    encoder: ClipBackbone, backbone: ClipBackbone, new: DomainData, *, accelerator: Accelerator | None = None
) -> tuple[Predictions, Predictions]:
    """Predicts the test images of new classes among the new classes, by their names alone.

    Args:
        encoder: the adapted towers.
        backbone: the frozen model.
        new: the new classes (`base_and_new`).
        accelerator: divides the encoding among its processes.

    Returns:
        The adapted model's predictions and the frozen one's, of the same images.
    """
    made = []
    for model in (encoder, backbone):
        features = FeatureCache(None).get(model, new.test, accelerator=accelerator)
        classifier = ZeroShotClassifier(model, new.prompt_names, new.card.templates).to(model.device)
        made.append(predict(classifier, features, new.test, accelerator=accelerator))
    return made[0], made[1]
