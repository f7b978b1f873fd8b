"""Tip-Adapter, Tip-Adapter-F, GDA and SS-Text+: adapt with the training images' features, in seconds.

Paper     tip, tip-f  Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP", ECCV 2022, arXiv:2207.09519
          gda         Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", arXiv:2402.04087
          ss-text     Silva-Rodriguez et al., "Few-Shot, Now for Real", arXiv:2506.17500
Run       accelerate launch recipes/tip_adapter.py --card my_images/ --backbone ViT-B-16 --pretrained openai
          (--variant tip, tip-f, gda or ss-text)
Smoke     accelerate launch recipes/tip_adapter.py      (embedded card and model: no download, CPU, about a minute)
Expected  see README.md in this folder
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import adaptclip as ac
from adaptclip.errors import ConfigError, did_you_mean

METHODS = {"tip": "tip_adapter", "tip-f": "tip_adapter", "gda": "gda", "ss-text": "ss_text"}


@dataclass(frozen=True)
class Config:
    """Four ways to use the training images' features. Defaults follow the papers."""

    card: str = "digits"
    """Name in data_cards/, path of a card, or a folder of images with one folder per class."""
    data_root: Path | None = None
    """Folder that holds the card's files; the card's own folder if not given."""
    backbone: str = "starter"
    """open_clip architecture, hf-hub:ORG/NAME, local-dir:FOLDER, or starter (comes with the package)."""
    pretrained: str | None = None
    """open_clip weights tag or checkpoint file; not for the other spellings."""
    image_size: int = 0
    """Side of the pictures in pixels; 0 is the model's own, another resizes its position embeddings and says so."""
    shots: int = 16
    """Labelled training images per class; 0 means all."""
    rule: Literal["nested", "coop"] = "nested"
    """How the images are drawn: 1 shot is part of 2 and so on (nested), or as the published code does (coop)."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image does; what was skipped is listed."""
    seed: int = 1
    """Chooses the few-shot images and the order of images."""
    variant: Literal["tip", "tip-f", "gda", "ss-text"] = "tip-f"
    """The method; only tip-f trains, the others are computed."""
    choose: Literal["validation", "fixed"] = "validation"
    """Where alpha and beta come from: the few-shot validation images (tip-f: before and after training), or below."""
    alpha: float | None = None
    """Weight of the images against the text, for --choose fixed; not given 1, for tip-f 3; not used by ss-text."""
    beta: float | None = None
    """Sharpness of the similarity, for --choose fixed; not given 5.5, for tip-f 1; only tip and tip-f use it."""
    mode: Literal["plus", "plain"] = "plus"
    """Of ss-text: plus is SS-Text+, which its paper arrives at, plain is SS-Text."""
    views: int | None = None
    """Sets of random crops; 0 is the evaluation transform. Not given: the papers' 10, and 0 for ss-text."""
    min_scale: float = 0.5
    """Smallest crop as a share of the image's area; a larger smallest crop in the card wins."""
    epochs: int = 20
    """Passes of tip-f over the training images, one set of crops after the other; the paper gives EuroSAT 100."""
    lr: float = 1e-3
    """Peak learning rate of tip-f's AdamW (eps 1e-4)."""
    batch_size: int = 256
    """Images of tip-f per process and micro-step."""
    accumulate: int = 0
    """Micro-batches of that size per optimizer step; 0 does what accelerate launch was told, or 1."""
    mitigate: str = ""
    """Balance of groups or classes in tip-f's training, such as group-sampling:sex or class-weights; empty for none."""
    save_every: int = 100
    """Optimizer steps between checkpoints; one is also written every five minutes."""
    gates: str = "card"
    """card, a YAML file of gates, or report (judge by the card's gates, but do not let them decide the exit code)."""
    trackers: str = ""
    """Accelerate's trackers, separated by commas; metrics.jsonl is always written."""
    cache: Path = Path(".cache/features")
    """Image features, shared by all recipes, shots and seeds."""
    out: Path = Path("runs/tip_adapter")
    """Run folder: settings, metrics, predictions, report, artifact."""
    resume: bool = False
    """Go on with the run in `out`."""
    overwrite: bool = False
    """Replace the run in `out`."""


