"""Gates from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adaptclip.errors import GateError, did_you_mean
from adaptclip.gate_rules import GateRule
from adaptclip.storage import read_yaml

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
