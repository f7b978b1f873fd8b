# SPDX-License-Identifier: Apache-2.0
"""The README.md of an artifact: a Hugging Face model card filled from the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from adaptclip.data.card_block import HubSource
from adaptclip.errors import agree
from adaptclip.gates import Verdict, overall_verdict
from adaptclip.metrics.rates import MACRO_F1
from adaptclip.reports.bias import info, sentence
from adaptclip.reports.findings_page import finding_worries
from adaptclip.reports.headline import NO_GATES, judged_words, verdict_of
from adaptclip.reports.render import escape_markdown, to_markdown

if TYPE_CHECKING:
    from adaptclip.data.card import Card

_MANY_CLASSES = 60

NO_CARD = "none"
"""What an artifact says of the data card where there was none."""


def unjudged_card(manifest: Mapping[str, Any]) -> str:
    """Writes the README of a model that was saved by itself: what it is, and that nobody judged it."""
    names = [escape_markdown(name) for name in manifest["class_names"]]
    return (
        f"# {manifest['method']}\n\n`{manifest['backbone']['name']}` for {len(names)} classes: "
        f"{', '.join(names[:_MANY_CLASSES])}{', …' * (len(names) > _MANY_CLASSES)}.\n\n"
        "It was saved from a program: no data card says what it learnt from, no gate was declared, and nothing here "
        "says how good it is. Judge it on images that it has not seen (`adaptclip.judge`) before relying on it.\n\n"
        '```python\nimport adaptclip\n\nmodel = adaptclip.load("path/to/this/folder")\n'
        f'print(model.predict(["image.jpg"]))\n```\n\n{_loading([])}\n'
    )


def model_card(manifest: Mapping[str, Any], card: Card, report: Mapping[str, Any], verdicts: Sequence[Verdict]) -> str:
    """Writes the model card.

    Args:
        manifest: what the artifact says of itself.
        card: of the data it was adapted to.
        report: on the test split (`full_report`, or `build_report`).
        verdicts: of the gates.

    Returns:
        Markdown under YAML metadata, with the results as the hub's model-index.
    """
    parts = [
        f"---\n{_metadata(manifest, card, report).to_yaml()}\n---",
        f"# {_title(manifest, card)}",
        _lead(manifest, card),
        "## Intended use",
        _intended(manifest, card, report),
        "## Out of scope",
        _out_of_scope(manifest, card, report),
        "## How to load it",
        '```python\nimport adaptclip\n\nmodel = adaptclip.load("path/to/this/folder")\n'
        'print(model.predict(["image.jpg"]))\n```',
        _loading(verdicts),
        "## Training data",
        _data(card, report),
        "## Limits",
        _limits(card, report),
        "## Gates",
        _gates(verdicts, report),
        "## Results on the test split",
        _results(report),
    ]
    return "\n\n".join(parts) + "\n"


def _title(manifest: Mapping[str, Any], card: Card) -> str:
    return escape_markdown(f"{manifest['method']} on {card.front_matter.get('pretty_name') or card.name}")


def _metadata(manifest: Mapping[str, Any], card: Card, report: Mapping[str, Any]) -> ModelCardData:
    hub = card.source.id if isinstance(card.source, HubSource) else None
    dataset: dict[str, Any] = {
        "dataset_type": hub or card.name,
        "dataset_name": str(card.front_matter.get("pretty_name") or card.name),
        "dataset_split": "test",
    }
    numbers = {name: compared["model"] for name, compared in report["overall"].items()}
    if fine := report.get("fine_grained"):
        numbers[MACRO_F1.name] = fine["overall"][MACRO_F1.name]["model"]
    results = [
        EvalResult(
            task_type="image-classification",
            metric_type=how["hub"],
            metric_name=how["words"][:1].upper() + how["words"][1:],
            metric_value=round(number["value"], 6),
            **dataset,
        )
        for name, number in numbers.items()
        if (how := info(report, name))["hub"] and number["value"] is not None
    ]
    name = manifest["backbone"]["name"]
    return ModelCardData(
        library_name="adaptclip",
        pipeline_tag="image-classification",
        tags=["clip", "adaptclip", "few-shot", manifest["method"]],
        model_name=f"{manifest['method']} on {card.name}",
        base_model=name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else None,
        datasets=[hub] if hub else None,
        eval_results=results or None,
    )


def _lead(manifest: Mapping[str, Any], card: Card) -> str:
    backbone, split = manifest["backbone"], manifest["split"]
    pretrained = f" with the weights `{backbone['pretrained']}`" if backbone["pretrained"] else ""
    training = (
        f"adapted with {split['shots'] or 'all'} labelled images per class (rule `{split['rule']}`, seed "
        f"{split['seed']})"
        if split
        else "without any training images"
    )
    return (
        f"`{backbone['name']}`{pretrained} for the {len(manifest['class_names'])} classes of the data card "
        f"`{card.name}`, {training}. The artifact holds what was learnt; the backbone's own weights are loaded from "
        "where they were in training, and are checked."
    )


def _intended(manifest: Mapping[str, Any], card: Card, report: Mapping[str, Any]) -> str:
    names = [escape_markdown(name) for name in manifest["class_names"]]
    shown = ", ".join(names[:_MANY_CLASSES]) + (f", and {len(names) - _MANY_CLASSES} more" * (len(names) > 60))
    aim = f"Telling apart these {len(names)} classes"
    if report.get("findings"):
        aim = f"Saying which of these {len(names)} classes an image shows, which may be several or none,"
    return (
        f"{aim} on images like those of `{card.name}`: {shown}.\n\n"
        "Assess it on images of the place where it is to be used before relying on it; `adaptclip report` and "
        "`adaptclip gate` do that from a file of predictions."
    )


def _out_of_scope(manifest: Mapping[str, Any], card: Card, report: Mapping[str, Any]) -> str:
    own = _section(card.prose, "uses to avoid")
    by_itself = bool(manifest.get("objective") or report.get("findings"))
    several = "may name several of them for an image, or none" if by_itself else ""
    general = (
        f"- It knows only its own classes and {several or 'gives each image one of them, whatever the image shows'}.\n"
        "- Images of other devices, places or people than those it was assessed on.\n"
        "- Decisions about people without a person who can overrule it."
    )
    return f"{general}\n\nThe data card says of its images:\n\n{own}" if own else general


def _section(prose: str, title: str) -> str:
    """The text under a second-level heading of a card's prose, with deeper headings as they are."""
    lines = prose.splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip().lower() == f"## {title}"]
    if not starts:
        return ""
    rest = lines[starts[0] + 1 :]
    end = next((i for i, line in enumerate(rest) if line.startswith(("# ", "## "))), len(rest))
    kept = "\n".join(rest[:end]).strip().replace("<", "&lt;")
    return "\n".join(f"> {line}".rstrip() for line in kept.splitlines())


