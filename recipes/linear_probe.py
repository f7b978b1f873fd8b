# SPDX-License-Identifier: Apache-2.0
"""Linear probe: a matrix of class weights on frozen image features, by four published ways to fit it.

Paper     logistic: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
          arXiv:2103.00020, app. A.3; text_init (ZS-LP) and clap: Silva-Rodríguez et al., "A Closer Look at the Few-Shot
          Adaptation of Large Vision-Language Models", CVPR 2024, arXiv:2312.12730; lp_plus_plus: Huang et al., "LP++: A
          Surprisingly Strong Linear Probe for Few-Shot CLIP", CVPR 2024, arXiv:2404.02285.
Run       python recipes/linear_probe.py --card images/ --backbone ViT-B-16 --pretrained openai --head clap
Smoke     python recipes/linear_probe.py  (embedded card and model: no download, CPU, under a minute)
Expected  see README.md in this folder
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import adaptclip as ac


@dataclass(frozen=True)
class Config(ac.RunSettings):
    """Linear heads. Defaults are the papers'; a setting that the chosen head does not have is refused."""

    out: Path = Path("runs/linear_probe")
    """Run folder: settings, predictions, report, artifact."""
    head: Literal["logistic", "text_init", "clap", "lp_plus_plus"] = "logistic"
    """How the weights are found: logistic regression, descent from the text features, that held near them, or LP++."""
    C: float | None = None
    """Inverse strength of the penalty of logistic; not given, it is chosen on the few-shot validation images."""
    start_norm: float | None = None
    """Norm at which the weights of text_init and clap start; not given the root of the logit scale (OpenAI's: 10)."""
    reading: Literal["code", "paper"] | None = None
    """LP++ as its code has it (the default and the published numbers: alpha, bias, best epoch) or as its paper has."""
    lr: float | None = None
    """Peak learning rate of text_init and clap; 0.1 in the paper."""
    epochs: int | None = None
    """Passes over the training images of text_init, clap and lp_plus_plus; 300 in the papers."""
    clap_weight: float | None = None
    """Multiplies the penalties of clap; 1 in the paper, and 0 makes it text_init."""
    views: int | None = None
    """Sets of random crops, 0 for the evaluation transform; not given 20, for lp_plus_plus 1, for logistic 0."""
    min_scale: float | None = None
    """Smallest random crop as a share of the image's area (0.5); a larger limit of the card wins."""
    templates: tuple[str, ...] = ()
    """Prompts with one {} for the class name, averaged; empty takes the card's."""
    objective: str = "auto"
    """auto follows the card; softmax (one class per image) or sigmoid (each by itself, :f1, :sensitivity=0.9, :0.5)."""


def main(cfg: Config) -> int:
    """Card → few-shot split → cached features → linear head → predictions → report, gates, artifact."""
    ac.refuse_settings(cfg, "a linear head is fitted as a whole, in full precision", "mixed_precision", "accumulate")
    accelerator = ac.make_accelerator("no", 1, trackers=cfg.trackers, out=cfg.out)
    ac.seed_everything(cfg.seed)

    card = ac.load_card(cfg.card)
    data = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image)
    objective = ac.parse_objective(cfg.objective, data)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed, rule=cfg.rule)
    few_shots, validation = split.select(data)
    # Each process fits the whole head.
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, objective=objective)
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    templates = cfg.templates or card.templates
    adapter = ac.LinearProbe(
        backbone, data.prompt_names, head=cfg.head, templates=templates, objective=objective.name,
        start_norm=cfg.start_norm, reading=cfg.reading,
    ).to(accelerator.device)  # fmt: skip
    # What the head does not have is refused here, before anything is encoded.
    schedule = adapter.schedule(
        cfg.shots, views=cfg.views, min_scale=cfg.min_scale, c=cfg.C, lr=cfg.lr, epochs=cfg.epochs,
        clap_weight=cfg.clap_weight,
    )  # fmt: skip
    adapter.check_mitigation(mitigation)
    accelerator.print(f"{cfg.head}: {schedule}")
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, split=split, backbone=backbone,
        resume=cfg.resume, overwrite=cfg.overwrite,
    )  # fmt: skip

    cache = ac.FeatureCache(cfg.cache)
    # Logistic without --C chooses by the validation images, lp_plus_plus keeps its best epoch; the others use none.
    support = ac.Support(
        backbone, few_shots, validation, source=cache, augmentation=card.augmentation, shots=cfg.shots, seed=cfg.seed,
        accelerator=accelerator, mitigation=mitigation,
    )  # fmt: skip
    info = adapter.learn(support, schedule)
    accelerator.print(f"{cfg.head}: {info['trainable_parameters']:,} weights fitted in {info['seconds']:.1f} s")

    # The test split is read once, here: nothing above has seen it and nothing below chooses.
    test = cache.get(backbone, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, templates, objective.name)
    zero_shot.begin(support, objective.thresholds)
    baseline = ac.predict(zero_shot, test, data.test, accelerator=accelerator)
    on_validation = ac.predict_validation(adapter, validation, cache, accelerator=accelerator)
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, method="linear_probe", predictions=predictions, zero_shot=baseline,
        rules=rules, gates=cfg.gates, accelerator=accelerator, validation=on_validation, training=info,
        objective=objective,
    )  # fmt: skip
    run.finish()
    return code


if __name__ == "__main__":
    ac.launch(main, Config)
