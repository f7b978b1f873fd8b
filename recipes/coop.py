"""CoOp: learn the words around the class name, keep CLIP frozen.

Paper     Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv:2109.01134.
Run       accelerate launch recipes/coop.py --card my_images/ --backbone ViT-B-16 --pretrained openai --seed 1
Smoke     accelerate launch recipes/coop.py          (embedded card and model: no download, CPU, about a minute)
Expected  flowers17, starter, 16 shots, seeds 1 to 3: 75.9 ± 1.9 % (zero-shot 7.9 %), a minute per seed on one core;
          more in README.md of this folder
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import adaptclip as ac
from adaptclip.methods.coop import published_length
from adaptclip.training.presets import chosen_preset


@dataclass(frozen=True)
class Config:
    """CoOp. Defaults follow the paper (sec. 4.1); the embedded default, and only it, has a short schedule."""

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
    """Chooses the few-shot images, the initial context and the order of images."""
    n_ctx: int = 16
    """Number of learnt context tokens M; not used with --ctx-init."""
    ctx_init: str = ""
    """Words to start from, for example "a photo of a"; empty means random, standard deviation 0.02."""
    position: Literal["end", "middle", "front", "csc-end", "csc-middle", "csc-front"] = "end"
    """Place of the class name among the context tokens; csc-…: a context of its own for every class (CSC)."""
    kg_weight: float = 0.0
    """Weight of KgCoOp's pull towards the card's own prompts; that paper uses 8 and --ctx-init "a photo of a"."""
    preset: Literal["auto", "smoke", "paper"] = "auto"
    """Where epochs and views come from that are not given: the paper, or smoke (50, 5); auto: smoke for the default."""
    epochs: int = 0
    """Passes over the training images; 0 takes the preset's, in the papers 50, 100 or 200 by shots, KgCoOp's 100."""
    views: int = 0
    """Sets of random crops, taken in turn; 0 takes the preset's, in the paper fresh ones for every epoch."""
    lr: float = 2e-3
    """Peak learning rate of SGD (momentum 0.9, weight decay 5e-4)."""
    batch_size: int = 0
    """Images per process and step; 0 takes CoOp's 32, and with --kg-weight KgCoOp's 128."""
    accumulate: int = 0
    """Micro-batches of that size per optimizer step; 0 does what accelerate launch was told, or 1."""
    objective: str = "softmax"
    """softmax (one class per image) or sigmoid (each by itself): sigmoid:f1, :sensitivity=0.9 or :0.5 as threshold."""
    mitigate: str = ""
    """Balance of groups or classes, such as group-sampling:sex, class-weights or group-dro:sex; empty for none."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Autocast of the text tower while training; auto does what accelerate launch was told."""
    memory_gib: float = 4.0
    """Budget for the text tower's activations; more classes than fit are taken in chunks, with the same gradients."""
    save_every: int = 100
    """Optimizer steps between checkpoints; one is also written every five minutes."""
    gates: str = "card"
    """card, a YAML file of gates, or report (judge by the card's gates, but do not let them decide the exit code)."""
    trackers: str = ""
    """Accelerate's trackers, separated by commas; metrics.jsonl is always written."""
    cache: Path = Path(".cache/features")
    """Image features, shared by all recipes, shots and seeds."""
    out: Path = Path("runs/coop")
    """Run folder: settings, metrics, predictions, report, artifact."""
    resume: bool = False
    """Go on with the run in `out`."""
    overwrite: bool = False
    """Replace the run in `out`."""


def main(cfg: Config) -> int:
    """Card → few-shot split → cached features → CoOp → predictions → report, gates, artifact."""
    accelerator = ac.make_accelerator(cfg.mixed_precision, cfg.accumulate, trackers=cfg.trackers, out=cfg.out)
    ac.seed_everything(cfg.seed)
    objective = ac.parse_objective(cfg.objective)

    card = ac.load_card(cfg.card)
    data = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed, rule=cfg.rule)
    few_shots, held_out = split.select(data)  # held out for the report: CoOp takes the last step
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, accelerator=accelerator, objective=objective)
    epochs, views, batch_size = training_length(cfg)
    preset = chosen_preset(cfg.preset, cfg.card, cfg.backbone)
    accelerator.print(f"preset {preset}: {epochs} epochs over {views} sets of crops (papers: 50 to 200, each fresh)")
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    adapter = ac.CoOp(
        backbone, data.prompt_names, n_ctx=cfg.n_ctx, ctx_init=cfg.ctx_init, position=cfg.position.removeprefix("csc-"),
        class_specific=cfg.position.startswith("csc-"), seed=cfg.seed, kg_weight=cfg.kg_weight,
        templates=card.templates, objective=objective.name, memory_budget_bytes=int(cfg.memory_gib * 2**30),
    ).to(accelerator.device)  # fmt: skip
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, split=split, backbone=backbone,
        resume=cfg.resume, overwrite=cfg.overwrite, save_every=cfg.save_every,
    )  # fmt: skip

    cache = ac.FeatureCache(cfg.cache)
    crop = ac.training_crop(backbone, card.augmentation)
    features = cache.get(backbone, few_shots, views=views, augment=crop, accelerator=accelerator)
    loader = ac.FeatureLoader(
        features, batch_size=batch_size, seed=cfg.seed, accelerator=accelerator, strata=mitigation.strata
    )
    adapter.begin(features)
    num_steps = epochs * loader.steps_per_epoch
    optimizer = ac.build_optimizer(adapter.trainable_parameters(), name="sgd", lr=cfg.lr, weight_decay=5e-4)
    scheduler = ac.build_scheduler(optimizer, total_steps=num_steps, steps_per_epoch=loader.steps_per_epoch)
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
    seconds = time.perf_counter() - started

    # The test split is read once, here: nothing above has seen it and nothing below chooses. It is judged in full
    # precision, as the artifact will be used.
    adapter = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    test = cache.get(backbone, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, card.templates).to(accelerator.device)
    baseline = ac.predict(zero_shot, test, data.test, accelerator=accelerator)
    validation = ac.predict_held_out(adapter, held_out, cache, accelerator=accelerator)
    training = {
        "trainable_parameters": sum(p.numel() for p in adapter.trainable_parameters()),
        "seconds": seconds,  # of this process: after --resume, without the steps taken before
        "schedule": f"{num_steps} steps ({epochs} epochs) of SGD, learning rate {cfg.lr:g}, cosine per epoch",
        "chosen": {},
        "validation_used_for": "nothing",
        "nearest_words": ac.read_prompt(adapter),
        "mitigation": mitigation.describe(),
    }
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, method="coop", predictions=predictions, zero_shot=baseline,
        rules=rules, gates=cfg.gates, accelerator=accelerator, validation=validation, training=training,
        objective=objective,
    )  # fmt: skip
    run.finish()
    return code


def training_length(cfg: Config) -> tuple[int, int, int]:
    """Returns epochs, sets of crops and batch: those given, and the preset's for the others."""
    published, batch_size = published_length(cfg.shots, kg_weight=cfg.kg_weight)
    smoke = chosen_preset(cfg.preset, cfg.card, cfg.backbone) == "smoke"
    epochs = cfg.epochs or (50 if smoke else published)
    return epochs, cfg.views or (min(5, epochs) if smoke else epochs), cfg.batch_size or batch_size


if __name__ == "__main__":
    ac.launch(main, Config)
