# SPDX-License-Identifier: Apache-2.0
"""How well a model tells classes apart: top-k, confusions, levels of a taxonomy, severity of mistakes; its sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adaptclip.errors import DataError, did_you_mean
from adaptclip.metrics.estimates import Measurement, linearised, mean_of
from adaptclip.metrics.rates import ACCURACY, MACRO_F1, ancestor_heights, least_severe, top_k
from adaptclip.metrics.worst_decile import WORST_DECILE, pick_worst
from adaptclip.predictions import Predictions
from adaptclip.reports.bias import is_paired, overall_blocks, sentence
from adaptclip.reports.blocks import (
    Block,
    Bullets,
    Cell,
    Figure,
    Gallery,
    Paragraph,
    Rows,
    Section,
    Thumbnail,
    change_scale,
    comparison,
    count,
    number,
    one_line,
    plain,
    points,
    rate,
    show_plain,
    show_points,
    show_rate,
    text,
)
from adaptclip.reports.measuring import coarsen, judged, measure, sampling_of
from adaptclip.reports.plots import class_spread

TOP_K = (1, 3, 5)

MAX_CONFUSIONS = 12
"""Confused pairs that a report lists."""

MAX_EXAMPLES = 3
"""Images that a report names of each confused pair."""

MAX_MATRIX_CLASSES = 25
"""Up to this many classes the whole confusion matrix is part of the report."""

MAX_SEVERITY_CLASSES = 4000
"""Above this many classes no matrix of common ancestors is built."""


def fine_grained_report(
    predictions: Predictions,
    baseline: Predictions | None = None,
    *,
    hard_pairs: Sequence[tuple[str, str]] = (),
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Assesses how finely a model distinguishes.

    Args:
        predictions: the judged model.
        baseline: zero-shot predictions, aligned, or None.
        hard_pairs: pairs of class names that are known to be hard, of the card.
        confidence: level of all two-sided intervals.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        JSON-able dict with numbers and comparisons as in `build_report`: "overall" (metric -> comparison: top-k
        accuracies, macro-F1, the worst tenth of the classes), "metrics" (name -> `Metric.info`), "worst_classes" (those
        with the lowest accuracy, "classes", of how many, "of", and their accuracy on the images that picked them,
        "as_chosen"), "confusions" (list), "matrix", "hard_pairs" (list), "levels" (list), "severity" (None without a
        taxonomy).

    Raises:
        DataError: a hard pair names an unknown class.
    """
    settings: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed}
    both = (predictions,) if baseline is None else (predictions, baseline)
    asked = [k for k in TOP_K if k < len(predictions.class_names) and k <= (predictions.ranked or k)]
    metrics = [*(ACCURACY if k == 1 else top_k(k) for k in asked), MACRO_F1, WORST_DECILE]
    compared = measure(predictions, baseline, metrics=metrics, draws=draws, seed=seed)
    return {
        "overall": {name: comparison(found, confidence) for name, found in compared.items()},
        "metrics": {metric.name: metric.info() for metric in metrics},
        "worst_classes": _worst_classes(predictions),
        "confusions": _confusions(predictions, confidence),
        "matrix": _matrix(predictions),
        "hard_pairs": [_hard_pair(predictions, baseline, pair, settings) for pair in hard_pairs],
        "levels": [_level(predictions, baseline, level, settings) for level in predictions.levels],
        "severity": _severity(both, confidence),
    }


def example_names(fine: Mapping[str, Any] | None) -> dict[str, str]:
    """Row id -> name of the images that a fine-grained report shows as examples of confusions; none without one."""
    pairs = (fine or {"confusions": ()})["confusions"]
    return {example["id"]: example["name"] for pair in pairs for example in pair["examples"]}


def _worst_classes(predictions: Predictions) -> dict[str, Any]:
    """The tenth of the classes with the lowest accuracy; how low it truly is, the metric of that name says."""
    picked = pick_worst(judged(predictions))
    names = [predictions.class_names[i] for i in picked.classes]
    return {"classes": names, "of": len(picked.of), "as_chosen": picked.accuracy}


