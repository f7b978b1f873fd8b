# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe or a command: settings from defaults, `--config` and flags, and one way to exit.

The only file that imports tyro. What happens becomes an exit code and a readable message here. Before tyro reads the
arguments, an unknown flag and an unknown choice get the nearest name, and a list flag that is given twice becomes one.
After it, a path that is read must exist.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from adaptclip.errors import AdaptclipError, ConfigError, Stopped, did_you_mean, nearest
from adaptclip.settings import MUST_EXIST, check_number, check_numbers
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
        ConfigError: an unknown flag or choice (with the nearest name), a path that does not exist, a number out of
            range, or a file that holds an unknown key or a value of the wrong type.
        SystemExit: with code 1 after a malformed value, 0 after `--help`.
    """
    from adaptclip.files import read_yaml

    rest = list(sys.argv[1:] if argv is None else argv)
    path, rest = _take_config_flag(rest)
    default = config_type() if path is None else from_mapping(config_type, read_yaml(path), where=str(path))
    hints = typing.get_type_hints(config_type, include_extras=True)
    flags = _flags({field.name: hints[field.name] for field in dataclasses.fields(config_type)})  # type: ignore[arg-type]
    rest = _read_flags(rest, flags, prog=Path(sys.argv[0]).name)
    config: T = _exit_with_1(
        lambda: tyro.cli(config_type, args=rest, default=default, config=(tyro.conf.FlagCreatePairsOff,))
    )
    check_numbers(config)
    _check_paths(hints, vars(config))
    return config


def parse_command(
    commands: Mapping[str, Any],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    groups: Mapping[str, str] | None = None,
) -> Any:
    """Reads a subcommand and its flags, calls its function, and returns what that returns.

    Args:
        commands: subcommand name -> function, or -> a mapping of the same kind ("card" -> "check", "new").
        argv: the arguments; None takes them from the command line.
        prog: the program's name in the help.
        description: the first line of the help.
        groups: name of a group of subcommands -> what it is about, as a sentence.

    Raises:
        ConfigError: there is no such subcommand, flag, choice or path, or a number is out of range.
        BackboneError: there is no such device here.
        SystemExit: with code 1 after a malformed value, 0 after `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    about = groups or {}
    first = arguments[0] if arguments else "--help"
    command = commands.get(first)
    if isinstance(command, Mapping):
        return parse_command(command, arguments[1:], prog=f"{prog} {first}", description=about.get(first, description))
    if command is not None:
        arguments = [first, *_read_flags(arguments[1:], _flags(_hints(command)), prog=f"{prog} {first}")]
    elif not first.startswith("-"):
        raise ConfigError(f"unknown command {f'{prog} {first}'!r}. {did_you_mean(first, commands)}")
    elif first not in _HELP:
        raise ConfigError(f"a command comes before its flags, got {first}. {prog} --help lists them")
    else:
        arguments = ["--help"]
    flat = {
        name: _listing(c, about.get(name, "")) if isinstance(c, Mapping) else _checked(c)
        for name, c in commands.items()
    }
    return _exit_with_1(
        lambda: tyro.extras.subcommand_cli_from_dict(
            flat, prog=prog, description=description, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
        )
    )


def _listing(group: Mapping[str, Any], about: str) -> Callable[[], None]:
    """A function that stands for a group of subcommands in the help; it is never called."""

    def listing() -> None: ...

    listing.__doc__ = f"{about} Commands: {', '.join(group)}.".lstrip()
    return listing


_HELP = ("-h", "--help")


@dataclass(frozen=True)
class _Flag:
    """What is known of a flag before its value is read: its choices, where they are fixed, and whether it is a list."""

    choices: tuple[str, ...] = ()
    several: bool = False


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a command's flags; arguments that are given by their place are none."""
    hints = typing.get_type_hints(function, include_extras=True)
    return {name: hints[name] for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def _flags(hints: Mapping[str, Any]) -> dict[str, _Flag]:
    found: dict[str, _Flag] = {}
    for name, hint in hints.items():
        parts = list(_parts_of(hint))
        choices = tuple(str(value) for part in parts if _is_literal(part) for value in typing.get_args(part))
        if any(part in (int, float, str, Path) for part in parts):
            choices = ()  # a number or a word, such as `--lora-scale 0.5` or `validation`
        elif choices and type(None) in parts:
            choices = (*choices, "None")
        several = any(typing.get_origin(part) in (tuple, list) for part in parts)
        flag = f"--{name.replace('_', '-')}"
        found[flag] = _Flag(choices, several)
        if bool in parts:
            found[flag.replace("--", "--no-", 1)] = _Flag()
    return found


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _parts_of(hint: Any) -> Iterator[Any]:
    """An annotation and what it is made of: of `list[Annotated[Path, MARK]] | None` the list, the mark and Path."""
    yield hint
    if typing.get_origin(hint) is typing.Annotated:
        yield from hint.__metadata__
        yield from _parts_of(hint.__origin__)
    elif not _is_literal(hint):
        for part in typing.get_args(hint):
            yield from _parts_of(part)


def _read_flags(argv: Sequence[str], flags: Mapping[str, _Flag], *, prog: str) -> list[str]:
    """Checks names and choices, and joins the values of a list flag that is given more than once.

    Raises:
        ConfigError: an unknown flag or choice, with the nearest name.
    """
    end = list(argv).index("--") if "--" in argv else len(argv)
    given: dict[str, list[tuple[int, int, list[str]]]] = {}
    i = 0
    while i < end:
        name, joined, value = argv[i].partition("=")
        name, start, i = name.replace("_", "-"), i, i + 1
        if not name.startswith("--") or name in _HELP:
            continue
        if name not in flags:
            raise ConfigError(_unknown_flag(argv[start].partition("=")[0], flags, prog))
        values = [value] if joined else []
        while not joined and i < end and not _is_flag(argv[i]) and (flags[name].several or not values):
            values.append(argv[i])
            i += 1
        for value in values if flags[name].choices else ():
            check_choice(value, flags[name].choices, what=name)
        given.setdefault(name, []).append((start, i, values))
    twice = {name: uses for name, uses in given.items() if flags[name].several and len(uses) > 1}
    taken = {i for uses in twice.values() for start, stop, _ in uses for i in range(start, stop)}
    # A list goes on to the next flag: behind everything else it takes in nothing that is not its own.
    behind = [part for name, uses in twice.items() for part in (name, *(v for *_, values in uses for v in values))]
    return [*(a for i, a in enumerate(argv[:end]) if i not in taken), *behind, *argv[end:]]


def _is_flag(argument: str) -> bool:
    return (
        argument.startswith("-") and argument != "-" and not re.fullmatch(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", argument)
    )


def _unknown_flag(name: str, flags: Mapping[str, _Flag], prog: str) -> str:
    near = nearest(name, [flag for flag in flags if not flag.startswith("--no-")])
    hint = "" if near is None else f"Did you mean {near}? "
    return f"there is no flag {name} of {prog}. {hint}All of them: {prog} --help"


def check_choice(value: str, choices: Sequence[str], *, what: str) -> None:
    """Refuses a value that is none of the choices; one by its name of version 0.1 gets today's name.

    Args:
        value: what is given.
        choices: what can be given.
        what: the flag or setting.

    Raises:
        ConfigError: it is none of them.
    """
    if value in choices:
        return
    from adaptclip.methods.registry import current_name

    meant = current_name(value)
    raise ConfigError(f"{what} has no choice {value!r}. {did_you_mean(meant if meant in choices else value, choices)}")


def _checked(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, behind a look at its numbers, its device and the paths that it reads."""
    signature, hints = inspect.signature(command), typing.get_type_hints(command, include_extras=True)

    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            default = signature.parameters[name].default
            check_number(name, value, None if default is inspect.Parameter.empty else default)
        if given.get("device", "cpu") != "cpu":  # the check needs torch, and most commands do not
            from adaptclip.clip import check_device

            check_device(given["device"])
        _check_paths(hints, given)
        return command(*args, **kwargs)

    return call


def _check_paths(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises ConfigError for a path that is read and not there, with the nearest name beside it."""
    from adaptclip.files import no_such_path

    for name, value in values.items():
        if value is None or MUST_EXIST not in [part for part in _parts_of(hints[name]) if isinstance(part, str)]:
            continue
        for path in value if isinstance(value, list | tuple) else [value]:
            if not Path(path).exists():
                raise ConfigError(no_such_path(path))


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

    hints = typing.get_type_hints(config_type, include_extras=True)
    known = [f.name for f in dataclasses.fields(config_type)]  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown setting {key!r}. {did_you_mean(str(key), known, limit=40)}")
        flag = next(iter(_flags({key: hints[key]}).values()))
        for value in (values[key] if isinstance(values[key], list) else [values[key]]) if flag.choices else ():
            if isinstance(value, str):
                check_choice(value, flag.choices, what=f"{where}: {key}")
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
        _check_out(configs[0])
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


def _check_out(config: Any) -> None:
    """Refuses a run folder that is in use before anything is read, where the settings are those of a run."""
    if hasattr(config, "out") and hasattr(config, "overwrite"):
        from adaptclip.training.run_folder import check_start

        resume = getattr(config, "resume", None)
        check_start(Path(config.out), resume=bool(resume), overwrite=config.overwrite, can_resume=resume is not None)


def _what_is_kept(config: Any) -> str:
    if not hasattr(config, "resume") or not hasattr(config, "out"):
        return _NOTHING_HALF_WRITTEN
    from adaptclip.training.run_folder import what_is_kept

    return what_is_kept(Path(config.out))  # pyright: ignore[reportAttributeAccessIssue]


def _leave_process_group() -> None:
    """Ends torch.distributed if it was started, so that no process waits for one that has left."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
