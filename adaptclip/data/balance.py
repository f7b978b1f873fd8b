"""Balance between classes or groups: the order of an epoch that shows each equally often, and weights of classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adaptclip.seeding import generator


def balanced_order(strata: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Returns the rows of one epoch, as many as there are images, in which every stratum has the same share.

    A stratum smaller than its share is gone through again, one that is larger in part: within an epoch the numbers of
    times that two of its images are shown differ by one at most, and which ones come once more is drawn anew in every
    epoch. Where the share is no whole number, strata take turns, so that over as many epochs as there are strata the
    shares are equal to the image. Rows of no stratum (-1) are shown once.

    Args:
        strata: (N,) int64 stratum of each row, 0 to G - 1 without gaps, or -1.
        seed: of the order.
        epoch: 0, 1, 2, …; the order is a function of (strata, seed, epoch) alone.

    Returns:
        (N,) int64 rows.
    """
    rng = generator(seed, "balanced order", epoch)
    shuffled = torch.randperm(len(strata), generator=rng)
    stratum = strata[shuffled]
    num_strata = int(strata.max()) + 1
    share, left = divmod(int((strata >= 0).sum()), num_strata)
    slots = [share] * num_strata
    for turn in range(left):
        slots[(epoch * left + turn) % num_strata] += 1
    parts = [shuffled[stratum < 0]]
    for number, count in enumerate(slots):
        own = shuffled[stratum == number]
        parts.append(own.repeat(-(-count // len(own)))[:count])
    rows = torch.cat(parts)
    return rows[torch.randperm(len(rows), generator=rng)]


def inverse_frequency(counts: np.ndarray) -> np.ndarray:
    """Class weights N / (C n_c), for which all classes weigh the same together; their mean over the images is 1.

    Args:
        counts: (C,) images n_c of each class; a class without images gets the weight 0, and is not counted in C.

    Returns:
        (C,) float64.
    """
    return _mean_one(np.divide(1.0, counts, where=counts > 0, out=np.zeros(len(counts))), counts)


def effective_number_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """Class weights by the effective number of images (Cui et al. 2019, arXiv:1901.05555, eq. 2).

    n images of a class count as E_n = (1 - beta^n) / (1 - beta), because new ones repeat more and more of what was
    seen; the weight is proportional to 1 / E_n. With beta = 0 all weights are equal, towards beta = 1 they become
    `inverse_frequency`. The paper makes the C weights sum to C; here their mean over the *images* is 1, so that the
    loss keeps its size and a learning rate its meaning. Ratios are the paper's.

    Args:
        counts: (C,) images n of each class; a class without images gets the weight 0.
        beta: 0 up to but not including 1.

    Returns:
        (C,) float64.
    """
    # expm1 and log1p keep digits where beta is close to 1.
    effective = -np.expm1(counts * np.log1p(beta - 1.0)) if beta > 0 else np.minimum(counts, 1.0)
    return _mean_one(np.divide(1.0, effective, where=counts > 0, out=np.zeros(len(counts))), counts)


def _mean_one(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return weights * counts.sum() / (weights * counts).sum()