def _loading(verdicts: Sequence[Verdict]) -> str:
    digests = (
        "Digests in `manifest.json` cover all that decides an answer. They find damage, not forgery: whoever changes a "
        "file on purpose can write its digest anew, so take artifacts only from people you trust."
    )
    if overall_verdict(verdicts) == "fail":
        return f"A gate failed, so loading it is refused unless you ask for it: `allow_failed_gates=True`. {digests}"
    return (
        "Loading refuses files that were changed, other backbone weights than those of training, and models that "
        f"failed a gate. {digests}"
    )


def _data(card: Card, report: Mapping[str, Any]) -> str:
    pretty = card.front_matter.get("pretty_name")
    licence = card.front_matter.get("license")
    lines = [f"- Data card `{card.name}`" + (f" ({escape_markdown(str(pretty))})" if pretty else "")]
    if licence:
        lines.append(
            f"- Licence of the images: {escape_markdown(str(licence))}. What it says of models is for you to read."
        )
    if data := report.get("data"):
        lines.append("- Images: " + ", ".join(f"{part} {n:,}" for part, n in data["images"].items()))
    split = report.get("split")
    if split:
        used_for = escape_markdown(str(split["validation_used_for"]))
        lines.append(
            f"- Trained on {split['num_train']:,} of them; the {split['num_validation']:,} validation images were used "
            f"for: {used_for}"
        )
    groups = ", ".join(escape_markdown(name) for name in report["groups"])
    lines.append(f"- Groups that are reported: {groups or 'none, so differences between groups are not known'}")
    return "\n".join(lines)


def _limits(card: Card, report: Mapping[str, Any]) -> str:
    worries = (report.get("data") or {}).get("worries", [])
    issues = [f"- {escape_markdown(issue)}" for issue in (*worries, *card.known_issues)]
    issues = issues or ["- The data card names no known issues, which does not mean that there are none."]
    few = [row["class"] for row in report["per_class"] if not row["sufficient"]]
    if few:
        which = " that are known to show it, or known not to" if report.get("findings") else ""
        issues.append(
            f"- {len(few)} {agree(len(few), 'class has', 'classes have')} fewer than 10 test images{which}; "
            f"nothing is known about {agree(len(few), 'it', 'them')}."
        )
    issues += [f"- {escape_markdown(sentence(worry))}" for worry in finding_worries(report)]
    shift = report.get("shift") or {}
    if shift.get("worse"):
        names = ", ".join(escape_markdown(name) for name in shift["worse"])
        issues.append(f"- Significantly less accurate than the unadapted model for: {names}.")
    return "\n".join(issues)


def _gates(verdicts: Sequence[Verdict], report: Mapping[str, Any]) -> str:
    if not verdicts:
        return NO_GATES
    lines = [f"- **{v.verdict}**: {escape_markdown(v.title)}. {escape_markdown(v.reason)}" for v in verdicts]
    belongs, said = judged_words(report)
    return "\n\n".join([f"{verdict_of(verdicts)[1]} {said}".rstrip(), "\n".join(lines), belongs]).rstrip()


def _results(report: Mapping[str, Any]) -> str:
    # The report's own headings go one level down, and its title away, below this card's; data and training are told
    # above.
    kept = {key: value for key, value in report.items() if key not in ("data", "training", "split")}
    return to_markdown(kept, None).partition("\n")[2].strip().replace("\n## ", "\n### ")
