"""Named lengths of training: the paper's, or a short one for the embedded default."""

from __future__ import annotations

from typing import Literal, get_args

from adaptclip.errors import ConfigError, did_you_mean

Preset = Literal["smoke", "paper"]

AskedPreset = Literal["auto", "smoke", "paper"]


def check_preset(preset: str) -> None:
    """Raises ConfigError unless it is the name of a preset."""
    if preset not in get_args(Preset):
        raise ConfigError(f"no preset {preset!r}. {did_you_mean(str(preset), get_args(Preset))}")


def chosen_preset(preset: AskedPreset, card: str, backbone: str) -> Preset:
    """Returns whose values what is not given takes: those of the short preset, smoke, or the paper's.

    Every setting that is given stays as given and changes nothing but itself.

    Args:
        preset: "smoke", "paper", or "auto": smoke for the embedded card digits on the embedded model, else the paper's.
        card: the recipe's card.
        backbone: the recipe's backbone.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset == "auto":
        return "smoke" if (card, backbone) == ("digits", "starter") else "paper"
    check_preset(preset)
    return preset
