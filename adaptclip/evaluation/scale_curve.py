"""What turning a trained adapter up or down does: accuracy, worst group, new classes and calibration at each scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator

from adaptclip.data.base_new import harmonic_mean
from adaptclip.data.dataset import ImageDataset
from adaptclip.errors import ConfigError
from adaptclip.evaluation.measuring import judged as judged_images
from adaptclip.evaluation.predict import predict
from adaptclip.features import FeatureCache
from adaptclip.methods.lora_layers import check_scale
from adaptclip.metrics.calibration import ece
from adaptclip.prompts import zero_shot_weights
from adaptclip.types import Predictions

SCALES = tuple(i / 10 for i in range(11))


def scale_curve(
    adapter: Any,
    validation: ImageDataset,
    new: tuple[ImageDataset, Sequence[str]] | None = None,
    *,
    scales: Sequence[float] = SCALES,
    accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """Judges an adapter on validation images at several scales; its own scale is the same afterwards.

    Args:
        adapter: LoRA, or another adapter with `scale`, `set_scale`, `encoder` and `templates`.
        validation: images of the classes it was trained on.
        new: images of classes it was not trained on, judged among themselves by their names, and these names; or None.
        scales: from 0 (zero-shot) to 1 (as trained).
        accelerator: divides the encoding among its processes.

    Returns:
        Per scale: "scale", "n", "accuracy", "ece", "worst_group" (lowest accuracy of a group of any attribute with its
        "worst_group_name" and "worst_group_n"; None without groups), "new_accuracy" and "new_n" (None without new
        classes). Rates from 0 to 1.

    Raises:
        ConfigError: there are no validation images.
    """
    if not len(validation):
        raise ConfigError("the scale is chosen on validation images, and there are none; give it as a number instead")
    before, rows = adapter.scale, []
    try:
        for scale in scales:
            adapter.set_scale(scale)
            encoder = adapter.encoder
            features = FeatureCache(None).get(encoder, validation, accelerator=accelerator)
            judged = predict(adapter, features, validation, accelerator=accelerator)
            row: dict[str, Any] = {"scale": float(scale), "n": len(judged)}
            row["accuracy"] = float((judged.pred == judged.labels).mean())
            row["ece"] = ece(judged_images(judged)).value
            row |= _worst_group(judged)
            row |= {"new_accuracy": None, "new_n": 0}
            if new is not None and len(new[0]):
                values = FeatureCache(None).get(encoder, new[0], accelerator=accelerator).values[0]
                weights = zero_shot_weights(encoder, new[1], adapter.templates).cpu()
                pred = (values @ weights.T).argmax(dim=1).numpy()
                row |= {"new_accuracy": float((pred == new[0].labels).mean()), "new_n": len(pred)}
            rows.append(row)
    finally:
        adapter.set_scale(before)
    return rows


def best_scale(curve: Sequence[dict[str, Any]]) -> float:
    """Returns the scale of the highest accuracy on validation; of equal ones the smallest, nearest to zero-shot.

    Where new classes were judged, it is the harmonic mean of both accuracies that counts.
    """

    def value(row: dict[str, Any]) -> float:
        base, new = row["accuracy"], row["new_accuracy"]
        return base if new is None else harmonic_mean(base, new)

    return max(curve, key=lambda row: (value(row), -row["scale"]))["scale"]


def _worst_group(judged: Predictions) -> dict[str, Any]:
    right = judged.pred == judged.labels
    found: list[tuple[float, str, int]] = []
    for attribute, values in judged.groups.items():
        column = np.asarray(values)
        for group in sorted(set(values)):
            own = column == group
            found.append((float(right[own].mean()), f"{attribute} = {group}", int(own.sum())))
    accuracy, name, count = min(found) if found else (None, None, 0)
    return {"worst_group": accuracy, "worst_group_name": name, "worst_group_n": count}


def check_setting(setting: float | str, validation: ImageDataset) -> None:
    """Says before training whether `choose_scale` will be able to choose.

    Raises:
        ConfigError: the setting is neither a number from 0 to 1 nor "validation", or there are no validation images.
    """
    if isinstance(setting, str):
        if setting != "validation":
            raise ConfigError(f'lora_scale should be a number from 0 to 1 or "validation", got {setting!r}')
        if not len(validation):
            raise ConfigError("lora_scale is to be chosen on validation images, and there are none; give a number")
    else:
        check_scale(setting)


def choose_scale(
    setting: float | str,
    adapter: Any,
    validation: ImageDataset,
    new: tuple[ImageDataset, Sequence[str]] | None = None,
    *,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Sets an adapter's scale to a number, or to the best one on validation images.

    Args:
        setting: from 0 to 1, or "validation".
        adapter: see `scale_curve`, as for the next ones.
        validation: images of the classes it was trained on.
        new: validation images of other classes, and their prompt names.
        accelerator: divides the encoding.

    Returns:
        What a report says of it: "chosen" and, where it was chosen, "scale_curve" and "validation_used_for".

    Raises:
        ConfigError: see `check_setting`.
    """
    check_setting(setting, validation)
    if not isinstance(setting, str):
        adapter.set_scale(setting)
        return {"chosen": {"lora_scale": float(setting)}, "validation_used_for": "nothing"}
    curve = scale_curve(adapter, validation, new, accelerator=accelerator)
    adapter.set_scale(best_scale(curve))
    images = f"{len(validation)} images" + (f" and {len(new[0])} of new classes" if new is not None else "")
    return {
        "chosen": {"lora_scale": adapter.scale},
        "scale_curve": curve,
        "validation_used_for": f"the scale of the update, {len(curve)} values ({images})",
    }
