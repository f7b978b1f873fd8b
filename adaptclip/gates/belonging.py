"""What a verdict belongs to: the images that were judged and the gates they were judged by, each as a digest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from adaptclip.gate_rules import GateRule
from adaptclip.storage import digest
from adaptclip.types import Predictions


def images_digest(predictions: Predictions) -> str:
    """Returns the digest of the judged images: their ids with the names of their true classes, in any order."""
    names = predictions.class_names
    pairs = sorted(zip(predictions.ids, (names[c] for c in predictions.labels.tolist()), strict=True))
    return digest(part for pair in pairs for part in pair)


def gates_digest(rules: Sequence[GateRule]) -> str:
    """Returns the digest of a set of rules, whatever their order and however their defaults are written."""
    return digest(sorted(json.dumps(_plain(rule), sort_keys=True, ensure_ascii=False) for rule in rules))


def _plain(rule: GateRule) -> dict[str, Any]:
    """The rule as it decides: lists in an order of their own where order says nothing."""
    found = rule.model_dump(mode="json", exclude={"metric", "reason"}) | {"metric": rule.measure.name}
    found |= {"margin": rule.slack, "positive": rule.positive and sorted(rule.positive)}
    return found | {"exclude": sorted(rule.exclude)}
