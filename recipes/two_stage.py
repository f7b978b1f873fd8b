"""Two stages (2SFS): tune the towers' LayerNorms, then a linear head on their features.

Paper     Farina et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages", CVPR 2025,
          arXiv:2503.11609.
Run       accelerate launch recipes/two_stage.py --card my_images/ --backbone ViT-B-16 --pretrained openai --seed 1
Smoke     accelerate launch recipes/two_stage.py     (embedded card and model: no download, CPU, about a minute)
Expected  see README.md in this folder
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import adaptclip as ac
from adaptclip.data.base_new import base_and_new
from adaptclip.errors import ConfigError
from adaptclip.evaluation.new_classes import predict_new_classes
from adaptclip.methods.two_stage import make_first_stage
from adaptclip.training.presets import chosen_preset


@dataclass(frozen=True)
class Config:
    """2SFS. Defaults follow the paper; the embedded default, and only it, has a short schedule."""

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
    seed: int = 1
    """Chooses the few-shot images, LoRA's initial A and the order of images."""
    tune: Literal["layernorm", "bitfit", "lora"] = "layernorm"
    """What the first stage tunes: the LayerNorms as published, or as the paper's ablations the biases or LoRA."""
    towers: Literal["image", "text", "both"] = "both"
    """Which towers are tuned; text alone trains on cached features."""
    rank: int | None = None
    """Of lora: r of the update B A; not given 2."""
    dropout: float | None = None
    """Of lora: share of each adapted layer's input that is dropped in training; not given 0.25."""
    projections: tuple[str, ...] | None = None
    """Of lora: any of q, k, v, out, mlp, conv; not given q, k, v."""
    base_to_new: bool = False
    """Learn the first half of the classes only, and judge the new half by its names too."""
    preset: Literal["auto", "smoke", "paper"] = "auto"
    """Where steps and lr come from that are not given: paper, or smoke (80 at 1e-2); auto: smoke for the default."""
    steps: int = 0
    """Optimizer steps of both stages; 0 takes the preset's, in the paper 300 per shot."""
    tower_share: float = 0.6
    """Share of the steps that the towers are adapted for; the rest trains the head."""
    views: int = 10
    """Sets of crops of the head's training images, taken in turn."""
    lr: float = 0.0
    """Peak learning rate of AdamW (weight decay 0.01) for the towers, cosine to 1e-6; 0 takes the preset's."""
    head_lr: float = 2e-4
    """The same for the head."""
    batch_size: int = 32
    """Images per process and step."""
    accumulate: int = 0
    """Micro-batches of that size per optimizer step; 0 does what accelerate launch was told, or 1."""
    mitigate: str = ""
    """Balance of groups or classes, such as group-sampling:sex, class-weights or group-dro:sex; empty for none."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Autocast of both towers while training; auto does what accelerate launch was told."""
    save_every: int = 100
    """Optimizer steps between checkpoints; one is also written every five minutes."""
    gates: str = "card"
    """card, a YAML file of gates, or report (judge by the card's gates, but do not let them decide the exit code)."""
    cache: Path = Path(".cache/features")
    """Image features of the frozen tower, shared by all recipes, shots and seeds."""
    out: Path = Path("runs/two_stage")
    """Run folder: settings, metrics, predictions, report, artifact."""
    resume: bool = False
    """Go on with the run in `out`."""
    overwrite: bool = False
    """Replace the run in `out`."""


