"""Published numbers beside one's own, where backbone, protocol and data sets are the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from adaptclip.experiments.summary import ALL_CARDS, Estimate, Row, estimate, values_by_cell
from adaptclip.storage import read_json


@dataclass(frozen=True)
class Comparison:
    """A published number and one's own.

    Attributes:
        method: name of a method (`methods.registry.named`).
        cards: a card, or the name of a published group of sets.
        target: judged set.
        shots: k.
        published: 0 to 1.
        own: mean over seeds with its interval.
        source: where the number is printed.
    """

    method: str
    cards: str
    target: str
    shots: int
    published: float
    own: Estimate
    source: str

    @property
    def difference(self) -> float:
        """One's own minus the published number."""
        return self.own.mean - self.published

    @property
    def is_flagged(self) -> bool | None:
        """Whether the difference is larger than the half width of one's own interval; None without an interval."""
        return None if self.own.half is None else abs(self.difference) > self.own.half


@cache
def published_tables() -> dict[str, Any]:
    """Returns the packaged tables: `cards`, `backbones`, and `tables` with protocol, source and values in per cent."""
    return read_json(Path(__file__).with_name("published.json"))


def compare(rows: Sequence[Row], *, leave_out: Collection[str] = ()) -> list[Comparison]:
    """Returns every published number that a run has a counterpart of.

    Sets are matched by the names of their cards: a card `eurosat` is taken for that data set. A number that is a mean
    of several sets is shown only when the run has all of them and no other. Only accuracy is published.

    Args:
        rows: of `tidy_rows`.
        leave_out: methods whose settings are not the published ones.
    """
    if not rows:
        return []
    known = published_tables()
    cells = values_by_cell(rows, "accuracy")
    cards = {row["card"] for row in rows}
    found = []
    for table in known["tables"]:
        pairs = [tuple(pair) for pair in known["backbones"][table["backbone"]]]
        if table["protocol"] != rows[0]["protocol"] or (rows[0]["backbone"], rows[0]["pretrained"]) not in pairs:
            continue
        for label, card, method, shots, value in _entries(table, known["cards"], cards, rows):
            own = cells.get((card, table["target"], shots, method))
            if own and method not in leave_out:
                found.append(
                    Comparison(
                        method,
                        label,
                        table["target"],
                        shots,
                        value / 100,
                        estimate(list(own.values())),
                        table["source"],
                    )
                )
    return found


def _entries(
    table: dict[str, Any], groups: dict[str, list[str]], cards: set[str], rows: Sequence[Row]
) -> Iterator[tuple[str, str, str, int, float]]:
    """Yields (label, card in the rows, method, shots, per cent) of a published table."""
    if table["cards"] == "each":
        shots = sorted({row["shots"] for row in rows})
        for card, value in table["values"].items():
            # Zero-shot is the same at every number of shots.
            yield card, card, "zero-shot", shots[0], value
    elif set(groups[table["cards"]]) == cards:
        for method, by_shots in table["values"].items():
            for shots, value in by_shots.items():
                yield table["cards"], ALL_CARDS, method, int(shots), value


def comparison_markdown(found: Sequence[Comparison]) -> str:
    """Returns the comparisons as a Markdown table with their sources, or a sentence that there are none."""
    if not found:
        return (
            "No published number fits this run: they are shown where settings, backbone, protocol and data sets (by "
            "the names of their cards) are the published ones."
        )
    lines = ["| method | sets | shots | published | own | difference |", "|---|---|---|---|---|---|"]
    for one in found:
        half = f" ± {100 * one.own.half:.1f}" if one.own.half is not None else " (one seed)"
        flag = " ⚑" if one.is_flagged else ""
        difference = f"{100 * one.difference:+.1f}{flag}".replace("-", "−")
        lines.append(
            f"| {one.method} | {one.cards}, {one.target} | {one.shots} | {100 * one.published:.2f} | "
            f"{100 * one.own.mean:.1f}{half} | {difference} |"
        )
    sources = "; ".join(dict.fromkeys(one.source for one in found))
    note = "⚑: the difference is larger than half of one's own 95 % interval over seeds."
    return "\n".join([*lines, "", f"{note} Sources: {sources}."])
