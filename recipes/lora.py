# SPDX-License-Identifier: Apache-2.0
"""LoRA: low-rank updates of the towers' projections, trained on pixels; CLIP-LoRA by default.

Paper     Zanella and Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models", CVPRW 2024, arXiv:2405.18541.
Run       python recipes/lora.py --card my_images/ --backbone ViT-B-16 --pretrained openai --seed 1
Smoke     python recipes/lora.py          (embedded card and model: no download, CPU, about a minute)
Expected  see README.md in this folder
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import adaptclip as ac
from adaptclip.bench.interpolation import check_setting, choose_scale, predict_new_classes
from adaptclip.data.shots import base_and_new
from adaptclip.training.support import chosen_preset, preset_line
from adaptclip.training.tracking import MAY_CHANGE


@dataclass(frozen=True)
class Config(ac.RunSettings):
    """CLIP-LoRA. Defaults follow the paper (sec. 4); the embedded default, and only it, has a short schedule."""

    out: Path = Path("runs/lora")
    """Run folder: settings, metrics, predictions, report, artifact."""
    towers: Literal["image", "text", "both"] = "both"
    """Which towers are adapted; text alone trains on cached features."""
    rank: int = 2
    """r of the update B A."""
    alpha: float = 1.0
    """The update is scaled by alpha / sqrt(rank), or alpha / rank for --variant lora."""
    variant: Literal["rslora", "lora", "dora"] = "rslora"
    """Scaling by the root of the rank (as published), by the rank, or DoRA (magnitudes apart, root scaling)."""
    dropout: float = 0.25
    """Share of each adapted layer's input that is dropped in training."""
    projections: tuple[str, ...] = ("q", "k", "v")
    """Any of q, k, v, out, mlp, conv; a tower without attention takes all its 1x1 convolutions and Linear layers."""
    blocks: str = "all"
    """all, top-N (the last N of each tower) or numbers such as 0,5,11."""
    lora_scale: float | Literal["validation"] = 1.0
    """How much of the trained update is used, from 0 (zero-shot) to 1; validation chooses it on those images."""
    base_to_new: bool = False
    """Learn the first half of the classes only, and judge the new half by its names too."""
    steps: int | None = None
    """Optimizer steps; 500 per shot in the paper, smoke 60."""
    lr: float | None = None
    """Peak learning rate of AdamW (weight decay 0.01), cosine to 1e-6; 2e-4 in the paper, smoke 1e-2."""
    batch_size: int | None = None
    """Images per process and step; 32 in the paper."""
    objective: str = "auto"
    """auto follows the card; softmax (one class per image) or sigmoid (each by itself, :f1, :sensitivity=0.9, :0.5)."""
    compute: Literal["plain", "checkpointing", "compile"] = "plain"
    """checkpointing computes image blocks twice to save memory; compile builds the image tower with torch.compile."""


def main(cfg: Config) -> int:
    """Card → few-shot split → pixels → LoRA → scale on validation → predictions → report, gates, artifact."""
    accelerator = ac.make_accelerator(cfg.mixed_precision, cfg.accumulate, trackers=cfg.trackers, out=cfg.out)
    ac.seed_everything(cfg.seed)

    card = ac.load_card(cfg.card)
    data, new = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image), None
    if cfg.base_to_new:
        data, new = base_and_new(data)
    objective = ac.parse_objective(cfg.objective, data)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed, rule=cfg.rule)
    few_shots, validation = split.select(data)
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, accelerator=accelerator, objective=objective)
    new_validation = new and (
        ac.sample_few_shot(new, shots=cfg.shots, seed=cfg.seed, rule=cfg.rule).select(new)[1], new.prompt_names
    )  # fmt: skip
    check_setting(cfg.lora_scale, validation)
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    adapter = ac.LoRA(
        backbone, data.prompt_names, towers=cfg.towers, rank=cfg.rank, alpha=cfg.alpha, dropout=cfg.dropout,
        projections=cfg.projections, blocks=cfg.blocks, rslora=cfg.variant != "lora", dora=cfg.variant == "dora",
        seed=cfg.seed, templates=card.templates, objective=objective.name, checkpointing=cfg.compute == "checkpointing",
    )  # fmt: skip
    if cfg.compute == "compile":
        adapter.compile_image_tower()
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, split=split, backbone=backbone,
        others={"the classes that are not learnt": new.digest} if new else None, resume=cfg.resume,
        overwrite=cfg.overwrite, save_every=cfg.save_every, may_change=(*MAY_CHANGE, "lora_scale"),
    )  # fmt: skip

    cache = ac.FeatureCache(cfg.cache)
    support = ac.Support(
        backbone, few_shots, validation, source=cache, augmentation=card.augmentation, shots=cfg.shots, seed=cfg.seed,
        accelerator=accelerator, mitigation=mitigation,
    )  # fmt: skip
    preset = chosen_preset(cfg.preset, cfg.card, cfg.backbone)
    schedule = adapter.schedule(
        cfg.shots, images_per_class=support.images_per_class, preset=preset, steps=cfg.steps, lr=cfg.lr,
        batch_size=cfg.batch_size,
    )  # fmt: skip
    accelerator.print(preset_line(cfg.preset, preset, schedule))
    info = adapter.learn(support, schedule, partial(train, run=run, accelerator=accelerator))
    info |= choose_scale(cfg.lora_scale, adapter, validation, new_validation, accelerator=accelerator)

    # The test split is read once, here: nothing above has seen it and nothing below chooses.
    test = ac.FeatureCache(None).get(adapter.encoder, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, card.templates, objective.name)
    zero_shot.begin(support, objective.thresholds)
    frozen = cache.get(backbone, data.test, accelerator=accelerator)
    baseline = ac.predict(zero_shot, frozen, data.test, accelerator=accelerator)
    on_validation = ac.predict_validation(adapter, validation, cache, accelerator=accelerator)
    new_classes = new and predict_new_classes(adapter.encoder, backbone, new, accelerator=accelerator)
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, method="lora", predictions=predictions, zero_shot=baseline,
        rules=rules, gates=cfg.gates, accelerator=accelerator, validation=on_validation, training=info,
        objective=objective, new_classes=new_classes,
    )  # fmt: skip
    run.finish()
    return code


def train(training: ac.Training, run: Any, accelerator: Any) -> None:
    """Takes the steps of LoRA, with checkpoints and metrics in the run's folder."""
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
