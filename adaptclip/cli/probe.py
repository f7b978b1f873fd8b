# SPDX-License-Identifier: Apache-2.0
"""`adaptclip probe`: what extra words and text queries do to the groups of an image set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adaptclip.errors import CardError, DataError
from adaptclip.settings import ExistingPath
from adaptclip.terminal import console, table

if TYPE_CHECKING:
    from adaptclip.data.card import Card


def probe(
    model: ExistingPath,
    /,
    *,
    card: str,
    data_root: ExistingPath | None = None,
    words: ExistingPath | None = None,
    top_k: int = 100,
    cache: Path = Path(".cache/features"),
    out: Path | None = None,
    device: str = "cpu",
    on_bad_image: Literal["error", "skip"] = "error",
    allow_failed_gates: bool = False,
) -> int:
    """Probe a model with words: how often each group's images are given a word that is no class, and whom texts find.

    Args:
        model: a run folder or an artifact.
        card: data card whose test images and groups are used; its `probes:` are the words.
        data_root: folder that holds the card's files.
        words: YAML file, kind -> list of words, instead of the card's.
        top_k: images at the head of a ranking that count for its skew.
        cache: image features of frozen backbones.
        out: where the numbers are written as JSON; `adaptclip report` of a run shows a probe.json in the run folder.
        device: cpu, cuda, cuda:1 ...
        on_bad_image: stop at the first unreadable image, or leave it out.
        allow_failed_gates: probe a model although one of its gates failed.
    """
    from adaptclip.artifact import artifact_folder, load
    from adaptclip.data.card import load_card
    from adaptclip.data.readers import card_places
    from adaptclip.data.sources import open_data
    from adaptclip.features import FeatureCache
    from adaptclip.files import digest
    from adaptclip.methods import ZeroShotClassifier
    from adaptclip.methods.predicting import is_comparable, predict, probe_scores
    from adaptclip.outputs import check_cache, check_file
    from adaptclip.reports.probe import check_words, probe_report
    from adaptclip.seals import write_sealed

    described = load_card(card)
    places, roots = card_places(described, data_root)
    check_cache(cache, [*places, model], roots)
    if out is not None:
        own = artifact_folder(model)
        read = [words, described.path, *(p for p in own.rglob("*") if p.is_file())]
        check_file(out, [path for path in read if path is not None], judges_runs=True, images=places)
    kinds = _kinds(described, words)
    adapted = load(model, device=device, allow_failed_gates=allow_failed_gates)
    check_words(kinds, (*adapted.class_names, *adapted.manifest["prompt_names"]))
    data = open_data(described, data_root=data_root, on_bad_image=on_bad_image)
    test = data.test
    if test.class_names != adapted.class_names:
        raise DataError(f"{model} knows other classes than the card {described.name}; probe it with the card it learnt")
    extra = [word for of_kind in kinds.values() for word in of_kind]
    adapter, backbone = adapted.adapter, adapted.backbone
    frozen = FeatureCache(cache).get(backbone, test)
    own = frozen if adapter.encoder is backbone else FeatureCache(None).get(adapter.encoder, test)
    zero_shot = ZeroShotClassifier(backbone, adapted.manifest["prompt_names"], described.templates).to(device)
    scores = probe_scores(adapter, own, extra, described.templates)
    report = probe_report(
        predict(zero_shot, frozen, test),
        kinds,
        scores,
        probe_scores(zero_shot, frozen, extra, described.templates),
        k=top_k,
        comparable=is_comparable(adapter, own, scores),
    )
    # By these a report of the run knows that the probe is of its model.
    made_by = digest((adapted.folder / "manifest.json").read_bytes())
    report |= {"card": described.name, "data": data.digest, "model": made_by}
    _print(report)
    if out is not None:
        write_sealed(out, report)
    return 0


def _kinds(card: Card, words: Path | None) -> dict[str, tuple[str, ...]]:
    from adaptclip.files import read_yaml

    if words is None:
        if not card.probes:
            raise CardError(f"card {card.name} names no words to probe with; add `probes:` or give a file (--words)")
        return dict(card.probes)
    kinds = read_yaml(words)
    for kind, of_kind in kinds.items():
        if not isinstance(of_kind, list) or not of_kind or not all(isinstance(word, str) for word in of_kind):
            raise DataError(f"{words}: {kind!r} should be a list of words in quotes, got {of_kind!r}")
    return {str(kind): tuple(of_kind) for kind, of_kind in kinds.items()}


def _print(report: dict[str, Any]) -> None:
    """One screen: rates of extra words by group, and the rankings that favour a group most."""
    from rich.box import SIMPLE_HEAD
    from rich.text import Text

    def rate(number: dict[str, Any] | None) -> Text:
        if number is None or number["value"] is None:
            return Text("–")
        ends = "" if number["low"] is None else f" [{100 * number['low']:.1f}, {100 * number['high']:.1f}]"
        return Text(f"{100 * number['value']:.1f}{ends}")

    screen = console()
    words = table(
        "kind", "group", "n", "zero-shot", "adapted", "change", box=SIMPLE_HEAD, title_justify="left",
        title="images given an extra word instead of a class, per cent",
    )  # fmt: skip
    for row in report["association"]["overall"]:
        n = str(row["model"]["n"])
        words.add_row(row["kind"], "all", n, *(rate(row[p]) for p in ("zero_shot", "model", "change")))
    for attribute, kinds in report["association"]["groups"].items():
        for kind, part in kinds.items():
            for row in part["rows"]:
                cells = (rate(row[p]) for p in ("zero_shot", "model", "change"))
                words.add_row(kind, f"{attribute} = {row['group']}", str(row["n"]), *cells)
    screen.print(words)
    skews = table(
        "query", "favours", "MaxSkew", "noise up to", "p (Holm)", "zero-shot", "NDKL", box=SIMPLE_HEAD,
        title_justify="left", title="text queries by the skew of their first images (0: as in the collection)",
    )  # fmt: skip
    for attribute, rankings in report["retrieval"].items():
        for row in rankings[:5]:
            before = "–" if row["zero_shot"] is None else f"{row['zero_shot']['max_skew']:.2f}"
            favours = f"{attribute} = {row['max_skew_group']}"
            cells = (f"{row['max_skew']:.2f}", f"{row['null_95']:.2f}", f"{row['p_holm']:.3f}", before)
            skews.add_row(f"{row['query']} (first {row['k']})", favours, *cells, f"{row['ndkl']:.3f}")
    screen.print(skews)
    for caution in report["cautions"]:
        screen.print(Text(f"Note: {caution}.", style="dim"))
