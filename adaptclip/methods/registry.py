# SPDX-License-Identifier: Apache-2.0
"""All methods by name: those of this folder and those that other packages bring, and which apply to a model.

A package brings a method by an entry point of the group `adaptclip.methods` that names a subclass of `Method`:

    [project.entry-points."adaptclip.methods"]
    my_method = "my_package.my_module:MyMethod"
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import adaptclip.methods
from adaptclip.errors import AdaptclipError, ConfigError, did_you_mean
from adaptclip.methods.contrastive import ContrastiveTuning
from adaptclip.methods.method import Method, Variant
from adaptclip.prompts import TEMPLATES
from adaptclip.training.criterion import ObjectiveName

if typing.TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone

GROUP = "adaptclip.methods"
"""Entry point group of methods from other packages."""

_NOT_BY_NAME = frozenset((
    "backbone", "class_names", "templates", "seed", "objective", "first", "num_keys", "memory_budget_bytes", "fast",
    "shard_classes", "checkpointing", "scale",
))  # fmt: skip
"""Arguments of constructors that a run decides elsewhere, or that change no result."""


@cache
def methods() -> Mapping[str, type[Method]]:
    """Returns key -> class of every method; artifacts name their method by these keys.

    Warns:
        UserWarning: another package's method cannot be used: its module cannot be imported, it is no `Method`, or it
            has the key of another.
    """
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(adaptclip.methods.__path__):
        for own in vars(importlib.import_module(f"{adaptclip.methods.__name__}.{module.name}")).values():
            if inspect.isclass(own) and issubclass(own, Method) and own.name:
                found[own.name] = own
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            other = point.load()
        except Exception as error:
            warnings.warn(f"the method {point.value} cannot be used: {error}", stacklevel=2)
            continue
        if not (inspect.isclass(other) and issubclass(other, Method) and other.name):
            warnings.warn(f"{point.value} is no subclass of adaptclip.Method with a name; it is left out", stacklevel=2)
        elif other.name in found and found[other.name] is not other:
            warnings.warn(f"{point.value}: there is a method {other.name!r} already; it is left out", stacklevel=2)
        else:
            found[other.name] = other
    return types.MappingProxyType(found)


def method_of(key: str) -> type[Method]:
    """Returns the class of a key. Raises ConfigError with the nearest key for an unknown one."""
    if key not in methods():
        raise ConfigError(f"no method {key!r}. {did_you_mean(key, methods())}")
    return methods()[key]


@dataclass(frozen=True)
class Named:
    """A method as it is run by name, with the settings that this name stands for.

    Attributes:
        name: for example "kgcoop".
        method: the class.
        variant: what the name stands for.
    """

    name: str
    method: type[Method]
    variant: Variant

    @property
    def cost(self) -> float:
        """Place on the ladder from cheap to dear."""
        return self.variant.cost

    @property
    def learns(self) -> bool:
        """Whether images are learnt from; otherwise results do not vary with shots and seeds."""
        return self.method._learn is not Method._learn

    def settings(self) -> dict[str, Any]:
        """Returns every setting that can be changed, with its default; None is "as published"."""
        own = {
            name: self.variant.defaults.get(name, p.default)
            for name, p in inspect.signature(self.method.__init__).parameters.items()
            if name not in ("self", *_NOT_BY_NAME, *self.variant.settings)
            and p.kind is not p.VAR_KEYWORD and isinstance(p.default, bool | int | float | str | None)
        }  # fmt: skip
        return own | {f.name: None for f in fields(self.method.schedule_type)}

    def kinds(self) -> dict[str, tuple[type, ...]]:
        """Returns the type or types of every setting."""
        known = typing.get_type_hints(self.method.schedule_type)
        info = {**inspect.get_annotations(self.method.__init__), **known}
        names = vars(importlib.import_module(self.method.__module__))
        return {name: _plain_types(_hint(info.get(name, str), names)) for name in self.settings()}

    def split(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns settings of the constructor, and those of the schedule."""
        planned = {f.name for f in fields(self.method.schedule_type)}
        own = {name: value for name, value in settings.items() if name not in planned}
        return own, {name: value for name, value in settings.items() if name in planned}

    def templates(self, templates: Sequence[str]) -> tuple[str, ...]:
        """Returns the prompts of a card as this name reads them: with CLIP's ensemble of seven, or as they are."""
        return tuple(dict.fromkeys((*templates, *(TEMPLATES["imagenet"] if self.variant.ensemble else ()))))

    def build(
        self,
        backbone: Any,
        class_names: Sequence[str],
        templates: Sequence[str],
        seed: int,
        objective: ObjectiveName = "softmax",
        **own: Any,
    ) -> Method:
        """Returns the method, before it has learnt.

        Args:
            backbone: the frozen CLIP.
            class_names: C names.
            templates: the card's prompts.
            seed: of what is drawn at first.
            objective: what it learns to tell; a method that knows no other than the softmax is left at that, and
                refuses to learn from images that show several classes.
            **own: settings of the constructor.
        """
        asked = inspect.signature(self.method.__init__).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in asked.values())
        usual: dict[str, Any] = {"templates": self.templates(templates), "seed": seed, "shard_classes": False}
        usual |= {} if objective == "softmax" else {"objective": objective}
        usual = {name: value for name, value in usual.items() if name in asked or (open_ended and name == "templates")}
        return self.method(backbone, class_names, **{**usual, **self.variant.defaults, **own, **self.variant.settings})


