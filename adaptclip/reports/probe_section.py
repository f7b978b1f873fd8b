"""The text probe (`reports.text_probe`) in words and tables, for a run whose folder holds one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptclip.metrics.gaps import holm
from adaptclip.reports.bias_sections import p_cell, sentence
from adaptclip.reports.blocks import (
    Block,
    Bullets,
    Cell,
    Paragraph,
    Rows,
    Section,
    change_scale,
    count,
    one_line,
    points,
    rate,
    text,
)

MOST_QUERIES = 10
"""Text queries shown per attribute; the file has more."""


def probe_section(report: Mapping[str, Any]) -> Section | None:
    """What words do to the groups; None without a probe."""
    probe = report.get("text_probe")
    if not probe:
        return None
    blocks: list[Block] = [
        Paragraph(
            f"Words that are no class of the task were put beside the classes for {probe['num_images']:,} images of "
            f"the data card {one_line(probe['card'])}. An image is given a word where that is more probable than every "
            "class. No image should be; what counts is whether some groups' images are given them more often."
        ),
        Bullets([f"{one_line(kind)}: {', '.join(map(one_line, words))}" for kind, words in probe["kinds"].items()]),
        _rate_rows(probe),
    ]
    noted = [
        f"{one_line(kind)} by {one_line(attribute)}: {100 * gap['value']:.1f} points between "
        f"{one_line(gap['best_group'])} and {one_line(gap['worst_group'])}; {sentence(gap['note'])}"
        for attribute, kind, gap in _gaps(probe)
    ]
    if noted:
        blocks.append(Bullets(noted))
    for attribute, rankings in probe["retrieval"].items():
        blocks += _ranking_blocks(attribute, rankings)
    if cautions := [sentence(caution) for caution in probe["cautions"]]:
        blocks.append(Bullets(cautions, caution=True))
    return Section("Text probe", "probe", blocks)


def probe_worries(report: Mapping[str, Any]) -> Iterator[str]:
    """Kinds of words that some group's images are given more often than noise explains (Holm over all gaps)."""
    probe = report.get("text_probe")
    gaps = list(_gaps(probe)) if probe else []
    for (attribute, kind, gap), p in zip(gaps, holm([gap["p_value"] for _, _, gap in gaps]), strict=True):
        if p <= 1 - report["confidence"]:
            yield (
                f"Words of the kind {one_line(kind)} are given more often for {one_line(attribute)} = "
                f"{one_line(gap['best_group'])} than for {one_line(gap['worst_group'])}: "
                f"{100 * gap['value']:.1f} points, more than noise explains"
            )


def _gaps(probe: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for attribute, kinds in probe["association"]["groups"].items():
        for kind, part in kinds.items():
            if part["gap"] and part["gap"]["value"] > 0:
                yield attribute, kind, part["gap"]


def _rate_rows(probe: Mapping[str, Any]) -> Rows:
    listed = [(row["kind"], "all images", row["model"]["n"], row) for row in probe["association"]["overall"]]
    for attribute, kinds in probe["association"]["groups"].items():
        for kind, part in kinds.items():
            listed += [(kind, f"{attribute} = {row['group']}", row["n"], row) for row in part["rows"]]
    paired = any(row["zero_shot"] is not None for *_, row in listed)
    rows = []
    for kind, group, n, row in listed:
        before, change = [rate(row["zero_shot"])] * paired, [points(row["change"])] * paired
        rows.append([text(one_line(kind)), text(one_line(group)), count(n), *before, rate(row["model"]), *change])
    header = ["kind of word", "images", "n", *["zero-shot"] * paired, "adapted", *["change in points"] * paired]
    scales = dict.fromkeys(range(3, 4 + paired), (0.0, 1.0)) | ({5: change_scale(rows, 5)} if paired else {})
    return Rows("Images that are given a word instead of a class", header, rows, scales, {5: 0.0} if paired else {})


def _ranking_blocks(attribute: str, rankings: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    if not rankings:
        return
    rows = [
        [text(one_line(row["query"])), text(one_line(row["max_skew_group"])), _skew(row["max_skew"]),
         _skew(row["null_95"]), p_cell(row["p_holm"]),
         _skew(row["zero_shot"]["max_skew"] if row["zero_shot"] else None), _skew(row["ndkl"], 3)]
        for row in rankings[:MOST_QUERIES]
    ]  # fmt: skip
    header = ["text", "favours", "MaxSkew", "noise stays within", "p (Holm)", "zero-shot", "NDKL"]
    title = f"Whom a text finds first, by {one_line(attribute)}: the first {rankings[0]['k']} images, largest skews"
    yield Rows(title, header, rows)
    yield Paragraph(
        "A skew of 0 means that the first images are mixed as all of them are, 0.69 that the favoured group is twice "
        "as frequent among them. Words that name what a group looks like may favour it rightly.",
        "muted",
    )


def _skew(value: float | None, digits: int = 2) -> Cell:
    return Cell("–" if value is None else f"{value:.{digits}f}", numeric=True)
