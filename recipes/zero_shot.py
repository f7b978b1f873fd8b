# SPDX-License-Identifier: Apache-2.0
"""Zero-shot: CLIP as it is, with the card's prompts; the number that every adaptation has to beat.

Paper     Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020.
Run       python recipes/zero_shot.py --card my_images/ --backbone ViT-B-16 --pretrained openai
Smoke     python recipes/zero_shot.py     (embedded card and model: no download, CPU, under a minute)
Expected  see README.md in this folder
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import adaptclip as ac
from adaptclip.reports.names import name_audit


@dataclass(frozen=True)
class Config(ac.DataSettings):
    """Zero-shot classification of the card's test split."""

    gates: str = "report"
    """report (judge by the card's gates, but do not let them decide the exit code), card, or a YAML file of gates."""
    out: Path = Path("runs/zero_shot")
    """Run folder: settings, predictions, report, artifact."""
    templates: tuple[str, ...] = ()
    """Prompts with one {} for the class name, averaged; empty takes the card's."""
    objective: str = "auto"
    """auto follows the card; softmax (one class per image) or sigmoid (each by itself, :f1, :sensitivity=0.9, :0.5)."""
    audit_names: bool = False
    """Also try the class names without the card's aliases, and each template by itself; the report compares them."""


def main(cfg: Config) -> int:
    """Card → cached features → zero-shot classifier → predictions → report, gates, artifact."""
    accelerator = ac.make_accelerator("no", 1)
    card = ac.load_card(cfg.card)
    data = ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image)
    objective = ac.parse_objective(cfg.objective, data)
    if cfg.audit_names:
        data.test.require_one_class("an audit of names")
    # What is compared with zero-shot would here be compared with itself.
    rules = [rule for rule in ac.choose_gates(cfg.gates, data) if rule.no_worse_than != "zero_shot"]
    backbone = ac.clip_of(data, cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    adapter = ac.ZeroShotClassifier(backbone, data.prompt_names, cfg.templates or card.templates, objective.name)
    adapter = adapter.to(accelerator.device)
    cache = ac.FeatureCache(cfg.cache)
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, data=data, backbone=backbone, overwrite=cfg.overwrite
    )

    # Classes that are judged each by itself need a bias that most models lack; it changes no ranking of images.
    seen = data.validation if len(data.validation) else data.train
    if adapter.learns_from != "nothing" and len(seen):
        adapter.begin(ac.Support(backbone, seen, data.validation, source=cache, accelerator=accelerator))
    test = cache.get(backbone, data.test, accelerator=accelerator)
    predictions = ac.predict(adapter, test, data.test, accelerator=accelerator)
    # Thresholds that an outcome of the card leaves open are chosen on validation images, never on those of the test.
    is_open = objective.name == "sigmoid" or any(outcome.undecided for outcome in card.outcomes)
    on_validation = ac.predict_validation(adapter, data.validation, cache, accelerator=accelerator) if is_open else None
    names = audit(backbone, data, test, predictions, adapter.templates, accelerator) if cfg.audit_names else None
    code = ac.finish_run(
        run.path, adapter, backbone, data, None, method="zero_shot", predictions=predictions, zero_shot=None,
        rules=rules, gates=cfg.gates, accelerator=accelerator, validation=on_validation, names=names,
        objective=objective,
    )  # fmt: skip
    run.finish()
    return code


def audit(
    backbone: Any, data: Any, test: ac.Features, predictions: ac.Predictions, templates: tuple[str, ...],
    accelerator: Any,
) -> dict[str, Any]:  # fmt: skip
    """Compares the card's names and templates with the plain class names, and with each template by itself."""
    tried = {"class names without aliases": (data.class_names, templates)} if data.card.aliases else {}
    if len(templates) > 1:
        tried |= {f"only: {template}": (data.prompt_names, (template,)) for template in templates}
    tried["names alone, no template"] = (data.prompt_names, ("{}",))
    variants = {"as the card says": predictions}
    for name, (names, prompts) in tried.items():
        classifier = ac.ZeroShotClassifier(backbone, names, prompts).to(accelerator.device)
        variants[name] = ac.predict(classifier, test, data.test, accelerator=accelerator)
    return name_audit(variants)


if __name__ == "__main__":
    ac.launch(main, Config)
