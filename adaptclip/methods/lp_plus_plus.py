"""LP++: a linear probe that adds the text features with a learnt weight per class, without settings to choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

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
    for epoch in tqdm(range(epochs), desc="fitting", unit="epoch", disable=None, leave=False, delay=2):
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
