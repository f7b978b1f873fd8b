# SPDX-License-Identifier: Apache-2.0
"""Means, intervals, marks, tables, curves, published numbers and advice, from rows whose answers are known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest
from scipy import stats

from adaptclip.bench.output import (
    BenchSettings,
    compare,
    comparison_markdown,
    draw_curves,
    published_tables,
    write_output,
)
from adaptclip.bench.summary import (
    ALL_CARDS,
    TIMES,
    clear_falls,
    column_cells,
    estimate,
    honest_difference,
    paired,
    tidy_rows,
    values_by_cell,
)
from adaptclip.bench.tables import CAUTION, Entry, ResultTable, advice, result_tables, to_latex, to_markdown
from adaptclip.files import read_parquet
from adaptclip.methods.registry import named


def result(method, seed, accuracy, *, card="flowers", shots=4, seconds=1.0, protocol="all-classes", judged=None):
    measured = {"n": 200, "num_classes": 10, "mean_per_class_accuracy": accuracy, "top5_accuracy": None, "ece": 0.1}
    targets: dict[str, float] = judged or {"test": accuracy}
    return {
        "key": f"{card}-{method}-{shots}-{seed}",
        "job": {
            "protocol": protocol, "card": card, "method": method, "shots": shots, "seed": seed, "settings": {},
            "split": "s", "backbone": "ViT-B-16", "pretrained": "openai", "weights": "w", "adaptclip": "0",
        },
        "judged": {name: {**measured, "accuracy": value} for name, value in targets.items()},
        "train_images": 40, "validation_images": 40,
        "validation_used_for": "choosing C" if method == "gda" else "nothing", "schedule": "closed form",
        "chosen": {"alpha": 1.0}, "search": None, "trainable_parameters": 7, "fit_s": seconds,
        "read_s": 0.0, "total_s": seconds + 1,
        "warnings": [],
    }  # fmt: skip


def test_an_estimate_is_scipys_t_interval():
    values = [0.71, 0.74, 0.69, 0.80]
    found = estimate(values)
    assert found.half is not None
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), abs=1e-12)
    assert found.n == 4
    assert estimate([0.5]).half is None
    assert not estimate([0.5]).is_clear


def test_differences_are_paired_by_seed():
    a, b = {1: 0.5, 2: 0.7, 3: 0.6, 9: 0.0}, {1: 0.4, 2: 0.61, 3: 0.49, 8: 1.0}
    found = paired(a, b)
    assert found is not None
    assert found.half is not None
    test = stats.ttest_rel([0.5, 0.7, 0.6], [0.4, 0.61, 0.49]).confidence_interval()
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((test.low, test.high))
    assert found.is_clear
    assert paired({1: 0.5}, {2: 0.5}) is None


def test_the_best_is_bold_and_only_what_may_be_as_good_is_marked():
    column = {
        "coop": {1: 0.80, 2: 0.82, 3: 0.81},
        "gda": {1: 0.79, 2: 0.83, 3: 0.80},  # differs by -1, +1, -1 points
        "clap": {1: 0.70, 2: 0.72, 3: 0.71},  # ten points below, every time
        "tip_adapter": {1: 0.99},  # not all seeds: not compared
    }
    cells = column_cells(column, 3)
    assert {m: (c.best, c.tied, c.full) for m, c in cells.items()} == {
        "coop": (True, False, True),
        "gda": (False, True, True),
        "clap": (False, False, True),
        "tip_adapter": (False, False, False),
    }
    alone = column_cells({m: {1: v[1]} for m, v in column.items()}, 1)
    assert [m for m, c in alone.items() if c.best] == ["tip_adapter"]
    assert not any(c.tied for c in alone.values())


def test_equal_methods_are_all_marked_in_95_per_cent_and_one_pair_is_students_t():
    rng = np.random.default_rng(0)
    names = [name for name, method in named().items() if method.learns][:8]
    left_out = 0
    for _ in range(400):
        draws = rng.normal(0, 0.02, 3)
        column = {m: {s: 0.7 + draws[s] + float(rng.normal(0, 0.01)) for s in range(3)} for m in names}
        cells = column_cells(column, 3)
        left_out += sum(c.best or c.tied for c in cells.values()) < 8
    assert left_out / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)  # 43 % when each was compared with the best alone
    pair = {"coop": {1: 0.8, 2: 0.82, 3: 0.81}, "gda": {1: 0.79, 2: 0.83, 3: 0.80}}
    difference = paired(pair["coop"], pair["gda"])
    assert difference is not None
    assert honest_difference(pair) == pytest.approx(difference.half, rel=1e-6)
    assert honest_difference({"coop": pair["coop"]}) is None


def test_the_honest_difference_is_tukeys_on_the_residuals_of_a_two_way_layout():
    """Four methods on five seeds: the studentised range of four means with (4 - 1)(5 - 1) degrees of freedom."""
    table = np.random.default_rng(3).normal(0.7, 0.02, (4, 5))
    names = [name for name, method in named().items() if method.learns][:4]
    column = {name: dict(enumerate(row.tolist())) for name, row in zip(names, table, strict=True)}
    design = np.zeros((20, 9))
    for i, (method, seed) in enumerate(np.ndindex(4, 5)):
        design[i, [method, 4 + seed]] = 1
    found, _, rank, _ = np.linalg.lstsq(design, table.ravel(), rcond=None)
    fitted = design @ found
    error = ((table.ravel() - fitted) ** 2).sum() / (20 - rank)
    expected = stats.studentized_range.ppf(0.95, 4, 12) * np.sqrt(error / 5)
    assert honest_difference(column) == pytest.approx(expected)
    still = column | {"zero_shot": dict.fromkeys(range(5), 0.6)}
    wider = stats.studentized_range.ppf(0.95, 5, 12) * np.sqrt(error / 5)
    assert honest_difference(still) == pytest.approx(wider)
    alone = {names[0]: column[names[0]], "zero_shot": still["zero_shot"]}
    assert honest_difference(alone) == pytest.approx(stats.t.ppf(0.975, 4) * table[0].std(ddof=1) / np.sqrt(5))


def test_a_seed_that_collapses_is_named_and_not_averaged():
    column = {
        "coop": {1: 0.80, 2: 0.66, 3: 0.81},
        "gda": {1: 0.79, 2: 0.80, 3: 0.80},
        "clap": {1: 0.78, 2: 0.80, 3: 0.79},
    }
    cells = column_cells(column, 3)
    assert cells["coop"].collapsed == ((2, 0.66),)
    assert (cells["coop"].value.mean, cells["coop"].value.half) == (0.80, None)
    assert [m for m, c in cells.items() if c.best] == ["gda"]
    assert not cells["coop"].tied
    assert cells["clap"].tied
    scattered = {"coop": {1: 0.80, 2: 0.70, 3: 0.90}, "gda": {1: 0.60, 2: 0.75, 3: 0.88}}
    assert not any(c.collapsed for c in column_cells(scattered, 3).values())
    results = [result(m, s, v) for m, own in column.items() for s, v in own.items()]
    means = result_tables(tidy_rows(results), metric="accuracy", baseline="zero_shot", num_seeds=3)[0]
    assert dict(means.rows)["coop"] == (Entry("80.0 ‡ (seed 2: 66.0)"),)
    assert "‡: median" in means.note
    assert (
        "‡" not in result_tables(tidy_rows(results[3:]), metric="accuracy", baseline="zero_shot", num_seeds=3)[0].note
    )


def test_the_mean_of_cards_takes_seeds_that_all_cards_have():
    rows = tidy_rows([result("gda", s, 0.5 + s / 10, card=c) for c, s in (("a", 1), ("a", 2), ("b", 1))])
    cells = values_by_cell(rows, "accuracy")
    assert cells[ALL_CARDS, "test", 4, "gda"] == {1: pytest.approx(0.6)}
    one = values_by_cell(rows[:2], "accuracy")
    assert {key[0] for key in one} == {"a"}


def test_tables_say_what_is_in_the_rows():
    results = [result("zero_shot", s, 0.25) for s in (1, 2, 3)]
    results += [result("gda", s, v) for s, v in ((1, 0.70), (2, 0.72), (3, 0.74))]
    means, differences = result_tables(tidy_rows(results), metric="accuracy", baseline="zero_shot", num_seeds=3)
    half = 100 * stats.t.ppf(0.975, 2) * 0.02 / 3**0.5
    assert means.columns == ("4 shots",)
    assert dict(means.rows)["gda"] == (Entry(f"72.0 ± {half:.1f}", bold=True),)
    assert dict(means.rows)["zero_shot"] == (Entry("25.0"),)
    assert dict(differences.rows) == {"gda": (Entry(f"+47.0 ± {half:.1f}", bold=True),)}
    assert "| gda | **72.0 ± " in to_markdown(means)
    assert "200 test images" in means.note


def test_several_judged_sets_of_one_number_of_shots_stand_side_by_side():
    own = {"base": 0.8, "new": 0.4, "harmonic mean": 0.53}
    rows = tidy_rows([result("coop", 1, 0.8, protocol="base-to-new", judged=own)])
    (table,) = result_tables(rows, metric="accuracy", baseline="zero_shot", num_seeds=1)
    assert table.columns == ("base", "new", "harmonic mean")
    assert [e.text if e else "" for e in table.rows[0][1]] == ["80.0", "40.0", "53.0"]
    rows += tidy_rows([result("coop", 1, 0.8, protocol="base-to-new", shots=16, judged=own)])
    tables = result_tables(rows, metric="accuracy", baseline="zero_shot", num_seeds=1)
    assert [t.columns for t in tables] == [("4 shots", "16 shots")] * 3


def test_curves_that_fall_are_found():
    values = {1: (0.5, 0.6, 0.55), 4: (0.7, 0.69, 0.71), 16: (0.6, 0.592, 0.608)}
    results = [result("gda", s, v, shots=k) for k, own in values.items() for s, v in enumerate(own)]
    results += [result("zero_shot", s, 0.9 - k / 100, shots=k) for k in values for s in range(3)]
    looked_at, falls = clear_falls(tidy_rows(results), "accuracy")
    assert looked_at == 2
    # Differences of -10.0, -9.8 and -10.2 points: 4.303 · 0.2 / √3.
    assert falls == ["flowers, test, gda from 4 to 16 shots: 10.0 ± 0.5 points"]
    assert clear_falls(tidy_rows(results[:1]), "accuracy") == (0, [])


def test_latex_and_markdown_keep_special_characters():
    table = ResultTable(
        "50 % of a_b & c", ("1 shot",), (("tip_adapter_f", (Entry("1.0 ± 2.0", mark=True),)), ("x", (None,))), "n"
    )
    text = to_latex(table)
    assert r"50 \% of a\_b \& c" in text
    assert r"tip\_adapter\_f & 1.0 $\pm$ 2.0$^\dagger$ \\" in text
    assert "tip_adapter_f | 1.0 ± 2.0 † |" in to_markdown(table)
    assert text.count(r"\begin{tabular}{lr}") == text.count(r"\end{tabular}") == 1


def all_outputs(folder: Path, results, **changes):
    asked = {
        "protocol": "all-classes", "backbone": "b <i>", "metric": "accuracy", "baseline": "zero_shot", "num_seeds": 3,
        "num_jobs": len(results) + 1, **changes,
    }  # fmt: skip
    failures = [{"job": "a card & more", "error": "DataError", "message": "<script>"}]
    return write_output(folder, results, failures, BenchSettings(**asked))


def grid(cards=("flowers", "grocery")):
    rng = np.random.default_rng(0)
    return [
        result(m, s, float(np.clip(base + rng.normal(0, 0.01) + 0.1 * np.log2(k), 0, 1)), card=c, shots=k, seconds=t)
        for c in cards
        for m, base, t in (("zero_shot", 0.1, 0.1), ("gda", 0.4, 0.5), ("coop", 0.3, 60.0))
        for k in (1, 4)
        for s in (1, 2, 3)
    ]


def test_everything_is_written_and_the_same_again(tmp_path):
    results = grid()
    all_outputs(tmp_path / "a", results)
    all_outputs(tmp_path / "b", [{**r, "fit_s": 9.0, "total_s": 99.0} for r in reversed(results)])
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    curves = [f"curves_{c}.{k}" for c in ("flowers", "grocery", "mean_of_the_cards") for k in ("png", "svg")]
    assert names == sorted(
        ["costs.md", "index.html", "results.csv", "results.parquet", "tables.md", "tables.tex", *curves]
    )
    same = [n for n in names if n not in ("costs.md", "index.html", "results.csv", "results.parquet")]
    for name in same:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    table, _ = read_parquet(tmp_path / "a" / "results.parquet")
    assert table.num_rows == 36
    assert set(TIMES) <= set(table.column_names)
    csv = pyarrow.csv.read_csv(tmp_path / "a" / "results.csv")
    assert csv["accuracy"].to_pylist() == pytest.approx(table["accuracy"].to_pylist())
    assert csv["job"].to_pylist() == table["job"].to_pylist()


def test_the_page_is_whole_in_itself_and_escapes(tmp_path):
    all_outputs(tmp_path, grid(cards=("<b>",)))
    page = (tmp_path / "index.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<h1>" in page
    assert page.count("<svg") == 1
    assert "<b>" not in page
    links = re.findall(r"(?:src|href)=[\"']([^\"'#]+)", page)
    assert not [link for link in links if not link.startswith("data:")], links
    assert (tmp_path / "curves__b_.svg").exists()


def test_curves_have_a_line_per_method_and_the_true_bars():
    figures = draw_curves(tidy_rows(grid(("flowers",))), metric="accuracy")
    svg = figures["flowers"]["svg"].decode()
    for text in ("zero_shot", "gda", "coop", "images per class", "flowers: test"):
        assert text in svg
    assert figures["flowers"]["png"].startswith(b"\x89PNG")


# Published numbers


def test_published_numbers_stand_beside_a_run_that_fits():
    cards = published_tables()["cards"]["the 11 sets of CoOp"]
    values = {"coop": (0.80, 0.801, 0.802), "lora": (0.828, 0.829, 0.831)}
    results = [
        result(m, s, v, card=c, shots=16) for m, seeds in values.items() for c in cards for s, v in enumerate(seeds)
    ]
    found = {c.method: c for c in compare(tidy_rows(results))}
    assert set(found) == {"coop", "lora"}
    assert found["coop"].published == pytest.approx(0.7901)
    assert found["coop"].difference == pytest.approx(0.801 - 0.7901)
    assert found["coop"].is_flagged  # 1.1 points, interval ± 0.25
    assert not found["lora"].is_flagged  # 0.04 points, interval ± 0.4
    assert "| coop | the 11 sets of CoOp, test | 16 | 79.01 | 80.1 ± 0.2 | +1.1 ⚑ |" in comparison_markdown(
        list(found.values())
    )
    assert "CLIP-SVD" in comparison_markdown(list(found.values()))
    assert {c.method for c in compare(tidy_rows(results), leave_out=["coop"])} == {"lora"}


@pytest.mark.parametrize("change", ["card", "backbone", "protocol", "shots"])
def test_a_run_that_does_not_fit_has_no_published_numbers(change):
    cards = published_tables()["cards"]["the 11 sets of CoOp"]
    cards = cards[:-1] if change == "card" else cards
    shots = 5 if change == "shots" else 16
    rows = tidy_rows([result("coop", s, 0.8, card=c, shots=shots) for c in cards for s in (1, 2)])
    for row in rows:
        row["backbone"] = "ViT-B-32" if change == "backbone" else row["backbone"]
        row["protocol"] = "imbalanced" if change == "protocol" else row["protocol"]
    assert compare(rows) == []
    assert "No published number" in comparison_markdown([])


def test_single_sets_are_matched_by_card_and_one_seed_cannot_be_flagged():
    rows = tidy_rows([result("zero_shot", 1, 0.40, card="eurosat")])
    for row in rows:
        row["backbone"] = "RN50"
    (one,) = compare(rows)
    assert (one.published, one.is_flagged) == (pytest.approx(0.3752), None)


def test_the_packaged_tables_are_sound():
    known = published_tables()
    numbers = 0
    for table in known["tables"]:
        assert table["source"]
        assert table["backbone"] in known["backbones"]
        assert table["cards"] == "each" or table["cards"] in known["cards"]
        for value in re.findall(r"[\d.]+(?=[,}])", json.dumps(table["values"])):
            assert 10 < float(value) < 100
            numbers += 1
    assert numbers == 96
    assert len(known["cards"]["the 11 sets of CoOp"]) == len(set(known["cards"]["the 11 sets of CoOp"])) == 11


def test_published_harmonic_means_are_those_of_their_halves():
    base, new, joined = (
        next(t["values"] for t in published_tables()["tables"] if t["target"] == name and "OpenAI" in t["backbone"])
        for name in ("base", "new", "harmonic mean")
    )
    compared = 0
    for method, value in joined.items():
        b, n = base[method]["16"], new[method]["16"]
        assert 2 * b * n / (b + n) == pytest.approx(value["16"], abs=0.02), method
        compared += 1
    assert compared == 8


# Advice


def rows_of(**values):
    seconds = {"zero_shot": 0.1, "gda": 0.5, "coop": 60.0, "lora": 600.0}
    return tidy_rows([result(m, s, v, seconds=seconds[m]) for m, own in values.items() for s, v in enumerate(own)])


def test_a_dearer_method_that_is_clearly_better_was_worth_it():
    rows = rows_of(zero_shot=(0.2, 0.2, 0.2), gda=(0.6, 0.61, 0.62), coop=(0.7, 0.711, 0.721))
    said, caution = advice(rows, metric="accuracy", num_seeds=3)
    assert caution == CAUTION
    assert "coop is best with 71.1 %" in said
    _, mode, _ = advice(rows, metric="accuracy", num_seeds=3, not_published={"coop": "views=10"})
    assert mode.startswith("Not with their published settings here")
    assert mode.endswith("coop (views=10).")
    # Differences of 10.0, 10.1 and 10.1 points: 10.07 ± 4.303 · 0.0577 / √3.
    assert "gda (0.5 s), is behind by 10.1 points [9.9, 10.2]: the dearer one was worth it, at 120 times" in said


def test_a_dearer_method_that_may_be_no_better_is_not_advised():
    rows = rows_of(zero_shot=(0.2, 0.2, 0.2), gda=(0.70, 0.72, 0.71), coop=(0.71, 0.711, 0.719))
    said, _ = advice(rows, metric="accuracy", num_seeds=3)
    assert re.search(
        r"gda costs 0\.5 s and is behind by 0\.3 points \[−\d\.\d, \d\.\d\], which may be chance: take gda", said
    )


def test_a_second_is_not_worth_points():
    rows = rows_of(zero_shot=(0.5, 0.6, 0.7), gda=(0.61, 0.62, 0.69))  # 0.1 s and 0.5 s
    said, _ = advice(rows, metric="accuracy", num_seeds=3)
    assert "gda is best with 64.0 %" in said
    assert "None is much cheaper; the next, zero_shot, is behind by" in said
    assert said.endswith("take gda.")


def test_the_cheapest_may_be_the_best_and_one_seed_says_little():
    rows = rows_of(zero_shot=(0.8, 0.8, 0.8), gda=(0.6, 0.61, 0.62))
    assert "None is much cheaper" in advice(rows, metric="accuracy", num_seeds=3)[0]
    one = rows_of(zero_shot=(0.2,), gda=(0.6,))
    assert "With one seed, nothing can be said" in advice(one, metric="accuracy", num_seeds=1)[0]
    assert advice(rows_of(gda=(0.6,)), metric="accuracy", num_seeds=1) == []
    assert [m.cost for m in named().values()] == sorted(m.cost for m in named().values())


def test_what_puts_a_card_in_doubt_stands_on_the_page_and_in_the_tables(tmp_path):
    leak = "grocery: 3 of 240 test images look the same as a train image <b> (allowed by the card: similar_images)"
    all_outputs(tmp_path, grid(), worries=(leak,))
    page, tables = ((tmp_path / name).read_text(encoding="utf-8") for name in ("index.html", "tables.md"))
    assert f"<h2>What to worry about</h2>\n<ul><li>{leak.replace('<', '&lt;').replace('>', '&gt;')}</li></ul>" in page
    assert f"## What to worry about\n\n- {leak}" in tables
    all_outputs(tmp_path, grid())
    assert "worry" not in (tmp_path / "index.html").read_text(encoding="utf-8")
