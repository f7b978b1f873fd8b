"""Functions that fit an adapter to a few images, with the published settings as defaults.

They use the adapters, loaders and schedules that the recipes use. What a recipe decides in its `Config`, such a
function has as a keyword argument; a run can change it (`--settings coop.epochs=50`), and the result records it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from adaptclip.backbone import ClipBackbone
from adaptclip.data.card_block import Augmentation
from adaptclip.data.dataset import ImageDataset
from adaptclip.errors import ConfigError
from adaptclip.experiments.store import FeatureStore
from adaptclip.features import FeatureCache, training_crop
from adaptclip.methods import GDA, CoOp, LinearProbe, LoRA, SSText, TipAdapter, TwoStage, ZeroShotClassifier
from adaptclip.methods.base import Adapter
from adaptclip.methods.coop import published_length
from adaptclip.methods.support import Choice
from adaptclip.methods.two_stage import make_first_stage
from adaptclip.prompts import TEMPLATES
from adaptclip.training.loop import train_by_steps
from adaptclip.training.optim import build_optimizer, build_scheduler
from adaptclip.training.pixels import training_loader
from adaptclip.training.steps import FeatureLoader
from adaptclip.types import Features


@dataclass(frozen=True)
class Support:
    """All that a method may see of a case: images to learn from, images to choose settings with, names. No test image.

    Attributes:
        store: features of the frozen backbone.
        names: C class names as prompts say them.
        templates: the card's prompts.
        augmentation: the card's crops.
        images: labelled training images.
        held_out: validation images.
        pools: the pools of the store that the two belong to.
        shots: k.
        seed: of the order of images and of what a method draws.
        accelerator: of this process alone.
    """

    store: FeatureStore
    names: tuple[str, ...]
    templates: tuple[str, ...]
    augmentation: Augmentation
    images: ImageDataset
    held_out: ImageDataset
    pools: tuple[ImageDataset, ImageDataset]
    shots: int
    seed: int
    accelerator: Accelerator

    @property
    def backbone(self) -> ClipBackbone:
        """The frozen CLIP."""
        return self.store.backbone

    @property
    def shots_or_mean(self) -> int:
        """k, or for k = 0 (all images) their rounded mean per class."""
        return self.shots or max(1, round(len(self.images) / len(self.names)))

    def augment(self, min_scale: float = 0.0) -> Any:
        """Returns the card's crop; `min_scale` is a smallest share of the area that the method asks for."""
        return training_crop(self.backbone, self.augmentation, min_scale=min_scale)

    def features(self, views: int = 0, min_scale: float = 0.0) -> Features:
        """Returns the training features: of the evaluation transform, or of numbered crops."""
        augment = self.augment(min_scale) if views else None
        return self.store.get(self.images, self.pools[0], views=views, augment=augment)

    def validation(self, encoder: ClipBackbone | None = None) -> Features:
        """Returns the validation features, by default the frozen backbone's."""
        if encoder is None or encoder.image_digest == self.backbone.image_digest:
            return self.store.get(self.held_out, self.pools[1])
        return FeatureCache(None).get(encoder, self.held_out)


@dataclass(frozen=True)
class Fitted:
    """A fitted adapter, and what to tell about it (JSON-able: schedule, chosen, validation_used_for)."""

    adapter: Adapter
    told: dict[str, Any] = field(default_factory=dict)


def fit_zero_shot(support: Support) -> Fitted:
    """CLIP with the card's prompts; no image is learnt from."""
    return Fitted(ZeroShotClassifier(support.backbone, support.names, support.templates))


def fit_ensemble(support: Support) -> Fitted:
    """CLIP with the card's prompts and CLIP's ensemble of seven; no image is learnt from."""
    return Fitted(ZeroShotClassifier(support.backbone, support.names, ensemble_templates(support.templates)))