EARLIER_NAMES = {
    "tip": "tip_adapter",
    "tip-f": "tip_adapter_f",
    "lp++": "lp_plus_plus",
    "promptsrc": "prompt_src",
    "taskres": "task_residual",
}
"""Names of version 0.1 that are not today's with hyphens -> today's."""


def current_name(name: str) -> str:
    """Returns today's name of a method or head that may be given by its name of version 0.1 (`tip-f`, `two-stage`)."""
    return EARLIER_NAMES.get(name, name.replace("-", "_"))


@cache
def named() -> Mapping[str, Named]:
    """Returns name -> method of all variants, cheap before dear."""
    found = [Named(name, own, variant) for own in methods().values() for name, variant in own.variants.items()]
    return types.MappingProxyType(
        {one.name: one for one in sorted(found, key=lambda one: (one.variant.cost, one.name))}
    )


def _plain_types(hint: Any) -> tuple[type, ...]:
    """The plain types that a value of an annotation may have, the narrow ones first."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    plain: set[type] = set()
    for part in parts:
        if typing.get_origin(part) is typing.Literal:
            plain |= {type(value) for value in typing.get_args(part)}
        elif isinstance(part, type) and part is not type(None):
            plain.add(part)
    return tuple(kind for kind in (bool, int, float, str) if kind in plain)


def _hint(hint: Any, names: Mapping[str, Any]) -> Any:
    """An annotation, evaluated where it is a text; `str` for one that names what is known to type checkers alone."""
    try:
        return eval(hint, dict(names)) if isinstance(hint, str) else hint  # of the method's own source
    except NameError:
        return str


@dataclass(frozen=True)
class Applicability:
    """Whether a method applies to a model at its default settings.

    Attributes:
        method: a key of the registry, or "contrastive" (its LoRA form).
        applies: whether it can be built.
        consumes: "features" or "pixels", what its `forward` reads; None where it does not apply.
        learns_from: "nothing", "features" or "images", over all its stages; None where it does not apply.
        learnt: numbers it learns, of all its stages; 0 for a closed form. None where it does not apply.
        stored: numbers its artifact holds. None where it does not apply.
        reason: the error in words where it does not apply, else "".
    """

    method: str
    applies: bool
    consumes: str | None
    learns_from: str | None
    learnt: int | None
    stored: int | None
    reason: str = ""


def methods_for(backbone: ClipBackbone, *, num_classes: int = 10) -> list[Applicability]:
    """Builds every method on a model, without training; cheap methods before dear ones.

    Args:
        backbone: any loaded model.
        num_classes: classes the counts are for. Heads grow with them; Tip-Adapter's cache, here one image per class,
            grows with the images.
    """
    names = [f"class {i}" for i in range(1, num_classes + 1)]

    def build(kind: Any, **settings: Any) -> Callable[[], Any]:
        return lambda: kind(backbone, names, **settings)

    by_cost = sorted(methods().items(), key=lambda own: min(v.cost for v in own[1].variants.values()))
    makers: dict[str, Callable[[], Any]] = {name: build(kind) for name, kind in by_cost}
    makers["tip_adapter"] = build(methods()["tip_adapter"], num_keys=num_classes)
    makers["contrastive"] = lambda: ContrastiveTuning(backbone, how="lora")
    return [_try(method, make) for method, make in makers.items()]


def _try(method: str, make: Callable[[], Any]) -> Applicability:
    try:
        adapter = make()
    except AdaptclipError as error:
        return Applicability(method, False, None, None, None, None, str(error))
    learns_from = getattr(adapter, "learns_from", "images")  # contrastive tuning is no `Method`
    return Applicability(method, True, adapter.consumes, learns_from, *adapter.counts())
