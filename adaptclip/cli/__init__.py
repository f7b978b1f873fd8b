# SPDX-License-Identifier: Apache-2.0
"""The `adaptclip` command: one table of commands, one small file per command or group of commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import adaptclip
from adaptclip.cli import card, export, gate, inspect, predict, probe, recipes, report, search
from adaptclip.entrypoint import parse_command, run_and_exit
from adaptclip.terminal import say

# Heavy modules are imported inside the commands: `adaptclip --help` should not wait for torch.

Command = Callable[..., "int | None"]

COMMANDS: Mapping[str, Command | Mapping[str, Command]] = {
    "predict": predict.predict,
    "report": report.report,
    "gate": gate.gate,
    "plan": gate.plan,
    "compare": gate.compare,
    "export": export.export,
    "embed": search.embed,
    "search": search.search,
    "inspect": inspect.inspect,
    "probe": probe.probe,
    "recipes": {"list": recipes.list_names, "copy": recipes.copy},
    "card": {"check": card.check, "list": card.list_names, "new": card.new},
}
"""Name -> function whose signature gives the flags and whose docstring gives the help, or a group of such."""


GROUPS = {
    "recipes": "Get the training scripts that come with the package.",
    "card": "Write a data card for your images, check it, or see the cards that come with the package.",
}
"""Name of a group -> what it is for."""

_ABOUT = "Adapt a pretrained CLIP to a custom domain, and judge it. `adaptclip --version` says which version this is."


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; leaves with 0, 1 (usage or data error), or a gate's 2 (failed) or 3 (inconclusive)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Any] = dict(COMMANDS)

    def call() -> int | None:
        if arguments == ["--version"]:
            say(f"adaptclip {adaptclip.__version__}")
            return 0
        return parse_command(commands, arguments, prog="adaptclip", description=_ABOUT, groups=GROUPS)

    run_and_exit(call)