def ensemble_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Returns the card's templates and CLIP's seven, each once."""
    return tuple(dict.fromkeys((*templates, *TEMPLATES["imagenet"])))


def fit_linear(
    support: Support,
    *,
    head: str,
    views: int,
    c: float = 0.0,
    lr: float = 0.0,
    epochs: int = 0,
    clap_weight: float = -1.0,
    start_norm: float = 0.0,
    reading: str = "",
) -> Fitted:
    """A linear head (`LinearProbe`); 0 or nothing, and -1 for `clap_weight`, stand for "as published"."""
    adapter = LinearProbe(
        support.backbone, support.names, head=head, templates=support.templates,  # type: ignore[arg-type]
        start_norm=start_norm or None, reading=reading or None,  # type: ignore[arg-type]
    )  # fmt: skip
    settings = adapter.fit_settings(
        c=c or None, lr=lr or None, epochs=epochs or None, clap_weight=None if clap_weight < 0 else clap_weight
    )
    reads = adapter.reads_validation(c or None) and len(support.held_out) > 0
    told = adapter.fit(
        support.features(views, min_scale=0.5), support.validation() if reads else None, **settings, seed=support.seed
    )
    return Fitted(adapter, told)


def fit_tip(
    support: Support, *, learn: bool = False, views: int = 10, alpha: float = -1.0, beta: float = -1.0,
    epochs: int = 20, lr: float = 1e-3, batch_size: int = 256,
) -> Fitted:  # fmt: skip
    """Tip-Adapter, or with `learn` Tip-Adapter-F; -1 is as published, or chosen where there are validation images."""
    given = max(alpha, beta) >= 0
    adapter = TipAdapter(
        support.backbone, support.names, templates=support.templates, learn_keys=learn,
        alpha=alpha if alpha >= 0 else None, beta=beta if beta >= 0 else None,
    )  # fmt: skip
    features = support.features(views, min_scale=0.5)
    adapter.fit(features)
    choose = adapter.choose_training if learn else adapter.choose
    told: dict[str, Any] = {"schedule": "closed form", **({} if given else _choose(choose, support))}
    if learn:
        loader = FeatureLoader(features, batch_size=batch_size, seed=support.seed, accelerator=support.accelerator)
        # The published code leaves the weight decay at torch's 0.01.
        optimizer = build_optimizer(adapter.trainable_parameters(), name="adamw", lr=lr, weight_decay=0.01, eps=1e-4)
        steps = epochs * loader.steps_per_epoch
        scheduler = build_scheduler(
            optimizer, total_steps=steps, steps_per_epoch=loader.steps_per_epoch, kind="cosine_per_step"
        )
        train_by_steps(adapter, loader, steps, optimizer, scheduler, support.accelerator)
        told["schedule"] = (
            f"AdamW {lr:g}, cosine, {epochs} epochs ({steps} steps) at alpha {adapter.alpha:g}, beta {adapter.beta:g}"
        )
        told |= {} if given else _choose(adapter.choose_trained, support)
    return Fitted(adapter, told)


def fit_gda(support: Support, *, views: int = 10, alpha: float = 1.0) -> Fitted:
    """Gaussian discriminant analysis; alpha chosen on validation images where there are any."""
    adapter = GDA(support.backbone, support.names, templates=support.templates, alpha=alpha)
    adapter.fit(support.features(views, min_scale=0.5))
    return Fitted(adapter, {"schedule": "closed form", **_choose(adapter.choose, support)})


def _choose(choose: Callable[[Features], Choice], support: Support) -> dict[str, Any]:
    if not len(support.held_out):
        return {"chosen": {}, "validation_used_for": "nothing"}
    choice = choose(support.validation())
    return {"chosen": choice.values, "validation_used_for": choice.describe()}


def fit_ss_text(support: Support, *, mode: str = "plus") -> Fitted:
    """SS-Text+, or SS-Text with the mode "plain"; nothing is chosen."""
    adapter = SSText(support.backbone, support.names, templates=support.templates, mode=mode)  # type: ignore[arg-type]
    adapter.fit(support.features())
    return Fitted(adapter, {"schedule": f"closed form ({mode})"})


def fit_coop(
    support: Support, *, n_ctx: int = 16, ctx_init: str = "", kg_weight: float = 0.0, epochs: int = 0, views: int = 10,
    lr: float = 2e-3, batch_size: int = 0,
) -> Fitted:  # fmt: skip
    """CoOp, and with `kg_weight` KgCoOp; 0 epochs and a batch of 0 are the papers' (`published_length`)."""
    adapter = CoOp(
        support.backbone, support.names, n_ctx=n_ctx, ctx_init=ctx_init, kg_weight=kg_weight,
        templates=support.templates, seed=support.seed, shard_classes=False,
    )  # fmt: skip
    published = published_length(support.shots, kg_weight=kg_weight)
    epochs, batch_size = epochs or published[0], batch_size or published[1]
    views = min(views, epochs)
    features = support.features(views)
    loader = FeatureLoader(features, batch_size=batch_size, seed=support.seed, accelerator=support.accelerator)
    optimizer = build_optimizer(adapter.trainable_parameters(), name="sgd", lr=lr, weight_decay=5e-4)
    steps = epochs * loader.steps_per_epoch
    scheduler = build_scheduler(optimizer, total_steps=steps, steps_per_epoch=loader.steps_per_epoch)
    train_by_steps(adapter, loader, steps, optimizer, scheduler, support.accelerator)
    about = f"SGD {lr:g}, cosine per epoch, {epochs} epochs ({steps} steps) over {views} sets of crops"
    return Fitted(adapter, {"schedule": about})


