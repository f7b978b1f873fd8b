# SPDX-License-Identifier: Apache-2.0
"""Contrastive tuning: CLIP's own loss on images and their captions, or the prompts of their classes; then WiSE-FT.

Paper     FLYP (Goyal et al., CVPR 2023, arXiv:2212.00638): the pretraining loss on images and prompts of their class;
          images of one class in a batch are negatives of each other, as published.
          WiSE-FT (Wortsman et al., CVPR 2022, arXiv:2109.01903); LiT (Zhai et al., arXiv:2111.07991): `--train text`.
Run       python recipes/contrastive.py --card flickr8k --data-root DATA --train text --lr 1e-4
          python recipes/contrastive.py --card my.md --backbone ViT-B-16 --pretrained openai --wise-ft 0.5
Smoke     python recipes/contrastive.py   (embedded card and model: no download, CPU, about a minute)
Then      python recipes/coop.py --backbone local-dir:runs/contrastive/model, or any other recipe
Expected  see README.md in this folder
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import adaptclip as ac
from adaptclip.bench.interpolation import curve_markdown, judge_retrieval, wise_ft_curve
from adaptclip.clip import ClipBackbone
from adaptclip.clip.saving import open_clip_config, save_open_clip
from adaptclip.data.dataset import DomainData
from adaptclip.files import write_json, write_text
from adaptclip.methods.contrastive import interpolate, pair_texts
from adaptclip.training.support import chosen_preset, preset_line


@dataclass(frozen=True)
class Config(ac.RunSettings):
    """Contrastive tuning. Defaults follow FLYP; the embedded default, and only it, is short."""

    shots: int = 0
    """Training images per class, or in all where the card has captions and no classes; 0 means all."""
    out: Path = Path("runs/contrastive")
    """Run folder: settings, metrics, report, wise_ft.json, retrieval.json, and model/, a stock open_clip folder."""
    train: Literal["both", "image", "text"] = "both"
    """Towers that learn; with `text`, image features are computed once."""
    how: Literal["full", "lora"] = "full"
    """All weights of the towers and the logit scale, or low-rank additions to their attention."""
    rank: int = 2
    """Rank of LoRA."""
    loss: Literal["clip", "siglip"] = "clip"
    """Softmax over both directions, or sigmoid (for models with a logit bias)."""
    wise_ft: float = 1.0
    """Share alpha of the tuned weights in the saved model, 0 to 1; declared before the test images are read."""
    zero_shot_card: str = ""
    """Another card whose zero-shot accuracy along the WiSE-FT curve shows what was forgotten."""
    epochs: int | None = None
    """Passes over the training images; 10 in FLYP, smoke 2."""
    views: int = 0
    """Sets of random crops, taken in turn; 0 makes fresh ones, or with a locked image tower takes the whole image."""
    lr: float = 1e-5
    """Peak rate of AdamW (decay .1; few shots 0), cosine after FLYP's 500 warm steps (few shots 0), at most a fifth."""
    batch_size: int | None = None
    """Pairs per process; all processes' pairs are contrasted. 256 in FLYP, smoke 32."""


