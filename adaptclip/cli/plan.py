"""`adaptclip plan`: how many images gates need, before they are collected."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from adaptclip.errors import GateError
from adaptclip.terminal import json_line, say


def plan(
    gates: str,
    /,
    *,
    expect: float | None = None,
    patients_with: int = 1,
    icc: float = 0.3,
    prevalence: float | None = None,
    groups: tuple[str, ...] = (),
    num_classes: int | None = None,
    changed: float = 0.1,
    power: float = 0.8,
    format: Literal["text", "json"] = "text",
) -> int:
    """Say how many images or patients gates need to pass with a stated chance, before any are collected.

    Args:
        gates: YAML file with a list of gates under the key `gates`, or a data card.
        expect: true value that is assumed of every metric, in every group.
        patients_with: images of each patient; 1 for independent images.
        icc: correlation of a patient's images, 0 to 1.
        prevalence: share of positive images, for gates on sensitivity and the like.
        groups: how many groups an attribute has, such as sex=2.
        num_classes: number of classes, for means over the classes; a card with class_names says it itself.
        changed: for gates against a reference, share of the images whose answer changes.
        power: chance with which each gate shall pass.
        format: text, or JSON with one object per line.
    """
    from adaptclip.gates.loading import load_gates
    from adaptclip.gates.planning import Assumed
    from adaptclip.gates.planning import plan as planned

    if Path(gates).suffix in (".yaml", ".yml"):
        rules, named = load_gates(gates), None
    else:
        from adaptclip.data.card import load_card

        card = load_card(gates)
        rules, named = list(card.gates), len(card.class_names or ()) or None
    if not rules:
        raise GateError(f"{gates} declares no gates, so there is nothing to plan")
    assumed = Assumed(
        expect,
        patients_with,
        icc,
        prevalence,
        dict(map(_group, groups)),
        named if num_classes is None else num_classes,
        changed,
        power,
    )
    for one in planned(rules, assumed):
        if format == "json":
            say(json_line(one.to_dict()))
            continue
        say(one.title)
        if one.images is None:
            say(f"  no number: {one.words}")
            continue
        patients = "" if one.patients is None else f" of {one.patients:,} patients"
        say(f"  {one.images:,} images{patients} give it a chance of {100 * (one.power or 0):.0f} % to pass")
        if one.groups > 1 or one.kind:
            counted = f", about {one.counted:,} of them {one.kind.strip()}" if one.kind else ""
            say(f"  {one.in_group:,} in each of {one.groups} groups{counted}" if one.groups > 1 else f"  {counted[2:]}")
        say(f"  {one.words}")
    return 0


def _group(text: str) -> tuple[str, int]:
    name, found, number = text.rpartition("=")
    if not found or not name or not number.isdecimal():
        raise GateError(f"groups are given as ATTRIBUTE=NUMBER, such as sex=2; got {text!r}")
    return name, int(number)
