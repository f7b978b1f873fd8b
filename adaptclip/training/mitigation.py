# SPDX-License-Identifier: Apache-2.0
"""Mitigation of differences between groups or classes while training: by sampling, by weights, by group DRO.

One setting, the same in every recipe that learns by gradients:

    group-sampling:sex              every group fills the same share of an epoch
    group-sampling:sex+class        the same for every pair of group and class
    class-sampling                  the same for every class
    class-weights                   weights by inverse frequency: all classes weigh the same
    class-balanced:0.999            weights by the effective number of images, beta = 0.999
    group-dro:sex                   the loss follows the worst group; options ,step=0.01 and ,adjust=0

Images whose group is "unknown" are no group here: they keep their natural share, because balancing would show a handful
of them again and again. A few shots drawn by rule have equally many images per class already, so that what balances
classes changes something with all images (`--shots 0`) or short classes only.

Balance is an order of an epoch that shows each equally often, or weights of classes; group DRO (Sagawa et al. 2020)
moves weights towards the groups with the highest loss.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptclip.data.dataset import UNKNOWN, ImageDataset
from adaptclip.errors import ConfigError, agree, did_you_mean
from adaptclip.seeding import generator
from adaptclip.training.criterion import Objective, ObjectiveName, check_several, sigmoid_losses

if TYPE_CHECKING:
    from accelerate import Accelerator

    from adaptclip.types import Batch


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


class GroupDRO:
    """The online algorithm of Sagawa et al. 2020 (arXiv:1911.08731, algorithm 1), on batches.

    The paper draws a group uniformly and an image of it, multiplies that group's weight q_g by exp(step · loss),
    normalises q, and descends on q_g · loss. Here the sampler shows every group equally often, and a batch moves the
    weights of all groups in it at once:

        q_g ← q_g · exp(step · (L_g + adjust / sqrt(n_g)))      for each group g in the batch, then q ← q / Σ q
        loss = Σ over the groups in the batch of q_g · L_g

    with L_g the mean loss of the batch's images of g, and n_g the training images of g (the adjustment is the paper's
    eq. 5). Images of no group keep their natural share u of the loss: u · (their mean loss) + (1 - u) · (the above).

    A batch is that of all processes together: sums over groups are reduced before the weights move, so that every
    process holds the same weights and the number of processes changes nothing. Accumulated micro-batches each move
    the weights.

    Attributes:
        log_weights: (G,) float64 log q; the state that a checkpoint holds.
    """

    def __init__(
        self, place: Tensor, *, step: float = 0.01, adjust: float = 0.0, accelerator: Accelerator | None = None
    ) -> None:
        """Starts with equal weights.

        Args:
            place: (N,) int64 group of each training image, 0 to G - 1 without gaps, or -1 for none.
            step: the paper's step size of q, above 0.
            adjust: the paper's C, 0 or more.
            accelerator: whose processes share a batch; None where there is one.
        """
        counts = torch.bincount(place[place >= 0])
        self._num_groups, self._step, self._accelerator = len(counts), step, accelerator
        # One more place, at the end, takes the images of no group.
        self._place = torch.where(place >= 0, place, len(counts))
        self._of_none = float((place < 0).double().mean())
        self._margin = adjust / counts.double().sqrt()
        self.log_weights = torch.full((len(counts),), 1 / len(counts), dtype=torch.float64).log()

    def fresh(self) -> GroupDRO:
        """Returns another one of the same images and settings, whose weights are equal again."""
        other = copy.copy(self)
        other.log_weights = torch.full_like(self.log_weights, 1 / self._num_groups).log()
        return other

    @property
    def shares(self) -> Tensor:
        """(G,) float64 q, which sums to 1."""
        return self.log_weights.exp()

    def weigh(self, losses: Tensor, index: Tensor) -> Tensor:
        """Moves the groups' weights and returns those of the images.

        Args:
            losses: (B,) losses of this process's images, without gradients.
            index: (B,) positions among the N images.

        Returns:
            (B,) w such that the mean of w · loss over the images of all processes is the loss above.
        """
        place = self._place[index.cpu()].to(losses.device)
        member = F.one_hot(place, self._num_groups + 1).to(losses.dtype)  # (B, G + 1)
        sums: Tensor = torch.stack([losses @ member, member.sum(dim=0)])
        processes = 1
        if self._accelerator is not None and self._accelerator.num_processes > 1:
            processes = self._accelerator.num_processes
            reduced = self._accelerator.reduce(sums, reduction="sum")
            assert isinstance(reduced, Tensor)
            sums = reduced
        total, count = sums.cpu().double()
        mean = (total / count.clamp(min=1))[:-1]
        moved = torch.where(count[:-1] > 0, self._step * (mean + self._margin), 0.0)
        self.log_weights = torch.log_softmax(self.log_weights + moved, dim=0)
        share = torch.cat([(1 - self._of_none) * self.shares, torch.tensor([self._of_none], dtype=torch.float64)])
        of_image = share / count.clamp(min=1) * (len(losses) * processes)
        return of_image.to(losses.dtype).to(losses.device)[place]


Kind = Literal["group-sampling", "class-sampling", "class-weights", "class-balanced", "group-dro"]

CLASS = "class"
"""Stands for the label among the attributes that make up a group."""

OFTEN = 20
"""An image that is shown more often than this in an epoch is warned about."""


@dataclass(frozen=True)
class MitigationSetting:
    """What was asked for.

    Attributes:
        text: the setting as it was written.
        kind: one of Kind.
        attributes: what makes up a group, "class" for the label; empty where the kind is about classes.
        beta: of class-balanced, 0 up to but not including 1.
        step: of group-dro, how fast the weights of groups move, above 0.
        adjust: C of group-dro's adjustment C / sqrt(n) for small groups, 0 or more.
    """

    text: str
    kind: Kind
    attributes: tuple[str, ...] = ()
    beta: float = 0.0
    step: float = 0.01
    adjust: float = 0.0


def parse_mitigation(text: str) -> MitigationSetting | None:
    """Reads the setting; None for an empty one.

    Raises:
        ConfigError: an unknown kind or option (with the nearest name), an argument that is missing, not used or out of
            range.
    """
    if not text.strip():
        return None
    head, *options = (part.strip() for part in text.split(","))
    kind, _, argument = (part.strip() for part in head.partition(":"))
    if kind not in get_args(Kind):
        raise ConfigError(f"unknown mitigation {kind!r}. {did_you_mean(kind, get_args(Kind))}")
    values: dict[str, Any] = {"text": text.strip(), "kind": kind}
    if kind.startswith("group-"):
        values["attributes"] = tuple(name.strip() for name in argument.split("+"))
        if not all(values["attributes"]):
            raise ConfigError(f"{kind} needs the group attribute to balance, for example {kind}:sex; got {text!r}")
    elif kind == "class-balanced":
        values["beta"] = _number(argument, "beta of class-balanced", "from 0 to below 1, for example 0.999", 0, 1)
    elif argument:
        raise ConfigError(f"{kind} takes no argument, got {argument!r}: it balances the classes")
    for option in options:
        name, _, value = (part.strip() for part in option.partition("="))
        allowed = ("step", "adjust") if kind == "group-dro" else ()
        if name not in allowed:
            raise ConfigError(f"{kind} has no option {name!r}. {did_you_mean(name, allowed)}")
        values[name] = _number(value, name, {"step": "above 0", "adjust": "0 or more"}[name], 0, math.inf)
    if values.get("step") == 0:
        raise ConfigError("step must be a number above 0, got 0; Sagawa et al. use 0.01")
    return MitigationSetting(**values)


def _number(text: str, name: str, wanted: str, low: float, below: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value < below:
        raise ConfigError(f"{name} must be a number {wanted}; got {text!r}")
    return value


@dataclass(frozen=True, eq=False)
class Mitigation:
    """A setting applied to N training images; the loop asks it for the loss.

    Attributes:
        setting: what was asked for; None for plain training.
        place: (N,) int64 group or class that each image counts to, -1 for none; None for plain training.
        sizes: name of a group or class -> its images, in the order of the places.
        weights: (N,) float32 weight of each image in the loss, mean 1; None for equal ones.
        dro: group DRO, which holds state; None for another kind.
        objective: what a single image's loss is: cross-entropy, or under sigmoid the sum of the classes' binary ones.
    """

    setting: MitigationSetting | None = None
    place: Tensor | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    weights: Tensor | None = None
    dro: GroupDRO | None = None
    objective: ObjectiveName = "softmax"

    def fresh(self) -> Mitigation:
        """Returns the same for another stage of training: what moved while training starts anew."""
        return self if self.dro is None else replace(self, dro=self.dro.fresh())

    @property
    def strata(self) -> Tensor | None:
        """(N,) what the sampler shows equally often (see `balanced_order`); None samples as usual."""
        return None if self.weights is not None else self.place

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Scalar loss of a batch; its mean over the processes is the loss of the whole step.

        Args:
            logits: (B, C).
            batch: labels (B,), and index (B,) into the N images.
        """
        plain = self.weights is None and self.dro is None
        if self.objective == "sigmoid":
            losses = sigmoid_losses(logits, batch.labels, batch.multi_hot)
        elif plain:
            return F.cross_entropy(logits, batch.labels)  # torch's own mean differs in the last bits
        else:
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
        return losses.mean() if plain else (self.weigh(losses.detach(), batch.index) * losses).mean()

    def weigh(self, losses: Tensor, index: Tensor) -> Tensor:
        """Returns (B,) weights for the images of a batch; the loss is the mean of weight times loss.

        With group DRO this is where the groups' weights move, so call it once per batch, on every process.

        Args:
            losses: (B,) losses of the images, without gradients.
            index: (B,) positions among the N images.
        """
        if self.dro is not None:
            return self.dro.weigh(losses, index)
        if self.weights is not None:
            return self.weights[index.cpu()].to(losses)
        return torch.ones_like(losses)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what a checkpoint must hold: the groups' weights of group DRO, otherwise nothing."""
        return {} if self.dro is None else {"log_weights": self.dro.log_weights}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError: it is of another kind of mitigation or of other groups.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        got = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if own != got:
            raise ValueError(f"the mitigation should hold {own}, got {got}")
        if self.dro is not None:
            self.dro.log_weights = state["log_weights"].clone()

    def describe(self) -> dict[str, Any] | None:
        """Returns a JSON-able account for the report; None for plain training.

        "groups" has for each group or class its training images and its "weight": the weight of its images in the loss
        (class-weights, class-balanced), its share of the loss at the end (group-dro), or its share of what an epoch
        shows (sampling).
        """
        if self.setting is None or self.place is None:
            return None
        if self.dro is not None:
            values = self.dro.shares.tolist()
        elif self.weights is not None:
            values = [self.weights[self.place == i].mean().item() for i in range(len(self.sizes))]
        else:
            values = [sum(self.sizes.values()) / len(self.place) / len(self.sizes)] * len(self.sizes)
        groups = zip(self.sizes.items(), values, strict=True)
        return {
            "setting": self.setting.text,
            "groups": {name: {"images": size, "weight": value} for (name, size), value in groups},
        }


