# SPDX-License-Identifier: Apache-2.0
"""The methods that a run of the bench takes, their settings, and how one of them is fitted."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from adaptclip.errors import BackboneError, ConfigError, did_you_mean
from adaptclip.methods.base import objective_of
from adaptclip.methods.registry import Named, current_name, named
from adaptclip.training.criterion import ObjectiveName, parse_objective

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.methods.method import Method
    from adaptclip.training.support import Preset, Support


@dataclass(frozen=True)
class Fitted:
    """A fitted method, and what to tell about it (JSON-able: schedule, chosen, validation_used_for, settings)."""

    adapter: Method
    info: dict[str, Any] = field(default_factory=dict)


def fit_named(
    one: Named,
    support: Support,
    class_names: Sequence[str],
    templates: Sequence[str],
    settings: Mapping[str, Any],
    *,
    preset: Preset = "paper",
) -> Fitted:
    """Builds a method and lets it learn; what recipes and `fit` do, without a run folder.

    Args:
        one: of `named`.
        support: what it may see.
        class_names: C names as prompts say them.
        templates: the card's prompts.
        settings: by name; None is "as published".
        preset: of what is not given.

    Raises:
        ConfigError: a setting is out of range.
    """
    own, planned = one.split(settings)
    objective = parse_objective("auto", support.images).name
    method = one.build(support.backbone, class_names, templates, support.seed, objective, **own)
    plan = method.schedule(support.shots, images_per_class=support.images_per_class, preset=preset, **planned)
    info = method.learn(support, plan)
    return Fitted(method, {**info, "settings": {**own, **asdict(plan)}})


def choose_methods(names: Sequence[str], *, new_names: bool) -> tuple[str, ...]:
    """Returns the methods asked for, cheap before dear; `ladder` stands for those of the ladder.

    Args:
        names: of `named`, or `ladder`.
        new_names: the protocol judges classes that were not learnt.

    Raises:
        ConfigError: an unknown name, none, or a method asked for by name that cannot take new class names.
    """
    known = named()
    able = [name for name, one in known.items() if one.method.takes_new_names or not new_names]
    chosen: list[str] = []
    for given in names:
        name = current_name(given)
        if name == "ladder":
            chosen += [own for own in able if known[own].variant.ladder]
        elif name not in known:
            raise ConfigError(f"no method {name!r}. {did_you_mean(name, [*known, 'ladder'])}")
        elif name not in able:
            raise ConfigError(
                f"{name} has a weight for each class it learnt and none for others, so it cannot be judged on new "
                f"class names. Methods that can: {', '.join(able)}"
            )
        else:
            chosen.append(name)
    if not chosen:
        raise ConfigError(f"name at least one method. {did_you_mean('', [*known, 'ladder'])}")
    return tuple(name for name in known if name in chosen)


def check_backbone(
    settings: Mapping[str, Mapping[str, Any]],
    backbone: ClipBackbone | FeatureClip,
    class_names: Sequence[str],
    objective: ObjectiveName = "softmax",
) -> None:
    """Builds every method once on the model, so that one that it or the images do not allow is known before any job.

    Args:
        settings: method -> its settings, of `read_settings`.
        backbone: what all jobs sit on.
        class_names: of a card; two of them are enough.
        objective: that of all jobs: sigmoid where images may show several classes.

    Raises:
        ConfigError: it does not allow some of the methods; the message says why, and which are left.
    """
    found = {name: _refusal(named()[name], own, backbone, class_names[:2], objective) for name, own in settings.items()}
    refused = {name: reason for name, reason in found.items() if reason}
    if refused:
        left = " ".join(name for name in settings if name not in refused)
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ConfigError(f"{why}. Leave out {', '.join(refused)}" + (f", and take --methods {left}" if left else ""))


def _refusal(
    one: Named,
    settings: Mapping[str, Any],
    backbone: ClipBackbone | FeatureClip,
    class_names: Sequence[str],
    objective: ObjectiveName,
) -> str:
    """Why a model or an objective does not allow a method; empty where both do."""
    own, templates = one.split(settings)[0], ("a photo of a {}.",)
    try:
        made = one.build(backbone, class_names, templates, 0, **own)
    except BackboneError as error:
        return str(error)
    if objective == objective_of(made):
        return ""
    with contextlib.suppress(ConfigError):
        if objective == objective_of(one.build(backbone, class_names, templates, 0, objective, **own)):
            return ""
    return "the images may show several classes, and it names exactly one"


def read_settings(texts: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads changes of settings, `METHOD.SETTING=VALUE`, and returns all settings of every method.

    Raises:
        ConfigError: an unknown method or setting, one of a method that does not run, or a value of another type.
    """
    settings = {name: named()[name].settings() for name in methods}
    for text in texts:
        left, equals, value = text.partition("=")
        name, dot, setting = left.partition(".")
        name = current_name(name)
        if not (equals and dot):
            raise ConfigError(f"settings are written METHOD.SETTING=VALUE, for example coop.epochs=50; got {text!r}")
        if name not in settings:
            where = "does not run here" if name in named() else "is no method"
            raise ConfigError(f"{text!r}: {name!r} {where}. {did_you_mean(name, settings)}")
        if setting not in settings[name]:
            raise ConfigError(f"{name} has no setting {setting!r}. {did_you_mean(setting, settings[name])}")
        settings[name][setting] = _read(value, named()[name].kinds()[setting], text)
    return settings


_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _read(value: str, kinds: Sequence[type], text: str) -> Any:
    """Returns a value as the first of the types that it can be."""
    for kind in kinds:
        with contextlib.suppress(ValueError, KeyError):
            return _BOOLS[value.lower()] if kind is bool else kind(value)
    wanted = " or ".join(kind.__name__ for kind in kinds) or "left as it is"
    raise ConfigError(f"{text!r}: {text.partition('=')[0].partition('.')[2]} should be {wanted}, got {value!r}")


def not_published(
    methods: Sequence[str], changes: Sequence[str], *, preset: Preset = "paper", searched: bool = False
) -> dict[str, str]:
    """Returns the methods of a run whose settings are not the published ones -> what differs.

    Args:
        methods: that run.
        changes: as `read_settings` takes them.
        preset: of what is not given.
        searched: whether settings are searched on validation images.
    """
    found: dict[str, list[str]] = {name: [] for name in methods}
    for text in changes:
        found[current_name(text.partition(".")[0])].append(text.partition(".")[2])
    for name in methods:
        found[name] += ["preset smoke"] if preset == "smoke" and named()[name].method.smoke else []
        found[name] += ["settings searched"] if searched and named()[name].variant.search else []
    return {name: ", ".join(info) for name, info in found.items() if info}
