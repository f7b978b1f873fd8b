"""Settings of artifacts that were written before a method had them, so that they load as what they were made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def complete_settings(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an artifact's settings with what was fixed, and so not written, when it was made.

    A method writes all settings that decide what it is. Where one is missing, the artifact is older than the setting,
    and was made with what the method then did:

    - linear_probe: text-init and clap started at unit norm, and lp++ was the paper's reading, without a bias;
    - ss_text: a weight of the text per class, and no repulsion ("adaptive"), which is neither published mode;
    - two_stage: LoRA in the first stage.

    Args:
        method: a key of the registry.
        settings: of the manifest.
    """
    head = settings.get("head")
    fixed: dict[str, Any] = {}
    if method == "linear_probe" and head in ("text-init", "clap"):
        fixed = {"start_norm": 1.0}
    elif method == "linear_probe" and head == "lp++":
        fixed = {"reading": "paper"}
    elif method == "ss_text":
        fixed = {"mode": "adaptive"}
    elif method == "two_stage":
        fixed = {"tune": "lora"}
    return {**fixed, **settings}
