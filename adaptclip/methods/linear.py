# SPDX-License-Identifier: Apache-2.0
"""Linear heads on the frozen image features: a matrix of class weights, fitted in seconds from the cache."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.errors import ConfigError, DataError, TrainingError, did_you_mean
from adaptclip.methods.base import ClassBias, Head, batch_features, check_features, check_state, scaled_logits
from adaptclip.methods.choosing import binary_loss, mean_auc
from adaptclip.methods.linear_fits import (
    ImageBalance,
    Reading,
    fit_each_class,
    fit_from_text,
    fit_logistic,
    fit_lp_plus_plus,
    score_logits,
    search_exponent,
    start_norm_of,
    step_sizes,
    warn_of_unseen,
    zero_shot_confidence,
)
from adaptclip.methods.method import Method, Schedule, Variant
from adaptclip.prompts import zero_shot_weights
from adaptclip.training.criterion import ObjectiveName, check_objective, marks_of

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.training.mitigation import Mitigation
    from adaptclip.training.support import Loop, Preset, Support
    from adaptclip.types import Batch, Features

HeadKind = Literal["logistic", "text_init", "clap", "lp_plus_plus"]

_DEFAULTS: dict[str, dict[str, float | None]] = {
    "logistic": {"c": None},
    "text_init": {"lr": 0.1, "epochs": 300},
    "clap": {"lr": 0.1, "epochs": 300, "clap_weight": 1.0},
    "lp_plus_plus": {"epochs": 300},
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
    if head == "lp_plus_plus":
        raise ConfigError("lp_plus_plus takes start and step sizes from all images alike; balance clap or text_init")
    if head == "logistic" and balance.weights is None:
        raise ConfigError(
            "logistic sees all images at once and draws none: it takes class-weights and class-balanced. For "
            "sampling or group DRO take the head text_init or clap."
        )


def check_variant(head: HeadKind, start_norm: float | None, reading: str | None) -> None:
    """Raises ConfigError for a start or a reading that is out of range, or belongs to another head."""
    if start_norm is not None and (head not in ("text_init", "clap") or not _in_range(start_norm, "above 0")):
        raise ConfigError(
            f"start_norm is a number above 0, where the weights of text_init and clap start; got {start_norm:g} for "
            f"{head}. Leave it out for the root of the logit scale."
        )
    if reading is not None and reading not in get_args(Reading):
        raise ConfigError(f"no reading {reading!r} of lp_plus_plus. {did_you_mean(reading, get_args(Reading))}")
    if reading is not None and head != "lp_plus_plus":
        raise ConfigError(f"the head {head!r} has no reading (got {reading!r}): that is lp_plus_plus's. Leave it out.")


def _in_range(value: float, least: str) -> bool:
    fine = {"0 or more": value >= 0, "1 or more": value >= 1, "above 0": value > 0}[least]
    return math.isfinite(value) and fine


def _flag(name: str) -> str:
    """The recipe's spelling of a setting."""
    return "--C" if name == "c" else f"--{name.replace('_', '-')}"


BATCH_SIZE = 256
"""Rows per step of text_init and clap (Silva-Rodríguez et al. 2024)."""


PUBLISHED_VIEWS = {"logistic": 0, "text_init": 20, "clap": 20, "lp_plus_plus": 1}
"""Sets of random crops that each head's paper uses; 0 is the evaluation transform."""

FIXED_C = 10.0
"""C of `logistic` in `fit` without validation images; of the right order for unit-norm features."""


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """How a head is fitted; what a head does not have stays None.

    Attributes:
        views: sets of crops; 0 is the evaluation transform.
        min_scale: smallest crop as a share of the image's area; a larger limit of the card wins.
        c: inverse strength of `logistic`'s penalty; None chooses it on the validation images.
        lr: peak learning rate of `text_init` and `clap`.
        epochs: passes of `text_init`, `clap` and `lp_plus_plus`.
        clap_weight: multiplies the penalties of `clap`; 0 makes it `text_init`.
    """

    views: int = 0
    min_scale: float = 0.5
    c: float | None = None
    lr: float | None = None
    epochs: int | None = None
    clap_weight: float | None = None


