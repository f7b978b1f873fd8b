# SPDX-License-Identifier: Apache-2.0
"""Two stages (2SFS): tune the towers' LayerNorms, then a linear head on their features.

Paper     Farina et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages", CVPR 2025,
          arXiv:2503.11609.
Run       python recipes/two_stage.py --card my_images/ --backbone ViT-B-16 --pretrained openai --seed 1
Smoke     python recipes/two_stage.py     (embedded card and model: no download, CPU, about a minute)
Expected  see README.md in this folder
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import adaptclip as ac
from adaptclip.bench.interpolation import predict_new_classes
from adaptclip.data.shots import base_and_new
from adaptclip.training.support import chosen_preset, preset_line


@dataclass(frozen=True)
class Config(ac.RunSettings):
    """2SFS. Defaults follow the paper; the embedded default, and only it, has a short schedule."""

    out: Path = Path("runs/two_stage")
    """Run folder: settings, metrics, predictions, report, artifact."""
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
    steps: int | None = None
    """Optimizer steps of both stages; 300 per shot in the paper, smoke 80."""
    tower_share: float | None = None
    """Share of the steps that the towers are adapted for (0.6); the rest trains the head."""
    views: int | None = None
    """Sets of crops of the head's training images, taken in turn (10)."""
    lr: float | None = None
    """Peak learning rate of AdamW (weight decay 0.01) for the towers, cosine to 1e-6; 2e-4 in the paper, smoke 1e-2."""
    head_lr: float | None = None
    """The same for the head; 2e-4 in the paper."""
    batch_size: int | None = None
    """Images per process and step; 32 in the paper."""


def main(cfg: Config) -> int:
    """Card → few-shot split → pixels → towers → features → linear head → predictions → report, gates, artifact."""
    accelerator = ac.make_accelerator(cfg.mixed_precision, cfg.accumulate, trackers=cfg.trackers, out=cfg.out)
    ac.seed_everything(cfg.seed)

    card = ac.load_card(cfg.card)
    data, new = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image), None
    if cfg.base_to_new:
        data, new = base_and_new(data)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed, rule=cfg.rule)
    few_shots, validation = split.select(data)  # validation is for the report
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, accelerator=accelerator)
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    given = {name: getattr(cfg, name) for name in ("rank", "dropout", "projections") if getattr(cfg, name) is not None}
    given |= {"seed": cfg.seed} if cfg.tune == "lora" else {}
    adapter = ac.TwoStage(
        backbone, data.prompt_names, tune=cfg.tune, towers=cfg.towers, templates=card.templates, **given
    ).to(accelerator.device)
    cache = ac.FeatureCache(cfg.cache)
    support = ac.Support(
        backbone, few_shots, validation, source=cache, augmentation=card.augmentation, shots=cfg.shots, seed=cfg.seed,
        accelerator=accelerator, mitigation=mitigation,
    )  # fmt: skip
    preset = chosen_preset(cfg.preset, cfg.card, cfg.backbone)
    schedule = adapter.schedule(
        cfg.shots, images_per_class=support.images_per_class, preset=preset, steps=cfg.steps, views=cfg.views,
        tower_share=cfg.tower_share, lr=cfg.lr, head_lr=cfg.head_lr, batch_size=cfg.batch_size,
    )  # fmt: skip
    accelerator.print(preset_line(cfg.preset, preset, schedule))
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, split=split, backbone=backbone,
        others={"the classes that are not learnt": new.digest} if new else None, resume=cfg.resume,
        overwrite=cfg.overwrite, save_every=cfg.save_every,
    )  # fmt: skip
    # Two stages: the towers on pixels, then the head on features of the tuned towers.
    info = adapter.learn(support, schedule, partial(train, run=run, accelerator=accelerator))

    # The test split is read once, here: nothing above has seen it and nothing below chooses.
    test = ac.FeatureCache(None).get(adapter.encoder, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, card.templates).to(accelerator.device)
    frozen = cache.get(backbone, data.test, accelerator=accelerator)
    baseline = ac.predict(zero_shot, frozen, data.test, accelerator=accelerator)
    on_validation = ac.predict_validation(adapter, validation, cache, accelerator=accelerator)
    new_classes = new and predict_new_classes(adapter.encoder, backbone, new, accelerator=accelerator)
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, method="two_stage", predictions=predictions, zero_shot=baseline,
        rules=rules, gates=cfg.gates, accelerator=accelerator, validation=on_validation, training=info,
        new_classes=new_classes,
    )  # fmt: skip
    run.finish()
    return code


def train(training: ac.Training, run: Any, accelerator: Any) -> None:
    """Takes the steps of a stage, with checkpoints and metrics in the run's folder."""
    adapter, loader, optimizer, scheduler, num_steps, mitigation, stage = training
    run = run.stage(stage)
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


if __name__ == "__main__":
    ac.launch(main, Config)
