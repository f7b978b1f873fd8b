# SPDX-License-Identifier: Apache-2.0
"""Fits of linear heads on cached features: logistic regression, gradient descent from the text features, LP++."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from adaptclip.errors import DataError, agree
from adaptclip.progress import progress_bar
from adaptclip.seeding import generator
from adaptclip.training.criterion import sigmoid_losses
from adaptclip.training.mitigation import balanced_order

Reading = Literal["code", "paper"]

MOMENTUM = 0.9
"""Momentum of the gradient steps on the class weights."""

ALPHA_EVERY = 10
"""Epochs between two steps on alpha."""


@dataclass(frozen=True)
class FittedLp:
    """What LP++ learnt: logits are f · (weight_c + alpha_c t_c) + bias_c.

    Attributes:
        weight: (C, D).
        alpha: (C,).
        bias: (C,); zero in the paper's reading.
        epoch: the epoch it was taken from, counted from 1.
    """

    weight: Tensor
    alpha: Tensor
    bias: Tensor
    epoch: int


def step_sizes(features: Tensor, text: Tensor) -> tuple[float, float]:
    """Step sizes that follow from the data (Huang et al. 2024, arXiv:2404.02285), in float64.

    lr_w = 4 N / (largest eigenvalue of FᵀF); lr_alpha = N / (4 · largest column sum of the squares of F Tᵀ). Both are
    inverses of bounds on the curvature of the mean cross-entropy.

    Args:
        features: F, (N, D) unit norm.
        text: T, (C, D) unit norm.

    Returns:
        (lr_w, lr_alpha).
    """
    exact = features.cpu().double()
    # FᵀF and FFᵀ have the same largest eigenvalue; the smaller matrix is quicker.
    gram = exact @ exact.T if len(exact) < exact.shape[1] else exact.T @ exact
    curvature = torch.linalg.eigvalsh(gram)[-1].item()
    cosines = (exact @ text.cpu().double().T).square().sum(dim=0).max().item()
    return 4 * len(features) / curvature, len(features) / (4 * cosines)


def initial_weights(features: Tensor, labels: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Where the descent starts (Huang et al. 2024).

    w_c is the sum of the features of class c; alpha is 250 / k · (mean over classes of the sum over the k images of
    class c of f · t_c), the same for all classes. Where classes have different numbers of images, each is divided by
    its own; classes without images start at w_c = 0 and are left out of the mean.

    Args:
        features: (N, D) unit norm.
        labels: (N,) class ids.
        text: (C, D) unit norm.

    Returns:
        w (C, D) and alpha (C,).
    """
    member = torch.nn.functional.one_hot(labels, len(text)).to(features.dtype)
    sums, count = member.T @ features, member.sum(dim=0)
    seen = count > 0
    mean_cosine = ((sums * text).sum(dim=1)[seen] / count[seen]).mean()
    return sums, (250 * mean_cosine).expand(len(text)).clone()