class LinearProbe(Method):
    """A linear classifier on frozen image features.

    The heads, with f a unit-norm feature and t_c the zero-shot text features:

    - `logistic`: logits f · w_c + b_c by logistic regression, the linear probe of CLIP and CoOp (Radford et al. 2021,
      app. A.3; Zhou et al. 2022). CLIP's own probe reads features that are not normalised, for its ViTs from before the
      projection into the shared space; these are normalised and projected, so the best C is larger than published ones.
    - `text_init`: logits scale · cos(f, w_c) with w_c starting along t_c (ZS-LP of Silva-Rodríguez et al. 2024,
      arXiv:2312.12730), at the norm of `start_norm_of`: the published code starts at the text tower's raw output. The
      unit-norm w_c is kept, which is all that the logits see.
    - `clap`: the same, with each w_c held near its start the more, the surer zero-shot CLIP is of class c (same paper).
    - `lp_plus_plus`: logits f · (w_c + alpha_c t_c) + b_c (Huang et al. 2024, arXiv:2404.02285), in the reading of the
      published code or of the paper, see `fit_lp_plus_plus`.

    Before learning, the last three give the zero-shot logits, and `logistic` gives 0 everywhere. Nothing here learns by
    gradients from outside.

    What differs from the published code: text features are means of unit-norm prompts (ZS-LP and CLAP average the raw
    ones; one prompt is the same in both), CLAP holds a class without images at 1, the order of rows is drawn by another
    generator, LP++ starts its bias at 0, and its validation images are those of the split (the code draws as many as
    there are training images).

    Args:
        backbone: frozen CLIP.
        class_names: C names in the order of the label ids; None takes those of a `FeatureClip`.
        head: which of the four.
        templates: prompts of the text features; not read by `logistic`.
        objective: "sigmoid" judges each class by itself, for images that may show several: text_init and clap learn a
            bias for each class beside the weights, see `ClassBias`; logistic is fitted to each class against the rest.
        start_norm: norm at which the weights of text_init and clap start; None is that of `start_norm_of`.
        reading: of lp_plus_plus, "code" (the default, which the published numbers come from) or "paper".

    Raises:
        ConfigError: an unknown head, objective or reading, a setting of another head or out of range, no class names,
            or a template without exactly one `{}`.
        BackboneError: a prompt is longer than the context.
    """

    name = "linear_probe"
    variants = {
        "logistic": Variant(3, {"head": "logistic"}, ladder=True),
        "lp_plus_plus": Variant(4, {"head": "lp_plus_plus"}, ladder=True),
        "text_init": Variant(8, {"head": "text_init"}, search={"lr": (1e-2, 1.0)}),
        "clap": Variant(9, {"head": "clap"}, ladder=True, search={"lr": (1e-2, 1.0), "clap_weight": (0.1, 10.0)}),
    }
    schedule_type = LinearSchedule
    text: Tensor

    def __init__(
        self,
        backbone: ClipBackbone | FeatureClip,
        class_names: Sequence[str] | None = None,
        *,
        head: HeadKind = "logistic",
        templates: Sequence[str] = ("a photo of a {}.",),
        objective: ObjectiveName = "softmax",
        start_norm: float | None = None,
        reading: Reading | None = None,
    ) -> None:
        super().__init__()
        if head not in get_args(HeadKind):
            raise ConfigError(f"no linear head {head!r}. {did_you_mean(str(head), get_args(HeadKind))}")
        check_variant(head, start_norm, reading)
        check_objective(objective)
        if objective == "sigmoid" and head == "lp_plus_plus":
            raise ConfigError(
                f"the head {head!r} is fitted to the softmax; the objective sigmoid takes logistic, text_init or clap"
            )
        names = self._sit_on(backbone, class_names)
        self.kind: HeadKind = head
        self.objective: ObjectiveName = objective
        self.templates = tuple(templates)
        self.start_norm = start_norm_of(float(backbone.logit_scale)) if start_norm is None else float(start_norm)
        self.reading: Reading = reading or "code"
        shape = (len(names), backbone.embed_dim)
        state = {"weight": torch.zeros(shape, device=backbone.device)}
        text = torch.zeros(0, shape[1], device=backbone.device)  # `logistic` reads no words
        if head == "logistic":
            state["bias"] = torch.zeros(shape[0], device=backbone.device)
        else:
            text = zero_shot_weights(backbone, names, self.templates)
        if head == "lp_plus_plus":
            state["alpha"] = backbone.logit_scale.detach().float().expand(shape[0]).clone()
        elif head != "logistic":
            state["weight"] = text.clone()
        if head == "lp_plus_plus" and self.reading == "code":
            state["bias"] = torch.zeros(shape[0], device=backbone.device)
        if objective == "sigmoid" and head != "logistic":
            state["bias"] = ClassBias(backbone, shape[0]).start
        self.learnt = nn.ParameterDict({name: nn.Parameter(t, requires_grad=False) for name, t in state.items()})
        self.register_buffer("text", text, persistent=False)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        settings: dict[str, Any] = {"head": self.kind, "templates": list(self.templates)}
        if self.objective != "softmax":
            settings["objective"] = self.objective
        if self.kind == "lp_plus_plus":
            return settings | {"reading": self.reading}
        return settings if self.kind == "logistic" else settings | {"start_norm": self.start_norm}

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features."""
        features = batch_features(batch, self.backbone.embed_dim)
        weight = self._weight()
        if self.kind in ("text_init", "clap"):
            return scaled_logits(features, weight, self.backbone.logit_scale, self.class_bias())
        with torch.autocast(device_type=features.device.type, enabled=False):
            logits = features.float() @ weight.T
            return logits + self.learnt["bias"] if "bias" in self.learnt else logits

    def fit_features(
        self,
        features: Features,
        validation: Features | None = None,
        *,
        c: float | None = None,
        lr: float | None = None,
        epochs: int | None = None,
        clap_weight: float | None = None,
        seed: int = 0,
        balance: ImageBalance | None = None,
    ) -> dict[str, Any]:
        """Fits the head. The same features and settings give the same head; with several processes, each fits it.

        `logistic` and `lp_plus_plus` take views as that many images; `text_init` and `clap` draw from all mixed.

        Args:
            features: of the training images, (V, N, D) unit norm.
            validation: of the validation images, (1, N, D); see `reads_validation`.
            c: inverse strength of `logistic`'s penalty; None chooses it on `validation` (`search_exponent`).
            lr: peak learning rate of `text_init` and `clap`; None is 0.1.
            epochs: of `text_init`, `clap` and `lp_plus_plus`; None is 300.
            clap_weight: multiplies the penalties of `clap`; None is 1, and 0 makes it `text_init`.
            seed: of the order of images in `text_init` and `clap`.
            balance: of groups or classes among the N images, see `check_balance`; None for none.

        Returns:
            JSON-able: `seconds`, `schedule` (in words), `chosen` (settings used, and what followed from the data),
            `validation_used_for` (in words).

        Raises:
            ConfigError: a setting is out of range or not one of this head, or C is to be chosen without validation
                images.
            DataError: the features are of another backbone, there are none, or labels do not fit.
            TrainingError: the weights are not finite.

        Warns:
            UserWarning: `logistic` has classes without a training image, which it can then never predict.
        """
        settings = self.fit_settings(c=c, lr=lr, epochs=epochs, clap_weight=clap_weight)
        self.check_balance(balance)
        self._check(features, "training")
        started = time.perf_counter()
        with torch.no_grad(), torch.autocast(device_type=self.learnt["weight"].device.type, enabled=False):
            if self.kind == "logistic":
                info = self._fit_logistic(features, validation, settings["c"], balance)
            elif self.kind == "lp_plus_plus":
                info = self._fit_lp_plus_plus(features, validation, int(settings["epochs"]))
            else:
                info = self._fit_from_text(features, settings, seed, balance)
        return {"seconds": time.perf_counter() - started, "validation_used_for": "nothing", **info}

    def published(self, shots: int, images_per_class: int) -> LinearSchedule:
        """Returns the published settings of the head."""
        return LinearSchedule(views=PUBLISHED_VIEWS[self.kind], **settings_of_fit(self.kind, {}))

    def schedule(self, shots: int, *, images_per_class: int = 0, preset: Preset = "paper", **given: Any) -> Any:
        """See `Method.schedule`; a setting that the head does not have is refused."""
        plan = super().schedule(shots, images_per_class=images_per_class, preset=preset, **given)
        self.fit_settings(**{name: given.get(name) for name in ("c", "lr", "epochs", "clap_weight")})
        return plan

    def _without_validation(self, given: dict[str, Any]) -> dict[str, Any]:
        if self.kind != "logistic" or given.get("c") is not None:
            return given
        warnings.warn(
            f"C of the logistic head is chosen on validation images, and there are none: it is {FIXED_C:g}. Give "
            "fit(x, y, validation=(x, y)), or c",
            stacklevel=3,
        )
        return {**given, "c": FIXED_C}

    def _learn(self, support: Support, schedule: LinearSchedule, loop: Loop) -> dict[str, Any]:
        reads = self.reads_validation(schedule.c)
        given = {name: getattr(schedule, name) for name in settings_of_fit(self.kind, {})}
        balance = support.mitigation.fresh()
        info = self.fit_features(
            support.features(schedule.views, min_scale=schedule.min_scale), support.validation() if reads else None,
            **given, seed=support.seed, balance=balance,
        )  # fmt: skip
        return {**info, "mitigation": balance.describe()}

    def head(self) -> Head:
        """Returns the head on image features; text_init and clap compare directions, times the logit scale."""
        if self.kind in ("text_init", "clap"):
            return super().head()
        weight = self._weight()
        bias = self.learnt["bias"] if "bias" in self.learnt else torch.zeros(len(weight), device=weight.device)
        return Head(self.encoder, weight.detach(), bias.detach(), 1.0, sigmoid=self.objective == "sigmoid")

    def fit_settings(
        self,
        *,
        c: float | None = None,
        lr: float | None = None,
        epochs: int | None = None,
        clap_weight: float | None = None,
    ) -> dict[str, Any]:
        """Returns the settings of `fit` that this head has: those given, and the published values for the others.

        Raises:
            ConfigError: a given setting is not one of this head, or is out of range.
        """
        return settings_of_fit(self.kind, {"c": c, "lr": lr, "epochs": epochs, "clap_weight": clap_weight})

    def reads_validation(self, c: float | None = None) -> bool:
        """Whether `fit` uses validation images: `logistic` without `c`, and `lp_plus_plus` as its code has it."""
        return (self.kind == "logistic" and c is None) or (self.kind == "lp_plus_plus" and self.reading == "code")

    def check_mitigation(self, mitigation: Mitigation) -> None:
        """See `check_balance`."""
        self.check_balance(mitigation)

    def check_balance(self, balance: ImageBalance | None) -> None:
        """Refuses a balance of groups or classes that the head cannot take.

        Raises:
            ConfigError: `lp_plus_plus` with any (its start and its step sizes follow from all images alike), or
                `logistic` with another than fixed weights (it sees all images at once, so that nothing is drawn and
                no group's turn comes).
        """
        check_balance_of(self.kind, balance)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns what `fit` learns: the weights, with the biases (logistic), or alpha and biases (lp_plus_plus)."""
        return list(self.learnt.values())

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the learnt tensors, and the (C, D) text features where logits are made with them (lp_plus_plus)."""
        state: dict[str, Tensor] = {name: self.learnt[name].detach() for name in self.learnt}
        return state | {"text": self.text} if self.kind == "lp_plus_plus" else state

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.adapter_state()
        check_state(state, {name: tensor.shape for name, tensor in own.items()}, f"a linear probe ({self.kind})")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def class_weights(self) -> Tensor:
        """Returns the (C, D) unit-norm direction of each class's weights (0 for a class `logistic` has not seen)."""
        return F.normalize(self._weight(), dim=-1)

    def class_bias(self) -> Tensor | None:
        """Returns the (C,) bias of the sigmoid objective; None under softmax."""
        return self.learnt["bias"].detach() if self.objective == "sigmoid" else None

    def _weight(self) -> Tensor:
        """(C, D) weights that multiply the features."""
        weight = self.learnt["weight"]
        return weight + self.learnt["alpha"][:, None] * self.text if self.kind == "lp_plus_plus" else weight

    def _check(self, features: Features, part: str) -> None:
        check_features(features, self.backbone)
        if not len(features):
            raise DataError(f"there are no {part} images to fit a linear head on")
        low, high = int(features.labels.min()), int(features.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise DataError(
                f"the {part} images have label ids {low}..{high}; this head has {len(self.class_names)} classes, "
                f"0..{len(self.class_names) - 1}"
            )

    def _fit_logistic(
        self, features: Features, validation: Features | None, c: float | None, balance: ImageBalance | None
    ) -> dict[str, Any]:
        x, y, shown, known = _stacked(features, len(self.class_names))
        rows, labels = x.numpy(), y.numpy()
        fixed = None if balance is None or balance.weights is None else balance.weights.double().numpy()
        weights = None if fixed is None else np.tile(fixed, len(features.values))
        fit_at = partial(fit_logistic, rows, labels, len(self.class_names), weights=weights)
        if self.objective == "sigmoid":
            fit_at = partial(
                fit_each_class, rows, shown.numpy(), None if known is None else known.numpy(), weights=weights
            )
        chosen: dict[str, Any] = {}
        best = c
        if best is None:
            if validation is None or not len(validation):
                raise ConfigError(
                    "C is to be chosen on the validation images, and there are none. Give it (--C; 10 is of the right "
                    "order for unit-norm features), or fewer --shots, so that images are left for validation."
                )
            self._check(validation, "validation")
            score, what = self._scorer(validation)
            exponent, tried = search_exponent(lambda e: score(fit_at(c=10.0**e)))
            best = 10.0**exponent
            chosen[f"validation_{what}"] = tried[exponent][0]
            chosen["tried"] = [{"C": 10.0**e, what: a, "loss": loss} for e, (a, loss) in tried.items()]
        if self.objective == "softmax":
            warn_of_unseen(labels, self.class_names)
        fit = fit_at(c=best)
        self._take(weight=torch.from_numpy(fit.weight), bias=torch.from_numpy(fit.bias))
        return {
            "schedule": "L-BFGS from zero, at most 1000 iterations",
            "chosen": {"C": best, **chosen, "iterations": fit.iterations, "converged": fit.converged},
            "validation_used_for": "choosing C" if chosen else "nothing",
        }

    def _scorer(self, validation: Features) -> tuple[Callable[[Any], tuple[float, float]], str]:
        """What tells how good a logistic fit is on validation images, (score, loss), and the name of the score."""
        x, y, shown, known = _stacked(validation, len(self.class_names))
        judged, truth = x.numpy(), y.numpy()
        if self.objective == "softmax":
            return lambda fit: score_logits(fit.logits(judged), truth), "accuracy"

        def score(fit: Any) -> tuple[float, float]:
            logits = torch.from_numpy(fit.logits(judged))
            return mean_auc(logits, shown, known), binary_loss(logits, shown, known)

        return score, "auc"

    def _fit_from_text(
        self, features: Features, settings: Mapping[str, Any], seed: int, balance: ImageBalance | None
    ) -> dict[str, Any]:
        scale = float(self.backbone.logit_scale)
        labels = features.labels.to(self.text.device)
        chosen: dict[str, Any] = {
            **settings, "batch_size": BATCH_SIZE, "views": len(features.values), "start_norm": self.start_norm
        }  # fmt: skip
        penalty = None
        if self.kind == "clap":
            member, _ = marks_of(features.labels, len(self.text), features.multi_hot)
            confidence = zero_shot_confidence(features.values, member.to(self.text.device), self.text, scale)
            penalty = settings["clap_weight"] * confidence
            chosen["lambda_mean"], chosen["lambda_min"], chosen["lambda_max"] = (
                float(v) for v in (confidence.mean(), confidence.min(), confidence.max())
            )
        learnt: dict[str, Tensor] = {}
        if self.objective == "sigmoid":
            start = ClassBias(self.backbone, len(self.class_names))
            start.begin(features, self.text, self.backbone.logit_scale)
            learnt["bias"] = start.start
        weight = fit_from_text(
            features.values, labels, self.text, scale, start_norm=self.start_norm, penalty=penalty, lr=settings["lr"],
            epochs=settings["epochs"], batch_size=BATCH_SIZE, seed=seed, balance=balance, bias=learnt.get("bias"),
            marks=features.multi_hot,
        )  # fmt: skip
        self._take(weight=F.normalize(weight, dim=-1), **learnt)
        return {
            "schedule": f"SGD (momentum 0.9) in batches of {BATCH_SIZE}, {settings['epochs']} epochs of a cosine from "
            f"{settings['lr']:g}, the first at 1e-5, from weights of norm {self.start_norm:.3g}; last step",
            "chosen": chosen,
        }

    def _fit_lp_plus_plus(self, features: Features, validation: Features | None, epochs: int) -> dict[str, Any]:
        x, y = (t.to(self.text.device) for t in _stacked(features, len(self.text))[:2])
        judged = None
        if self.reads_validation() and validation is not None and len(validation):
            self._check(validation, "validation")
            rows, truth = _stacked(validation, len(self.text))[:2]
            judged = rows.to(self.text.device), truth.to(self.text.device)
        lr_w, lr_alpha = step_sizes(x, self.text)
        fitted = fit_lp_plus_plus(
            x, y, self.text, lr_w=lr_w, lr_alpha=lr_alpha, epochs=epochs, reading=self.reading, validation=judged
        )
        learnt = {"weight": fitted.weight, "alpha": fitted.alpha}
        self._take(**learnt, **({"bias": fitted.bias} if self.reading == "code" else {}))
        kept = "last step" if judged is None else "the epoch that is best on validation images"
        return {
            "schedule": f"full-batch gradient descent (momentum 0.9), {epochs} epochs, alpha every tenth; {kept}",
            "chosen": {
                "reading": self.reading, "epochs": epochs, "epoch": fitted.epoch, "views": len(features.values),
                "lr_w": lr_w, "lr_alpha": lr_alpha, "alpha_mean": float(fitted.alpha.mean()),
                "alpha_spread": float(fitted.alpha.std(unbiased=False)),
            },
            "validation_used_for": "nothing" if judged is None else "choosing the epoch",
        }  # fmt: skip

    def _take(self, **learnt: Tensor) -> None:
        for name, value in learnt.items():
            if not torch.isfinite(value).all():
                raise TrainingError(
                    f"the {name} of the linear head ({self.kind}) came out not finite; try a tenth of the learning "
                    "rate, and check that the features are finite"
                )
        for name, value in learnt.items():
            self.learnt[name].copy_(value)


def _stacked(features: Features, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Views one below the other: (V·N, D) features, (V·N,) labels, (V·N, C) what is shown and known (`marks_of`)."""
    views = len(features.values)
    shown, known = marks_of(features.labels, num_classes, features.multi_hot)
    known = None if known is None else known.repeat(views, 1)
    return features.values.flatten(0, 1), features.labels.repeat(views), shown.repeat(views, 1), known
