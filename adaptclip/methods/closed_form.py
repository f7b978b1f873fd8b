# SPDX-License-Identifier: Apache-2.0
"""Linear heads in closed form, from the features of the training images: GDA and SS-Text. Nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptclip.errors import ConfigError, DataError, did_you_mean
from adaptclip.methods.base import ClassBias, Head, batch_features, check_state, scaled_logits
from adaptclip.methods.choosing import (
    Choice,
    check_factor,
    choose_by_accuracy,
    choose_by_auc,
    class_means,
    support_rows,
    validation_rows,
)
from adaptclip.methods.method import Method, Schedule, Variant
from adaptclip.prompts import zero_shot_weights
from adaptclip.training.criterion import ObjectiveName, check_objective, marks_of

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch, Features

GDA_ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""Candidates for alpha of GDA, those of the published search."""

Mode = Literal["plus", "plain", "adaptive"]

_LARGEST_INVERSE_LAMBDA = 1000
"""SS-Text's code holds lambda at 0.001 or more."""

_NO_SPREAD = 1e-10
"""Summed squared distance of unit-norm rows from their mean that rounding alone can make."""


def gaussian_discriminant(rows: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Gaussian discriminant analysis with one covariance for all classes (Wang et al. 2024, arXiv:2402.04087).

    Classes are N(mu_c, Sigma) with equal priors, so the log posterior of a feature x is, up to what all classes share,

        x·w_c + b_c   with   w_c = P mu_c,   b_c = log(1 / C) - mu_c · P mu_c / 2

    The precision P comes from the empirical-Bayes ridge estimator of Kubokawa & Srivastava (2008), which exists for
    fewer rows than dimensions. With S the scatter of the R rows around their classes' means and Sigma = S / (R - 1):

        P = D · (S + tr(Sigma) · I)^-1

    What the paper leaves open:

    - S is zero where no class has two different rows (one image per class and one view of each). The scatter around
      the mean of all rows takes its place: an upper bound that still knows the directions. If that is zero too, P is
      the identity.
    - A class without rows gets the mean score of the other classes, so that its zero-shot logit decides.

    Args:
        rows: (R, D) float64 features; the augmented views of an image are rows of their own.
        labels: (R,) class ids.
        num_classes: C.

    Returns:
        Weights (C, D) and biases (C,), float64.

    Raises:
        DataError: there are no rows.
    """
    if len(rows) == 0:
        raise DataError("a Gaussian needs at least one image; got none")
    means, counts = class_means(rows, labels, num_classes)
    covariance = _ridge_covariance(rows - means[labels])
    if covariance is None:
        covariance = _ridge_covariance(rows - rows.mean(dim=0))
    weights = means if covariance is None else torch.linalg.solve(covariance, means.T).T
    biases = -torch.log(torch.tensor(float(num_classes), dtype=rows.dtype)) - (weights * means).sum(dim=1) / 2
    present = counts > 0
    weights[~present], biases[~present] = weights[present].mean(dim=0), biases[present].mean()
    return weights, biases


def gaussian_of_each_class(rows: Tensor, positive: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gaussian discriminants of each class against the rest, for images that may show several classes.

    The paper has one class per image. Of its model remains that all Gaussians share one covariance: images with class c
    are N(mu_c+, Sigma), those without it N(mu_c-, Sigma), and the log posterior odds of a feature x are

        x·w_c + b_c   with   w_c = P (mu_c+ - mu_c-),   b_c = log(n_c+ / n_c-) - w_c·(mu_c+ + mu_c-) / 2

    P is the paper's ridge estimator of the scatter within, averaged over the classes: the scatter of all rows around
    their mean, less the mean over the classes of (n_c+ n_c- / n_c) d_c d_cᵀ with d_c = mu_c+ - mu_c-. With two classes
    that exclude each other, and as many images of each, w is the difference of the two of `gaussian_discriminant`.

    Args:
        rows: (R, D) float64 features.
        positive: (R, C) bool, whether the image shows the class.
        known: (R, C) bool, whether that is known, or None; means are those of known rows.

    Returns:
        Weights (C, D) and biases (C,), float64; 0 for a class that all rows show, or none.

    Raises:
        DataError: there are no rows.
    """
    if len(rows) == 0:
        raise DataError("a Gaussian needs at least one image; got none")
    known = torch.ones_like(positive) if known is None else known
    shown, absent = (positive & known).to(rows.dtype), (~positive & known).to(rows.dtype)
    with_it, without = shown.sum(dim=0), absent.sum(dim=0)
    high = shown.T @ rows / with_it.clamp(min=1)[:, None]
    low = absent.T @ rows / without.clamp(min=1)[:, None]
    usable = (with_it > 0) & (without > 0)
    apart = torch.where(usable[:, None], high - low, 0.0)
    share = with_it * without / (with_it + without).clamp(min=1)
    between = (apart * share[:, None]).T @ apart / max(int(usable.sum()), 1)
    centred = rows - rows.mean(dim=0)
    left = centred.square().sum() - between.trace()
    covariance = _ridge_covariance(centred, between if left > _NO_SPREAD else None)
    weights = apart if covariance is None else torch.linalg.solve(covariance, apart.T).T
    odds = torch.log(with_it.clamp(min=1) / without.clamp(min=1))
    biases = torch.where(usable, odds - (weights * (high + low)).sum(dim=1) / 2, 0.0)
    return weights, biases


def _ridge_covariance(centred: Tensor, between: Tensor | None = None) -> Tensor | None:
    """Returns the inverse of P, (D, D), from the rows (R, D) less their means; None where they do not differ.

    Args:
        centred: the rows.
        between: (D, D) scatter between classes that is still in the rows, and is taken out.
    """
    total = centred.square().sum()
    if total <= _NO_SPREAD:
        return None
    num_rows, width = centred.shape
    scatter = centred.T @ centred
    if between is not None:
        scatter = scatter - between
        total = scatter.trace().clamp(min=_NO_SPREAD)
    return (scatter + total / (num_rows - 1) * torch.eye(width, dtype=centred.dtype)) / width


def text_anchored(rows: Tensor, labels: Tensor, text: Tensor, scale: float, mode: Mode = "plus") -> Tensor:
    """The head of SS-Text (Silva-Rodriguez et al. 2025, arXiv:2506.17500), anchored at the text features.

    It is the minimiser over W of

        -(1 / N) · sum over i of scale · f_i·w_(y_i)  +  sum over c of (lambda_c / 2) · |w_c - t_c|²

    that is, of the cross-entropy's linear part (what pulls a class to its images; the log-partition is left out) and a
    quadratic anchor. Its gradient is zero at

        w_c = t_c + scale / (lambda_c · N) · sum over i with y_i = c of f_i

    - "plus", SS-Text+, which the paper arrives at: lambda_c = 1 / (number of images of c), and 0.001 at the least; then
      each class is moved against d_c = 2 w_c - mean of w, to w_c - d_c / |d_c|.
    - "plain", SS-Text: lambda_c = 1 / N, and 0.001 at the least. From the first image on, a class's images then weigh
      `scale` times its text each, so that with one image per class it can be below zero-shot.
    - "adaptive": "plus" without the move, as this package had it before; in neither the paper nor its code.

    A class without images keeps its text feature exactly, but for the move.

    Args:
        rows: (N, D) float64 features f, one per image.
        labels: (N,) class ids.
        text: (C, D) float64 unit-norm text features t.
        scale: of the logits, 1 / temperature.
        mode: which of the three.

    Returns:
        (C, D) float64 weights, not normalised.

    Raises:
        DataError: there are no rows.
    """
    if len(rows) == 0:
        raise DataError("SS-Text needs at least one image; got none")
    means, counts = class_means(rows, labels, len(text))
    of_class = torch.full_like(counts, len(rows)) if mode == "plain" else counts
    inverse_lambda = of_class.clamp(max=_LARGEST_INVERSE_LAMBDA) if mode != "adaptive" else of_class
    weights = text + scale / len(rows) * (inverse_lambda * counts)[:, None] * means
    if mode != "plus":
        return weights
    return weights - F.normalize(2 * weights - weights.mean(dim=0), dim=-1)


@dataclass(frozen=True)
class GDASchedule(Schedule):
    """What GDA learns from (published code: 10 random crops of each image, of half its area or more).

    Attributes:
        views: sets of crops; 0 is the evaluation transform.
        min_scale: smallest crop as a share of the image's area; a larger limit of the card wins.
        choose: whether alpha is chosen on the validation images, where there are any and it was not given.
    """

    views: int = 10
    min_scale: float = 0.5
    choose: bool = True


class GDA(Method):
    """Zero-shot logits plus those of a Gaussian discriminant (Wang et al. 2024, "A hard-to-beat baseline").

        logit_c = scale · f·t_c  +  alpha · (f·w_c + b_c)

    with w and b from `gaussian_discriminant`. Before `fit`, and with alpha 0, it is the zero-shot classifier.

    Under the sigmoid objective, for images that may show several classes, w and b are `gaussian_of_each_class`, alpha
    is chosen by the mean AUC of the classes, and each class has a bias beside, the most likely one for the training
    images (`ClassBias`).

    Args:
        backbone: frozen CLIP.
        class_names: C names in the order of the label ids; None takes those of a `FeatureClip`.
        templates: prompts with one `{}`; their features are averaged per class.
        alpha: weight of the Gaussian's log posterior, 0 or more; None is 1, which adds it as it is, or is chosen on
            validation images where learning has any.
        objective: "sigmoid" judges each class by itself, see above.

    Raises:
        ConfigError: alpha is out of range.
        BackboneError: a prompt is longer than the context.
    """

    name = "gda"
    variants = {"gda": Variant(6, ladder=True)}
    schedule_type = GDASchedule
    text: Tensor
    weights: Tensor
    biases: Tensor

    def __init__(
        self,
        backbone: ClipBackbone | FeatureClip,
        class_names: Sequence[str] | None = None,
        *,
        templates: Sequence[str] = ("a photo of a {}.",),
        alpha: float | None = None,
        objective: ObjectiveName = "softmax",
    ) -> None:
        super().__init__()
        check_objective(objective)
        self.objective: ObjectiveName = objective
        self._fixed = alpha is not None
        self.alpha = check_factor("alpha", 1.0 if alpha is None else alpha)
        names = self._sit_on(backbone, class_names)
        self.templates = tuple(templates)
        text = zero_shot_weights(backbone, names, self.templates)
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("weights", torch.zeros_like(text), persistent=False)
        self.register_buffer("biases", torch.zeros_like(text[:, 0]), persistent=False)
        self.bias = ClassBias(backbone, len(names)) if objective == "sigmoid" else None

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        objective = {} if self.bias is None else {"objective": self.objective}
        return {"templates": list(self.templates), "alpha": self.alpha, **objective}

    def fit_features(self, features: Features) -> None:
        """Estimates means and covariance, in double precision.

        Args:
            features: of the training images, (V, N, D); each of the V · N rows counts as one. The published code takes
                V = 10 augmented views.

        Raises:
            DataError: there are no images, a label is out of range, or the features come from another backbone.
        """
        rows, labels = support_rows(features, self.backbone, len(self.text))
        views, flat = len(rows), rows.flatten(0, 1)
        if self.bias is None:
            weights, biases = gaussian_discriminant(flat, labels.repeat(views), len(self.text))
        else:
            shown, known = marks_of(labels, len(self.text), features.multi_hot)
            known = None if known is None else known.repeat(views, 1)
            weights, biases = gaussian_of_each_class(flat, shown.repeat(views, 1), known)
        self.weights.copy_(weights)
        self.biases.copy_(biases)

    def begin(self, features: Features) -> None:
        """Sets the bias of the sigmoid objective by the training images, for alpha as it is; softmax has none."""
        if self.bias is not None:
            rows, _ = support_rows(features, self.backbone, len(self.text))
            self.bias.match(self._logits(rows[0], self.alpha), features)

    def _logits(self, rows: Tensor, alpha: float) -> Tensor:
        """(N, C) logits of (N, D) rows in double precision, without the bias of the sigmoid objective."""
        zero_shot = self.backbone.logit_scale.cpu().double() * (rows @ self.text.cpu().double().T)
        return zero_shot + alpha * (rows @ self.weights.cpu().double().T + self.biases.cpu().double())

    def choose(self, validation: Features, *, alphas: Sequence[float] = GDA_ALPHAS) -> Choice:
        """Takes over the alpha that classifies the validation images best (ties: see `choose_by_accuracy`).

        Args:
            validation: features of images that `fit` has not seen, (1, N, D).
            alphas: candidates.

        Raises:
            ConfigError: a candidate is out of range, or there is none.
            DataError: there are no validation images, or the features do not fit.
        """
        rows, labels = validation_rows(validation, self.backbone, len(self.text))
        candidates = (({"alpha": alpha}, self._logits(rows, check_factor("alpha", alpha))) for alpha in alphas)
        if self.bias is None:
            choice = choose_by_accuracy(candidates, labels)
        else:
            choice = choose_by_auc(candidates, *marks_of(labels, len(self.text), validation.multi_hot))
        self.alpha = choice.values["alpha"]
        return choice

    def _learn(self, support: Support, schedule: GDASchedule, loop: Loop) -> dict[str, Any]:
        features = support.features(schedule.views, min_scale=schedule.min_scale)
        self.fit_features(features)
        validation = support.validation() if schedule.choose and not self._fixed else None
        info = {} if validation is None else self.choose(validation).info()
        self.begin(features)
        return {"schedule": "closed form", "chosen": {"alpha": self.alpha}, **info}

    def head(self) -> Head:
        """Returns the zero-shot head and the Gaussian's, added."""
        scale = float(self.backbone.logit_scale)
        weight = scale * self.text + self.alpha * self.weights
        bias = self.alpha * self.biases
        own = self.class_bias()
        return Head(self.encoder, weight, bias if own is None else bias + own, scale, sigmoid=own is not None)

    def class_bias(self) -> Tensor | None:
        """Returns the (C,) bias of the sigmoid objective; None under softmax."""
        return None if self.bias is None else self.bias().detach()

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features."""
        features = batch_features(batch, self.text.shape[1])
        zero_shot = scaled_logits(features, self.text, self.backbone.logit_scale, self.class_bias())
        with torch.autocast(device_type=features.device.type, enabled=False):
            return zero_shot + self.alpha * (features.float() @ self.weights.T + self.biases)

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (C, D) weights and (C,) biases of the Gaussian discriminant, and under sigmoid the bias."""
        bias = {} if self.bias is None else self.bias.state()
        return {"weights": self.weights, "biases": self.biases, **bias}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {name: value.shape for name, value in self.adapter_state().items()}, "GDA")
        self.weights.copy_(state["weights"])
        self.biases.copy_(state["biases"])
        if self.bias is not None:
            self.bias.load_state(state)

    def class_weights(self) -> Tensor:
        """Returns the (C, D) unit-norm text features; the Gaussian's weights are not among them."""
        return self.text


