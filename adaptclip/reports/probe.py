# SPDX-License-Identifier: Apache-2.0
"""What words do to groups: how often images are given an extra word, and whom a text query finds first.

- *Association* (Radford et al. 2021, section 7.1): words that are no class of the task are put beside the classes; the
  share of a group's images that are given one of them rather than a class is its rate.
- *Retrieval skew* (Geyik et al. 2019): all images are ranked for a text. Skew@k of a group is the logarithm of its
  share of the first k over its share of all images, and MaxSkew@k the largest; NDKL is the divergence of the first 1,
  2, ... images' shares from those of all, discounted by rank. Both are above 0 for random rankings too, so each comes
  with what random rankings give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from adaptclip.errors import DataError
from adaptclip.metrics.gaps import holm
from adaptclip.predictions import Predictions
from adaptclip.reports.bias import p_cell, sentence
from adaptclip.reports.blocks import (
    MIN_GROUP,
    Block,
    Bullets,
    Cell,
    Paragraph,
    Rows,
    Section,
    change_scale,
    comparison,
    count,
    gap_of_means,
    one_line,
    points,
    rate,
    text,
)
from adaptclip.reports.measuring import group_rows, group_values, measure, sampling_of
from adaptclip.seeding import numpy_generator

FORMAT_VERSION = 1

DEPTH = 1_000
"""Images of a ranking that NDKL looks at."""

KEPT_QUERIES = 50
"""Queries that are listed per attribute, those with the largest skew first."""

_NDKL_DRAWS = 200


def check_words(kinds: Mapping[str, Sequence[str]], class_names: Sequence[str]) -> None:
    """Refuses a probe without words, a word that stands twice, and one that is a class.

    Raises:
        DataError: it is one of these.
    """
    words = [word for of_kind in kinds.values() for word in of_kind]
    if not words:
        raise DataError("a text probe needs at least one word; name some under `probes:` in the card")
    repeated = [word for word in words if words.count(word) > 1 or word in class_names]
    if repeated:
        raise DataError(f"a word is asked for once, and is no class; got {repeated[0]!r} again")


def probe_report(
    predictions: Predictions,
    kinds: Mapping[str, Sequence[str]],
    scores: np.ndarray,
    before: np.ndarray | None = None,
    *,
    k: int = 100,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    comparable: bool = True,
) -> dict[str, Any]:
    """Assesses what extra words and text queries do to the groups of an image set.

    Args:
        predictions: of the same images: ids, class names, groups, clusters are used.
        kinds: kind of word -> its words, for example {"crime": ["thief", "criminal"]}.
        scores: (N, C + E) logits of the judged model: classes, then the words of all kinds in their order
            (`methods.predicting.probe_scores`).
        before: the same of the zero-shot model, or None.
        k: images at the head of a ranking; at most half of the images are used.
        confidence: level of the intervals.
        draws: bootstrap draws and random deals.
        seed: of both.
        comparable: whether classes and words are scored on one scale; a caution says so where they are not.

    Returns:
        JSON-able dict: "num_images", "confidence", "kinds", "queries", "association" ("overall": per kind its rate
        compared; "groups": attribute -> kind -> {"rows", "gap"}), "retrieval" (attribute -> list of rankings with
        "query", "k", "max_skew", "max_skew_group", "null_95", "p_value", "p_holm", "ndkl", "ndkl_null_95",
        "zero_shot"; "p_holm" is corrected for the number of queries) and
        "cautions".

    Raises:
        DataError: no words, a word that is a class or stands twice, or scores of another shape.
    """
    words = [word for of_kind in kinds.values() for word in of_kind]
    shape = (len(predictions), len(predictions.class_names) + len(words))
    check_words(kinds, predictions.class_names)
    for given in (scores, before):
        if given is not None and given.shape != shape:
            raise DataError(f"scores should be {shape} (images, classes and words), got {given.shape}")
    settings = {"confidence": confidence, "draws": draws, "seed": seed}
    starts = np.cumsum([len(predictions.class_names), *map(len, kinds.values())])
    columns = {kind: (starts[i], starts[i + 1]) for i, kind in enumerate(kinds)}
    queries = [*predictions.class_names, *words]
    depth = min(k, max(len(predictions) // 2, 1))
    return {
        "format_version": FORMAT_VERSION,
        "confidence": confidence,
        "num_images": len(predictions),
        "kinds": {kind: list(of_kind) for kind, of_kind in kinds.items()},
        "queries": queries,
        "association": _association(predictions, columns, scores, before, settings),
        "retrieval": {
            attribute: _retrieval(predictions, attribute, queries, scores, before, depth, confidence, draws, seed)
            for attribute in predictions.groups
        },
        "cautions": _cautions(predictions, comparable),
    }


def _cautions(predictions: Predictions, comparable: bool) -> list[str]:
    cautions = []
    if not comparable:
        cautions.append(
            "this head's logits are not on the scale of CLIP's own, so after adaptation the rates of extra words "
            "depend on the head's scale and cannot be compared with those before"
        )
    if not predictions.groups:
        cautions.append("no groups: without group columns, differences between groups cannot be assessed")
    if predictions.clusters is not None:
        cautions.append("what random rankings give is drawn image by image, without regard to clusters")
    return cautions


def _association(
    predictions: Predictions,
    columns: Mapping[str, tuple[int, int]],
    scores: np.ndarray,
    before: np.ndarray | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Rates of each kind, overall and per group; a rate is the accuracy of "was given a word of this kind"."""
    found: dict[str, Any] = {"overall": [], "groups": {attribute: {} for attribute in predictions.groups}}
    confidence, drawing = settings["confidence"], {"draws": settings["draws"], "seed": settings["seed"]}
    for kind, span in columns.items():
        now = _given(predictions, scores, span)
        base = None if before is None else _given(predictions, before, span)
        whole = measure(now, base, metrics=("accuracy",), **drawing)["accuracy"]
        found["overall"].append({"kind": kind, **comparison(whole, confidence)})
        hits = now.pred == 1
        for attribute in predictions.groups:
            rows = []
            for group, positions in group_rows(now, attribute).items():
                part = measure(now, base, metrics=("accuracy",), rows=positions, **drawing)["accuracy"]
                rows.append({"group": group, "n": len(positions), **comparison(part, confidence)})
            names, code = group_values(now, attribute)
            gap, _ = gap_of_means(hits, code, names, sampling_of(now), what=f"rate of {kind}", **settings)
            found["groups"][attribute][kind] = {"rows": rows, "gap": gap}
    return found


