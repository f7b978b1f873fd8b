"""Runs a recipe or command: one place that turns what happens into an exit code and a readable message."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from adaptclip.config import parse
from adaptclip.errors import AdaptclipError, Stopped
from adaptclip.terminal import guard_messages, say
from adaptclip.training.interruption import Signals, hear_launcher

T = TypeVar("T")

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