@dataclass(frozen=True)
class SSTextSchedule(Schedule):
    """What SS-Text learns from: in the published code the evaluation transform alone.

    Attributes:
        views: sets of crops, whose features are averaged; 0 is the evaluation transform.
        min_scale: smallest crop as a share of the image's area.
    """

    views: int = 0
    min_scale: float = 0.5


class SSText(Method):
    """A linear head in closed form between text and image features (SS-Text, arXiv:2506.17500).

    Images are compared with the direction of each class's `text_anchored` weights:

        logit_c = scale · f·w_c / |w_c|

    There is nothing to choose, so no validation image is used. Before `fit` it is the zero-shot classifier. The
    published code reads image features and prompts as its models give them, of unit norm or not; here all are.

    Args:
        backbone: frozen CLIP.
        class_names: C names in the order of the label ids; None takes those of a `FeatureClip`.
        templates: prompts with one `{}`; their features are averaged per class.
        mode: "plus" (SS-Text+) or "plain" (SS-Text); see `text_anchored`.

    Raises:
        ConfigError: an unknown mode.
        BackboneError: a prompt is longer than the context.
    """

    name = "ss_text"
    variants = {"ss_text": Variant(2, ladder=True)}
    schedule_type = SSTextSchedule
    text: Tensor
    weights: Tensor

    def __init__(
        self,
        backbone: ClipBackbone | FeatureClip,
        class_names: Sequence[str] | None = None,
        *,
        templates: Sequence[str] = ("a photo of a {}.",),
        mode: Mode = "plus",
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ConfigError(f"SS-Text has no mode {mode!r}. {did_you_mean(str(mode), get_args(Mode))}")
        names = self._sit_on(backbone, class_names)
        self.templates = tuple(templates)
        self.mode: Mode = mode
        text = zero_shot_weights(backbone, names, self.templates)
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("weights", text.clone(), persistent=False)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {"templates": list(self.templates), "mode": self.mode}

    def fit_features(self, features: Features) -> None:
        """Computes the head, in double precision.

        Args:
            features: of the training images, (V, N, D); an image's feature is the mean over its views. The published
                code takes the evaluation transform alone.

        Raises:
            DataError: there are no images, a label is out of range, or the features come from another backbone.
        """
        rows, labels = support_rows(features, self.backbone, len(self.text))
        scale = float(self.backbone.logit_scale)
        text = self.text.cpu().double()
        weights = text_anchored(rows.mean(dim=0), labels, text, scale, self.mode)
        kept = (weights == text).all(dim=1, keepdim=True)  # to the bit
        self.weights.copy_(torch.where(kept, text, F.normalize(weights, dim=-1)))

    def _learn(self, support: Support, schedule: SSTextSchedule, loop: Loop) -> dict[str, Any]:
        self.fit_features(support.features(schedule.views, min_scale=schedule.min_scale))
        return {"schedule": f"closed form ({self.mode})"}

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features."""
        features = batch_features(batch, self.text.shape[1])
        return scaled_logits(features, self.weights, self.backbone.logit_scale)

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (C, D) unit-norm class weights."""
        return {"class_weights": self.weights}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {"class_weights": self.weights.shape}, "SS-Text")
        self.weights.copy_(state["class_weights"])

    def class_weights(self) -> Tensor:
        """Returns the (C, D) unit-norm class weights."""
        return self.weights