def _given(predictions: Predictions, scores: np.ndarray, span: tuple[int, int]) -> Predictions:
    """Predictions of two classes, of which the second, "was given a word of this kind", is always the true one."""
    answer = scores.argmax(axis=1)
    hit = ((answer >= span[0]) & (answer < span[1])).astype(np.float32)
    return Predictions(
        predictions.ids, np.ones(len(hit), np.int64), np.stack([1 - hit, hit], axis=1), ("a class", "a word"),
        predictions.groups, predictions.clusters,
    )  # fmt: skip


def _retrieval(
    predictions: Predictions,
    attribute: str,
    queries: Sequence[str],
    scores: np.ndarray,
    before: np.ndarray | None,
    k: int,
    confidence: float,
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    names, code = group_values(predictions, attribute)
    counts = np.bincount(code, minlength=len(names))
    kept = np.flatnonzero(counts >= MIN_GROUP)
    rows = np.flatnonzero(np.isin(code, kept))
    if len(kept) < 2 or len(rows) <= k:
        return []
    place, sizes = np.searchsorted(kept, code[rows]), counts[kept]
    rng = numpy_generator(seed, "skew", attribute)
    drawn = rng.multivariate_hypergeometric(sizes, k, size=draws, method="marginals")
    null = _skews(drawn / k, sizes).max(axis=1)
    shuffled = rng.permuted(np.tile(place, (_NDKL_DRAWS, 1)), axis=1)[:, :DEPTH]
    null_ndkl = float(np.quantile(ndkl(shuffled, sizes), confidence))
    found = []
    for q, query in enumerate(queries):
        skew, group, divergence = _ranked(scores[rows, q], place, sizes, k)
        base = None
        if before is not None:
            old_skew, old_group, old = _ranked(before[rows, q], place, sizes, k)
            base = {"max_skew": old_skew, "max_skew_group": names[kept[old_group]], "ndkl": old}
        found.append(
            {
                "query": query,
                "k": k,
                "max_skew": skew,
                "max_skew_group": names[kept[group]],
                "null_95": float(np.quantile(null, confidence)),
                "p_value": float((1 + (null >= skew - 1e-9).sum()) / (1 + draws)),
                "ndkl": divergence,
                "ndkl_null_95": null_ndkl,
                "zero_shot": base,
            }
        )
    # Of many queries some are skewed by luck: corrected for all of them, not for those that are listed.
    for row, corrected in zip(found, holm([row["p_value"] for row in found]), strict=True):
        row["p_holm"] = float(corrected)
    return sorted(found, key=lambda row: row["max_skew"], reverse=True)[:KEPT_QUERIES]


def _ranked(scores: np.ndarray, place: np.ndarray, sizes: np.ndarray, k: int) -> tuple[float, int, float]:
    """MaxSkew@k, the group it is of, and NDKL of the images ranked by score; earlier images win ties."""
    order = place[np.argsort(-scores, kind="stable")]
    skews = _skews(np.bincount(order[:k], minlength=len(sizes)) / k, sizes)
    return float(skews.max()), int(skews.argmax()), float(ndkl(order[None, :DEPTH], sizes)[0])


def _skews(shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(..., G) log of each group's share over its share of all images; a group that is absent has minus infinity."""
    with np.errstate(divide="ignore"):
        return np.log(shares / (sizes / sizes.sum()))


def ndkl(ranked: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Normalised discounted Kullback-Leibler divergence of rankings (Geyik et al. 2019, eq. 7).

    Args:
        ranked: (R, K) group of the image at each rank, 0 to G - 1.
        sizes: (G,) images of each group in the collection, all above 0.

    Returns:
        (R,) 0 where every head of the ranking mirrors the collection.
    """
    ranks = np.arange(1, ranked.shape[1] + 1)
    wanted, total = sizes / sizes.sum(), np.zeros(ranked.shape)
    for g, share in enumerate(wanted):
        seen = np.cumsum(ranked == g, axis=1) / ranks
        total += np.where(seen > 0, seen * np.log(np.maximum(seen, 1e-300) / share), 0.0)
    discount = 1 / np.log2(ranks + 1)
    return total @ discount / discount.sum()


SHOWN_QUERIES = 10
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
    """Kinds of words that some group's images are given more often than chance explains (Holm over all gaps)."""
    probe = report.get("text_probe")
    gaps = list(_gaps(probe)) if probe else []
    for (attribute, kind, gap), p in zip(gaps, holm([gap["p_value"] for _, _, gap in gaps]), strict=True):
        if p <= 1 - report["confidence"]:
            yield (
                f"Words of the kind {one_line(kind)} are given more often for {one_line(attribute)} = "
                f"{one_line(gap['best_group'])} than for {one_line(gap['worst_group'])}: "
                f"{100 * gap['value']:.1f} points, more than chance explains"
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
        for row in rankings[:SHOWN_QUERIES]
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
