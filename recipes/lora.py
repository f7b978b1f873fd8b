"""LoRA: low-rank updates of the towers' projections, trained on pixels; CLIP-LoRA by default.

Paper     Zanella and Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models", CVPRW 2024, arXiv:2405.18541.
Run       accelerate launch recipes/lora.py --card my_images/ --backbone ViT-B-16 --pretrained openai --seed 1
Smoke     accelerate launch recipes/lora.py          (embedded card and model: no download, CPU, about a minute)
Expected  see README.md in this folder
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import adaptclip as ac
from adaptclip.data.base_new import base_and_new
from adaptclip.evaluation.new_classes import predict_new_classes
from adaptclip.evaluation.scale_curve import check_setting, choose_scale
from adaptclip.training.presets import chosen_preset
from adaptclip.training.tracking import MAY_CHANGE


@dataclass(frozen=True)
class Config:
    """CLIP-LoRA. Defaults follow the paper (sec. 4); the embedded default, and only it, has a short schedule."""

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
    """Chooses the few-shot images, the initial A and the order of images."""
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
    preset: Literal["auto", "smoke", "paper"] = "auto"
    """Where steps and lr come from that are not given: paper, or smoke (60 at 1e-2); auto: smoke for the default."""
    steps: int = 0
    """Optimizer steps; 0 takes the preset's, in the paper 500 per shot."""
    lr: float = 0.0
    """Peak learning rate of AdamW (weight decay 0.01), cosine to 1e-6; 0 takes the preset's, in the paper 2e-4."""
    batch_size: int = 32
    """Images per process and step."""
    accumulate: int = 0
    """Micro-batches of that size per optimizer step; 0 does what accelerate launch was told, or 1."""
    objective: str = "softmax"
    """softmax (one class per image) or sigmoid (each by itself): sigmoid:f1, :sensitivity=0.9 or :0.5 as threshold."""
    mitigate: str = ""
    """Balance of groups or classes, such as group-sampling:sex, class-weights or group-dro:sex; empty for none."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Autocast of both towers while training; auto does what accelerate launch was told."""
    compute: Literal["plain", "checkpointing", "compile"] = "plain"
    """checkpointing computes image blocks twice to save memory; compile builds the image tower with torch.compile."""
    save_every: int = 100
    """Optimizer steps between checkpoints; one is also written every five minutes."""
    gates: str = "card"
    """card, a YAML file of gates, or report (judge by the card's gates, but do not let them decide the exit code)."""
    cache: Path = Path(".cache/features")
    """Image features of the frozen tower, shared by all recipes, shots and seeds."""
    out: Path = Path("runs/lora")
    """Run folder: settings, metrics, predictions, report, artifact."""
    resume: bool = False
    """Go on with the run in `out`; a finished one is judged again, at another --lora-scale for example."""
    overwrite: bool = False
    """Replace the run in `out`."""


def main(cfg: Config) -> int:
    """Card → few-shot split → pixels → LoRA → scale on validation → predictions → report, gates, artifact."""
    accelerator = ac.make_accelerator(cfg.mixed_precision, cfg.accumulate, out=cfg.out)
    ac.seed_everything(cfg.seed)
    objective = ac.parse_objective(cfg.objective)

    card = ac.load_card(cfg.card)
    data, new = ac.open_data(card, data_root=cfg.data_root), None
    if cfg.base_to_new:
        data, new = base_and_new(data)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed)
    few_shots, validation = split.select(data)
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, accelerator=accelerator, objective=objective)
    new_validation = new and (ac.sample_few_shot(new, shots=cfg.shots, seed=cfg.seed).select(new)[1], new.prompt_names)
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
    crop = ac.training_crop(backbone, card.augmentation)
    adapter.begin_from(few_shots, cache, accelerator=accelerator)
    loader = ac.training_loader(
        adapter, few_shots, cache, augment=crop, batch_size=cfg.batch_size, seed=cfg.seed, accelerator=accelerator,
        strata=mitigation.strata,
    )  # fmt: skip
    num_steps, lr = training_length(cfg, len(few_shots) / len(data.class_names))
    preset = chosen_preset(cfg.preset, cfg.card, cfg.backbone)
    accelerator.print(f"preset {preset}: {num_steps} steps, learning rate {lr:g} (the paper: 500 per shot, 2e-4)")
    optimizer = ac.build_optimizer(adapter.trainable_parameters(), name="adamw", lr=lr, weight_decay=1e-2)
    scheduler = ac.build_scheduler(
        optimizer, total_steps=num_steps, steps_per_epoch=loader.steps_per_epoch, kind="cosine_per_step", final_lr=1e-6
    )
    model, optimizer = accelerator.prepare(adapter, optimizer)
    start = ac.load_checkpoint(run.checkpoints, adapter, optimizer, scheduler, accelerator, mitigation)
    started = time.perf_counter()

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

    training = {
        "trainable_parameters": sum(p.numel() for p in adapter.trainable_parameters()),
        "seconds": time.perf_counter() - started, "schedule": f"{num_steps} steps of {cfg.batch_size}, lr {lr:g}",
        "mitigation": mitigation.describe(),
    }  # fmt: skip
    adapter = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    training |= choose_scale(cfg.lora_scale, adapter, validation, new_validation, accelerator=accelerator)

    # The test split is read once, here: nothing above has seen it and nothing below chooses.
    test = ac.FeatureCache(None).get(adapter.encoder, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, card.templates).to(accelerator.device)
    frozen = cache.get(backbone, data.test, accelerator=accelerator)
    baseline = ac.predict(zero_shot, frozen, data.test, accelerator=accelerator)
    held = ac.predict_held_out(adapter, validation, cache, accelerator=accelerator)
    new_classes = new and predict_new_classes(adapter.encoder, backbone, new, accelerator=accelerator)
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, method="lora", predictions=predictions, zero_shot=baseline,
        rules=rules, gates=cfg.gates, accelerator=accelerator, validation=held, training=training, objective=objective,
        new_classes=new_classes,
    )  # fmt: skip
    run.finish()
    return code


def training_length(cfg: Config, images_per_class: float) -> tuple[int, float]:
    """Returns optimizer steps and learning rate: those given, and the preset's for the others."""
    smoke = chosen_preset(cfg.preset, cfg.card, cfg.backbone) == "smoke"
    published = 500 * (cfg.shots or round(images_per_class))
    return cfg.steps or (60 if smoke else published), cfg.lr or (1e-2 if smoke else 2e-4)


if __name__ == "__main__":
    ac.launch(main, Config)
