# SPDX-License-Identifier: Apache-2.0
"""Tip-Adapter: the training images themselves are kept as keys, and vote for their classes by similarity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.errors import ArtifactError, ConfigError
from adaptclip.methods.base import ClassBias, Head, batch_features, check_state, scaled_logits
from adaptclip.methods.choosing import (
    Choice,
    check_factor,
    choose_by_accuracy,
    choose_by_auc,
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

ALPHAS = tuple(round(0.1 * 500 ** (i / 19), 4) for i in range(20))
"""Candidates for alpha: 20 from 0.1 to 50, at equal ratios.

The published search has 20 equally spaced values from 0.1 to an upper end that its authors set for each data set, 3 on
ImageNet and up to 50 where the text alone does poorly. One grid for all data sets has to span all of these.
"""

TRAINING_ALPHAS = (1.17, 2.0, 3.0, 5.0, 10.0)
"""What Tip-Adapter-F's eleven published settings train at: 1.17 (ImageNet, Pets, Food, SUN), 2 (DTD, EuroSAT), 3
(Caltech, Cars, UCF), 5 (Aircraft), 10 (Flowers); its authors say nothing of how they were found."""

TRAINING_ALPHA, TRAINING_BETA = 3.0, 1.0
"""What Tip-Adapter-F trains at where no validation image chooses: the middle one of these, and the beta of all."""

BETAS = tuple(round(0.1 * 500 ** (i / 49), 4) for i in range(50))
"""Candidates for beta: 50 from 0.1 to 50, at equal ratios; in the published search, 200 up to 7 to 50 by data set."""


_ROWS = 1024
"""Rows compared with all keys at a time, to bound the memory."""


@dataclass(frozen=True)
class TipAdapterSchedule(Schedule):
    """How Tip-Adapter makes its keys and Tip-Adapter-F learns them (sec. 4.1 and the published code).

    Attributes:
        views: sets of crops whose mean is a key; 0 is the evaluation transform.
        min_scale: smallest crop as a share of the image's area; a larger limit of the card wins.
        choose: whether alpha and beta are chosen on the validation images, where there are any and neither was given.
        epochs: passes of Tip-Adapter-F over the training images; the paper gives EuroSAT 100.
        lr: peak learning rate of its AdamW (eps 1e-4, weight decay 0.01, which is torch's), a cosine per step.
        batch_size: its images per process and step.
    """

    views: int = 10
    min_scale: float = 0.5
    choose: bool = True
    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 256


class TipAdapter(Method):
    """Tip-Adapter and Tip-Adapter-F (Zhang et al. 2022, arXiv:2207.09519), a key-value cache beside zero-shot CLIP.

    With the unit-norm feature f of an image, the text features t_c, the keys k_j and their classes y_j (sec. 3.1):

        logit_c = scale · f·t_c  +  alpha · sum over j with y_j = c of exp(-beta · (1 - f·k_j))

    A key is the mean of the unit-norm features of one training image's augmented views, normalised again. Tip-Adapter
    keeps the keys; Tip-Adapter-F starts from them and learns them by gradient descent (and does not normalise them
    any more), with the values and the text features frozen. The scale is the backbone's own (100 in the paper).

    Tip-Adapter-F's published settings all train at beta 1, with an alpha of their data set (`TRAINING_ALPHAS`). Here
    `choose_training` takes from these the one with which the keys, before they are trained, classify the validation
    images best. The published code searches alpha and beta again after training, on the test images of most data sets,
    and keeps the epoch that is best on them; here `choose_trained` searches on the validation images, and leaves the
    pair of the training unless another is better by more than chance, and the last epoch is kept. It trains EuroSAT for
    100 epochs, all others for 20.

    Without keys (before it has learnt), and with alpha 0, it is the zero-shot classifier.

    Under the sigmoid objective, for images that may show several classes, the value of a key has a 1 for each class
    that its image shows (the paper's values are one-hot; what nobody knows is 0), alpha and beta are chosen by the mean
    AUC of the classes, and each class has a bias, the most likely one for the training images with their own keys
    covered (`ClassBias`), learnt further with the keys of Tip-Adapter-F.

    Args:
        backbone: frozen CLIP.
        class_names: C names in the order of the label ids; None takes those of a `FeatureClip`.
        templates: prompts with one `{}`; their features are averaged per class.
        alpha: weight of the cache against the text, 0 or more; None is the paper's 1, for Tip-Adapter-F 3.
        beta: sharpness of the similarity, 0 or more; None is the paper's 5.5, for Tip-Adapter-F 1.
        learn_keys: the keys are trainable (Tip-Adapter-F).
        num_keys: keys of a state that will be loaded; learning makes as many as there are images.
        objective: "sigmoid" judges each class by itself, see above.

    Raises:
        ConfigError: alpha, beta or num_keys is out of range.
        BackboneError: a prompt is longer than the context.
    """

    name = "tip_adapter"
    variants = {
        "tip_adapter": Variant(5, {"learn_keys": False}, ladder=True),
        "tip_adapter_f": Variant(
            7, {"learn_keys": True}, ladder=True, search={"lr": (2e-4, 1e-2), "epochs": [20, 50, 100]}
        ),
    }  # fmt: skip
    schedule_type = TipAdapterSchedule
    text: Tensor
    key_labels: Tensor
    values: Tensor

    def __init__(
        self,
        backbone: ClipBackbone | FeatureClip,
        class_names: Sequence[str] | None = None,
        *,
        templates: Sequence[str] = ("a photo of a {}.",),
        alpha: float | None = None,
        beta: float | None = None,
        learn_keys: bool = False,
        num_keys: int = 0,
        objective: ObjectiveName = "softmax",
    ) -> None:
        super().__init__()
        if num_keys < 0:
            raise ConfigError(f"num_keys must be 0 or more, got {num_keys}")
        check_objective(objective)
        self.objective: ObjectiveName = objective
        usual = (TRAINING_ALPHA, TRAINING_BETA) if learn_keys else (1.0, 5.5)
        self.alpha = check_factor("alpha", usual[0] if alpha is None else alpha)
        self.beta = check_factor("beta", usual[1] if beta is None else beta)
        self._fixed = alpha is not None or beta is not None
        names = self._sit_on(backbone, class_names)
        self.templates, self.learn_keys = tuple(templates), learn_keys
        text = zero_shot_weights(backbone, names, self.templates)
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("key_labels", torch.empty(0, dtype=torch.long), persistent=False)
        self.register_buffer("values", torch.empty(0), persistent=False)
        self.bias = ClassBias(backbone, len(names)) if objective == "sigmoid" else None
        # Keys of no class yet: they vote for none.
        empty = (num_keys, len(names)) if objective == "sigmoid" else (num_keys,)
        self._set_keys(torch.zeros(num_keys, text.shape[1]), torch.full(empty, -1))

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {
            "templates": list(self.templates),
            "alpha": self.alpha,
            "beta": self.beta,
            "learn_keys": self.learn_keys,
            "num_keys": len(self.keys),
            **({"objective": self.objective} if self.bias is not None else {}),
        }

    def fit_features(self, features: Features) -> None:
        """Makes the cache: one key per training image. Call it before an optimizer is built over the keys.

        Args:
            features: of the training images, (V, N, D); the paper takes V = 10 augmented views.

        Raises:
            DataError: there are no images, a label is out of range, or the features come from another backbone.
        """
        rows, labels = support_rows(features, self.backbone, len(self.text))
        if self.bias is not None:
            marks = features.multi_hot
            labels = F.one_hot(labels, len(self.text)) if marks is None else marks.cpu().long()
        self._set_keys(F.normalize(rows.mean(dim=0), dim=-1).float(), labels)

    def begin(self, features: Features) -> None:
        """Sets the bias of the sigmoid objective for the pair of alpha and beta; under softmax there is none.

        A training image would find itself among the keys, so its own key does not count.

        Args:
            features: of the training images, (V, N, D), whose keys these are.
        """
        if self.bias is None:
            return
        self.bias.offset.data.zero_()
        rows = support_rows(features, self.backbone, len(self.text))[0][0]
        keys, values = self.keys.detach().cpu().double(), self.values.cpu().double()
        logits = self.backbone.logit_scale.cpu().double() * (rows @ self.text.cpu().double().T)
        for part in torch.arange(len(rows)).split(_ROWS):
            votes = torch.exp(-self.beta * (1 - rows[part] @ keys.T))
            votes[torch.arange(len(part)), part] = 0
            logits[part] += self.alpha * (votes @ values)
        self.bias.match(logits, features)

    @property
    def learns_by_steps(self) -> bool:  # type: ignore[override]
        """Whether it is Tip-Adapter-F."""
        return self.learn_keys

    def _learn(self, support: Support, schedule: TipAdapterSchedule, loop: Loop) -> dict[str, Any]:
        features = support.features(schedule.views, min_scale=schedule.min_scale)
        self.fit_features(features)
        validation = support.validation() if schedule.choose and not self._fixed else None
        if not self.learn_keys:
            chosen = {} if validation is None else self.choose(validation).info()
            self.begin(features)
            return {"schedule": "closed form", "chosen": self._pair(), **chosen}
        # Tip-Adapter-F chooses what it trains at, and afterwards whether to use the keys with another pair.
        if validation is not None:
            self.choose_training(validation)
        self.begin(features)
        trained_at = f"alpha {self.alpha:g}, beta {self.beta:g}"
        loader = support.loader(features, batch_size=schedule.batch_size)
        num_steps = schedule.epochs * loader.steps_per_epoch
        loop(
            support.training(
                self, loader, num_steps, optimizer="adamw", lr=schedule.lr, weight_decay=0.01, eps=1e-4,
                schedule="cosine_per_step",
            )
        )  # fmt: skip
        before = self.alpha, self.beta
        info = {} if validation is None else self.choose_trained(validation).info()
        if before != (self.alpha, self.beta):
            self.begin(features)
        about = f"AdamW {schedule.lr:g}, cosine, {schedule.epochs} epochs ({num_steps} steps) at {trained_at}"
        return {"schedule": about, "chosen": self._pair(), **info}

    def _pair(self) -> dict[str, float]:
        return {"alpha": self.alpha, "beta": self.beta}

    def head(self) -> Head:
        """Returns the zero-shot head and the keys with their votes."""
        zero_shot = super().head()
        return replace(zero_shot, keys=self.keys, votes=self.alpha * self.values, sharpness=self.beta)

    def choose(
        self, validation: Features, *, alphas: Sequence[float] = ALPHAS, betas: Sequence[float] = BETAS
    ) -> Choice:
        """Takes over the pair of alpha and beta that classifies the validation images best.

        Ties are frequent with few images: see `choose_by_accuracy`; what is then still equal goes to the smaller
        beta, then the smaller alpha, where the grids ascend. The published code chooses on the test images of most
        data sets, which this does not.

        Args:
            validation: features of images that neither `fit` nor training has seen, (1, N, D).
            alphas: candidates for alpha.
            betas: candidates for beta.

        Raises:
            ConfigError: a candidate is out of range, or there is none.
            DataError: there are no validation images, or the features do not fit.
        """
        rows, labels = validation_rows(validation, self.backbone, len(self.text))
        alphas = [check_factor("alpha", alpha) for alpha in alphas]
        betas = [check_factor("beta", beta) for beta in betas]
        candidates = self._candidates(rows, alphas, betas)
        if self.bias is None:
            choice = choose_by_accuracy(candidates, labels)
        else:
            choice = choose_by_auc(candidates, *marks_of(labels, len(self.text), validation.multi_hot))
        self.alpha, self.beta = choice.values["alpha"], choice.values["beta"]
        return choice

    def choose_training(self, validation: Features) -> Choice:
        """Takes over what Tip-Adapter-F is to train at: one of `TRAINING_ALPHAS`, and beta 1.

        Args:
            validation: see `choose`, as for the errors.
        """
        return self.choose(validation, alphas=TRAINING_ALPHAS, betas=(TRAINING_BETA,))

    def choose_trained(self, validation: Features) -> Choice:
        """Takes over the best pair for trained keys, or stays with that of the training.

        A few validation images rarely tell pairs apart, so another pair has to be right on more of them by over one
        standard error of the present pair's accuracy (the rule of one standard error, Breiman et al. 1984).

        Args:
            validation: see `choose`, as for the errors.

        Returns:
            The search where its pair was taken over, else what is known of the present pair.
        """
        present = self.choose(validation, alphas=(self.alpha,), betas=(self.beta,))
        best = self.choose(validation)
        error = (present.accuracy * (1 - present.accuracy) / present.num_images) ** 0.5
        if best.accuracy - present.accuracy > error:
            return best
        self.alpha, self.beta = present.values["alpha"], present.values["beta"]
        return present

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features."""
        features = batch_features(batch, self.text.shape[1])
        bias = None if self.bias is None else self.bias()
        zero_shot = scaled_logits(features, self.text, self.backbone.logit_scale, bias)
        with torch.autocast(device_type=features.device.type, enabled=False):
            similarity = features.float() @ self.keys.float().T
            return zero_shot + self.alpha * (torch.exp(-self.beta * (1 - similarity)) @ self.values)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the keys of Tip-Adapter-F, and under sigmoid the offset of the bias; nothing for Tip-Adapter."""
        if not self.learn_keys:
            return []
        return [self.keys] if self.bias is None else [self.keys, self.bias.offset]

    def class_bias(self) -> Tensor | None:
        """Returns the (C,) bias of the sigmoid objective without gradients; None under softmax."""
        return None if self.bias is None else self.bias().detach()

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (K, D) keys of K training images and their (K,) class ids; under sigmoid (K, C) marks, a bias."""
        bias = {} if self.bias is None else self.bias.state()
        return {"keys": self.keys.detach(), "key_labels": self.key_labels, **bias}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        shapes = {name: value.shape for name, value in self.adapter_state().items()}
        check_state(state, shapes, f"a Tip-Adapter with {len(self.keys)} keys")
        labels = state["key_labels"]
        last, what = (len(self.text) - 1, "class ids") if self.bias is None else (1, "marks")
        if labels.is_floating_point() or bool(((labels < -1) | (labels > last)).any()):
            raise ArtifactError(
                f"'key_labels' in this state of a Tip-Adapter should be {what} from 0 to {last}; it was "
                "trained with other classes"
            )
        with torch.no_grad():
            self.keys.copy_(state["keys"])  # in place: an optimizer may hold the parameter
        self._set_labels(labels)
        if self.bias is not None:
            self.bias.load_state(state)

    def class_weights(self) -> Tensor:
        """Returns the (C, D) unit-norm text features; the keys are not among them."""
        return self.text

    def _candidates(
        self, rows: Tensor, alphas: Sequence[float], betas: Sequence[float]
    ) -> Iterator[tuple[dict[str, float], Tensor]]:
        """Yields each pair with its (N, C) logits, in double precision on the CPU."""
        similarity = rows @ self.keys.detach().cpu().double().T
        values = self.values.cpu().double()
        zero_shot = self.backbone.logit_scale.cpu().double() * (rows @ self.text.cpu().double().T)
        for beta in betas:
            cache = torch.exp(-beta * (1 - similarity)) @ values
            for alpha in alphas:
                yield {"alpha": alpha, "beta": beta}, zero_shot + alpha * cache

    def _set_keys(self, keys: Tensor, labels: Tensor) -> None:
        self.keys = nn.Parameter(keys.to(self.text.device), requires_grad=self.learn_keys)
        self._set_labels(labels)

    def _set_labels(self, labels: Tensor) -> None:
        """Keeps the keys' class ids (K,), of which -1 is none, or marks (K, C), and their values (K, C) of 0 and 1."""
        self.key_labels = labels.to(self.text.device)
        if self.bias is not None:
            self.values = (self.key_labels == 1).float()
            return
        self.values = (self.key_labels[:, None] == torch.arange(len(self.text), device=self.text.device)).float()