def main(cfg: Config) -> int:
    """Card → few-shot split → cached features → fit, choice on validation → predictions → report, gates, artifact."""
    check(cfg)
    accelerator = ac.make_accelerator("no", cfg.accumulate, trackers=cfg.trackers, out=cfg.out)
    ac.seed_everything(cfg.seed)

    card = ac.load_card(cfg.card)
    data = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed, rule=cfg.rule)
    few_shots, for_choice = split.select(data)
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, accelerator=accelerator)
    choose = cfg.choose == "validation" and cfg.variant != "ss-text"
    if choose and len(for_choice) == 0:
        how = "take the paper's with --choose fixed, fewer --shots, or a card with a validation part"
        raise ConfigError(f"card {card.name} leaves no validation images to choose alpha and beta on; {how}")
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    adapter = build(cfg, backbone, data.prompt_names, card.templates).to(accelerator.device)
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, split=split, backbone=backbone,
        resume=cfg.resume, overwrite=cfg.overwrite, save_every=cfg.save_every,
    )  # fmt: skip

    cache = ac.FeatureCache(cfg.cache)
    crop = ac.training_crop(backbone, card.augmentation, min_scale=cfg.min_scale)
    views = (0 if cfg.variant == "ss-text" else 10) if cfg.views is None else cfg.views
    features = cache.get(backbone, few_shots, views=views, augment=crop, accelerator=accelerator)
    validation = cache.get(backbone, for_choice, accelerator=accelerator) if choose else None

    started = time.perf_counter()
    adapter.fit(features)
    # Tip-F chooses what it trains at, and afterwards whether to use the keys with another pair.
    choose_by = adapter.choose_training if cfg.variant == "tip-f" else getattr(adapter, "choose", None)
    choice = choose_by(validation) if choose_by and validation is not None else None
    schedule = "closed form"
    if cfg.variant == "tip-f":
        schedule = f"AdamW {cfg.lr:g}, cosine, {cfg.epochs} epochs at alpha {adapter.alpha:g}, beta {adapter.beta:g}"
        train(cfg, accelerator, run, adapter, features, mitigation)
        choice = adapter.choose_trained(validation) if validation is not None else None
    seconds = time.perf_counter() - started
    # The test split is read once, here: nothing above has seen it and nothing below chooses.
    test = cache.get(backbone, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, card.templates).to(accelerator.device)
    baseline = ac.predict(zero_shot, test, data.test, accelerator=accelerator)
    held_out = ac.predict_held_out(adapter, for_choice, cache, accelerator=accelerator)
    training = {
        "variant": cfg.variant, "seconds": seconds, "schedule": schedule, "views": views,
        "trainable_parameters": sum(p.numel() for p in adapter.trainable_parameters()),
        "chosen": {name: adapter.settings[name] for name in ("alpha", "beta") if name in adapter.settings},
        "validation_used_for": choice.describe() if choice else "nothing", "mitigation": mitigation.describe(),
    }  # fmt: skip
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, zero_shot=baseline, predictions=predictions, validation=held_out,
        method=METHODS[cfg.variant], rules=rules, gates=cfg.gates, accelerator=accelerator, training=training,
    )  # fmt: skip
    run.finish()
    return code


def train(cfg: Config, accelerator: Any, run: Any, adapter: Any, features: ac.Features, mitigation: Any) -> None:
    """Tip-Adapter-F: learns the keys, with alpha and beta as they are."""
    loader = ac.FeatureLoader(
        features, batch_size=cfg.batch_size, seed=cfg.seed, accelerator=accelerator, strata=mitigation.strata
    )
    num_steps = cfg.epochs * loader.steps_per_epoch
    # The published code leaves the weight decay at torch's 0.01.
    optimizer = ac.build_optimizer(adapter.trainable_parameters(), name="adamw", lr=cfg.lr, weight_decay=0.01, eps=1e-4)
    scheduler = ac.build_scheduler(
        optimizer, total_steps=num_steps, steps_per_epoch=loader.steps_per_epoch, kind="cosine_per_step"
    )
    model, optimizer = accelerator.prepare(adapter, optimizer)
    start = ac.load_checkpoint(run.checkpoints, adapter, optimizer, scheduler, accelerator, mitigation)

    # --- loop: the same lines in every recipe ---
    model.train()
    for step, batch in ac.train_steps(loader, num_steps, accelerator, start=start, run=run):
        with accelerator.accumulate(model):
            logits = model(batch)  # (B, C), already scaled by logit_scale.exp()
            loss = mitigation.loss(logits, batch) + adapter.penalty()
            grad_norm = ac.backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step)
        if ac.is_due(step, 10, num_steps):
            run.log(step, loss=loss, grad_norm=grad_norm, lr=scheduler.get_last_lr()[0])
        if run.save_is_due(step, num_steps):
            ac.save_checkpoint(run.checkpoints, step, adapter, optimizer, scheduler, accelerator, mitigation)
    # --- end of loop ---


def check(cfg: Config) -> None:
    """Raises ConfigError for a name that a program, unlike the command line, can get wrong."""
    for value, options in ((cfg.variant, METHODS), (cfg.choose, ("validation", "fixed"))):
        if value not in options:
            raise ConfigError(f"{value!r} is not one of the options. {did_you_mean(value, options)}")
    given = [f"--{name}" for name in ("alpha", "beta") if getattr(cfg, name) is not None]
    if given and cfg.choose == "validation":
        raise ConfigError(f"{' and '.join(given)} would be overwritten by --choose validation; add --choose fixed")
    if cfg.mitigate and cfg.variant != "tip-f":
        raise ConfigError(f"{cfg.variant} is computed and not trained, so --mitigate has no loss to change")


def build(cfg: Config, backbone: Any, names: Sequence[str], templates: Sequence[str]) -> Any:
    """Returns the adapter of the variant, before it has seen an image: a zero-shot classifier."""
    if cfg.variant == "gda":
        return ac.GDA(backbone, names, templates=templates, alpha=1.0 if cfg.alpha is None else cfg.alpha)
    if cfg.variant == "ss-text":
        return ac.SSText(backbone, names, templates=templates, mode=cfg.mode)
    learn = cfg.variant == "tip-f"
    return ac.TipAdapter(backbone, names, templates=templates, alpha=cfg.alpha, beta=cfg.beta, learn_keys=learn)


if __name__ == "__main__":
    ac.launch(main, Config)
