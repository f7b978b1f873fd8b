# SPDX-License-Identifier: Apache-2.0
"""Links as hub caches, DVC and git-annex (datalad) make them: which are followed, and what fetches what is not there.

A link that leads out of a folder is followed where it points into a store that such a program keeps beside the data:
`.git/annex/objects` (also below `.git/modules`), `.dvc/cache` or `.cache/dvc` in a folder above, or the `blobs` beside
the `snapshots` that the folder is part of. No other link out of a table's folder is followed.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from adaptclip.errors import shown

_FETCH = {
    "git-annex": "`datalad get .` or `git annex get .` fetches it",
    "DVC": "`dvc pull` fetches it",
    "hub": "download the snapshot again (`hf download`)",
}
"""Kind of store -> what fetches a file that is not in it."""

DANGLING = {f"{kind} link without content": f"the content is not here: {how}" for kind, how in _FETCH.items()}
"""As what a link to nothing is passed over, where it points into a store -> why."""


def store_of(target: Path, folder: Path) -> str | None:
    """Returns which program's store beside `folder` a path lies in: "git-annex", "DVC", "hub" or None; see above.

    Args:
        target: a path without links in it.
        folder: likewise; where the link lies, or a folder above.
    """
    for above in (folder, *folder.parents):
        if not target.is_relative_to(above):
            continue
        parts = target.relative_to(above).parts
        if parts[:1] == (".git",) and ("annex", "objects") in pairwise(parts):
            return "git-annex"
        if parts[:2] in ((".dvc", "cache"), (".cache", "dvc")):
            return "DVC"
        if parts[:1] == ("blobs",) and folder.relative_to(above).parts[:1] == ("snapshots",):
            return "hub"
    return None


def dangling_kind(path: Path) -> str:
    """Returns as what a link to nothing is passed over; see DANGLING."""
    kind = store_of(path.resolve(), path.parent.resolve())
    return f"{kind} link without content" if kind else "link to nothing"


def why_absent(path: Path) -> str:
    """Returns why there is no file at a path and what fetches it, or "" where nothing is known of it."""
    if "\0" in str(path) or path.exists() or not isinstance(path, Path):  # in an archive there are no links
        return ""
    if path.is_symlink():
        kind = store_of(path.resolve(), path.parent.resolve())
        target = shown(path.readlink())
        return f"its content is not here: {_FETCH[kind]}" if kind else f"it is a link to {target}, which is not there"
    pointer = next((p for p in (path, *path.parents) if p.name and p.with_name(f"{p.name}.dvc").is_file()), None)
    return f"{pointer.name}.dvc stands for it: {_FETCH['DVC']}" if pointer else ""
