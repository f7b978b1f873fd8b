"""Linear probe: a matrix of class weights on frozen image features, by four published ways to fit it.

Paper     logistic: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
          arXiv:2103.00020, app. A.3; text-init (ZS-LP) and clap: Silva-Rodríguez et al., "A Closer Look at the Few-Shot
          Adaptation of Large Vision-Language Models", CVPR 2024, arXiv:2312.12730; lp++: Huang et al., "LP++: A
          Surprisingly Strong Linear Probe for Few-Shot CLIP", CVPR 2024, arXiv:2404.02285.
Run       accelerate launch recipes/linear_probe.py --card images/ --backbone ViT-B-16 --pretrained openai --head clap
Smoke     accelerate launch recipes/linear_probe.py  (embedded card and model: no download, CPU, under a minute)
Expected  see README.md in this folder
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import adaptclip as ac

PUBLISHED_VIEWS = {"logistic": 0, "text-init": 20, "clap": 20, "lp++": 1}
"""Sets of random crops that each head's paper uses; 0 is the evaluation transform."""


@dataclass(frozen=True)
class Config:
    """Linear heads. Defaults are the papers'; a setting that the chosen head does not have is refused."""

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
    """Chooses the few-shot images and, in text-init and clap, the order of images."""
    head: Literal["logistic", "text-init", "clap", "lp++"] = "logistic"
    """How the weights are found: logistic regression, descent from the text features, that held near them, or LP++."""
    C: float = 0.0
    """Inverse strength of the penalty of logistic; 0 chooses it on the few-shot validation images."""
    start_norm: float = 0.0
    """Norm at which the weights of text-init and clap start; 0 takes the root of the logit scale (OpenAI's: 10)."""
    reading: Literal["", "code", "paper"] = ""
    """LP++ as its code has it (the default and the published numbers: alpha, bias, best epoch) or as its paper has."""
    lr: float = 0.0
    """Peak learning rate of text-init and clap; 0 takes the paper's 0.1."""
    epochs: int = 0
    """Passes over the training images of text-init, clap and lp++; 0 takes the papers' 300."""
    clap_weight: float | None = None
    """Multiplies the penalties of clap; not given it is 1, as in the paper, and 0 makes it text-init."""
    views: int | None = None
    """Sets of random crops, 0 for the evaluation transform; not given: 20 (text-init, clap), 1 (lp++), 0 (logistic)."""
    objective: str = "softmax"
    """softmax (one class per image) or sigmoid (each by itself): sigmoid:f1, :sensitivity=0.9 or :0.5 as threshold."""
    mitigate: str = ""
    """Balance of groups or classes, such as group-sampling:sex, class-weights or group-dro:sex; empty for none."""
    min_scale: float = 0.5
    """Smallest random crop as a share of the image's area; a larger limit of the card wins."""
    templates: tuple[str, ...] = ()
    """Prompts with one {} for the class name, averaged; empty takes the card's."""
    gates: str = "card"
    """card, a YAML file of gates, or report (judge by the card's gates, but do not let them decide the exit code)."""
    cache: Path = Path(".cache/features")
    """Image features, shared by all recipes, shots and seeds."""
    out: Path = Path("runs/linear_probe")
    """Run folder: settings, predictions, report, artifact."""
    overwrite: bool = False
    """Replace the run in `out`."""


def main(cfg: Config) -> int:
    """Card → few-shot split → cached features → linear head → predictions → report, gates, artifact."""
    accelerator = ac.make_accelerator("no", 1)
    ac.seed_everything(cfg.seed)
    objective = ac.parse_objective(cfg.objective)

    card = ac.load_card(cfg.card)
    data = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image)
    rules = ac.choose_gates(cfg.gates, data)
    split = ac.sample_few_shot(data, shots=cfg.shots, seed=cfg.seed, rule=cfg.rule)
    few_shots, held_out = split.select(data)
    # Each process fits the whole head.
    mitigation = ac.build_mitigation(cfg.mitigate, few_shots, data.train, objective=objective)
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    templates = cfg.templates or card.templates
    adapter = ac.LinearProbe(
        backbone, data.prompt_names, head=cfg.head, templates=templates, objective=objective.name,
        start_norm=cfg.start_norm or None, reading=cfg.reading or None,
    ).to(accelerator.device)  # fmt: skip
    # 0 stands for "as published"; what the head does not have is refused here, before anything is encoded.
    settings = adapter.fit_settings(
        c=cfg.C or None, lr=cfg.lr or None, epochs=cfg.epochs or None, clap_weight=cfg.clap_weight
    )
    adapter.check_balance(mitigation)
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, split=split, backbone=backbone,
        overwrite=cfg.overwrite,
    )  # fmt: skip

    cache = ac.FeatureCache(cfg.cache)
    crop = ac.training_crop(backbone, card.augmentation, min_scale=cfg.min_scale)
    views = PUBLISHED_VIEWS[cfg.head] if cfg.views is None else cfg.views
    features = cache.get(backbone, few_shots, views=views, augment=crop, accelerator=accelerator)
    # Logistic without --C chooses by them and lp++ keeps its best epoch; the other heads have no use for them.
    reads = adapter.reads_validation(settings.get("c")) and len(held_out) > 0
    validation = cache.get(backbone, held_out, accelerator=accelerator) if reads else None
    fitted = adapter.fit(features, validation, **settings, seed=cfg.seed, balance=mitigation)
    num_learnt = sum(p.numel() for p in adapter.trainable_parameters())
    accelerator.print(f"{cfg.head}: {num_learnt:,} weights fitted in {fitted['seconds']:.1f} s")

    # The test split is read once, here: nothing above has seen it and nothing below chooses.
    test = cache.get(backbone, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    zero_shot = ac.ZeroShotClassifier(backbone, data.prompt_names, templates).to(accelerator.device)
    baseline = ac.predict(zero_shot, test, data.test, accelerator=accelerator)
    judged_held_out = ac.predict_held_out(adapter, held_out, cache, accelerator=accelerator)
    code = ac.finish_run(
        run.path, adapter, backbone, data, split, method="linear_probe", predictions=predictions, zero_shot=baseline,
        rules=rules, gates=cfg.gates, accelerator=accelerator, validation=judged_held_out,
        training={"trainable_parameters": num_learnt, **fitted, "mitigation": mitigation.describe()},
        objective=objective,
    )  # fmt: skip
    run.finish()
    return code


if __name__ == "__main__":
    ac.launch(main, Config)