def _confusions(predictions: Predictions, confidence: float) -> list[dict[str, Any]]:
    """The directed pairs of classes that are confused most, by number of images and then by rate."""
    size = len(predictions.class_names)
    predicted = predictions.pred
    wrong = np.flatnonzero(predicted != predictions.labels)
    pairs, counts = np.unique(predictions.labels[wrong] * size + predicted[wrong], return_counts=True)
    true, other = np.divmod(pairs, size)
    sizes = np.bincount(predictions.labels, minlength=size)
    order = np.lexsort((pairs, -counts / sizes[true], -counts))[:MAX_CONFUSIONS]
    rows, sampling, names = [], sampling_of(predictions), predictions.names
    for i in order:
        of_class = np.flatnonzero(predictions.labels == true[i])
        taken = predicted[of_class] == other[i]
        images = of_class[taken]
        sure_first = images[np.argsort(-predictions.probs[images, other[i]], kind="stable")][:MAX_EXAMPLES]
        rows.append(
            {
                "true": predictions.class_names[true[i]],
                "predicted": predictions.class_names[other[i]],
                "count": int(counts[i]),
                "back": int(((predictions.labels == other[i]) & (predicted == true[i])).sum()),
                "rate": number(mean_of(taken, sampling.take(of_class)), confidence),
                "examples": [
                    {
                        "id": predictions.ids[j],
                        "name": names[j],
                        "confidence": float(predictions.probs[j, other[i]]) if predictions.confident else None,
                    }
                    for j in sure_first
                ],
            }
        )
    return rows


def _matrix(predictions: Predictions) -> list[list[int]] | None:
    """Images by true class (row) and predicted class; None with more than MAX_MATRIX_CLASSES."""
    size = len(predictions.class_names)
    if size > MAX_MATRIX_CLASSES:
        return None
    counts = np.bincount(predictions.labels * size + predictions.pred, minlength=size * size)
    return counts.reshape(size, size).tolist()


