"""Runs a recipe or command: one place that turns what happens into an exit code and a readable message."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from adaptclip.config import parse
from adaptclip.errors import AdaptclipError
from adaptclip.terminal import guard_messages, say

T = TypeVar("T")


def launch(main: Callable[[T], int], config_type: type[T], argv: Sequence[str] | None = None) -> None:
    """Parses the settings, runs `main` and leaves with its exit code; what every recipe ends with.

    Exit codes: 0 all gates passed, 2 a gate failed, 3 a gate was inconclusive, 1 a usage or data error,
    130 stopped by Ctrl-C.

    Args:
        main: the recipe's function; returns the exit code.
        config_type: the recipe's frozen dataclass.
        argv: the arguments; None takes them from the command line.
    """
    run_and_exit(lambda: main(parse(config_type, argv)))


def run_and_exit(call: Callable[[], int | None]) -> None:
    """Leaves with the code that `call` returns; deliberate errors become one message on stderr and code 1."""
    guard_messages()
    try:
        code = call() or 0
    except AdaptclipError as error:
        # Every process of a distributed run fails alike; one of them tells.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(to=sys.stderr)
            say(f"error: {error}", to=sys.stderr, several_lines=True)
        code = 1
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(to=sys.stderr)
            say(
                "stopped by Ctrl-C. What was finished is kept; the same command with --resume goes on "
                "from the newest checkpoint.",
                to=sys.stderr,
            )
        code = 130
    finally:
        _leave_process_group()
    sys.exit(code)


def _leave_process_group() -> None:
    """Ends torch.distributed if it was started, so that no process waits for one that has left."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