def build_mitigation(
    text: str,
    images: ImageDataset,
    whole: ImageDataset | None = None,
    *,
    accelerator: Accelerator | None = None,
    pairs: bool = False,
    objective: Objective | None = None,
) -> Mitigation:
    """Applies a setting to the training images, before anything is trained.

    Args:
        text: the setting; empty for plain training.
        images: the N images that are trained on.
        whole: the training part they were drawn from, whose groups must all be among them; None does not look.
        accelerator: whose processes share the batches; None where each process sees the whole batch.
        pairs: whether the loss contrasts pairs, so that there is no loss of a single image to weigh.
        objective: what a single image's loss is; None is softmax.

    Raises:
        ConfigError: the setting is not valid, or does not apply to this loss or these images: an attribute they do not
            have (with the nearest name), a single group or class, a group or class without training images, or classes
            where an image may show several. Without a setting, that images show several classes and the objective is
            the softmax.

    Warns:
        UserWarning: the images of a group or class come very often in an epoch, or nothing is left to balance.
    """
    setting, name = parse_mitigation(text), objective.name if objective else "softmax"
    check_several(images, name)
    if setting is not None and images.several and (not setting.attributes or CLASS in setting.attributes):
        raise ConfigError(
            f"{setting.text} balances classes that exclude each other, and these images may show several. Balance a "
            "group (group-sampling:ATTRIBUTE), or leave it out: the few-shot draw has equally many of each class"
        )
    if setting is None:
        return Mitigation(objective=name)
    if pairs and setting.kind not in ("group-sampling", "class-sampling"):
        raise ConfigError(
            f"{setting.kind} weighs the loss of single images, and a contrastive loss has none: every pair's loss "
            "depends on all pairs of the batch. Use group-sampling or class-sampling."
        )
    names, place = _places(setting, images)
    _check_whole(setting, images, whole)
    counts = np.bincount(place[place >= 0], minlength=len(names))
    sizes = dict(zip(names, counts.tolist(), strict=True))
    rows, weights, dro = torch.from_numpy(place), None, None
    if setting.kind in ("class-weights", "class-balanced"):
        of_class = (
            inverse_frequency(counts) if setting.kind == "class-weights"
            else effective_number_weights(counts, setting.beta)
        )  # fmt: skip
        weights = torch.from_numpy(of_class).float()[rows]
    else:
        _warn_of_repeats(setting, sizes)
    if setting.kind == "group-dro":
        dro = GroupDRO(rows, step=setting.step, adjust=setting.adjust, accelerator=accelerator)
    elif counts.min() == counts.max():
        warnings.warn(f"{setting.text} changes nothing: all {len(names)} have {counts.min()} images", stacklevel=2)
    return Mitigation(setting, rows, sizes, weights, dro, name)


