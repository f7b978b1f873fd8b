"""Settings: defaults < `--config` file < flags. The only file that imports tyro."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import TypeAdapter, ValidationError

from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.settings import check_numbers
from adaptclip.storage import read_yaml, write_yaml

T = TypeVar("T")


def parse(config_type: type[T], argv: Sequence[str] | None = None) -> T:
    """Reads a recipe's settings from the command line.

    Args:
        config_type: a frozen dataclass whose fields have defaults and a docstring line each.
        argv: the arguments; None takes them from the command line.

    Returns:
        The settings: the dataclass's defaults, overridden by the file given as `--config FILE` (YAML, for example
        `config.yaml` of an earlier run), overridden by flags.

    Raises:
        ConfigError: the file holds an unknown key or a value of the wrong type, or a number is out of range.
        SystemExit: with code 1 after an unknown or malformed flag (tyro prints the nearest name), 0 after `--help`.
    """
    rest = list(sys.argv[1:] if argv is None else argv)
    path, rest = _take_config_flag(rest)
    default = config_type() if path is None else from_mapping(config_type, read_yaml(path), where=str(path))
    config: T = _exit_with_1(
        lambda: tyro.cli(config_type, args=rest, default=default, config=(tyro.conf.FlagCreatePairsOff,))
    )
    check_numbers(config)
    return config


def parse_command(
    commands: Mapping[str, Any], argv: Sequence[str] | None = None, *, prog: str, description: str
) -> Any:
    """Reads a subcommand and its flags, calls its function, and returns what that returns.

    Args:
        commands: subcommand name -> function, or -> a mapping of the same kind ("card" -> "check", "new").
        argv: the arguments; None takes them from the command line.
        prog: the program's name in the help.
        description: the first line of the help.

    Raises:
        ConfigError: there is no such subcommand.
        SystemExit: with code 1 after an unknown or malformed flag, 0 after `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    group = commands.get(arguments[0]) if arguments else None
    if isinstance(group, Mapping):
        return parse_command(group, arguments[1:], prog=f"{prog} {arguments[0]}", description=description)
    if arguments and arguments[0] not in commands and not arguments[0].startswith("-"):
        raise ConfigError(f"unknown command {prog + ' ' + arguments[0]!r}. {did_you_mean(arguments[0], commands)}")
    flat = {name: _listing(c) if isinstance(c, Mapping) else c for name, c in commands.items()}
    return _exit_with_1(
        lambda: tyro.extras.subcommand_cli_from_dict(
            flat, prog=prog, description=description, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
        )
    )


def _listing(group: Mapping[str, Any]) -> Callable[[], None]:
    """A function that stands for a group of subcommands in the help; it is never called."""

    def listing() -> None: ...

    listing.__doc__ = f"One of: {', '.join(group)}."
    return listing


def _exit_with_1(call: Any) -> Any:
    """Turns argparse's exit code for a usage error, 2, into 1: 2 is what a failed gate exits with."""
    try:
        return call()
    except SystemExit as stop:
        raise SystemExit(1 if stop.code == 2 else stop.code) from None


def _take_config_flag(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Splits `--config FILE` or `--config=FILE` off the arguments."""
    rest: list[str] = []
    path: Path | None = None
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            value = next(arguments, None)
            if value is None:
                raise ConfigError("--config needs a file, for example --config runs/coop/config.yaml")
            path = Path(value)
        elif argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return path, rest


def from_mapping(config_type: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Builds settings from names and values, for example of a saved `config.yaml`.

    Raises:
        ConfigError: naming the unknown key and the nearest known one, or the value of the wrong type.
    """
    known = [f.name for f in dataclasses.fields(config_type)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown setting {key!r}. {did_you_mean(str(key), known, limit=40)}")
    try:
        return TypeAdapter(config_type).validate_python(dict(values))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def save_config(config: Any, path: Path) -> None:
    """Writes settings as YAML that `parse` reads back with `--config`."""
    write_yaml(path, dataclasses.asdict(config))
