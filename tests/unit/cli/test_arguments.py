# SPDX-License-Identifier: Apache-2.0
"""What a newcomer types wrong: flags, choices, paths and lists; each gets one sentence that says what to type."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from recipe_files import load_recipe

import adaptclip
from adaptclip.cli import COMMANDS, main
from adaptclip.entrypoint import launch, parse, parse_command
from adaptclip.errors import ConfigError, StorageError, did_you_mean, nearest
from adaptclip.files import no_such_path, read_yaml, write_json
from adaptclip.settings import MUST_EXIST, DataSettings, ExistingPath


def said(capsys, *argv: str, code: int = 1) -> str:
    """What a command prints, after it ended with a code."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert (stop.value.code or 0) == code
    printed = capsys.readouterr()
    return (printed.out + printed.err).strip()


# --- flags ---


@dataclass(frozen=True)
class Config:
    """Settings."""

    names: tuple[str, ...] = ("a",)
    """Names."""
    counts: tuple[int, ...] = ()
    """Numbers."""
    head: Literal["text_init", "tip_adapter_f", "clap"] = "clap"
    """A choice."""
    margin: float = 0.1
    """A number."""
    quiet: bool = False
    """Says nothing."""
    data_root: ExistingPath | None = None
    """A folder."""


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--names", "x", "y"], ("x", "y")),
        (["--names", "x", "--names", "y"], ("x", "y")),
        (["--names=x", "--names=y"], ("x", "y")),
        (["--names", "x", "--quiet", "--names", "y", "z", "--margin", "-0.5"], ("x", "y", "z")),
        (["--names", "x", "--names=y", "--counts", "-1", "--counts", "2"], ("x", "y")),
    ],
)
def test_a_list_flag_given_twice_counts_twice(argv, names):
    found = parse(Config, argv)
    assert found.names == names
    assert found.counts == ((-1, 2) if "--counts" in argv else ())
    assert found.margin == (-0.5 if "--margin" in argv else 0.1)
    assert found.quiet == ("--quiet" in argv)