def main(cfg: Config) -> int:
    """Card → pairs → tuned towers → WiSE-FT → stock open_clip folder → retrieval, predictions, report, gates."""
    accelerator = ac.make_accelerator(cfg.mixed_precision, cfg.accumulate, trackers=cfg.trackers, out=cfg.out)
    ac.seed_everything(cfg.seed)
    card = ac.load_card(cfg.card)
    data = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image)
    rules = ac.choose_gates(cfg.gates, data)
    shots, epochs, batch_size = training_length(cfg)
    split = ac.sample_few_shot(data, shots=shots, seed=cfg.seed, rule=cfg.rule)
    images, validation = split.select(data)
    mitigation = ac.build_mitigation(cfg.mitigate, images, data.train, accelerator=accelerator, pairs=True)
    other = ac.open_data(ac.load_card(cfg.zero_shot_card), data_root=cfg.data_root) if cfg.zero_shot_card else None
    if other is not None:
        other.test.require_one_class("zero-shot accuracy along the curve")
    backbone = ac.load_backbone(cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    interpolate({}, {}, cfg.wise_ft)  # a share out of range, or a model that could not be saved, is refused now
    config = open_clip_config(backbone)
    adapter = ac.ContrastiveTuning(
        backbone, train=cfg.train, how=cfg.how, loss=cfg.loss, rank=cfg.rank, seed=cfg.seed,
        process_index=accelerator.process_index, num_processes=accelerator.num_processes,
    ).to(accelerator.device)  # fmt: skip
    texts, num_cut = pair_texts(backbone, images, data)
    words = f"epochs {epochs}, {len(images)} images, {len(texts.tokens)} texts ({num_cut} of them cut at the context)"
    accelerator.print(preset_line(cfg.preset, chosen_preset(cfg.preset, cfg.card, cfg.backbone), words))
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, split=split, backbone=backbone,
        others={other.card.name: other.digest} if other else None, resume=cfg.resume, overwrite=cfg.overwrite,
        save_every=cfg.save_every,
    )  # fmt: skip
    cache, crop = ac.FeatureCache(cfg.cache), ac.training_crop(backbone, card.augmentation)
    how: dict[str, Any] = {"batch_size": batch_size, "seed": cfg.seed, "strata": mitigation.strata}
    if adapter.consumes == "features":
        features = cache.get(backbone, images, views=cfg.views, augment=crop, accelerator=accelerator)
        pictures = ac.FeatureLoader(features, accelerator=accelerator, **how)
    else:
        pictures = ac.PixelLoader(images, backbone, augment=crop, views=cfg.views, accelerator=accelerator, **how)
    loader = ac.CaptionLoader(pictures, texts, seed=cfg.seed, accumulate=accelerator.gradient_accumulation_steps)
    num_steps = epochs * loader.steps_per_epoch
    decay, warmup = (0.0, 0) if shots else (0.1, min(500, num_steps // 5))
    optimizer = ac.build_optimizer(adapter.trainable_parameters(), name="adamw", lr=cfg.lr, weight_decay=decay)
    per_epoch: Any = {"steps_per_epoch": loader.steps_per_epoch, "kind": "cosine_per_step", "warmup_steps": warmup}
    scheduler = ac.build_scheduler(optimizer, total_steps=num_steps, **per_epoch)
    model, optimizer = accelerator.prepare(adapter, optimizer)
    start = ac.load_checkpoint(run.checkpoints, adapter, optimizer, scheduler, accelerator, mitigation)
    started = time.perf_counter()
    # --- loop: the same lines in every recipe ---
    model.train()
    for step, batch in ac.train_steps(loader, num_steps, accelerator, start=start, run=run):
        with accelerator.accumulate(model):
            loss = model(batch)  # contrasts the pairs of all processes
            grad_norm = ac.backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step, max_grad_norm=1)
        if ac.is_due(step, 10, num_steps):
            run.log(step, loss=loss, grad_norm=grad_norm, lr=scheduler.get_last_lr()[0])
        if run.save_is_due(step, num_steps):
            ac.save_checkpoint(run.checkpoints, step, adapter, optimizer, scheduler, accelerator, mitigation)
    # --- end of loop ---
    training = {
        "trainable_parameters": sum(p.numel() for p in adapter.trainable_parameters()),
        "seconds": time.perf_counter() - started, "chosen": {"wise_ft": cfg.wise_ft},
        "schedule": f"{epochs} epochs, {num_steps} steps of {batch_size} pairs, AdamW {cfg.lr:g}, warm-up {warmup}",
        "validation_used_for": "the WiSE-FT curve; alpha was declared before", "mitigation": mitigation.describe(),
    }  # fmt: skip
    tuned = accelerator.unwrap_model(model, keep_fp32_wrapper=False).tuned_state()
    on = {"validation": (validation, data)} | ({other.card.name: (other.test, other)} if other else {})
    curve = wise_ft_curve(backbone, tuned, on, cache=cache, accelerator=accelerator)
    folder = run.path.resolve() / "model"
    if accelerator.is_main_process:
        mixed = interpolate(backbone.model.state_dict(), tuned, cfg.wise_ft)
        save_open_clip(folder, mixed, backbone, config=config, overwrite=True)
        write_json(run.path / "wise_ft.json", {"alpha": cfg.wise_ft, "curve": curve})
        write_text(run.path / "wise_ft.md", curve_markdown(curve))
    accelerator.wait_for_everyone()
    after = ac.load_backbone(f"local-dir:{folder}", device=accelerator.device)
    accelerator.print(f"{folder}: the tuned model, a stock open_clip folder (--backbone local-dir:FOLDER)")
    # The test split is read once, from here on: nothing above has seen it and nothing below chooses.
    code = 0
    if data.test.captions is not None:
        judge_retrieval(run.path, backbone, after, data, cfg.wise_ft, cache=cache, accelerator=accelerator)
    if data.has_classes:
        code = judge_classes(cfg, run.path, backbone, after, data, split, rules, training, accelerator)
    run.finish()
    return code


def judge_classes(
    cfg: Config, out: Path, before: ClipBackbone, after: ClipBackbone, data: DomainData, split: Any, rules: Any,
    training: dict[str, Any], accelerator: Any,
) -> int:  # fmt: skip
    """Zero-shot predictions of the tuned model and of the one before, report, gates, artifact; the exit code."""
    made: list[Any] = []
    for model in (after, before):
        classifier = ac.ZeroShotClassifier(model, data.prompt_names, data.card.templates).to(accelerator.device)
        test = ac.FeatureCache(cfg.cache).get(model, data.test, accelerator=accelerator)
        made += [classifier, ac.predict(classifier, test, data.test, accelerator=accelerator)]
    return ac.finish_run(
        out, made[0], after, data, split, method="zero_shot", predictions=made[1], zero_shot=made[3],
        rules=rules, gates=cfg.gates, accelerator=accelerator, training=training,
    )  # fmt: skip


def training_length(cfg: Config) -> tuple[int, int, int]:
    """Returns shots, epochs and pairs per step: those given, and the preset's for the others."""
    shots, epochs, pairs = (16, 2, 32) if chosen_preset(cfg.preset, cfg.card, cfg.backbone) == "smoke" else (0, 10, 256)
    return cfg.shots or shots, cfg.epochs or epochs, cfg.batch_size or pairs


if __name__ == "__main__":
    ac.launch(main, Config)