def fit_lp_plus_plus(
    features: Tensor,
    labels: Tensor,
    text: Tensor,
    *,
    lr_w: float,
    lr_alpha: float,
    epochs: int,
    reading: Reading = "code",
    validation: tuple[Tensor, Tensor] | None = None,
) -> FittedLp:
    """Full-batch descent on the mean cross-entropy of the logits f · (w_c + alpha_c t_c) + b_c.

    Every epoch takes a step on w, every tenth also one on alpha (without momentum). Paper and published code differ:

    - "paper": alpha's step is along that epoch's gradient; there is no bias, and the last epoch is kept. Alpha hardly
      moves.
    - "code": alpha's gradient is the sum over all epochs so far, since the code never clears it; a bias takes w's
      steps; and where there are validation images, the last of the epochs that are right on most of them is kept. The
      published numbers come from this. Its bias starts at random within 1 / sqrt(D), here at 0. It knows no class
      without images; here such a class keeps its alpha, and its bias is the mean of the others'.

    Args:
        features: (N, D) float32 unit-norm image features.
        labels: (N,) class ids.
        text: (C, D) unit-norm text features.
        lr_w: step size of w and the bias (`step_sizes`).
        lr_alpha: step size of alpha.
        epochs: gradient steps.
        reading: which of the two.
        validation: features (M, D) and labels (M,) for "code"; None or without images keeps the last epoch.
    """
    weight, alpha = initial_weights(features, labels, text)
    bias, velocity = torch.zeros_like(alpha), torch.zeros_like(weight)
    drift, uphill = torch.zeros_like(bias), torch.zeros_like(alpha)
    seen = torch.bincount(labels, minlength=len(text)) > 0
    cosines = text @ features.T  # (C, N): the products are quicker with the classes as rows
    columns = torch.arange(len(labels), device=labels.device)
    judged = validation if reading == "code" and validation is not None and len(validation[1]) else None
    best, kept = -1, FittedLp(weight, alpha, bias, 0)
    for epoch in progress_bar(range(epochs), desc="fitting", unit="epoch", leave=False, delay=2):
        error = torch.softmax(torch.addmm(alpha[:, None] * cosines + bias[:, None], weight, features.T), dim=0)
        error[labels, columns] -= 1
        slope = (error * cosines).sum(dim=1) / len(features)
        uphill = uphill + slope * seen if reading == "code" else slope
        velocity.mul_(MOMENTUM).add_(error @ features, alpha=1 / len(features))
        weight.sub_(velocity, alpha=lr_w)
        if reading == "code":
            bias.sub_(drift.mul_(MOMENTUM).add_(error.mean(dim=1)), alpha=lr_w)
            bias[~seen] = bias[seen].mean()
        if (epoch + 1) % ALPHA_EVERY == 0:
            alpha.sub_(uphill, alpha=lr_alpha)
        if judged is not None:
            rows, truth = judged
            hits = int((torch.addmm(bias, rows, (weight + alpha[:, None] * text).T).argmax(dim=1) == truth).sum())
            if hits >= best:
                best, kept = hits, FittedLp(weight.clone(), alpha.clone(), bias.clone(), epoch + 1)
    return kept if judged is not None else FittedLp(weight, alpha, bias, epochs)


MAX_ITERATIONS = 1000
"""Most L-BFGS iterations (Radford et al. 2021, app. A.3)."""

COARSE_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""Powers of ten at which the search for C starts; its range is from the first to the last."""

FINEST_STEP = 1 / 8
"""Resolution of the search for C in decades: 8 steps per decade."""

_NEVER = 104.0
"""exp(-104) is 0 in float32."""


class ImageBalance(Protocol):
    """What balances groups or classes of the N training images (`training.mitigation.Mitigation`)."""

    @property
    def weights(self) -> Tensor | None:
        """(N,) weight of each image in the loss, mean 1, where it is fixed; None otherwise."""
        ...

    @property
    def strata(self) -> Tensor | None:
        """(N,) what an epoch shows equally often, see `balanced_order`; None shows every image once."""
        ...

    def weigh(self, losses: Tensor, index: Tensor) -> Tensor:
        """Returns (B,) weights of the images `index` (B,), given their losses (B,)."""
        ...


@dataclass(frozen=True)
class LogisticFit:
    """A fitted logistic regression, its classes spread over all C.

    Attributes:
        weight: (C, D) float32.
        bias: (C,) float32.
        iterations: L-BFGS iterations taken.
        converged: whether they ended before MAX_ITERATIONS.
    """

    weight: np.ndarray
    bias: np.ndarray
    iterations: int
    converged: bool

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Returns (N, C) float64 logits of (N, D) features."""
        return features.astype(np.float64) @ self.weight.T.astype(np.float64) + self.bias


def fit_logistic(
    features: np.ndarray, labels: np.ndarray, num_classes: int, *, c: float, weights: np.ndarray | None = None
) -> LogisticFit:
    """Multinomial logistic regression with an L2 penalty by scikit-learn's L-BFGS, started at zero.

    It minimises c · (sum of the cross-entropies) + |W|²/2; the bias is not penalised. Two classes share one weight w in
    scikit-learn, which becomes the rows -w/2 and w/2 here. A class without images has the row 0 and a bias so low that
    its probability is 0 for every unit-norm feature.

    Args:
        features: (N, D) float32, unit norm.
        labels: (N,) class ids in 0..C-1.
        num_classes: C.
        c: inverse strength of the penalty, above 0.
        weights: (N,) factor of each image's cross-entropy; None for 1.

    Raises:
        DataError: the images are all of one class.
    """
    if len(np.unique(labels)) < 2:
        raise DataError("logistic regression needs training images of at least two classes, got one class")
    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by `converged`
        model.fit(features, labels, sample_weight=weights)
    rows, offsets = model.coef_, model.intercept_
    if len(rows) == 1:
        rows, offsets = np.concatenate([-rows, rows]) / 2, np.concatenate([-offsets, offsets]) / 2
    lowest = (offsets - np.linalg.norm(rows, axis=1)).min()
    weight = np.zeros((num_classes, features.shape[1]), dtype=np.float32)
    bias = np.full(num_classes, lowest - _NEVER, dtype=np.float32)
    weight[model.classes_], bias[model.classes_] = rows, offsets
    iterations = int(model.n_iter_.max())
    return LogisticFit(weight, bias, iterations, iterations < MAX_ITERATIONS)


