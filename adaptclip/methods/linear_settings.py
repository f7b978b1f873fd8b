"""Which settings each linear head has, their published values and their ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.methods.linear_fits import ImageBalance
from adaptclip.methods.lp_plus_plus import Reading

HeadKind = Literal["logistic", "text-init", "clap", "lp++"]

_DEFAULTS: dict[str, dict[str, float | None]] = {
    "logistic": {"c": None},
    "text-init": {"lr": 0.1, "epochs": 300},
    "clap": {"lr": 0.1, "epochs": 300, "clap_weight": 1.0},
    "lp++": {"epochs": 300},
}
"""Head -> the settings of learning that it has, and their published values; a C of None is chosen by validation."""


def settings_of_fit(head: HeadKind, given: Mapping[str, float | None]) -> dict[str, Any]:
    """Returns the settings of `LinearProbe.fit` that a head has: those given, and the published values for the others.

    Raises:
        ConfigError: a given setting is not one of this head, or is out of range.
    """
    allowed = _DEFAULTS[head]
    for name, value in given.items():
        if value is not None and name not in allowed:
            owners = " and ".join(head for head, names in _DEFAULTS.items() if name in names)
            raise ConfigError(
                f"the head {head!r} has no setting {_flag(name)} (got {value:g}): it belongs to {owners}. "
                "Leave it out, or take another head."
            )
    settings = {name: default if given.get(name) is None else given[name] for name, default in allowed.items()}
    for name, value in settings.items():
        least = {"clap_weight": "0 or more", "epochs": "1 or more"}.get(name, "above 0")
        if value is not None and not _in_range(value, least):
            raise ConfigError(f"{_flag(name)} must be a number {least}, got {value:g}")
    return settings


def check_balance_of(head: HeadKind, balance: ImageBalance | None) -> None:
    """Raises ConfigError for a balance that a head cannot take, see `LinearProbe.check_balance`."""
    if balance is None or (balance.weights is None and balance.strata is None):
        return
    if head == "lp++":
        raise ConfigError("lp++ takes its start and step sizes from all images alike; balance clap or text-init")
    if head == "logistic" and balance.weights is None:
        raise ConfigError(
            "logistic sees all images at once and draws none: it takes class-weights and class-balanced. For "
            "sampling or group DRO take the head text-init or clap."
        )


def check_variant(head: HeadKind, start_norm: float | None, reading: str | None) -> None:
    """Raises ConfigError for a start or a reading that is out of range, or belongs to another head."""
    if start_norm is not None and (head not in ("text-init", "clap") or not _in_range(start_norm, "above 0")):
        raise ConfigError(
            f"start_norm is a number above 0, where the weights of text-init and clap start; got {start_norm:g} for "
            f"{head}. Leave it out for the root of the logit scale."
        )
    if reading is not None and reading not in get_args(Reading):
        raise ConfigError(f"no reading {reading!r} of lp++. {did_you_mean(reading, get_args(Reading))}")
    if reading is not None and head != "lp++":
        raise ConfigError(f"the head {head!r} has no reading (got {reading!r}): it belongs to lp++. Leave it out.")


def _in_range(value: float, least: str) -> bool:
    fine = {"0 or more": value >= 0, "1 or more": value >= 1, "above 0": value > 0}[least]
    return math.isfinite(value) and fine


def _flag(name: str) -> str:
    """The recipe's spelling of a setting."""
    return "--C" if name == "c" else f"--{name.replace('_', '-')}"
