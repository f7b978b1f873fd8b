"""Which values a recipe's settings have that were not given: the paper's, or a schedule for trying things out."""

from __future__ import annotations

from typing import Literal, get_args

from adaptclip.errors import ConfigError, did_you_mean

Preset = Literal["auto", "smoke", "paper"]


def chosen_preset(preset: Preset, card: str, backbone: str) -> Literal["smoke", "paper"]:
    """Returns whose values what is not given takes: those of the short preset, smoke, or the paper's.

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
    if preset == "auto":
        return "smoke" if (card, backbone) == ("digits", "starter") else "paper"
    return preset
