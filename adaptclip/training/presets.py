"""Which values a recipe's settings have that were not given: the paper's, or a schedule for trying things out."""

from __future__ import annotations

from typing import Literal, get_args

from adaptclip.errors import ConfigError, did_you_mean

Preset = Literal["auto", "smoke", "paper"]


def is_smoke(preset: Preset, *, card: str, backbone: str) -> bool:
    """Whether what is not given takes the values of the short preset, smoke, instead of the paper's.

    Every setting that is given stays as given and changes nothing but itself.

    Args:
        preset: "smoke", "paper", or "auto": smoke for the embedded card digits on the embedded model, else the paper's.
        card: the recipe's card.
        backbone: the recipe's backbone.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset not in get_args(Preset):
        raise ConfigError(f"no preset {preset!r}. {did_you_mean(str(preset), get_args(Preset))}")
    return preset == "smoke" or (preset == "auto" and (card, backbone) == ("digits", "starter"))
