# SPDX-License-Identifier: Apache-2.0
"""Tip-Adapter, Tip-Adapter-F, GDA and SS-Text+: adapt with the training images' features, in seconds.

Paper     tip_adapter, tip_adapter_f
                      Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP", ECCV 2022, arXiv:2207.09519
          gda         Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", arXiv:2402.04087
          ss_text     Silva-Rodriguez et al., "Few-Shot, Now for Real", arXiv:2506.17500
Run       python recipes/tip_adapter.py --card my_images/ --backbone ViT-B-16 --pretrained openai
          (--variant tip_adapter, tip_adapter_f, gda or ss_text)
Smoke     python recipes/tip_adapter.py      (embedded card and model: no download, CPU, about a minute)
Expected  see README.md in this folder
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import adaptclip as ac
from adaptclip.errors import ConfigError, did_you_mean

METHODS = {"tip_adapter": "tip_adapter", "tip_adapter_f": "tip_adapter", "gda": "gda", "ss_text": "ss_text"}
"""Variant -> the method's name in artifacts."""


@dataclass(frozen=True)
class Config(ac.RunSettings):
    """Four ways to use the training images' features. Defaults follow the papers."""

    out: Path = Path("runs/tip_adapter")
    """Run folder: settings, metrics, predictions, report, artifact."""
    variant: Literal["tip_adapter", "tip_adapter_f", "gda", "ss_text"] = "tip_adapter_f"
    """The method; only tip_adapter_f trains, the others are computed."""
    choose: Literal["validation", "fixed"] = "validation"
    """Where alpha and beta come from: the validation images (tip_adapter_f: before and after training), or below."""
    alpha: float | None = None
    """Weight of the images against the text, for --choose fixed; not given 1 (tip_adapter_f: 3); not for ss_text."""
    beta: float | None = None
    """Sharpness of the similarity, for --choose fixed; not given 5.5 (tip_adapter_f: 1); not for gda and ss_text."""
    mode: Literal["plus", "plain"] = "plus"
    """Of ss_text: plus is SS-Text+, which its paper arrives at, plain is SS-Text."""
    views: int | None = None
    """Sets of random crops; 0 is the evaluation transform. Not given: the papers' 10, and 0 for ss_text."""
    min_scale: float | None = None
    """Smallest crop as a share of the image's area (0.5); a larger smallest crop in the card wins."""
    epochs: int | None = None
    """Passes of tip_adapter_f over the training images; 20 in the paper, which gives EuroSAT 100."""
    lr: float | None = None
    """Peak learning rate of tip_adapter_f's AdamW (eps 1e-4); 1e-3 in the paper."""
    batch_size: int | None = None
    """Images of tip_adapter_f per process and micro-step; 256 in the paper."""
    objective: str = "auto"
    """auto follows the card; softmax (one class per image) or sigmoid (each by itself, :f1, :sensitivity=0.9, :0.5)."""


def main(cfg: Config) -> int:
    """Card → few-shot split → cached features → fit, choice on validation → predictions → report, gates, artifact."""
    check(cfg)
    accelerator = ac.make_accelerator("no", cfg.accumulate, trackers=cfg.trackers, out=cfg.out)
    ac.seed_everything(cfg.seed)

    card = ac.load_card(cfg.card)
    data = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image)
    objective = ac.parse_objective(cfg.objective, data)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed, rule=cfg.rule)
    few_shots, validation = split.select(data)
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, accelerator=accelerator, objective=objective)
    if cfg.choose == "validation" and cfg.variant != "ss_text" and len(validation) == 0:
        how = "take the paper's with --choose fixed, fewer --shots, or a card with a validation part"
        raise ConfigError(f"card {card.name} leaves no validation images to choose alpha and beta on; {how}")
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    adapter = build(cfg, backbone, data.prompt_names, card.templates, objective.name).to(accelerator.device)
    given = {name: getattr(cfg, name) for name in ("views", "min_scale", "epochs", "lr", "batch_size")}
    given = given if cfg.variant == "tip_adapter_f" else {name: given[name] for name in ("views", "min_scale")}
    choose = {} if cfg.variant == "ss_text" else {"choose": cfg.choose == "validation"}
    schedule = adapter.schedule(cfg.shots, **given, **choose)
    accelerator.print(f"{cfg.variant}: {schedule}")
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, split=split, backbone=backbone,
        resume=cfg.resume, overwrite=cfg.overwrite, save_every=cfg.save_every,
    )  # fmt: skip

    cache = ac.FeatureCache(cfg.cache)
    support = ac.Support(
        backbone, few_shots, validation, source=cache, augmentation=card.augmentation, shots=cfg.shots, seed=cfg.seed,
        accelerator=accelerator, mitigation=mitigation,
    )  # fmt: skip
    # Tip-F chooses what it trains at, and afterwards whether to use the keys with another pair.
    info = adapter.learn(support, schedule, partial(train, run=run, accelerator=accelerator))

    # The test split is read once, here: nothing above has seen it and nothing below chooses.
    test = cache.get(backbone, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, card.templates, objective.name)
    zero_shot.begin(support, objective.thresholds)
    baseline = ac.predict(zero_shot, test, data.test, accelerator=accelerator)
    on_validation = ac.predict_validation(adapter, validation, cache, accelerator=accelerator)
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, zero_shot=baseline, predictions=predictions, validation=on_validation,
        method=METHODS[cfg.variant], rules=rules, gates=cfg.gates, accelerator=accelerator, objective=objective,
        training={"variant": cfg.variant, "views": schedule.views, **info},
    )  # fmt: skip
    run.finish()
    return code


def train(training: ac.Training, run: Any, accelerator: Any) -> None:
    """Takes the steps of Tip-Adapter-F, with checkpoints and metrics in the run's folder."""
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


def check(cfg: Config) -> None:
    """Raises ConfigError for a name that a program can get wrong, or a setting that has nothing to change."""
    for value, options in ((cfg.variant, METHODS), (cfg.choose, ("validation", "fixed"))):
        if value not in options:
            raise ConfigError(f"{value!r} is not one of the options. {did_you_mean(value, options)}")
    given = [f"--{name}" for name in ("alpha", "beta") if getattr(cfg, name) is not None]
    if given and cfg.choose == "validation":
        raise ConfigError(f"{' and '.join(given)} would be overwritten by --choose validation; add --choose fixed")
    ac.refuse_settings(cfg, "keys are learnt in full precision", "mixed_precision")
    if cfg.variant != "tip_adapter_f":
        learns = ("mitigate", "epochs", "lr", "batch_size", "accumulate")
        ac.refuse_settings(cfg, f"{cfg.variant} is computed and not trained", *learns)


def build(cfg: Config, backbone: Any, names: Any, templates: Any, objective: Any) -> Any:
    """Returns the adapter of the variant, before it has seen an image: a zero-shot classifier."""
    if cfg.variant == "gda":
        return ac.GDA(backbone, names, templates=templates, alpha=cfg.alpha, objective=objective)
    if cfg.variant == "ss_text":
        if objective == "sigmoid":
            raise ConfigError("ss_text names exactly one class; for the objective sigmoid take another --variant")
        return ac.SSText(backbone, names, templates=templates, mode=cfg.mode)
    learn = cfg.variant == "tip_adapter_f"
    how = {"alpha": cfg.alpha, "beta": cfg.beta, "learn_keys": learn, "objective": objective}
    return ac.TipAdapter(backbone, names, templates=templates, **how)


if __name__ == "__main__":
    ac.launch(main, Config)
