# SPDX-License-Identifier: Apache-2.0
"""The base of every method: settings, learning, scikit-learn's conventions, and what a trained one comes to."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

import adaptclip
from adaptclip.data.dataset import ImageDataset
from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.feature_clip import FeatureClip, in_order
from adaptclip.features import FeatureCache
from adaptclip.methods.base import Head, check_backbone, check_features, in_one_line, objective_of
from adaptclip.methods.examples import GivenFeatures, as_dataset, as_labels, as_marks, shots_of
from adaptclip.settings import check_numbers
from adaptclip.training.criterion import check_several
from adaptclip.training.support import Loop, Preset, Support, Training, check_preset, schedule_words, train_by_steps
from adaptclip.training.thresholds import ThresholdRule, Thresholds, choose_thresholds
from adaptclip.types import Batch, Features

if TYPE_CHECKING:
    from accelerate import Accelerator
    from typing_extensions import Self

    from adaptclip.data.card_block import Augmentation
    from adaptclip.training.mitigation import Mitigation

BATCH_ROWS = 1024
"""Rows of features per forward pass of `predict_proba`."""


@dataclass(frozen=True)
class Schedule:
    """How a method learns: nothing to set. Methods have their own, whose defaults are the published values."""

    def __str__(self) -> str:
        """The settings in words; what is None is as published and left out."""
        return schedule_words(self)


@dataclass(frozen=True)
class Variant:
    """A method under a name of its own, as the bench and the registry know it.

    Attributes:
        cost: place on the ladder from cheap to dear; jobs run in this order.
        settings: of the constructor, that make it this one; they cannot be changed by name.
        defaults: of the constructor, that it has unless told otherwise.
        ladder: whether the bench's `ladder` includes it.
        ensemble: whether CLIP's ensemble of seven prompts stands beside the card's.
        search: setting -> (low, high) searched at equal ratios, or a list of options.
    """

    cost: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ladder: bool = False
    ensemble: bool = False
    search: Mapping[str, tuple[float, float] | list[Any]] = field(default_factory=dict)


class Method(nn.Module):
    """A way to adapt a CLIP: an `nn.Module` on a frozen backbone, with scikit-learn's conventions around it.

        model = CoOp(clip, ["cat", "dog"]).fit(paths, labels)
        model.predict_proba(images)

    A subclass gives `name`, `forward`, `settings`, `adapter_state`, `_load_state`, and `_learn`; what it does not have
    (a schedule, a head, other names) it leaves as it is here.

    Attributes:
        name: key of the method in the registry and in artifacts.
        variants: name -> what the bench runs under it.
        schedule_type: dataclass of the settings of its training, whose defaults are published.
        smoke: settings of the short preset.
        learns_by_steps: whether there is a loop whose loss a mitigation can change.
        takes_new_names: whether `for_classes` can make a classifier of classes that were not learnt.
        is_clip: whether what it learnt is in the towers alone, so that it leaves as a checkpoint of a CLIP.
        stock_image_tower: whether its image tower is one that open_clip builds from a configuration.
        consumes: whether `forward` reads `batch.features` or `batch.images` in training.
        backbone: the frozen model it sits on, never changed.
        class_names: C names in the order of the class ids.
        thresholds_: after `fit` on images that may show several classes, from which probability each is named: the best
            F1 on the validation images, 0.5 without any; None otherwise.
        info_: after `fit`, what there is to tell of it, JSON-able: schedule, chosen, validation_used_for, seconds.
        classes_: after `fit`, what `predict` answers with: class ids, or names where it was given names.
    """

    name: ClassVar[str] = ""
    variants: ClassVar[Mapping[str, Variant]] = {}
    schedule_type: ClassVar[type[Any]] = Schedule
    smoke: ClassVar[Mapping[str, Any]] = {}
    learns_by_steps: ClassVar[bool] = False
    takes_new_names: ClassVar[bool] = False
    is_clip: ClassVar[bool] = False
    stock_image_tower: ClassVar[bool] = True
    consumes: Literal["features", "pixels"] = "features"

    backbone: Any
    class_names: tuple[str, ...]
    info_: dict[str, Any]
    thresholds_: Thresholds | None = None
    classes_: np.ndarray
    _given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remembers the arguments, by which `get_params` and `clone` know it."""
        made = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        given = dict(signature.bind_partial(None, *args, **kwargs).arguments)
        check_backbone(cls, given)
        given.pop("self", None)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        object.__setattr__(made, "_given", given)
        object.__setattr__(made, "_planned", {})
        return made

    @classmethod
    def sits_on_features(cls) -> bool:
        """Whether it can be built on a `FeatureClip`, whose class names are then its own."""
        names = inspect.signature(cls.__init__).parameters.get("class_names")
        return names is not None and names.default is None

    def _sit_on(self, backbone: Any, class_names: Sequence[str] | None) -> tuple[str, ...]:
        """Takes over the backbone and the names: those of a `FeatureClip` where none are given. Returns the names.

        Raises:
            ConfigError: there are no names.
            DataError: they are a text or a set instead of a list.
        """
        if class_names is None and isinstance(backbone, FeatureClip):
            class_names = backbone.class_names
        names = () if class_names is None else in_order(class_names, "class_names")
        if not names:
            raise ConfigError(f"{type(self).__name__} needs at least one class name, got none")
        self.backbone, self.class_names = backbone, names
        return names

    # --- what a subclass may have ---

    @property
    def encoder(self) -> Any:
        """The model that makes the features `forward` takes: the backbone itself, or the adapted one."""
        return self.backbone

    @property
    def learns_from(self) -> Literal["nothing", "features", "images"]:
        """What it learns from: nothing, features of the frozen tower, or images."""
        if type(self)._learn is Method._learn:
            return "nothing"
        return "features" if self.consumes == "features" and not self._changes_encoder else "images"

    @property
    def _changes_encoder(self) -> bool:
        return type(self).encoder is not Method.encoder

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same method again, beside backbone and class names."""
        raise NotImplementedError

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that learn; empty for a method without training."""
        return []

    def adapter_state(self) -> dict[str, Tensor]:
        """What must be kept, without anything of the backbone."""
        raise NotImplementedError

    def counts(self) -> tuple[int, int]:
        """Returns how many numbers it learns, and how many its state holds."""
        learnt, stored = self.trainable_parameters(), self.adapter_state().values()
        return sum(p.numel() for p in learnt), sum(t.numel() for t in stored)

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `adapter_state` returned. Raises ArtifactError when names or shapes differ."""
        self._load_state(state)
        self._is_fitted = True

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def class_weights(self) -> Tensor:
        """(C, D) unit-norm weights the images are compared with, without gradients."""
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """Scalar to add to the loss, computed in the last `forward`; 0 where there is no regulariser."""
        return torch.zeros((), device=self.backbone.device)

    def published(self, shots: int, images_per_class: int) -> Any:
        """Returns the published schedule for k shots (0: all images) with so many images per class on average."""
        return self.schedule_type()

    def schedule(self, shots: int, *, images_per_class: int = 0, preset: Preset = "paper", **given: Any) -> Any:
        """Returns how it learns: what is given, and the preset's values for the rest.

        Args:
            shots: k; 0 stands for all images.
            images_per_class: on average; needed for all images.
            preset: "paper", or "smoke" for the short one.
            **given: settings by name; None is "not given".

        Raises:
            ConfigError: an unknown preset, a setting that the method does not have (with the nearest name), or a number
                that no training can have.
        """
        known = [f.name for f in fields(self.schedule_type)]
        for name in given:
            if name not in known:
                raise ConfigError(f"{self._called} has no setting {name!r}. {did_you_mean(name, known)}")
        check_preset(preset)
        short = self.smoke if preset == "smoke" else {}
        chosen = {**short, **{name: value for name, value in given.items() if value is not None}}
        plan = replace(self.published(shots, images_per_class or max(shots, 1)), **chosen)
        check_numbers(plan)
        return plan

    def check_mitigation(self, mitigation: Mitigation) -> None:
        """Raises ConfigError for a mitigation that has nothing to change here."""
        if mitigation.setting is not None and not self.learns_by_steps:
            raise ConfigError(
                f"{self._called} is computed and not trained by steps, so that a mitigation ({mitigation.setting.text})"
                " has no loss to change"
            )

    def _learn(self, support: Support, schedule: Any, loop: Loop) -> dict[str, Any]:
        """Learns from a support set; calls `loop` for every stage that is learnt by steps. Returns what to tell."""
        return {}

    def head(self) -> Head:
        """Returns the fixed head on image features. Raises ConfigError where the method has none."""
        scale = float(self.backbone.logit_scale)
        weight = self.class_weights()
        bias = getattr(self, "class_bias", lambda: None)()
        bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias
        return Head(self.encoder, scale * weight, bias, scale, sigmoid=objective_of(self) == "sigmoid")

    def merged_model(self) -> Any:
        """Returns a stock open_clip model whose towers are those that it predicts with."""
        return self.backbone.model

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Method:
        """Returns a classifier of other classes by their names. Raises ConfigError where the method cannot."""
        self._lacks(
            "has a weight for each class it learnt and none for others, so it cannot name new classes. Methods that "
            "can keep a text tower to ask: zero-shot, CoOp, LoRA, two-stage"
        )

    def _lacks(self, what: str) -> NoReturn:
        raise ConfigError(f"{self._called} {what}")

    @property
    def _called(self) -> str:
        return type(self).__name__

    # --- learning ---

    def learn(self, support: Support, schedule: Any | None = None, loop: Loop | None = None) -> dict[str, Any]:
        """Learns from a support set; what `fit`, the recipes and the bench all call.

        Args:
            support: what it may see.
            schedule: from `schedule`; None is the published one.
            loop: takes the steps of a stage; None is the package's own, without logging and checkpoints.

        Returns:
            JSON-able: schedule (in words), chosen, validation_used_for, trainable_parameters, mitigation, and seconds
            without those of reading images and features.

        Raises:
            ConfigError: a setting is out of range, validation images are missing that it needs, or images may show
                several classes and the method's objective is the softmax.
            DataError: the images do not fit.
            TrainingError: a loss or gradient is not finite.
        """
        self.check_mitigation(support.mitigation)
        check_several(support.images, objective_of(self))
        if objective_of(self) != support.mitigation.objective:
            support.mitigation = replace(support.mitigation, objective=objective_of(self))
        schedule = schedule or self.schedule(support.shots, images_per_class=support.images_per_class)
        loop = loop or partial(train_by_steps, accelerator=support.accelerator)
        stages: list[Training] = []

        def run(training: Training) -> None:
            stages.append(training)
            loop(training)

        torch.manual_seed(support.seed)  # what dropout draws comes from torch's own generator
        started, read_s = time.perf_counter(), support.reading_s
        info = self._learn(support, schedule, run)
        seconds = time.perf_counter() - started - (support.reading_s - read_s)
        learnt = {id(p): p.numel() for own in (self, *(s.adapter for s in stages)) for p in own.trainable_parameters()}
        self._is_fitted = True
        self.eval()
        return {
            "schedule": "nothing is learnt", "chosen": {}, "validation_used_for": "nothing", "seconds": seconds,
            "trainable_parameters": sum(learnt.values()),
            **{f"{stage.name}_mitigation".lstrip("_"): stage.mitigation.describe() for stage in stages}, **info,
        }  # fmt: skip

    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        validation: Any = None,
        shots: int | None = None,
        preset: Preset = "paper",
        seed: int = 1,
        augmentation: Augmentation | None = None,
        accelerator: Accelerator | None = None,
        **settings: Any,
    ) -> Self:
        """Learns from labelled images or features, from the start.

        Args:
            x: N images (paths, PIL images, bytes, open files or pixels, see `data.given_images`), or for methods that
                learn from features (N, D) or (V, N, D) of them, V views of each image that are all learnt from.
            y: N class ids or class names; for images that may show several classes, which the objective sigmoid
                learns, N lists of names or an (N, C) matrix of 0 and 1, and -1 or NaN for what nobody knows; None where
                x brings them (`Features`, `ImageDataset`).
            validation: (x, y) of images to choose settings with, or what brings its labels; None for none.
            shots: k, by which papers set their lengths; None counts: k where every class has k images, else all (0).
            preset: "paper", or "smoke" for a short schedule.
            seed: of the order of images and of dropout; that of what is drawn at first is the constructor's.
            augmentation: of training crops, as a card has it; None crops 8 to 100 % of the area and mirrors half.
            accelerator: None makes one for the backbone's device, without autocast.
            **settings: of the schedule, for example `epochs=50`; by default the published ones.

        Returns:
            The method itself, in evaluation mode.

        Raises:
            ConfigError: an unknown setting, or one out of range.
            DataError: x or y do not fit.
            TrainingError: a loss or gradient is not finite.
        """
        from adaptclip.training.tracking import make_accelerator

        if self.__sklearn_is_fitted__():
            self._start_again()
        width = self.backbone.embed_dim
        for part in (x, validation):
            if isinstance(part, Features):
                check_features(part, self.backbone)
        several = objective_of(self) == "sigmoid"
        images = as_dataset(x, y, self.class_names, width=width, several=several)
        if y is None and not isinstance(x, Features | ImageDataset):
            raise ConfigError("y is missing: `fit` learns from labels, one class id or class name for each image")
        validation_images = images.select([])
        if validation is not None:
            pair = validation if isinstance(validation, tuple) and len(validation) == 2 else (validation, None)
            validation_images = as_dataset(*pair, self.class_names, width=width, what="validation X", several=several)
        self._check_source(images, validation_images)
        if accelerator is None:
            accelerator = make_accelerator("no", 1, cpu=self.backbone.device.type == "cpu")
        support = Support(
            self.backbone, images, validation_images, accelerator=accelerator, seed=seed, augmentation=augmentation,
            shots=shots_of(images) if shots is None else shots,
            source=None if images.has_pixels else GivenFeatures(),
        )  # fmt: skip
        given = {**self._planned, **{name: value for name, value in settings.items() if value is not None}}
        given = self._without_validation(given) if not len(validation_images) else given
        plan = self.schedule(support.shots, images_per_class=support.images_per_class, preset=preset, **given)
        self.to(accelerator.device)
        device = self.backbone.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self.info_ = self.learn(support, plan)
        named = images.several or (not isinstance(x, Features | ImageDataset) and np.asarray(y).dtype.kind in "OUS")
        self.classes_ = np.array(self.class_names) if named else np.arange(len(self.class_names))
        self.thresholds_ = None
        if images.several:
            self.choose_thresholds(support)
        return self

    def choose_thresholds(self, support: Support, rule: ThresholdRule | None = None) -> None:
        """Sets `thresholds_` on the validation images, by the best F1 unless a rule is given; 0.5 without any."""
        from adaptclip.methods.predicting import predict  # imports the towers, which features alone do not need

        features = support.validation(self.encoder)
        judged = None if features is None else predict(self, features, support.validation_images)
        self.thresholds_ = choose_thresholds(judged, self.class_names, rule or ThresholdRule())

    def _without_validation(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the settings for `fit` where there are no validation images to choose by."""
        return given

    def _check_source(self, images: ImageDataset, validation_images: ImageDataset) -> None:
        """Refuses features for a method that learns from images, and images where there is no tower."""
        for part in (images, validation_images):
            if not len(part):
                continue
            if part.has_pixels and isinstance(self.backbone, FeatureClip):
                self._lacks("sits on features that were computed elsewhere, without an image tower; give features")
            if not part.has_pixels and self.learns_from == "images":
                self._lacks("changes the image tower or crops images anew, so it learns from images and not features")
        if len(validation_images) and validation_images.has_pixels != images.has_pixels:
            self._lacks("takes training and validation as images, or both as features; got one of each")

    def _start_again(self) -> None:
        """Forgets what was learnt: builds itself anew from its arguments."""
        given, training = dict(self._given), dict(self._planned)
        type(self).__init__(self, **given)
        self._given, self._planned = given, training
        self._is_fitted = False

    # --- using it ---

    @torch.no_grad()
    def predict_proba(self, x: Any) -> np.ndarray:
        """Returns (N, C) float32 class probabilities, columns in the order of `class_names`.

        Rows sum to 1; under the sigmoid objective each probability is of its class by itself. A method that learns and
        has not learnt yet is refused (`ZeroShotClassifier` needs nothing).

        Args:
            x: images, or features of `encoder`, as `fit` takes them; of several views the first is judged.
        """
        if self.learns_from != "nothing" and not self.__sklearn_is_fitted__():
            self._lacks("has not learnt anything yet; call fit(x, y) first, or take ZeroShotClassifier")
        if isinstance(x, Features):
            check_features(x, self.encoder)
        images = as_dataset(x, None, self.class_names, width=self.encoder.embed_dim)
        if images.has_pixels and isinstance(self.backbone, FeatureClip):
            self._lacks("sits on features that were computed elsewhere, without an image tower; give features")
        source = FeatureCache(None) if images.has_pixels else GivenFeatures()
        features = source.get(self.encoder, images).values[0]
        device, training = self.backbone.device, self.training
        self.eval()
        index = torch.arange(len(features))
        parts = [
            self(Batch(labels=rows, index=rows, features=features[rows]).to(device)).float()
            for rows in index.split(BATCH_ROWS)
        ]
        self.train(training)
        logits = torch.cat(parts)
        return (logits.sigmoid() if objective_of(self) == "sigmoid" else logits.softmax(dim=1)).cpu().numpy()

    def predict(self, x: Any) -> np.ndarray:
        """Returns (N,) the most probable class of each: its id, or its name where `fit` was given names.

        Where it learnt from images that may show several classes: (N, C) int64 of 0 and 1, as scikit-learn does, 1
        where the probability reaches the class's threshold (`thresholds_`).
        """
        probs = self.predict_proba(x)
        if self.thresholds_ is not None:
            return (probs >= self.thresholds_.values).astype(np.int64)
        classes = getattr(self, "classes_", np.arange(len(self.class_names)))
        return classes[probs.argmax(axis=1)]

    def score(self, x: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Returns the accuracy, 0 to 1, as scikit-learn's classifiers do.

        Where it learnt from images that may show several classes, an image is right with exactly its classes (subset
        accuracy); what nobody knows counts for nothing.
        """
        brought = x if y is None and isinstance(x, Features | ImageDataset) else None
        labels = y if brought is None else brought.labels if brought.multi_hot is None else brought.multi_hot
        if labels is None:
            raise ConfigError("y is missing: an accuracy needs the true class of each image")
        found = self.predict_proba(x)
        if self.thresholds_ is not None:
            marks = as_marks(labels, self.class_names, len(found))
            if marks is None:
                self._lacks("learnt from images that may show several classes; give their lists of names, or (N, C)")
            right = (((found >= self.thresholds_.values) == (marks == 1)) | (marks < 0)).all(axis=1)
            told = (marks >= 0).any(axis=1)
            right, sample_weight = right[told], None if sample_weight is None else np.asarray(sample_weight)[told]
        else:
            right = found.argmax(axis=1) == as_labels(labels, self.class_names, len(found))
        return float(np.average(right, weights=sample_weight))

    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Writes an artifact that `adaptclip.load` reads.

        It was judged by no gate, and says so; a recipe or `judge` decides whether a model may be released.

        Args:
            path: the new folder.
            overwrite: replace an earlier artifact.

        Raises:
            StorageError: the folder exists already, or cannot be written.
        """
        adaptclip.save_model(self, path, overwrite=overwrite)  # its room comes after this one

    # --- scikit-learn's conventions ---

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns the constructor's arguments and the schedule's settings by name; None is "as published"."""
        parameters = inspect.signature(type(self).__init__).parameters
        own = {
            name: p.default for name, p in parameters.items()
            if name != "self" and p.kind is not p.VAR_KEYWORD and p.default is not p.empty
        }  # fmt: skip
        training = {f.name: None for f in fields(self.schedule_type) if f.name not in own}
        return {**own, **training, **self._given, **self._planned}

    def set_params(self, **params: Any) -> Self:
        """Changes arguments of the constructor, which builds it anew, or settings of the next `fit`."""
        known, schedule = self.get_params(), {f.name for f in fields(self.schedule_type)}
        own = set(inspect.signature(type(self).__init__).parameters)
        for name in params:
            if name not in known:
                raise ConfigError(f"{self._called} has no setting {name!r}. {did_you_mean(name, known)}")
        self._planned |= {name: value for name, value in params.items() if name in schedule and name not in own}
        changed = {name: value for name, value in params.items() if name in own}
        if changed:
            self._given = {**self._given, **changed}
            self._start_again()
        return self

    def __repr__(self) -> str:
        """One line: what it is, on which model, what was set, and whether it has learnt."""
        return in_one_line(self)

    def __sklearn_clone__(self) -> Method:
        """Returns one that has not learnt, on the same backbone."""
        other = type(self)(**self._given)
        other._planned = dict(self._planned)
        return other

    def __sklearn_is_fitted__(self) -> bool:
        """Whether it has learnt, or taken over what another learnt."""
        return bool(getattr(self, "_is_fitted", False))

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks of an estimator: a classifier, of features or images."""
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier", target_tags=TargetTags(required=True), classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=True, three_d_array=True),
        )  # fmt: skip