def fit_each_class(
    features: np.ndarray,
    positive: np.ndarray,
    known: np.ndarray | None,
    *,
    c: float,
    weights: np.ndarray | None = None,
) -> LogisticFit:
    """A logistic regression for each class against all other images ("one against the rest"), see `fit_logistic`.

    It minimises for each class c · (sum of its binary cross-entropies) + |w|²/2. A class that all images show, or none,
    has the row 0 and the bias of a share of half an image.

    Args:
        features: (N, D) float32, unit norm.
        positive: (N, C) bool, whether an image shows the class.
        known: (N, C) bool, whether that is known, or None; a class is fitted to its known images.
        c: inverse strength of the penalty, above 0.
        weights: (N,) factor of each image's cross-entropy; None for 1.
    """
    num_classes = positive.shape[1]
    weight, bias = np.zeros((num_classes, features.shape[1]), np.float32), np.zeros(num_classes, np.float32)
    iterations = one_sided = 0
    for k in range(num_classes):
        rows = np.arange(len(features)) if known is None else np.flatnonzero(known[:, k])
        shown = positive[rows, k]
        if not 0 < shown.sum() < len(rows):
            half = min(0.5 / max(len(rows), 1), 0.1)
            share = min(max(float(shown.mean()) if len(rows) else 1 / max(num_classes, 2), half), 1 - half)
            one_sided += 1
            bias[k] = math.log(share / (1 - share))
            continue
        model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # told by `converged`
            model.fit(features[rows], shown, sample_weight=None if weights is None else weights[rows])
        weight[k], bias[k] = model.coef_[0], np.asarray(model.intercept_)[0]
        iterations = max(iterations, int(model.n_iter_.max()))
    if one_sided:
        warnings.warn(
            f"{one_sided} of {num_classes} {agree(num_classes, 'class', 'classes')} have no training images both with "
            "and without them: a logistic head answers the same for every image. text_init and clap know the words.",
            stacklevel=4,
        )
    return LogisticFit(weight, bias, iterations, iterations < MAX_ITERATIONS)


