# SPDX-License-Identifier: Apache-2.0
"""Search for settings on the validation shots of a job, within a budget, with every trial written down."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adaptclip.bench.methods import Fitted, fit_named
from adaptclip.errors import ConfigError
from adaptclip.methods.choosing import binary_loss, mean_auc
from adaptclip.methods.predicting import predict
from adaptclip.seeding import derive_seed
from adaptclip.training.criterion import marks_of

if TYPE_CHECKING:
    from adaptclip.methods.registry import Named
    from adaptclip.training.support import Preset, Support


@dataclass(frozen=True)
class Budget:
    """What a search may cost.

    Attributes:
        trials: settings tried per job, the published ones among them; 2 or more.
        seconds: no trial is started after so many seconds; 0 sets no limit. With a limit, what is found depends on the
            machine.
    """

    trials: int
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.trials < 2 or self.seconds < 0:
            raise ConfigError(
                f"a search needs two trials or more (the first takes the published settings) and 0 seconds or more, "
                f"got {self.trials} and {self.seconds:g}; leave --search-trials at 0 for no search"
            )


def search(
    one: Named,
    support: Support,
    class_names: Sequence[str],
    templates: Sequence[str],
    settings: Mapping[str, Any],
    budget: Budget,
    *,
    preset: Preset = "paper",
) -> Fitted:
    """Fits a method with several settings and keeps the adapter that does best on the validation shots.

    Better means more validation images right, and among equals the lower cross-entropy; the published settings are the
    first trial, so nothing is taken that does worse there. Further trials come from optuna's TPE sampler (Bergstra et
    al. 2011) with a seed of the job.

    Returns:
        The best adapter. `info` says what was chosen, and under `search` what was tried.

    Raises:
        ConfigError: optuna is not installed, or the case has no validation images.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError('a search needs optuna: python -m pip install "adaptclip[tune]"') from error
    if not len(support.validation_images):
        raise ConfigError(
            "this draw has no validation images to search settings on; leave --search-trials at 0, take fewer shots, "
            "or a card with a validation part"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=derive_seed(support.seed, "search") % 2**32)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    best: tuple[tuple[float, float], Fitted, dict[str, Any]] | None = None
    tried: list[dict[str, Any]] = []
    started = time.perf_counter()
    for number in range(budget.trials):
        if number and budget.seconds and time.perf_counter() - started > budget.seconds:
            break
        trial = study.ask() if number else None
        values = dict(settings) if trial is None else {**settings, **_suggest(trial, one)}
        fitted = fit_named(one, support, class_names, templates, values, preset=preset)
        right, loss = _validate(fitted, support)
        score = right - (1 if isinstance(right, int) else 1e-3) * loss / (1 + loss)
        if trial is not None:
            study.tell(trial, score)
        changed = {name: fitted.info["settings"][name] for name in one.variant.search}
        tried.append({"settings": changed, "right": right, "loss": loss})
        if best is None or (right, -loss) > best[0]:
            best = ((right, -loss), fitted, changed)
    assert best is not None
    _, fitted, chosen = best
    info = dict(fitted.info)
    used = info.get("validation_used_for", "nothing")
    searched = f"choosing {', '.join(one.variant.search)} among {len(tried)} settings"
    info["validation_used_for"] = searched if used == "nothing" else f"{searched}; {used}"
    info["chosen"] = {**info.get("chosen", {}), **chosen}
    info["search"] = {
        "images": len(support.validation_images),
        "trials": tried,
        "seconds": time.perf_counter() - started,
    }
    return Fitted(fitted.adapter, info)


def _suggest(trial: Any, one: Named) -> dict[str, Any]:
    values = {}
    for name, span in one.variant.search.items():
        if isinstance(span, list):
            values[name] = trial.suggest_categorical(name, span)
        else:
            values[name] = trial.suggest_float(name, *span, log=True)
    return values


def _validate(fitted: Fitted, support: Support) -> tuple[float, float]:
    """Validation images that are right, and their mean cross-entropy.

    Of images that may show several classes: the mean AUC of the classes times their number, and the mean binary
    cross-entropy.
    """
    adapter: Any = fitted.adapter
    features = support.validation(adapter.encoder)
    assert features is not None
    judged = predict(adapter, features, support.validation_images)
    if judged.positive is not None:
        marks = marks_of(features.labels, len(judged.class_names), features.multi_hot)
        assert judged.sigmoid is not None
        logits = torch.logit(torch.from_numpy(judged.sigmoid).double(), eps=1e-7)
        return mean_auc(logits, *marks) * len(judged), binary_loss(logits, *marks)
    own = judged.probs[np.arange(len(judged)), judged.labels].astype(np.float64)
    return int((judged.pred == judged.labels).sum()), float(-np.log(np.maximum(own, 1e-12)).mean())
