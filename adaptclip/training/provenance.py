"""What a run is made from, in digests, and in words what of it has changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptclip.data.card import load_card
from adaptclip.data.card_block import CardBlock
from adaptclip.data.dataset import DomainData
from adaptclip.data.fewshot import FewShotSplit
from adaptclip.data.rows import card_places
from adaptclip.storage import digest

if TYPE_CHECKING:
    from adaptclip.backbone import ClipBackbone

_NUM_MARKS = 4
_MAX_NAMED = 5


def describe_inputs(
    data: DomainData | None,
    split: FewShotSplit | None,
    backbone: ClipBackbone | None,
    others: Mapping[str, str],
) -> dict[str, Any]:
    """Returns the record of what a run is made from, JSON-able; what is None has no part in it.

    Args:
        data: the images. Of each class are kept how many images it has and its smallest content digests, by which it
            is known again under another name; of each part one digest of everything.
        split: the images that are learnt from.
        backbone: what is adapted.
        others: further inputs, name -> digest.
    """
    record: dict[str, Any] = {}
    if data is not None:
        block = data.card.model_dump(mode="json", include=set(CardBlock.model_fields))
        record["card"] = {
            key: digest(json.dumps(value, sort_keys=True, ensure_ascii=False))[:16] for key, value in block.items()
        }
        contents: dict[str, list[str]] = {name: [] for name in data.class_names}
        for part in data.parts.values():
            for label, content in zip(part.labels.tolist(), part.contents, strict=True):
                contents[data.class_names[label]].append(content)
        record["classes"] = {
            name: {"images": len(found), "marks": [content[:16] for content in sorted(found)[:_NUM_MARKS]]}
            for name, found in contents.items()
        }
        record["parts"] = {name: {"images": len(part), "digest": part.digest} for name, part in data.parts.items()}
    if split is not None:
        record["split"] = split.digest
    if backbone is not None:
        record["backbone"] = {"name": backbone.name, "digest": backbone.digest}
    return record | ({"others": dict(others)} if others else {})


def places_read(config: Mapping[str, Any], data: DomainData | None) -> tuple[list[Path], list[Path]]:
    """Returns files and folders that a run reads, and folders that only hold some of those; see `outputs.check_apart`.

    Args:
        config: the run's settings; of use are `backbone`, `pretrained`, `zero_shot_card` and `data_root`.
        data: the images.
    """
    from adaptclip.backbone.loading import local_folders  # open_clip, which no method on features needs

    root = Path(config["data_root"]) if config.get("data_root") else None
    read = local_folders(config.get("backbone"))
    if config.get("pretrained") and Path(config["pretrained"]).is_file():
        read.append(Path(config["pretrained"]))
    roots = [root] if root is not None else []
    cards = [data.card] if data is not None else []
    cards += [load_card(config["zero_shot_card"])] if config.get("zero_shot_card") else []
    for card in cards:
        own, around = card_places(card, root)
        read, roots = [*read, *own], [*roots, *around]
    return read, roots


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns in words what differs between two records of `describe_inputs`; empty when nothing does.

    Raises:
        KeyError, TypeError, AttributeError: `before` is no such record.
    """
    said = []
    cards = [record.get("card", {}) for record in (before, now)]
    keys = [key for key in sorted({*cards[0], *cards[1]}) if cards[0].get(key) != cards[1].get(key)]
    if keys:
        said.append(f"the card ({', '.join(keys)})")
    said += _data_changes(before, now)
    if not said and before.get("split") != now.get("split"):
        said.append("the few-shot split, which is drawn otherwise from the same images")
    weights = [record.get("backbone", {"name": "none", "digest": "none"}) for record in (before, now)]
    if weights[0]["digest"] != weights[1]["digest"]:
        shown = " -> ".join(f"{w['name']} {w['digest'][:12]}" for w in weights)
        said.append(f"the weights of the backbone ({shown})")
    others = [record.get("others", {}) for record in (before, now)]
    said += [name for name in sorted({*others[0], *others[1]}) if others[0].get(name) != others[1].get(name)]
    if not said and before != now:
        said.append("the record of what it was made from")
    return said


def _data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = before.get("classes", {}), now.get("classes", {})
    name_of = {name: name for name in old if name in new}
    come = [name for name in new if name not in old]
    for name in old:
        known = [other for other in come if other not in name_of.values()]
        same = [other for other in known if {*old[name]["marks"]} & {*new[other]["marks"]}]
        if name not in name_of and same:
            name_of[name] = same[0]
    renamed = [f"{name} -> {other}" for name, other in name_of.items() if name != other]
    added = sum(max(0, new[other]["images"] - old[name]["images"]) for name, other in name_of.items())
    lost = sum(max(0, old[name]["images"] - new[other]["images"]) for name, other in name_of.items())
    added += sum(new[name]["images"] for name in come if name not in name_of.values())
    lost += sum(old[name]["images"] for name in old if name not in name_of)
    said = [
        *_listed("class", "renamed", renamed),
        *_listed("class", "removed", [name for name in old if name not in name_of]),
        *_listed("class", "added", [name for name in come if name not in name_of.values()]),
        *([f"{added} images were added"] if added else []),
        *([f"{lost} images were removed"] if lost else []),
    ]
    if not said and list(old) != list(new):
        said.append("the order of the classes")
    parts = [record.get("parts", {}) for record in (before, now)]
    other = [name for name in sorted({*parts[0], *parts[1]}) if parts[0].get(name) != parts[1].get(name)]
    if not said and other:
        said.append(f"what is in the images, names, labels, groups or captions of {' and '.join(other)}")
    return said


def _listed(what: str, how: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f", … ({len(names)} in all)" if len(names) > _MAX_NAMED else ""
    count = f"1 {what} was" if len(names) == 1 else f"{len(names)} {what}es were"
    return [f"{count} {how}: {', '.join(names[:_MAX_NAMED])}{more}"]