def fit_lora(
    support: Support, *, steps: int = 0, lr: float = 2e-4, rank: int = 2, dropout: float = 0.25, batch_size: int = 32
) -> Fitted:
    """CLIP-LoRA; 0 steps are the paper's 500 per shot."""
    adapter = LoRA(
        support.backbone, support.names, rank=rank, dropout=dropout, seed=support.seed, templates=support.templates
    )
    steps = steps or 500 * support.shots_or_mean
    _train_towers(adapter, support, steps, lr, batch_size)
    return Fitted(adapter, {"schedule": f"AdamW {lr:g}, cosine, {steps} steps of {batch_size}"})


def fit_two_stage(
    support: Support, *, steps: int = 0, lr: float = 2e-4, head_lr: float = 2e-4, tower_share: float = 0.6,
    views: int = 10, tune: str = "layernorm", batch_size: int = 32,
) -> Fitted:  # fmt: skip
    """2SFS: the towers' LayerNorms (or bitfit, or lora), then a linear head; 0 steps are the paper's 300 per shot."""
    steps = steps or 300 * support.shots_or_mean
    first = round(tower_share * steps)
    if not 0 < first < steps:
        raise ConfigError(f"two-stage needs a step for each stage, got steps={steps} and tower_share={tower_share:g}")
    stage = make_first_stage(
        support.backbone, support.names, tune, seed=support.seed, templates=support.templates,  # type: ignore[arg-type]
    )  # fmt: skip
    _train_towers(stage, support, first, lr, batch_size)
    learnt = sum(p.numel() for p in stage.trainable_parameters())
    adapter = TwoStage(support.backbone, support.names, first=stage)
    features = FeatureCache(None).get(adapter.encoder, support.images, views=views, augment=support.augment())
    loader = FeatureLoader(features, batch_size=batch_size, seed=support.seed, accelerator=support.accelerator)
    _adamw_steps(adapter, loader, steps - first, head_lr, support)
    learnt += sum(p.numel() for p in adapter.trainable_parameters())
    about = (
        f"AdamW {lr:g} and {head_lr:g}, {first} steps of {tune}, {steps - first} of the head, batches of {batch_size}"
    )
    return Fitted(adapter, {"schedule": about, "trainable_parameters": learnt})


def _train_towers(adapter: Any, support: Support, steps: int, lr: float, batch_size: int) -> None:
    loader = training_loader(
        adapter, support.images, FeatureCache(None), augment=support.augment(), batch_size=batch_size,
        seed=support.seed, accelerator=support.accelerator,
    )  # fmt: skip
    _adamw_steps(adapter, loader, steps, lr, support)


def _adamw_steps(adapter: Any, loader: Any, steps: int, lr: float, support: Support) -> None:
    optimizer = build_optimizer(adapter.trainable_parameters(), name="adamw", lr=lr, weight_decay=1e-2)
    scheduler = build_scheduler(
        optimizer, total_steps=steps, steps_per_epoch=loader.steps_per_epoch, kind="cosine_per_step", final_lr=1e-6
    )
    train_by_steps(adapter, loader, steps, optimizer, scheduler, support.accelerator)


def with_templates(adapter: Any, names: Sequence[str], templates: Sequence[str]) -> Adapter:
    """A classifier of other names by the adapter's own towers: zero-shot with their text."""
    return ZeroShotClassifier(adapter.encoder, names, templates)


def with_ensemble(adapter: Any, names: Sequence[str], templates: Sequence[str]) -> Adapter:
    """The same with the ensemble of templates."""
    return ZeroShotClassifier(adapter.encoder, names, ensemble_templates(templates))


def with_context(adapter: Any, names: Sequence[str], templates: Sequence[str]) -> Adapter:
    """CoOp's learnt context around other names."""
    moved = CoOp(adapter.backbone, names, **adapter.settings, shard_classes=False)
    moved.load_adapter_state(adapter.adapter_state())
    return moved
