"""The report on classes in words and tables: top-k, worst classes, confusions, hard pairs, taxonomy, changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptclip.reports.bias_sections import is_paired, overall_blocks, sentence
from adaptclip.reports.blocks import (
    Block,
    Bullets,
    Cell,
    Figure,
    Gallery,
    Paragraph,
    Picture,
    Rows,
    Section,
    change_scale,
    count,
    one_line,
    plain,
    points,
    rate,
    show_plain,
    show_points,
    show_rate,
    text,
)
from adaptclip.reports.plots import class_spread

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
    """Which classes are taken for which, with pictures of them.

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
        Picture(
            pictures.get(example["id"]),
            f"{one_line(c['true'])}, taken for {one_line(c['predicted'])}{_sure(example)} ({one_line(example['id'])})",
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
