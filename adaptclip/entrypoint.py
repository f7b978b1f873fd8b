# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe or a command: settings from defaults, `--config` and flags, and one way to exit.

The only file that imports tyro. What happens becomes an exit code and a readable message here.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from adaptclip.errors import AdaptclipError, ConfigError, Stopped, did_you_mean
from adaptclip.settings import check_numbers
from adaptclip.terminal import guard_messages, say
from adaptclip.training.interruption import Signals, hear_launcher

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
    from adaptclip.files import read_yaml

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
    from pydantic import TypeAdapter, ValidationError

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
    from adaptclip.files import write_yaml

    write_yaml(path, dataclasses.asdict(config))


_NOTHING_HALF_WRITTEN = "Nothing was left half-written."


def launch(main: Callable[[T], int], config_type: type[T], argv: Sequence[str] | None = None) -> None:
    """Parses the settings, runs `main` and leaves with its exit code; what every recipe ends with.

    Exit codes: 0 all gates passed, 2 a gate failed, 3 a gate was inconclusive, 1 a usage or data error,
    130 stopped by Ctrl-C (SIGINT), 143 by SIGTERM; then it says what is kept in the run folder.

    Args:
        main: the recipe's function; returns the exit code.
        config_type: the recipe's frozen dataclass.
        argv: the arguments; None takes them from the command line.
    """
    configs: list[T] = []

    def call() -> int:
        hear_launcher()
        configs.append(parse(config_type, argv))
        return main(configs[0])

    run_and_exit(call, kept=lambda: _what_is_kept(configs[0]) if configs else _NOTHING_HALF_WRITTEN)


def run_and_exit(call: Callable[[], int | None], *, kept: Callable[[], str] = lambda: _NOTHING_HALF_WRITTEN) -> None:
    """Leaves with the code that `call` returns; deliberate errors become one message on stderr and code 1.

    So does what the operating system says of a file by its name (too long, not allowed, links in a circle).

    Args:
        call: what to run.
        kept: says what is left of it when a signal has stopped it.
    """
    guard_messages()
    # Every process of a distributed run fails alike; one of them tells.
    tells = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        with Signals([signal.SIGTERM] if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else []):
            code = call() or 0
    except (AdaptclipError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        said = f"cannot use {error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        if tells:
            say(to=sys.stderr)
            say(f"error: {said}", to=sys.stderr, several_lines=True)
        code = 1
    except KeyboardInterrupt as stop:
        signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        if tells:
            by = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
            say(to=sys.stderr)
            say(f"stopped by {by}. {kept()}", to=sys.stderr)
        code = 128 + signum
    finally:
        _leave_process_group()
    sys.exit(code)


def _what_is_kept(config: object) -> str:
    if not hasattr(config, "resume") or not hasattr(config, "out"):
        return _NOTHING_HALF_WRITTEN
    from adaptclip.training.run_folder import what_is_kept

    return what_is_kept(Path(config.out))  # pyright: ignore[reportAttributeAccessIssue]


def _leave_process_group() -> None:
    """Ends torch.distributed if it was started, so that no process waits for one that has left."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