def _places(setting: MitigationSetting, images: ImageDataset) -> tuple[list[str], np.ndarray]:
    """Returns the names of the G groups or classes and the (N,) int64 place of each image among them, -1 for none."""
    if not setting.attributes:
        return _classes(setting, images)
    columns: list[np.ndarray] = []
    for name in setting.attributes:
        if name in images.groups:
            columns.append(np.asarray(images.groups[name], dtype=str))
        elif name == CLASS:
            columns.append(np.asarray(images.class_names, dtype=str)[images.labels])
        elif not images.groups:
            raise ConfigError(
                f"{setting.text}: these images have no group attributes; name the columns in the card (columns: groups)"
            )
        else:
            has = did_you_mean(name, [*images.groups, CLASS], lead="There are")
            raise ConfigError(f"{setting.text}: no attribute {name!r}. {has}")
    table = np.stack(columns, axis=1)
    known = (table != UNKNOWN).all(axis=1)
    cells, inverse = np.unique(table[known], axis=0, return_inverse=True)
    names = [" & ".join(cell) for cell in cells.tolist()]
    if len(names) < 2:
        found = names[0] if names else UNKNOWN
        raise ConfigError(
            f"{setting.text}: all {len(images)} training images are {found!r}"
            f"{' or unknown' * bool(names and not known.all())}; there is nothing to balance. Take another "
            "attribute, or more images"
        )
    place = np.full(len(images), -1, dtype=np.int64)
    place[known] = inverse.reshape(-1)
    return names, place


