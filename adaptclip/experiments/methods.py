"""The methods of the bench by name: what fits them, what they cost, what a search may change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.experiments.fits import (
    Fitted,
    fit_coop,
    fit_ensemble,
    fit_gda,
    fit_linear,
    fit_lora,
    fit_ss_text,
    fit_tip,
    fit_two_stage,
    fit_zero_shot,
    with_context,
    with_ensemble,
    with_templates,
)
from adaptclip.methods.base import Adapter


@dataclass(frozen=True)
class Method:
    """A way to adapt, as the bench runs it.

    Attributes:
        fit: (support, **settings) to a fitted adapter; its keyword arguments are the settings.
        cost: place on the ladder from cheap to dear; jobs run in this order.
        learns: whether images are learnt from; otherwise results do not vary with shots and seeds.
        rename: (adapter, names, templates) to a classifier of classes that were not learnt, or None.
        search: setting -> (low, high) searched at equal ratios, or a tuple of options as a list.
        ladder: whether `ladder` includes it.
    """

    fit: Callable[..., Fitted]
    cost: int
    learns: bool = True
    rename: Callable[[Any, Sequence[str], Sequence[str]], Adapter] | None = None
    search: Mapping[str, tuple[float, float] | list[Any]] = field(default_factory=dict)
    ladder: bool = True

    def settings(self) -> dict[str, Any]:
        """Returns every setting with its default."""
        parameters = inspect.signature(self.fit).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


METHODS: dict[str, Method] = {
    "zero-shot": Method(fit_zero_shot, 0, learns=False, rename=with_templates),
    "ensemble": Method(fit_ensemble, 1, learns=False, rename=with_ensemble),
    "ss-text": Method(fit_ss_text, 2),
    "logistic": Method(partial(fit_linear, head="logistic", views=0), 3),
    "lp++": Method(partial(fit_linear, head="lp++", views=1), 4),
    "tip": Method(fit_tip, 5),
    "gda": Method(fit_gda, 6),
    "tip-f": Method(
        partial(fit_tip, learn=True), 7, search={"lr": (2e-4, 1e-2), "epochs": [20, 50, 100]}
    ),
    "text-init": Method(
        partial(fit_linear, head="text-init", views=20), 8, search={"lr": (1e-2, 1.0)}, ladder=False
    ),
    "clap": Method(
        partial(fit_linear, head="clap", views=20), 9, search={"lr": (1e-2, 1.0), "clap_weight": (0.1, 10.0)}
    ),
    "coop": Method(fit_coop, 10, rename=with_context, search={"lr": (5e-4, 2e-2), "n_ctx": [4, 8, 16]}),
    "kgcoop": Method(
        partial(fit_coop, n_ctx=4, ctx_init="a photo of a", kg_weight=8.0), 11,
        rename=with_context, search={"lr": (5e-4, 2e-2), "kg_weight": (1.0, 32.0)}, ladder=False,
    ),
    "lora": Method(fit_lora, 12, rename=with_templates, search={"lr": (1e-4, 2e-2), "rank": [2, 4, 8]}),
    "two-stage": Method(
        fit_two_stage, 13, rename=with_templates, search={"lr": (1e-4, 2e-2), "head_lr": (1e-4, 1e-2)}, ladder=False
    ),
}  # fmt: skip
"""Method name -> how it is fitted, cheap before dear."""


def choose_methods(names: Sequence[str], *, new_names: bool) -> tuple[str, ...]:
    """Returns the methods asked for, cheap before dear; `ladder` stands for those of the ladder.

    Args:
        names: of METHODS, or `ladder`.
        new_names: the protocol judges classes that were not learnt.

    Raises:
        ConfigError: an unknown name, none, or a method asked for by name that cannot take new class names.
    """
    able = [name for name, method in METHODS.items() if method.rename is not None or not new_names]
    chosen: list[str] = []
    for name in names:
        if name == "ladder":
            chosen += [own for own in able if METHODS[own].ladder]
        elif name not in METHODS:
            raise ConfigError(f"no method {name!r}. {did_you_mean(name, [*METHODS, 'ladder'])}")
        elif name not in able:
            raise ConfigError(
                f"{name} has a weight for each class it learnt and none for others, so it cannot be judged on new "
                f"class names. Methods that can: {', '.join(able)}"
            )
        else:
            chosen.append(name)
    if not chosen:
        raise ConfigError(f"name at least one method. {did_you_mean('', [*METHODS, 'ladder'])}")
    return tuple(name for name in METHODS if name in chosen)


def read_settings(texts: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads changes of settings, `METHOD.SETTING=VALUE`, and returns all settings of every method.

    Raises:
        ConfigError: an unknown method or setting, one of a method that does not run, or a value of another type.
    """
    settings = {name: METHODS[name].settings() for name in methods}
    for text in texts:
        left, equals, value = text.partition("=")
        name, dot, setting = left.partition(".")
        if not (equals and dot):
            raise ConfigError(f"settings are written METHOD.SETTING=VALUE, for example coop.epochs=50; got {text!r}")
        if name not in settings:
            where = "does not run here" if name in METHODS else "is no method"
            raise ConfigError(f"{text!r}: {name!r} {where}. {did_you_mean(name, settings)}")
        known = {key: default for key, default in settings[name].items() if key not in ("head", "learn")}
        if setting not in known:
            raise ConfigError(f"{name} has no setting {setting!r}. {did_you_mean(setting, known)}")
        try:
            settings[name][setting] = type(known[setting])(value)
        except ValueError as error:
            kind = type(known[setting]).__name__
            raise ConfigError(f"{text!r}: {setting} should be {kind}, got {value!r}") from error
    return settings
