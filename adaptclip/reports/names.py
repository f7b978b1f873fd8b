# SPDX-License-Identifier: Apache-2.0
"""Name audit: what other class names and other templates make of zero-shot classification.

CLIP knows everyday names far better than scientific ones (Parashar et al. 2023), so that a poor zero-shot result may
say more of the words than of the images. The audit compares and does not choose: names that are picked on test images
would flatter the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.errors import DataError
from adaptclip.metrics.gaps import holm
from adaptclip.metrics.metric import MIN_CLASS_IMAGES
from adaptclip.reports.blocks import number
from adaptclip.reports.measuring import align, measure, sampling_of, sign_test

if TYPE_CHECKING:
    from adaptclip.predictions import Predictions

MAX_CLASSES = 10
"""Classes that the audit lists."""

NOTE = (
    "The audit shows what words do and chooses none: to use other names or templates, put them into the data card and "
    "judge them on other images."
)


def name_audit(
    variants: Mapping[str, Predictions], *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Compares zero-shot predictions of the same images that differ in class names or templates only.

    Args:
        variants: name of the variant -> predictions; the first is the reference.
        confidence: level of the two-sided intervals.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        JSON-able dict: "reference", "variants" (list, best first, of {"variant", "accuracy", "mean_per_class_accuracy",
        "change" (numbers; change is of accuracy against the reference), "p_value", "p_holm"}; the last three None for
        the reference) and "classes" (those that another variant serves better, largest difference first), "note".

    Raises:
        DataError: fewer than two variants, or variants of other images or classes.
    """
    if len(variants) < 2:
        raise DataError(f"a name audit compares at least two variants, got {len(variants)}")
    reference, first = next(iter(variants.items()))
    metrics = ("accuracy", "mean_per_class_accuracy")
    aligned = {name: align(first, p) if p is not first else p for name, p in variants.items()}
    right = {name: p.pred == p.labels for name, p in aligned.items()}
    others, sampling = [name for name in variants if name != reference], sampling_of(first)
    p_values = [sign_test(right[name], right[reference], sampling.unit) for name in others]
    adjusted = dict(zip(others, zip(p_values, holm(p_values), strict=True), strict=True))
    rows = []
    for name, p in aligned.items():
        base = None if name == reference else first
        measured = measure(p, base, metrics=metrics, draws=draws, seed=seed)
        change = measured["accuracy"].change
        rows.append(
            {
                "variant": name,
                **{metric: number(compared.model, confidence) for metric, compared in measured.items()},
                "change": None if change is None else number(change, confidence),
                "p_value": None if name == reference else float(adjusted[name][0]),
                "p_holm": None if name == reference else float(adjusted[name][1]),
            }
        )
    rows.sort(key=lambda row: -row["accuracy"]["value"])
    return {"reference": reference, "variants": rows, "classes": _classes(first, right, reference), "note": NOTE}


def _classes(first: Predictions, right: Mapping[str, np.ndarray], reference: str) -> list[dict[str, Any]]:
    """Classes by how much better the best other variant does; as a hint, the best of several being favoured by luck."""
    sizes = np.bincount(first.labels, minlength=len(first.class_names))
    rates = {
        name: np.bincount(first.labels, hits, minlength=len(sizes)) / np.maximum(sizes, 1)
        for name, hits in right.items()
    }
    found = []
    for c in np.flatnonzero(sizes >= MIN_CLASS_IMAGES):
        best = max((name for name in rates if name != reference), key=lambda name: rates[name][c])
        gain = float(rates[best][c] - rates[reference][c])
        if gain > 0:
            found.append(
                {
                    "class": first.class_names[c],
                    "n": int(sizes[c]),
                    "variant": best,
                    "reference": float(rates[reference][c]),
                    "best": float(rates[best][c]),
                }
            )
    return sorted(found, key=lambda row: row["reference"] - row["best"])[:MAX_CLASSES]
