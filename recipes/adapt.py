# SPDX-License-Identifier: Apache-2.0
"""Any method by its name, with the loop in view: those without a recipe of their own, and those of other packages.

Paper     of each method: in its docstring, and in docs/peers.md what was compared with it.
Run       python recipes/adapt.py --method gda --card my_images/ --backbone ViT-B-16 --pretrained openai
Smoke     python recipes/adapt.py         (embedded card and model: no download, CPU, under a minute)
Expected  see README.md in this folder
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import adaptclip as ac
from adaptclip.bench.methods import choose_methods, read_settings
from adaptclip.errors import ConfigError
from adaptclip.methods.base import objective_of
from adaptclip.methods.registry import named
from adaptclip.training.support import chosen_preset, preset_line


@dataclass(frozen=True)
class Config(ac.RunSettings):
    """Any method that the bench knows. Defaults follow the papers."""

    out: Path = Path("runs/adapt")
    """Run folder: settings, metrics, predictions, report, artifact."""
    method: str = "gda"
    """Name of a method, as in recipes/few_shot.py."""
    settings: tuple[str, ...] = ()
    """Changes of its settings, SETTING=VALUE, for example epochs=50 lr=1e-3; a wrong one names those that there are."""
    objective: str = "auto"
    """auto follows the card; softmax (one class per image) or sigmoid (each by itself, :f1, :sensitivity=0.9, :0.5)."""


def main(cfg: Config) -> int:
    """Card → few-shot split → features or pixels → method → predictions → report, gates, artifact."""
    (name,) = choose_methods([cfg.method], new_names=False)
    settings = read_settings([f"{name}.{text}" for text in cfg.settings], [name])[name]
    accelerator = ac.make_accelerator(cfg.mixed_precision, cfg.accumulate, trackers=cfg.trackers, out=cfg.out)
    ac.seed_everything(cfg.seed)

    card = ac.load_card(cfg.card)
    data = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image)
    objective = ac.parse_objective(cfg.objective, data)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed, rule=cfg.rule)
    few_shots, validation = split.select(data)
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, accelerator=accelerator, objective=objective)
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    own, planned = named()[name].split(settings)
    adapter = named()[name].build(backbone, data.prompt_names, card.templates, cfg.seed, objective.name, **own)
    adapter = adapter.to(accelerator.device)
    if objective_of(adapter) != objective.name:
        raise ConfigError(f"{name} names exactly one class and has no objective {objective.name}; take another method")
    adapter.check_mitigation(mitigation)
    cache = ac.FeatureCache(cfg.cache)
    support = ac.Support(
        backbone, few_shots, validation, source=cache, augmentation=card.augmentation, shots=cfg.shots, seed=cfg.seed,
        accelerator=accelerator, mitigation=mitigation,
    )  # fmt: skip
    preset = chosen_preset(cfg.preset, cfg.card, cfg.backbone)
    schedule = adapter.schedule(cfg.shots, images_per_class=support.images_per_class, preset=preset, **planned)
    accelerator.print(f"{name}, {preset_line(cfg.preset, preset, schedule)}")
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, split=split, backbone=backbone,
        resume=cfg.resume, overwrite=cfg.overwrite, save_every=cfg.save_every,
    )  # fmt: skip
    info = adapter.learn(support, schedule, partial(train, run=run, accelerator=accelerator))

    # The test split is read once, here: nothing above has seen it and nothing below chooses.
    frozen = cache.get(backbone, data.test, accelerator=accelerator)
    changed = adapter.encoder.image_digest != backbone.image_digest
    test = ac.FeatureCache(None).get(adapter.encoder, data.test, accelerator=accelerator) if changed else frozen
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, card.templates, objective.name)
    zero_shot.begin(support, objective.thresholds)
    baseline = ac.predict(zero_shot, frozen, data.test, accelerator=accelerator)
    on_validation = ac.predict_validation(adapter, validation, cache, accelerator=accelerator)
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, method=adapter.name, predictions=predictions, zero_shot=baseline,
        rules=rules, gates=cfg.gates, accelerator=accelerator, validation=on_validation, objective=objective,
        training={"name": name, **info},
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