def test_lists_of_commands_count_twice_too_and_take_in_nothing_else():
    def command(first: str, rest: list[str], /, *, groups: tuple[str, ...] = (), k: int = 1) -> Any:
        """Do it."""
        return first, rest, groups, k

    def run(*argv: str) -> Any:
        return parse_command({"do": command, "other": command}, ["do", *argv], prog="p", description="d")

    assert run("--groups=a", "x", "y", "--groups=b", "--k", "3") == ("x", ["y"], ("a", "b"), 3)
    assert run("x", "y", "--groups", "a", "--groups", "b") == ("x", ["y"], ("a", "b"), 1)
    assert run("--groups", "a", "--groups", "b", "--", "x", "y") == ("x", ["y"], ("a", "b"), 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--naems", "x"], r"^there is no flag --naems of .*\. Did you mean --names\? All of them: .* --help$"),
        (["--data_rot=x"], r"no flag --data_rot of .*Did you mean --data-root\?"),
        (["--zzzzzz"], r"^there is no flag --zzzzzz of \S+\. All of them"),
        (
            ["--head", "text-init"],
            r"^--head has no choice 'text-init'. Did you mean \"text_init\"\? Allowed: clap, text",
        ),
        (["--head=tip-f"], r'Did you mean "tip_adapter_f"\?'),
        (["--head", "clip"], r'Did you mean "clap"\?'),
        (["--data-root", "nowhere"], "^there is no file or folder nowhere"),
    ],
)
def test_wrong_flags_and_choices(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        parse(Config, argv)


def test_a_choice_in_a_file_gets_the_nearest_name_too(tmp_path):
    (tmp_path / "c.yaml").write_text("head: tip-f\n")
    with pytest.raises(ConfigError, match=r'c\.yaml: head has no choice \'tip-f\'\. Did you mean "tip_adapter_f"'):
        parse(Config, ["--config", str(tmp_path / "c.yaml")])
    with pytest.raises(StorageError, match=r'no file or folder .*d\.yaml\. Did you mean ".*c\.yaml"'):
        parse(Config, ["--config", str(tmp_path / "d.yaml")])


def test_an_unknown_flag_of_a_command_is_one_line(capsys):
    text = said(capsys, "gate", "p.csv", "--gats", "g.yaml")
    assert (
        text
        == "error: there is no flag --gats of adaptclip gate. Did you mean --gates? All of them: adaptclip gate --help"
    )
    assert said(capsys, "--gates", "g.yaml").startswith("error: a command comes before its flags, got --gates")


def test_version_groups_and_cards_describe_themselves(capsys):
    assert said(capsys, "--version", code=0) == f"adaptclip {adaptclip.__version__}"
    assert "Write a data card for your images" in said(capsys, "card", "--help", code=0)
    whole = " ".join(said(capsys, "--help", code=0).replace("│", " ").split())
    assert "adaptclip --version" in whole
    assert "Commands: check, list, new." in whole
    cards = dict(line.split(maxsplit=1) for line in said(capsys, "card", "list", code=0).splitlines())
    assert len(cards) >= 10
    assert cards["digits"] == "Handwritten digits (comes with the package)"
    assert cards["aerial_features"].endswith("(comes with the package)")
    assert cards["eurosat"].endswith("(downloaded from the Hugging Face hub)")
    assert cards["flowers17"].endswith("(from files of yours: --data-root)")


def test_a_card_that_is_not_valid_is_listed_as_such(tmp_path, monkeypatch, capsys):
    (tmp_path / "data_cards").mkdir()
    (tmp_path / "data_cards" / "mine.md").write_text("no front matter")
    monkeypatch.chdir(tmp_path)
    assert "mine                 is not valid; adaptclip card check mine says why" in said(
        capsys, "card", "list", code=0
    )


# --- before anything is read ---


@dataclass(frozen=True)
class RunConfig:
    """A recipe's."""

    out: Path = Path("run")
    """Run folder."""
    overwrite: bool = False
    """Replace it."""
    resume: bool = False
    """Go on."""


def begun(version: str) -> None:
    """A run folder as a version leaves it."""
    record = {"adaptclip": version, "num_processes": 1, "config": {"resume": False, "overwrite": False, "lr": 0.0}}
    Path("run").mkdir(exist_ok=True)
    write_json(Path("run/run.json"), record)


@pytest.mark.parametrize(
    ("version", "flags", "message"),
    [
        ("0.2.0", [], "run holds an earlier run. Go on with it (--resume), replace it (--overwrite) or choose"),
        ("0.1.0", ["--resume"], "run was begun with adaptclip 0.1.0, and this is {}: "),
        (adaptclip.__version__, ["--resume"], None),
        ("0.1.0", ["--overwrite"], None),
    ],
)
def test_a_folder_that_is_in_use_is_refused_before_the_recipe_begins(
    version, flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    begun(version)
    called = []
    with pytest.raises(SystemExit) as stop:
        launch(lambda config: called.append(config) or 0, RunConfig, flags)
    err = capsys.readouterr().err
    if message is None:
        assert (stop.value.code, len(called), err) == (0, 1, "")
    else:
        assert (stop.value.code, called) == (1, [])
        assert message.format(adaptclip.__version__) in err
        assert "--overwrite" in err
    assert [p.name for p in Path("run").iterdir()] == ["run.json"]


# --- paths ---


def test_a_missing_path_names_the_nearest_and_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert no_such_path("a.csv") == "there is no file or folder a.csv. This folder is empty."
    for name in ("coop", "lora", ".hidden"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "gates.yaml").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    assert no_such_path("runs/cop") == (
        'there is no file or folder runs/cop. Did you mean "runs/coop"? In runs: coop, lora.'
    )
    assert no_such_path("gats.yaml").startswith(
        'there is no file or folder gats.yaml. Did you mean "gates.yaml"? In this'
    )
    assert no_such_path("run/coop/x") == (
        "there is no file or folder run/coop/x, nor a folder run. "
        'Did you mean "runs/coop/x"? In this folder: dangling, gates.yaml, runs.'
    )
    assert no_such_path("dangling").endswith("dangling is a link, and nothing is where it leads.")
    with pytest.raises(StorageError, match=r'^there is no file or folder gats\.yaml\. Did you mean "gates\.yaml"'):
        read_yaml(Path("gats.yaml"))


def functions() -> dict[str, Callable[..., Any]]:
    """Every command by its name."""
    return {
        f"{group} {name}".strip(): function
        for group, own in COMMANDS.items()
        for name, function in (own.items() if isinstance(own, Mapping) else [("", own)])
    }


WRITTEN = {"out", "junit", "cache"}
"""Paths that commands write."""


def test_every_path_that_a_command_reads_must_exist(tmp_path, monkeypatch, capsys):
    """A path is either written or checked before anything else is done, whichever command it is of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere_else").touch()
    paths = 0
    for name, function in functions().items():
        for argument, hint in typing.get_type_hints(function, include_extras=True).items():
            text = str(hint)
            if "Path" not in text:
                continue
            assert (MUST_EXIST in text) != (argument in WRITTEN), f"{name}: {argument}"
            if argument in WRITTEN:
                continue
            given = []
            for one, p in inspect.signature(function).parameters.items():
                by_place, here = p.kind is p.POSITIONAL_ONLY, one == argument
                needed = p.default is p.empty
                value = "nowhere" if here else "starter" if one in ("card", "query") else "."
                if one == "to":
                    value = "hf"
                if here or needed:
                    given += [value] if by_place else [f"--{one.replace('_', '-')}", value]
            text = said(capsys, *name.split(), *given)
            assert text.startswith('error: there is no file or folder nowhere. Did you mean "nowhere_else"?'), name
            paths += 1
    assert paths >= 20
    assert MUST_EXIST in str(typing.get_type_hints(DataSettings, include_extras=True)["data_root"])


def test_compare_without_a_group_names_those_there_are(tmp_path, capsys):
    rows = "\n".join(f"{i},cat,0.9,0.1,s{i % 2},x" for i in range(4))
    (tmp_path / "p.csv").write_text(f"id,label,prob_cat,prob_dog,site,camera\n{rows}\n", encoding="utf-8")
    text = said(capsys, "compare", str(tmp_path / "p.csv"), str(tmp_path / "p.csv"))
    assert text.endswith("--group NAME. These predictions have: site, camera.")
    text = said(capsys, "compare", str(tmp_path / "p.csv"), str(tmp_path / "p.csv"), "--group", "sit")
    assert text.endswith("no group attribute 'sit'. Did you mean \"site\"? They have: camera, site.")


def test_what_is_there_is_not_called_allowed():
    assert did_you_mean("labl", ["label", "id"], lead="It has") == 'Did you mean "label"? It has: id, label.'
    assert did_you_mean("x", []) == "Allowed: none."
    assert nearest("labl", ["label", "id"]) == "label"
    assert nearest("zzz", ["label", "id"]) is None


@pytest.mark.parametrize(("given", "read"), [("0.5", 0.5), ("1", 1.0), ("validation", "validation")])
def test_a_number_may_stand_where_a_word_may(given, read):
    assert parse(load_recipe("lora").Config, ["--lora-scale", given]).lora_scale == read
