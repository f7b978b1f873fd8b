"""Which methods apply to a model, how many numbers each learns, and why one does not apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adaptclip.backbone import ClipBackbone
from adaptclip.errors import AdaptclipError
from adaptclip.methods.contrastive import ContrastiveTuning
from adaptclip.methods.registry import methods


@dataclass(frozen=True)
class Applicability:
    """Whether a method applies to a model at its default settings.

    Attributes:
        method: a key of the registry, or "contrastive" (its LoRA form).
        applies: whether it can be built.
        consumes: "features" or "pixels"; None where it does not apply.
        learnt: numbers it learns, of all its stages; 0 for a closed form. None where it does not apply.
        stored: numbers its artifact holds. None where it does not apply.
        reason: the error in words where it does not apply, else "".
    """

    method: str
    applies: bool
    consumes: str | None
    learnt: int | None
    stored: int | None
    reason: str = ""


def methods_for(backbone: ClipBackbone, *, num_classes: int = 10) -> list[Applicability]:
    """Builds every method on a model, without training.

    Args:
        backbone: any loaded model.
        num_classes: classes the counts are for. Heads grow with them; Tip-Adapter's cache, here one image per class,
            grows with the images.
    """
    names = [f"class {i}" for i in range(1, num_classes + 1)]

    def build(kind: Any, **settings: Any) -> Callable[[], Any]:
        return lambda: kind(backbone, names, **settings)

    makers: dict[str, Callable[[], Any]] = {name: build(kind) for name, kind in methods().items()}
    makers["tip_adapter"] = build(methods()["tip_adapter"], num_keys=num_classes)
    makers["contrastive"] = lambda: ContrastiveTuning(backbone, how="lora")
    return [_try(method, make) for method, make in makers.items()]


def _try(method: str, make: Callable[[], Any]) -> Applicability:
    try:
        adapter = make()
    except AdaptclipError as error:
        return Applicability(method, False, None, None, None, str(error))
    return Applicability(method, True, adapter.consumes, *adapter.counts())
