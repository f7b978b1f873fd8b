# SPDX-License-Identifier: Apache-2.0
"""`adaptclip recipes`: the recipes that come with the package, listed and copied to where they can be changed."""

from __future__ import annotations

import ast
from pathlib import Path

from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.terminal import say


def folder() -> Path:
    """Returns where the recipes lie: inside an installed package, beside it in a checkout.

    Raises:
        ConfigError: this installation has none.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / "recipes", package.parent / "recipes"):
        if (place / "coop.py").is_file():
            return place
    raise ConfigError(f"the recipes are not in this installation ({package}); install adaptclip again")


def list_names() -> int:
    """List the recipes, each with its first line."""
    files = sorted(folder().glob("*.py"))
    width = max(len(file.stem) for file in files)
    for file in files:
        about = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[:1]
        say(f"{file.stem:<{width}}  {''.join(about)}")
    return 0


def copy(names: list[str], /, *, out: Path = Path("recipes"), overwrite: bool = False) -> int:
    """Copy recipes into a folder, where they are yours to change and run.

    Args:
        names: recipes by name, such as coop; none means all of them.
        out: the folder they are copied to.
        overwrite: replace files that are there and differ.
    """
    from adaptclip.files import write_text
    from adaptclip.outputs import check_apart, check_file

    known = {file.stem: file for file in sorted(folder().glob("*.py"))}
    for name in names:
        if name.removesuffix(".py") not in known:
            raise ConfigError(f"there is no recipe {name!r}. {did_you_mean(name, known)}")
    chosen = [known[name.removesuffix(".py")] for name in dict.fromkeys(names)] or list(known.values())
    beside = [folder() / "README.md", *sorted(folder().glob("figures/*.svg"))]
    check_apart(out, [folder()])
    for file in [*chosen, *beside]:
        check_file(out / file.relative_to(folder()))
    texts = {out / file.relative_to(folder()): file.read_text(encoding="utf-8") for file in [*chosen, *beside]}
    changed = [path for path, text in texts.items() if path.exists() and path.read_text(encoding="utf-8") != text]
    if changed and not overwrite:
        raise ConfigError(
            f"{', '.join(map(str, changed))} would be replaced and differs; choose another folder, or --overwrite it"
        )
    for path, text in texts.items():
        write_text(path, text)
    say(f"copied {len(chosen)} recipes to {out}; run: python {out / chosen[0].name}")
    return 0