def _hard_pair(
    predictions: Predictions, baseline: Predictions | None, pair: tuple[str, str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Accuracy on the images of two classes when only the two are asked about."""
    for name in pair:
        if name not in predictions.class_names:
            has = did_you_mean(name, predictions.class_names, lead="The classes are")
            raise DataError(f"hard pair {list(pair)}: no class {name!r}. {has}")
    if pair[0] == pair[1]:
        raise DataError(f"hard pair {list(pair)} names one class twice; it needs two")
    ids = [predictions.class_names.index(name) for name in pair]
    rows = np.flatnonzero(np.isin(predictions.labels, ids))
    kept = [None if p is None else _only(p, rows, ids) for p in (predictions, baseline)]
    confidence = settings["confidence"]
    assert kept[0] is not None
    measured = measure(
        kept[0], kept[1], metrics=("mean_per_class_accuracy",), draws=settings["draws"], seed=settings["seed"]
    )
    inside = np.isin(predictions.pred[rows], ids)
    return {
        "pair": list(pair),
        "n": [int((predictions.labels == i).sum()) for i in ids],
        "accuracy": comparison(measured["mean_per_class_accuracy"], confidence),
        "within_pair": float(inside.mean()) if len(rows) else None,
    }


def _only(predictions: Predictions, rows: np.ndarray, classes: list[int]) -> Predictions:
    """Predictions of the images at `rows` among two classes."""
    two = predictions.probs[rows][:, classes].astype(np.float64)
    total = two.sum(axis=1, keepdims=True)
    two = np.divide(two, total, out=np.full_like(two, 0.5), where=total > 0)
    return Predictions(
        tuple(predictions.ids[i] for i in rows),
        (predictions.labels[rows] == classes[1]).astype(np.int64),
        two.astype(np.float32),
        tuple(predictions.class_names[c] for c in classes),
        clusters=None if predictions.clusters is None else tuple(predictions.clusters[i] for i in rows),
        fixed_classes=predictions.fixed_classes,
    )


def _level(
    predictions: Predictions, baseline: Predictions | None, level: str, settings: dict[str, Any]
) -> dict[str, Any]:
    coarse = coarsen(predictions, level)
    base = None if baseline is None else coarsen(replace(baseline, levels=predictions.levels), level)
    metrics = ("accuracy", "mean_per_class_accuracy")
    measured = measure(coarse, base, metrics=metrics, draws=settings["draws"], seed=settings["seed"])
    return {
        "level": level,
        "num_names": len(coarse.class_names),
        **{metric: comparison(compared, settings["confidence"]) for metric, compared in measured.items()},
    }


def _severity(both: Sequence[Predictions], confidence: float) -> dict[str, Any] | None:
    """Mean height of the lowest common ancestor over the mistakes, and what deciding by severity would change."""
    first = both[0]
    size = len(first.class_names)
    if not first.levels or size > MAX_SEVERITY_CLASSES:
        return None
    heights = ancestor_heights(first.levels, size)
    top = len(first.levels) + 1
    names = ["the class itself", *reversed(first.levels), "only the root"]
    reached = heights[first.labels, first.pred]
    wrong = int((reached > 0).sum())
    cautious = least_severe(first.probs, heights)
    return {
        "max_height": top,
        "mistakes": _mistakes([p.pred for p in both], first, heights, top, confidence),
        "distribution": [
            {
                "height": h,
                "shared": names[h],
                "count": int((reached == h).sum()),
                "share": int((reached == h).sum()) / wrong if wrong else None,
            }
            for h in range(1, top + 1)
        ],
        "least_severe": {
            "accuracy": number(mean_of(cautious == first.labels, sampling_of(first)), confidence),
            "mistakes": _mistakes([cautious], first, heights, top, confidence)["model"],
            "height_of_all": number(_height_of_all(cautious, first, heights, top), confidence),
            "decisions_changed": int((cautious != first.pred).sum()),
        },
        "height_of_all": number(_height_of_all(first.pred, first, heights, top), confidence),
    }


def _mistakes(
    decided: list[np.ndarray], predictions: Predictions, heights: np.ndarray, top: int, confidence: float
) -> dict[str, Any]:
    """Mean height over the mistakes; without a change, as two models' mistakes are of different images."""
    numbers = [number(_mean_height(pred, predictions, heights, top), confidence) for pred in decided]
    return {"model": numbers[0], "zero_shot": numbers[1] if len(numbers) > 1 else None, "change": None}


def _mean_height(decided: np.ndarray, predictions: Predictions, heights: np.ndarray, top: int) -> Measurement:
    reached = heights[predictions.labels, decided].astype(np.float64)
    wrong = reached > 0
    count = int(wrong.sum())
    if count == 0:
        return Measurement(None, 0, note="there are no mistakes")
    mean = float(reached[wrong].mean())
    influence = np.where(wrong, reached - mean, 0.0) / count
    rows = np.flatnonzero(wrong)
    return linearised(mean, influence[rows], sampling_of(predictions, rows), low=1.0, high=float(top))


def _height_of_all(decided: np.ndarray, predictions: Predictions, heights: np.ndarray, top: int) -> Measurement:
    return mean_of(heights[predictions.labels, decided].astype(np.float64), sampling_of(predictions), high=float(top))


_MANY_CLASSES = 12


def class_section(report: Mapping[str, Any], *, plots: bool) -> Section:
    """Every class, the worst tenth, top-k and macro-F1."""
    blocks: list[Block] = []
    fine = report.get("fine_grained")
    if fine:
        blocks += overall_blocks(fine, "How finely it distinguishes")
    if plots and len(report["per_class"]) >= _MANY_CLASSES:
        rows = [row for row in report["per_class"] if row["accuracy"]["value"] is not None]
        ends = sorted(rows, key=lambda row: row["accuracy"]["value"])
        words = (
            f"From {100 * ends[0]['accuracy']['value']:.0f} % for {one_line(ends[0]['class'])} to "
            f"{100 * ends[-1]['accuracy']['value']:.0f} % for {one_line(ends[-1]['class'])}; each class is in the "
            "table below."
        )
        blocks.append(Figure("Accuracy of every class with its interval", class_spread(report["per_class"]), words))
    blocks.append(_class_rows(report))
    if (report.get("shift") or {}).get("classes"):
        words = (
            "Each bracket is of that class alone; the last column allows for the number of classes, so that it may say "
            "“cannot tell” where a bracket leaves out zero."
        )
        blocks.append(Paragraph(words, "muted"))
    if not all(row["sufficient"] for row in report["per_class"]):
        words = "Insufficient: fewer than 10 test images; such an accuracy says next to nothing."
        blocks.append(Paragraph(words, "muted"))
    return Section("Classes", "classes", blocks)


def _class_rows(report: Mapping[str, Any]) -> Rows:
    changes = {row["class"]: row for row in (report.get("shift") or {}).get("classes", ())}
    few = not all(row["sufficient"] for row in report["per_class"])
    rows = []
    for row in sorted(report["per_class"], key=lambda r: (r["accuracy"]["value"] is None, r["accuracy"]["value"] or 0)):
        tone = "" if row["sufficient"] else "muted"
        cells = [text(one_line(row["class"]), tone), count(row["n"]), rate(row["accuracy"])]
        if changes:
            change = changes.get(row["class"])
            cells += [points(change["change"] if change else None), _direction(change)]
        if few:
            cells.append(text("" if row["sufficient"] else "insufficient", "muted"))
        rows.append(cells)
    header = ["class", "n", "accuracy", *["change in points", "against zero-shot"] * bool(changes), *["images"] * few]
    scales = {2: (0.0, 1.0)} | ({3: change_scale(rows, 3)} if changes else {})
    return Rows("Classes, lowest accuracy first", header, rows, scales, {3: 0.0} if changes else {})


def _direction(change: Mapping[str, Any] | None) -> Cell:
    if change is None or not change["direction"]:
        return text("cannot tell" if change else "", "muted")
    return text(change["direction"], "fail" if change["direction"] == "worse" else "pass")


def shift_section(report: Mapping[str, Any]) -> Section | None:
    """Which classes got worse; other classes and other domains where they were given."""
    shift = report.get("shift")
    if not shift:
        return None
    return Section("What adaptation changed", "shift", list(_shift_blocks(shift, report["confidence"])))


def _shift_blocks(shift: Mapping[str, Any], confidence: float) -> Iterator[Block]:
    if shift.get("classes"):
        tested, worse, better = shift["tested"], shift["worse"], shift["better"]
        yield Paragraph(
            f"Of {tested} classes, {len(worse)} got worse than zero-shot and {len(better)} better beyond what chance "
            f"explains (exact test on the images that changed, at the {100 * (1 - confidence):.3g} % level, "
            f"Holm-corrected over the classes). Classes with a lower accuracy, by chance or not: {shift['num_lower']}."
        )
        listed = [row for row in shift["classes"] if row["direction"] == "worse"] or shift["classes"][:3]
        listed = [row for row in listed if row["change"]["value"] < 0]
        if listed:
            luck = f"with {tested} classes tested, chance can explain it"
            yield Bullets(
                [
                    f"{one_line(row['class'])}: {show_points(row['change'])} points, n = {row['n']}"
                    + (f", p = {row['p_holm']:.2g} (Holm): worse." if row["direction"] else f": {luck}.")
                    for row in listed[:10]
                ],
                caution=bool(worse),
            )
    if found := shift.get("base_new"):
        yield _base_new_rows(found)
        yield Paragraph(
            "Base classes were learnt, new ones are known by their names only; either half is judged among its own "
            f"classes. Their harmonic mean is high only where both are. Of its change: "
            f"{sentence(found['harmonic_mean']['change']['note'])}",
            "muted",
        )
    if found := shift.get("domains"):
        rows = [
            [text(metric.replace("_", " ")), rate(c["source"]), rate(c["target"]), points(c["change"])]
            for metric, c in found.items()
        ]
        header = ["metric", "source", "target", "target minus source, points"]
        scales = {1: (0.0, 1.0), 2: (0.0, 1.0), 3: change_scale(rows, 3)}
        yield Rows("Source and target domain", header, rows, scales, {3: 0.0})


def _base_new_rows(found: Mapping[str, Any]) -> Rows:
    rows = []
    for key, name in (("base", "base classes"), ("new", "new classes"), ("harmonic_mean", "harmonic mean")):
        c = found[key]
        rows.append([text(name), rate(c["zero_shot"]), rate(c["model"]), points(c["change"]), count(c["model"]["n"])])
    header = ["", "zero-shot", "adapted", "change in points", "n"]
    scales = {1: (0.0, 1.0), 2: (0.0, 1.0), 3: change_scale(rows, 3)}
    return Rows("Accuracy on base and new classes", header, rows, scales, {3: 0.0})


def confusion_section(
    report: Mapping[str, Any], pictures: Mapping[str, str] | None, *, matrix: str | None
) -> Section | None:
    """Which classes are taken for which, with images of them.

    Args:
        report: the whole report.
        pictures: row id -> data: URI; None where images are not at hand.
        matrix: SVG of the confusion matrix, or None.
    """
    fine = report.get("fine_grained")
    if not fine:
        return None
    confusions = fine["confusions"]
    if not confusions:
        return Section("Mistakes", "mistakes", [Paragraph("No image was given a wrong class.")])
    blocks: list[Block] = []
    if matrix:
        first = confusions[0]
        words = (
            f"Most often, {one_line(first['true'])} was taken for {one_line(first['predicted'])}: {first['count']} "
            "images. The table lists the commonest confusions."
        )
        blocks.append(Figure("True classes (rows) and what they were taken for (columns), images", matrix, words))
    rows = [
        [text(one_line(c["true"])), text(one_line(c["predicted"])), count(c["count"]), rate(c["rate"]),
         count(c["back"])]
        for c in confusions
    ]  # fmt: skip
    header = ["true class", "taken for", "images", "of the true class", "the other way round"]
    blocks.append(Rows("Commonest confusions", header, rows, {3: (0.0, 1.0)}))
    if fine["hard_pairs"]:
        blocks.append(_pair_rows(fine["hard_pairs"]))
    if pictures is not None:
        blocks.append(_gallery(confusions, pictures))
    return Section("Mistakes", "mistakes", blocks)


def _gallery(confusions: Sequence[Mapping[str, Any]], pictures: Mapping[str, str]) -> Gallery:
    shown = [
        Thumbnail(
            pictures.get(example["id"]),
            f"{one_line(c['true'])}, taken for {one_line(c['predicted'])}{_sure(example)} "
            f"({one_line(example['name'])})",
        )
        for c in confusions
        for example in c["examples"]
    ]
    return Gallery("The most confident mistakes of each commonest confusion", shown)


def _sure(example: Mapping[str, Any]) -> str:
    return "" if example["confidence"] is None else f" with {100 * example['confidence']:.0f} % confidence"


def _pair_rows(pairs: Sequence[Mapping[str, Any]]) -> Rows:
    paired = is_paired(pairs[0]["accuracy"])
    rows = []
    for p in pairs:
        names = " / ".join(map(one_line, p["pair"]))
        before = [rate(p["accuracy"]["zero_shot"])] if paired else []
        change = [points(p["accuracy"]["change"])] if paired else []
        numbers = " / ".join(map(str, p["n"]))
        rows.append([text(names), Cell(numbers, numeric=True), *before, rate(p["accuracy"]["model"]), *change])
    header = ["pair", "n", *["zero-shot"] * paired, "accuracy within the pair", *["change in points"] * paired]
    ends = dict.fromkeys(range(2, 3 + paired), (0.0, 1.0)) | ({4: change_scale(rows, 4)} if paired else {})
    title = "Hard pairs of the card: mean of the two classes' accuracies when only the two are asked about"
    return Rows(title, header, rows, ends, {4: 0.0} if paired else {})


def taxonomy_section(report: Mapping[str, Any]) -> Section | None:
    """Accuracy on every level, and how bad the mistakes are."""
    fine = report.get("fine_grained")
    if not fine or not fine["levels"]:
        return None
    classes = {
        "level": "class",
        "num_names": report["num_classes"],
        **{m: report["overall"][m] for m in ("accuracy", "mean_per_class_accuracy")},
    }
    listed = [*fine["levels"], classes]
    paired = is_paired(classes["accuracy"])
    rows = []
    for level in listed:
        cells = [text(one_line(level["level"])), count(level["num_names"])]
        for metric in ("accuracy", "mean_per_class_accuracy"):
            cells += [rate(level[metric]["zero_shot"])] * paired + [rate(level[metric]["model"])]
        rows.append(cells)
    heads = ["accuracy", "mean per name"]
    header = ["level", "names", *(h for head in heads for h in ([f"zero-shot {head}"] * paired + [head]))]
    scales = dict.fromkeys(range(2, len(header)), (0.0, 1.0))
    title = "Levels, coarse to fine; a name's probability is the sum of its classes'"
    blocks: list[Block] = [Rows(title, header, rows, scales)]
    if severity := fine["severity"]:
        blocks += _severity_blocks(severity)
    return Section("Taxonomy", "taxonomy", blocks)


def _severity_blocks(severity: Mapping[str, Any]) -> list[Block]:
    mistakes, cautious = severity["mistakes"], severity["least_severe"]
    model, before = mistakes["model"], mistakes["zero_shot"]
    if model["value"] is None:
        return [Paragraph(sentence(model["note"]))]
    words = (
        f"Severity of the {model['n']:,} mistakes: {show_plain(model, 2)} on a scale from 1 (right on the finest "
        f"level) to {severity['max_height']} (nothing shared but the root): the mean height of the lowest common "
        "ancestor."
    )
    words += f" Zero-shot: {show_plain(before, 2)}." if before and before["value"] is not None else ""
    rows = [
        [text(d["shared"]), count(d["height"]), count(d["count"]),
         Cell(f"{100 * d['share']:.1f} %", numeric=True, bar=(d["share"], None, None))]
        for d in severity["distribution"]
    ]  # fmt: skip
    table = Rows("Mistakes by what they share with the truth", ["shared", "height", "mistakes", "share"], rows,
                 {3: (0.0, 1.0)})  # fmt: skip
    decided = (
        f"Deciding for the class of least expected severity instead of the most probable one would change "
        f"{cautious['decisions_changed']} decisions: mean height over all images "
        f"{show_plain(cautious['height_of_all'])} instead of {show_plain(severity['height_of_all'])}, "
        f"accuracy {show_rate(cautious['accuracy'])}."
    )
    return [Paragraph(words), table, Paragraph(decided, "muted")]


def name_section(audit: Mapping[str, Any]) -> Section:
    """What other class names and templates make of zero-shot classification."""
    rows = [
        [text(one_line(v["variant"])), rate(v["accuracy"]), rate(v["mean_per_class_accuracy"]), points(v["change"]),
         plain(None) if v["p_holm"] is None else Cell(f"{v['p_holm']:.3f}", numeric=True)]
        for v in audit["variants"]
    ]  # fmt: skip
    header = ["names and templates", "accuracy", "mean per class", "change in points", "p (Holm)"]
    scales = {1: (0.0, 1.0), 2: (0.0, 1.0), 3: change_scale(rows, 3)}
    reference = one_line(audit["reference"])
    blocks: list[Block] = [Rows(f"Zero-shot, each against “{reference}”", header, rows, scales, {3: 0.0})]
    if audit["classes"]:
        listed = [
            f"{one_line(c['class'])}: {100 * c['reference']:.0f} % with “{reference}”, {100 * c['best']:.0f} % with "
            f"“{one_line(c['variant'])}” (n = {c['n']})"
            for c in audit["classes"]
        ]
        blocks.append(
            Paragraph(
                "Classes that other names did better for on these images, by chance too, largest difference first:"
            )
        )
        blocks.append(Bullets(listed))
    blocks.append(Paragraph(audit["note"], "muted"))
    return Section("Name audit", "names", blocks)