def warn_of_unseen(labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Warns of classes that no image of `labels` (N,) belongs to, from within a fit of a logistic head."""
    unseen = [class_names[i] for i in sorted({*range(len(class_names))} - {*labels.tolist()})]
    if unseen:
        listed = ", ".join(unseen[:5]) + (", …" if len(unseen) > 5 else "")
        warnings.warn(
            f"{len(unseen)} of {len(class_names)} classes {agree(len(unseen), 'has', 'have')} no training image "
            f"({listed}); a logistic head can never predict them. The heads text_init, clap and lp_plus_plus know "
            "every class by its words.",
            stacklevel=4,
        )


def search_exponent(score: Callable[[float], tuple[float, float]]) -> tuple[float, dict[float, tuple[float, float]]]:
    """CLIP's search for the strength of the penalty (Radford et al. 2021, app. A.3), on exponents of ten.

    It starts with 1e-6, 1e-4, …, 1e6 and tries the two neighbours of the best value at half the distance, again and
    again, until the distance is an eighth of a decade: at most 15 fits.

    Args:
        score: gives (validation accuracy, validation loss) of an exponent. Few images tie often: a tie in accuracy goes
            to the lower loss, and a tie in both to the smaller exponent, which is the stronger penalty.

    Returns:
        The best exponent, and the scores of all that were tried in the order of trying.
    """
    tried = {exponent: score(exponent) for exponent in COARSE_EXPONENTS}
    step = COARSE_EXPONENTS[1] - COARSE_EXPONENTS[0]
    while step > FINEST_STEP:
        step /= 2
        best = _best(tried)
        for exponent in (best - step, best + step):
            if COARSE_EXPONENTS[0] <= exponent <= COARSE_EXPONENTS[-1] and exponent not in tried:
                tried[exponent] = score(exponent)
    return _best(tried), tried


def _best(tried: Mapping[float, tuple[float, float]]) -> float:
    return min(tried, key=lambda exponent: (-tried[exponent][0], tried[exponent][1], exponent))


def score_logits(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns accuracy (0 to 1) and mean cross-entropy (nats) of (N, C) logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    loss = log_sum - shifted[np.arange(len(labels)), labels]
    return float((logits.argmax(axis=1) == labels).mean()), float(loss.mean())


def zero_shot_confidence(values: Tensor, member: Tensor, text: Tensor, scale: float) -> Tensor:
    """CLAP's weight of each class's penalty: how sure zero-shot CLIP is of the class on its own training images.

    lambda_c is the mean over the images of class c of the softmax probability that the zero-shot classifier gives to c
    (Silva-Rodríguez et al. 2024, arXiv:2312.12730). The mean is over all views of the images too. The paper has no
    class without images; here such a class gets 1, the most the formula can give, because its words are all that is
    known of it.

    Args:
        values: (V, N, D) unit-norm image features.
        member: (N, C) bool, whether an image is of the class; of several classes where it shows several.
        text: (C, D) unit-norm text features.
        scale: the logit scale.

    Returns:
        (C,) values in 0..1.
    """
    scaled, own = scale * text.T, member.to(text.dtype)
    total = torch.zeros(len(text), device=text.device)
    for view in values:
        total += (torch.softmax(view.to(text.device) @ scaled, dim=1) * own).sum(dim=0)
    count = own.sum(dim=0)
    mean = total / len(values) / count.clamp(min=1)
    return torch.where(count > 0, mean, torch.ones_like(mean))


def cosine_gradient(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    scale: float,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Gradient of the mean cross-entropy of the logits scale · cos(f, w_c) with respect to the weights.

    With p the softmax, y the labels as one-hot rows and g_c = sum over images of (p_c - y_c) f, it is
    scale / (B |w_c|) · (g_c - (g_c · w_c) w_c / |w_c|²): what is left of g_c across w_c.

    Args:
        features: (B, D) unit norm.
        labels: (B,) class ids.
        weight: (C, D) of any norm but 0.
        scale: the logit scale.
        weigh: turns the images' (B,) cross-entropies into the (B,) factors of their losses; None for 1.

    Returns:
        (C, D).
    """
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    # (C, B) and not (B, C): both products are quicker with the classes as rows.
    logits = (weight * (scale / norm)) @ features.T
    own = labels, torch.arange(len(labels), device=labels.device)
    error = torch.softmax(logits, dim=0)
    error[own] -= 1
    if weigh is not None:
        error *= weigh(torch.logsumexp(logits, dim=0) - logits[own])
    return _across(error, features, weight, norm, scale)


def sigmoid_gradient(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: float,
    weigh: Callable[[Tensor], Tensor] | None = None,
    marks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the mean of `sigmoid_losses` of the logits scale · cos(f, w_c) + b_c, as `cosine_gradient`.

    Args:
        features: see `cosine_gradient`, as for the others.
        labels: (B,).
        weight: (C, D).
        bias: (C,).
        scale: the logit scale.
        weigh: turns the images' (B,) losses into the (B,) factors of their losses; None for 1.
        marks: (B, C) where images may show several classes (`Batch.multi_hot`), or None.

    Returns:
        (C, D) of the weights and (C,) of the bias.
    """
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    logits = (weight * (scale / norm)) @ features.T + bias[:, None]
    error = torch.sigmoid(logits)
    if marks is None:
        error[labels, torch.arange(len(labels), device=labels.device)] -= 1
    else:
        error = (error - (marks == 1).T.to(error)) * (marks >= 0).T
    if weigh is not None:
        error *= weigh(sigmoid_losses(logits.T, labels, marks))
    return _across(error, features, weight, norm, scale), error.mean(dim=1)


def _across(error: Tensor, features: Tensor, weight: Tensor, norm: Tensor, scale: float) -> Tensor:
    """What is left of the errors' gradient across each class's weights, for a mean over the images."""
    gradient = error @ features
    radial = (gradient * weight).sum(dim=1, keepdim=True) / norm.square()
    return gradient.addcmul_(weight, radial, value=-1).mul_(scale / error.shape[1] / norm)


def epoch_rate(epoch: int, *, epochs: int, lr: float, warmup_lr: float = 1e-5) -> float:
    """Learning rate of an epoch, counted from 0: `warmup_lr` in the first, then CoOp's cosine over `epochs`."""
    return warmup_lr if epoch == 0 else lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def start_norm_of(scale: float) -> float:
    """The norm at which the weights of ZS-LP and CLAP start: the root of the logit scale.

    The logits see the weights' direction alone, so that a start of norm s changes how far they turn, by steps s² times
    smaller, and how hard CLAP holds them, by a pull s² times stronger. The published code starts from the text tower's
    raw output, whose norm is about 10 in OpenAI's models, all of which have the logit scale 100; the paper says nothing
    of it. The root of the scale is that 10, and it is known of every model: with s² equal to the scale, a step turns
    the weights by the learning rate times the mean error-weighted feature, whatever the scale, and CLAP's pull is in
    units of the logits. The raw norms of other models differ (the starter's is 43) for no reason of the classifier's.
    """
    return math.sqrt(scale)


def fit_from_text(
    values: Tensor,
    labels: Tensor,
    text: Tensor,
    scale: float,
    *,
    start_norm: float,
    penalty: Tensor | None,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    balance: ImageBalance | None = None,
    bias: Tensor | None = None,
    marks: Tensor | None = None,
) -> Tensor:
    """Gradient descent on the class weights of a cosine classifier that starts as the zero-shot one.

    This is ZS-LP, and with `penalty` CLAP (Silva-Rodríguez et al. 2024, arXiv:2312.12730): mini-batch SGD with momentum
    0.9 and without weight decay on

        cross-entropy(scale · cos(f, w_c)) + 1/C · sum over c of penalty_c · |w_c - s t_c|²

    from w_c = s t_c. As in the published code, an epoch has as many steps as the images without their views fill, one
    at least, and each takes `batch_size` rows from all views of all images mixed.

    Args:
        values: (V, N, D) float32 unit-norm image features.
        labels: (N,) class ids on the device of `text`.
        text: (C, D) unit-norm text features t.
        scale: the logit scale.
        start_norm: s, see `start_norm_of`.
        penalty: (C,) weights of the pull towards the start; None for none.
        lr: peak learning rate (`epoch_rate`).
        epochs: passes over as many rows as there are images.
        batch_size: rows per step.
        seed: of the order.
        balance: of groups or classes; None for none.
        bias: (C,) where it starts; given, the loss is `sigmoid_losses` and the bias is learnt in place.
        marks: (N, C) beside the labels, where images may show several classes; needs `bias`.

    Returns:
        (C, D) weights, not normalised.
    """
    start = start_norm * text
    weight, velocity = start.clone(), torch.zeros_like(text)
    drift = None if bias is None else torch.zeros_like(bias)
    pull = None if penalty is None else (2 / len(text) * penalty)[:, None]
    images, strata = len(labels), None if balance is None else balance.strata
    rows = values.flatten(0, 1)
    strata = None if strata is None else strata.repeat(len(values))
    used = min(max(images // batch_size, 1) * batch_size, len(rows))
    for epoch in progress_bar(range(epochs), desc="fitting", unit="epoch", leave=False, delay=2):
        rate = epoch_rate(epoch, epochs=epochs, lr=lr)
        if strata is None:
            order = torch.randperm(len(rows), generator=generator(seed, "order of the linear head", epoch))[:used]
        else:
            order = balanced_order(strata, seed=seed, epoch=epoch)[:used]
        features = rows.index_select(0, order.to(rows.device)).to(text.device)
        image = order % images
        of_epoch = labels[image.to(labels.device)]
        for first in range(0, used, batch_size):
            batch = slice(first, first + batch_size)
            weigh = None if balance is None else partial(balance.weigh, index=image[batch])
            if bias is None or drift is None:
                gradient = cosine_gradient(features[batch], of_epoch[batch], weight, scale, weigh)
            else:
                shown = None if marks is None else marks[image[batch].to(marks.device)].to(text.device)
                gradient, slope = sigmoid_gradient(features[batch], of_epoch[batch], weight, bias, scale, weigh, shown)
                bias.sub_(drift.mul_(0.9).add_(slope), alpha=rate)
            if pull is not None:
                gradient.addcmul_(weight - start, pull)
            velocity.mul_(0.9).add_(gradient)
            weight.sub_(velocity, alpha=rate)
    return weight
