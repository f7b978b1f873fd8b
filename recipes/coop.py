# SPDX-License-Identifier: Apache-2.0
"""CoOp: learn the words around the class name, keep CLIP frozen.

Paper     Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv:2109.01134.
Run       python recipes/coop.py --card my_images/ --backbone ViT-B-16 --pretrained openai --seed 1
Smoke     python recipes/coop.py          (embedded card and model: no download, CPU, about a minute)
Expected  flowers17, starter, 16 shots, seeds 1 to 3: 75.9 ± 1.9 % (zero-shot 7.9 %), a minute per seed on one core;
          more in README.md of this folder
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import adaptclip as ac
from adaptclip.training.support import chosen_preset, preset_line


@dataclass(frozen=True)
class Config(ac.RunSettings):
    """CoOp. Defaults follow the paper (sec. 4.1); the embedded default, and only it, has a short schedule."""

    out: Path = Path("runs/coop")
    """Run folder: settings, metrics, predictions, report, artifact."""
    n_ctx: int = 16
    """Number of learnt context tokens M; not used with --ctx-init."""
    ctx_init: str = ""
    """Words to start from, for example "a photo of a"; empty means random, standard deviation 0.02."""
    position: Literal["end", "middle", "front", "csc-end", "csc-middle", "csc-front"] = "end"
    """Place of the class name among the context tokens; csc-…: a context of its own for every class (CSC)."""
    kg_weight: float = 0.0
    """Weight of KgCoOp's pull towards the card's own prompts; that paper uses 8 and --ctx-init "a photo of a"."""
    epochs: int | None = None
    """Passes over the training images; the papers take 50, 100 or 200 by shots, KgCoOp 100, smoke 50."""
    views: int | None = None
    """Sets of random crops, taken in turn; the paper takes fresh ones for every epoch, smoke 5."""
    lr: float | None = None
    """Peak learning rate of SGD (momentum 0.9, weight decay 5e-4); 2e-3 in the paper."""
    batch_size: int | None = None
    """Images per process and step; 32 in the paper, 128 in KgCoOp's."""
    objective: str = "auto"
    """auto follows the card; softmax (one class per image) or sigmoid (each by itself, :f1, :sensitivity=0.9, :0.5)."""
    memory_gib: float = 4.0
    """Budget for the text tower's activations; more classes than fit are taken in chunks, with the same gradients."""


def main(cfg: Config) -> int:
    """Card → few-shot split → cached features → CoOp → predictions → report, gates, artifact."""
    accelerator = ac.make_accelerator(cfg.mixed_precision, cfg.accumulate, trackers=cfg.trackers, out=cfg.out)
    ac.seed_everything(cfg.seed)

    card = ac.load_card(cfg.card)
    data = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image)
    objective = ac.parse_objective(cfg.objective, data)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed, rule=cfg.rule)
    few_shots, validation = split.select(data)  # CoOp takes the last step: validation is for the report
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, accelerator=accelerator, objective=objective)
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    adapter = ac.CoOp(
        backbone, data.prompt_names, n_ctx=cfg.n_ctx, ctx_init=cfg.ctx_init, position=cfg.position.removeprefix("csc-"),
        class_specific=cfg.position.startswith("csc-"), seed=cfg.seed, kg_weight=cfg.kg_weight,
        templates=card.templates, objective=objective.name, memory_budget_bytes=int(cfg.memory_gib * 2**30),
    ).to(accelerator.device)  # fmt: skip
    preset = chosen_preset(cfg.preset, cfg.card, cfg.backbone)
    schedule = adapter.schedule(
        cfg.shots, preset=preset, epochs=cfg.epochs, views=cfg.views, lr=cfg.lr, batch_size=cfg.batch_size
    )
    accelerator.print(preset_line(cfg.preset, preset, schedule))
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, split=split, backbone=backbone,
        resume=cfg.resume, overwrite=cfg.overwrite, save_every=cfg.save_every,
    )  # fmt: skip

    cache = ac.FeatureCache(cfg.cache)
    support = ac.Support(
        backbone, few_shots, validation, source=cache, augmentation=card.augmentation, shots=cfg.shots, seed=cfg.seed,
        accelerator=accelerator, mitigation=mitigation,
    )  # fmt: skip
    info = adapter.learn(support, schedule, partial(train, run=run, accelerator=accelerator))

    # The test split is read once, here: nothing above has seen it and nothing below chooses. It is judged in full
    # precision, as the artifact will be used.
    test = cache.get(backbone, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, card.templates, objective.name)
    zero_shot.begin(support, objective.thresholds)
    baseline = ac.predict(zero_shot, test, data.test, accelerator=accelerator)
    on_validation = ac.predict_validation(adapter, validation, cache, accelerator=accelerator)
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, method="coop", predictions=predictions, zero_shot=baseline,
        rules=rules, gates=cfg.gates, accelerator=accelerator, validation=on_validation, objective=objective,
        training={**info, "nearest_words": ac.read_prompt(adapter)},
    )  # fmt: skip
    run.finish()
    return code


def train(training: ac.Training, run: Any, accelerator: Any) -> None:
    """Takes the steps of CoOp, with checkpoints and metrics in the run's folder."""
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
