# SPDX-License-Identifier: Apache-2.0
"""Flags: every recipe's settings are documented, wrong ones get the nearest name, files and flags come in order."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from recipe_files import RECIPES, ROOT, load_recipe

from adaptclip.cli import COMMANDS
from adaptclip.entrypoint import parse, parse_command, save_config
from adaptclip.errors import BackboneError, ConfigError
from adaptclip.settings import check_numbers

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "data_cards").glob("*.md"), *(ROOT / "recipes").glob("*.md")]


@pytest.fixture(scope="module")
def configs() -> dict[str, type]:
    return {path.name: load_recipe(path.stem).Config for path in RECIPES}


def test_every_setting_has_a_line_of_help(configs):
    fields = 0
    for path in RECIPES:
        source = ast.parse(path.read_text(encoding="utf-8"))
        body = next(n.body for n in source.body if isinstance(n, ast.ClassDef) and n.name == "Config")
        names = [n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        documented = [
            a.target.id
            for a, b in itertools.pairwise(body)
            if isinstance(a, ast.AnnAssign)
            and isinstance(a.target, ast.Name)
            and isinstance(b, ast.Expr)
            and isinstance(b.value, ast.Constant)
        ]
        assert documented == names, f"{path.name}: no help for {set(names) - set(documented)}"
        assert len(names) <= 31, f"{path.name} has {len(names)} settings"
        assert configs[path.name].__dataclass_params__.frozen
        fields += len(names)
    assert fields >= 40


@pytest.mark.parametrize("name", [p.name for p in RECIPES])
def test_help_and_unknown_flag(configs, name, capsys):
    # The bench never does again what is done, so it has nothing to overwrite.
    known = "metric" if name == "few_shot.py" else "overwrite"
    with pytest.raises(SystemExit) as stop:
        parse(configs[name], ["--help"])
    assert stop.value.code == 0
    assert "--out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^there is no flag --sed of .*--help$"):
        parse(configs[name], ["--sed", "2"])
    with pytest.raises(ConfigError, match=rf"Did you mean --{known}\?"):
        parse(configs[name], [f"--{known[:-1]}"])


def test_a_value_of_the_wrong_kind_is_named(configs, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(configs["coop.py"], ["--lr", "fast"])
    assert stop.value.code == 1
    assert "--lr" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"^--rule has no choice 'random'\. Allowed: coop, nested"):
        parse(configs["coop.py"], ["--rule", "random"])


def test_numbers_no_training_can_have_are_refused_before_anything_is_read(configs, tmp_path):
    """In every recipe, from flags and from files. A 0 passes where it is the default, and as a number of views."""
    wrong: dict[str, tuple[str, ...]] = {
        **dict.fromkeys(("batch_size", "accumulate", "epochs", "steps", "views", "save_every"), ("-1",)),
        **dict.fromkeys(("lr", "head_lr", "memory_gib"), ("-0.1", "nan", "inf")),
    }
    refused, allowed = 0, 0
    for recipe, config in configs.items():
        for field in dataclasses.fields(config):
            flag = f"--{field.name.replace('_', '-')}"
            for value in wrong.get(field.name, ()):
                with pytest.raises(ConfigError, match=rf"^{field.name} must be .*, got {value}"):
                    parse(config, [flag, value])
                refused += 1
            if field.name in wrong and (field.default == 0 or field.name in ("save_every", "views")):
                assert getattr(parse(config, [flag, "0"]), field.name) == 0, recipe
                allowed += 1
            elif field.name in wrong:
                with pytest.raises(
                    ConfigError, match=rf"^{field.name} must be .*, got 0.*(the default is|the paper's)"
                ):
                    parse(config, [flag, "0"])
                refused += 1
            if field.name in ("shots", "seed", "seeds", "threads", "search_trials", "search_seconds", "rank", "n_ctx"):
                below = (-1,) if isinstance(field.default, tuple) else -1
                with pytest.raises(ConfigError, match=rf"^{field.name} must be .*, got -1"):
                    check_numbers(dataclasses.replace(config(), **{field.name: below}))
                refused += 1
        check_numbers(config())
    assert refused >= 90, f"only {refused} numbers were refused"
    assert allowed >= 8, f"only {allowed} zeros were allowed"
    save_config(dataclasses.replace(configs["lora.py"](), batch_size=0), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        parse(configs["lora.py"], ["--config", str(tmp_path / "config.yaml")])


def test_numbers_and_devices_of_every_command_are_refused_in_words():
    """Before the command starts: none of the files that it would need is there."""
    refused = []
    flat = [(name, c) for name, c in COMMANDS.items() if not isinstance(c, Mapping)]
    for name, command in flat:
        parameters = inspect.signature(command).parameters.values()
        needed = ["x" if p.name != "out" else "" for p in parameters if p.kind is p.POSITIONAL_ONLY]
        needed += [part for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY
                   for part in (f"--{p.name}", {"to": "onnx", "group": "g"}.get(p.name, "x"))]  # fmt: skip
        for p in parameters:
            wrong = ("0", "-3") if p.annotation == "int" else ("gpu", "cuda:99", "meta") if p.name == "device" else ()
            for value in wrong:
                with pytest.raises((ConfigError, BackboneError)) as caught:
                    parse_command(
                        {name: command},
                        [name, *needed, f"--{p.name.replace('_', '-')}", value],
                        prog="a",
                        description="",
                    )
                said = str(caught.value)
                assert value in said, said
                assert ("must be 1 or more" in said) if p.name != "device" else ("device" in said and "cpu" in said), (
                    said
                )
                refused.append((name, p.name))
    assert {"batch_size", "top_k", "device", "min_n", "classes", "patients_with"} <= {name for _, name in refused}
    assert len(refused) >= 20, refused


def test_defaults_then_file_then_flags(configs, tmp_path):
    saved = dataclasses.replace(configs["coop.py"](), lr=0.5, seed=3, out=Path("elsewhere"))
    save_config(saved, tmp_path / "config.yaml")
    cfg = parse(configs["coop.py"], ["--config", str(tmp_path / "config.yaml"), "--seed", "4"])
    assert cfg == dataclasses.replace(saved, seed=4)
    assert parse(configs["coop.py"], [f"--config={tmp_path / 'config.yaml'}"]) == saved


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sede: 3", 'Did you mean "seed"'),
        ("seed: many", "seed"),
        ("- 1\n- 2", "mapping"),
        ("seed: [", "cannot read"),
    ],
)
def test_a_wrong_settings_file(configs, tmp_path, content, message):
    from adaptclip.errors import AdaptclipError

    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(AdaptclipError, match=re.escape(message)):
        parse(configs["coop.py"], ["--config", str(tmp_path / "c.yaml")])
    with pytest.raises(ConfigError, match="needs a file"):
        parse(configs["coop.py"], ["--config"])


def test_commands_get_the_nearest_name():
    from adaptclip.cli import main

    def command(name: str, /) -> int:
        """Do it."""
        return len(name)

    commands = {"predict": command, "card": {"check": command}}
    assert parse_command(commands, ["card", "check", "abc"], prog="p", description="d") == 3
    for argv, nearest in ((["predcit"], "predict"), (["card", "chek"], "check")):
        with pytest.raises(ConfigError, match=f'Did you mean "{nearest}"'):
            parse_command(commands, argv, prog="p", description="d")
    with pytest.raises(SystemExit) as stop:
        main(["gat"])
    assert stop.value.code == 1


def test_flags_in_the_documents_exist(configs):
    """A flag that a document shows is a flag of some recipe or command; how many were looked at is asserted."""
    from adaptclip.cli import COMMANDS

    known = {f.name for config in configs.values() for f in dataclasses.fields(config)}
    functions = [f for c in COMMANDS.values() for f in (c.values() if isinstance(c, Mapping) else [c])]
    assert len(functions) >= 6
    known |= {a for f in functions for a in f.__annotations__}
    others = {
        "help",
        "version",
        "config",
        "standalone",
        "nproc-per-node",
        "num-processes",
        "multi-gpu",
        "cpu",
        "mixed-precision",
    }
    others |= {"no-deps", "quiet", "durations", "junitxml", "order"}
    shown = 0
    for path in DOCUMENTS:
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", path.read_text(encoding="utf-8")):
            shown += 1
            name = flag.replace("_", "-")
            assert name.replace("-", "_") in known or name in others, f"{path.name} shows --{flag}"
    assert shown >= 15