def main(cfg: Config) -> int:
    """Card → few-shot split → pixels → towers → features → linear head → predictions → report, gates, artifact."""
    accelerator = ac.make_accelerator(cfg.mixed_precision, cfg.accumulate, out=cfg.out)
    ac.seed_everything(cfg.seed)

    card = ac.load_card(cfg.card)
    data, new = ac.open_data(card, data_root=cfg.data_root), None
    if cfg.base_to_new:
        data, new = base_and_new(data)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed)
    few_shots, held_out = split.select(data)  # held out for the report
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, accelerator=accelerator)
    head_mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, accelerator=accelerator)
    tower_steps, head_steps, lr = training_length(cfg, len(few_shots) / len(data.class_names))
    preset = chosen_preset(cfg.preset, cfg.card, cfg.backbone)
    accelerator.print(f"preset {preset}: {tower_steps} and {head_steps} steps, learning rate of the towers {lr:g}")
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    given = {name: getattr(cfg, name) for name in ("rank", "dropout", "projections") if getattr(cfg, name) is not None}
    first = make_first_stage(
        backbone, data.prompt_names, cfg.tune, seed=cfg.seed, towers=cfg.towers, templates=card.templates, **given
    ).to(accelerator.device)
    how: Any = {"config": asdict(cfg), "accelerator": accelerator, "resume": cfg.resume, "save_every": cfg.save_every}
    run = ac.start_run(
        cfg.out, data=data, split=split, backbone=backbone, overwrite=cfg.overwrite, **how,
        others={"the classes that are not learnt": new.digest} if new else None,
    )  # fmt: skip

    cache = ac.FeatureCache(cfg.cache)
    crop = ac.training_crop(backbone, card.augmentation)
    started = time.perf_counter()
    fed: Any = {"batch_size": cfg.batch_size, "seed": cfg.seed, "strata": mitigation.strata, "accelerator": accelerator}
    loader = ac.training_loader(first, few_shots, cache, augment=crop, **fed)
    train(first, loader, tower_steps, lr, run, accelerator, mitigation)

    # The head learns on features of the tuned towers, which no other run could use.
    adapter = ac.TwoStage(backbone, data.prompt_names, first=first)
    features = ac.FeatureCache(None).get(
        adapter.encoder, few_shots, views=cfg.views, augment=crop, accelerator=accelerator
    )
    head_run = ac.start_run(run.path / "head", **how)
    train(adapter, ac.FeatureLoader(features, **fed), head_steps, cfg.head_lr, head_run, accelerator, head_mitigation)
    training = {
        "trainable_parameters": sum(p.numel() for own in (first, adapter) for p in own.trainable_parameters()),
        "seconds": time.perf_counter() - started, "chosen": {}, "validation_used_for": "nothing",
        "schedule": f"{tower_steps} steps of {cfg.tune}, {head_steps} of the head, batches of {cfg.batch_size}",
        "mitigation": mitigation.describe(), "head_mitigation": head_mitigation.describe(),
    }  # fmt: skip

    # The test split is read once, here: nothing above has seen it and nothing below chooses.
    test = ac.FeatureCache(None).get(adapter.encoder, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, card.templates).to(accelerator.device)
    frozen = cache.get(backbone, data.test, accelerator=accelerator)
    baseline = ac.predict(zero_shot, frozen, data.test, accelerator=accelerator)
    validation = ac.predict_held_out(adapter, held_out, cache, accelerator=accelerator)
    new_classes = new and predict_new_classes(adapter.encoder, backbone, new, accelerator=accelerator)
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, method="two_stage", predictions=predictions, zero_shot=baseline,
        rules=rules, gates=cfg.gates, accelerator=accelerator, validation=validation, training=training,
        new_classes=new_classes,
    )  # fmt: skip
    run.finish()
    return code


def train(adapter: Any, loader: Any, num_steps: int, lr: float, run: Any, accelerator: Any, mitigation: Any) -> None:
    """One stage: AdamW, cosine per step; checkpoints and metrics in the stage's own run folder."""
    optimizer = ac.build_optimizer(adapter.trainable_parameters(), name="adamw", lr=lr, weight_decay=1e-2)
    scheduler = ac.build_scheduler(
        optimizer, total_steps=num_steps, steps_per_epoch=loader.steps_per_epoch, kind="cosine_per_step", final_lr=1e-6
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
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()


def training_length(cfg: Config, images_per_class: float) -> tuple[int, int, float]:
    """Returns steps of either stage and the towers' learning rate: those given, and the preset's for the others.

    Raises:
        ConfigError: a stage has no steps.
    """
    smoke = chosen_preset(cfg.preset, cfg.card, cfg.backbone) == "smoke"
    total = cfg.steps or (80 if smoke else 300 * (cfg.shots or round(images_per_class)))
    lr = cfg.lr or (1e-2 if smoke else 2e-4)
    tower_steps = round(cfg.tower_share * total)
    if not 0 < tower_steps < total:
        raise ConfigError(
            f"steps and tower_share must leave 1 step or more for each stage, got {total} and {cfg.tower_share:g}; "
            "recipes/lora.py has no second stage, recipes/linear_probe.py no first"
        )
    return tower_steps, total - tower_steps, lr


if __name__ == "__main__":
    ac.launch(main, Config)
