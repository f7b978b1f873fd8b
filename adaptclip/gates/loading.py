# SPDX-License-Identifier: Apache-2.0
"""Gates from a YAML file, whether they fit the images they are about, and the runs they compare with by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from adaptclip.errors import AdaptclipError, DataError, GateError, did_you_mean
from adaptclip.files import read_yaml
from adaptclip.gate_rules import ZERO_SHOT, GateRule
from adaptclip.predictions import Predictions
from adaptclip.reports.measuring import NO_LEVELS, group_values
from adaptclip.seals import run_file

EXAMPLE = "gates: [{metric: accuracy, at_least: 0.8}]"


def load_gates(path: Path | str) -> list[GateRule]:
    """Reads rules from a YAML file: a list under the key `gates`, each with the fields of GateRule.

    Raises:
        StorageError: the file is missing or is not YAML.
        GateError: a rule is not valid; the message names the rule, the reason and the nearest allowed name.
    """
    content = read_yaml(Path(path), shape="a list of rules with a line `gates:` above it")
    if set(content) & set(GateRule.model_fields):
        raise GateError(f"{path} is a rule by itself; put `gates:` above it and set the rule in as an item: {EXAMPLE}")
    for key in content:
        if key != "gates":
            raise GateError(f'{path}: unknown key "{key}". {did_you_mean(str(key), ["gates"])}')
    listed = content.get("gates")
    if not isinstance(listed, list):
        raise GateError(f'{path} needs a list of rules under the key "gates", got {type(listed).__name__}')
    return [parse_rule(entry, f"{path}: gate {i}") for i, entry in enumerate(listed, start=1)]


def parse_rule(entry: Any, where: str) -> GateRule:
    """Reads one rule from a mapping. Raises GateError, which begins with `where`, unless it is valid."""
    if not isinstance(entry, Mapping):
        raise GateError(f"{where} should be a mapping such as {{metric: accuracy, at_least: 0.8}}, got {entry!r}")
    for key in entry:
        if isinstance(key, int) and entry[key] is None:  # {at_least: 0,5} is {at_least: 0, 5: null}
            raise GateError(f"{where}: {key} stands alone after a comma; YAML has no decimal comma: write 0.5, not 0,5")
    try:
        return GateRule.model_validate(dict(entry))
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                problems.append(f'unknown field "{name}". {did_you_mean(name, GateRule.model_fields)}')
            else:
                message = problem["msg"].removeprefix("Value error, ")
                problems.append(f"{name}: {message}, got {problem['input']!r}" if name else message)
        raise GateError(f"{where}: {'; '.join(problems)}") from error


class Described(Protocol):
    """Images with classes and groups: `Predictions` and `ImageDataset` are that."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        ...

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """Attribute name -> N values."""
        ...

    @property
    def levels(self) -> Mapping[str, Sequence[str]]:
        """Taxonomy level name -> C coarse names."""
        ...

    @property
    def several(self) -> bool:
        """Whether an image may show several classes, or none of them."""
        ...

    def __len__(self) -> int:
        """Number of images N."""
        ...


def check_rules(rules: Sequence[GateRule], images: Described) -> None:
    """Refuses rules that name what there is not: attributes, groups left out, levels, classes.

    Args:
        rules: what was declared.
        images: those that will be judged.

    Raises:
        GateError: a rule does not fit; the message names the rule and the nearest name that would.
    """
    if rules and len(images) == 0:
        raise GateError("nothing can be judged: the predictions have no rows")
    for rule in rules:
        _check_rule(rule, images)


def _check_rule(rule: GateRule, images: Described) -> None:
    where = f'gate "{rule.title}"'
    for name in (rule.group,) if isinstance(rule.group, str) else rule.group or ():
        if name not in images.groups:
            has = (
                did_you_mean(name, images.groups, lead="There are")
                if images.groups
                else "There are no group columns at all; name them in the card (columns: groups) or the file (group:X)."
            )
            raise GateError(f"{where}: there is no group attribute {name!r}. {has}")
    if images.several and rule.positive is None:
        if not rule.measure.of_labels:
            raise GateError(f"{where}: {rule.measure.of_one_class}")
        if rule.level is not None:
            raise GateError(f"{where}: {NO_LEVELS}")
    num_sides = len(images.class_names)
    if rule.level is not None:
        if rule.level not in images.levels:
            levels = did_you_mean(rule.level, images.levels, lead="There are")
            has = levels if images.levels else "There are no levels at all."
            raise GateError(f"{where}: there is no taxonomy level {rule.level!r}. {has}")
        num_sides = len(set(images.levels[rule.level]))
    if rule.outcome is not None:
        try:
            rule.outcome.check(images.class_names, images.levels, several=images.several)
        except DataError as error:
            raise GateError(f"{where}: {error}") from error
    if num_sides < rule.measure.least_classes:
        raise GateError(f"{where}: {rule.measure.words} says nothing about {num_sides} classes; use accuracy")
    if rule.attribute is not None and rule.exclude:
        _check_excluded(rule, group_values(images, rule.attribute)[0], where)


def _check_excluded(rule: GateRule, names: Sequence[str], where: str) -> None:
    for name in rule.exclude:
        # "unknown" may well have no images in one split of several.
        if name not in names and name != "unknown":
            has = did_you_mean(name, names, lead="The groups are")
            raise GateError(f"{where} excludes {name!r}, which is no group here. {has}")
    if set(names) <= set(rule.exclude):
        raise GateError(f"{where} excludes all groups of {rule.attribute}, so that nothing is left to judge")


_FILES = (".parquet", ".csv", ".tsv")


def load_references(
    rules: Sequence[GateRule], places: Sequence[Path], *, classes: Sequence[str] | None = None
) -> dict[str, Predictions]:
    """Reads the predictions of every run that rules name; zero-shot is none of them.

    Args:
        rules: the gates.
        places: folders from which a relative name is looked up, in this order: that of the gates or the card first.
        classes: class names in the order of their ids, for a file that has numbers only.

    Returns:
        The name as the rule has it -> predictions.

    Raises:
        GateError: nothing is there by that name, it is no run and no file of predictions, or a file of the run was
            changed after it was written.
    """
    found: dict[str, Predictions] = {}
    for rule in rules:
        name = rule.no_worse_than
        if name is None or name == ZERO_SHOT or name in found:
            continue
        where = f'gate "{rule.title}"'
        path = _find(name, places, where)
        try:
            file = run_file(path, "predictions.parquet") if path.is_dir() else path
            if file is None:
                raise GateError(f"{path} is not a finished run: it has no predictions.parquet")
            found[name] = Predictions.load(file, classes=classes)
        except AdaptclipError as error:
            raise GateError(f"{where}: {error}") from error
    return found


def _find(name: str, places: Sequence[Path], where: str) -> Path:
    tried = list(dict.fromkeys((place / name).absolute() for place in map(Path, places)))
    for path in tried:
        if path.exists():
            return path
    near = [ZERO_SHOT]
    for path in tried:
        if path.parent.is_dir():
            beside = path.parent.iterdir()
            kept = [p.name for p in beside if (p / "predictions.parquet").is_file() or p.suffix in _FILES]
            near += [str(Path(name).with_name(found)) for found in sorted(kept)]
    raise GateError(
        f"{where} compares with {name!r}, and there is no such run folder or file of predictions; looked for "
        f"{', '.join(map(str, tried))}. {did_you_mean(name, near, lead='There are')}"
    )