def _classes(setting: MitigationSetting, images: ImageDataset) -> tuple[list[str], np.ndarray]:
    names, counts = images.class_names, images.class_counts()
    if len(names) < 2:
        raise ConfigError(
            f"{setting.text}: all images are of the one class {', '.join(names)}; there is nothing to balance"
        )
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if empty:
        raise ConfigError(
            f"{setting.text}: {len(empty)} of {len(names)} classes {agree(len(empty), 'has', 'have')} no training "
            f"image ({', '.join(empty[:5])}{', …' * (len(empty) > 5)}) and cannot be balanced; add images of them, or "
            "leave "
            "them out of the card"
        )
    return list(names), images.labels.astype(np.int64)


def _check_whole(setting: MitigationSetting, images: ImageDataset, whole: ImageDataset | None) -> None:
    """Raises ConfigError where the drawn images lack a group that the whole training part has."""
    for name in setting.attributes:
        if whole is None or name not in whole.groups:
            continue
        missing = sorted(set(whole.groups[name]) - set(images.groups[name]) - {UNKNOWN})
        if missing:
            raise ConfigError(
                f"{setting.text}: none of the {len(images)} training images drawn has {name} = {', '.join(missing)}, "
                "which the training part has; take more --shots (0 for all images)"
            )


def _warn_of_repeats(setting: MitigationSetting, sizes: Mapping[str, int]) -> None:
    name, fewest = min(sizes.items(), key=lambda item: item[1])
    times = sum(sizes.values()) / len(sizes) / fewest
    if times > OFTEN:
        warnings.warn(
            f"{setting.text} shows each of the {fewest} images of {name!r} {times:.0f} times per epoch; so few are "
            "learnt by heart. Join small groups in the card, or balance another attribute",
            stacklevel=3,
        )
