# SPDX-License-Identifier: Apache-2.0
"""What an output may replace: a table of commands and targets, each cell a test, and nothing else moves."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made_artifacts
import numpy as np
import pytest
from PIL import Image
from recipe_files import load_recipe
from tiny_clip import make_tiny_backbone

import adaptclip as ac
from adaptclip.artifact import save_artifact
from adaptclip.cli.card import new
from adaptclip.cli.export import export
from adaptclip.cli.gate import compare, gate
from adaptclip.cli.predict import predict
from adaptclip.cli.probe import probe
from adaptclip.cli.recipes import copy as copy_recipes
from adaptclip.cli.recipes import folder as recipes_folder
from adaptclip.cli.report import report
from adaptclip.cli.search import embed, search
from adaptclip.clip.saving import save_open_clip
from adaptclip.data.image_files import list_images
from adaptclip.data.shots import FewShotSplit
from adaptclip.errors import AdaptclipError, StorageError
from adaptclip.outputs import KINDS, atomic_folder, check_folder, strangers
from adaptclip.predictions import Predictions
from adaptclip.training.tracking import make_accelerator, start_run

WRITTEN = ""


def plant(kind: str, folder: Path, *own: str, extra: Callable[[Path], object] = lambda folder: None) -> None:
    """Makes a folder carry the marker of a kind and files that adaptclip wrote there; `extra` makes what it did not."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / KINDS[kind].marker
    known = json.loads(marker.read_text()) if marker.is_file() else {}
    marker.unlink(missing_ok=True)  # it may be a hard link
    known = {**dict.fromkeys(KINDS[kind].keys, 0), "adaptclip": "0", "config": {}, **known}
    listing = folder / KINDS[kind].listing
    if listing == marker:
        known["files"] = {name: {} for name in own}
    marker.write_text(json.dumps(known))
    if KINDS[kind].listing and listing != marker:
        listing.write_text(json.dumps({"files": {name: {} for name in own}}))
    for name in own:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("written by adaptclip")
    extra(folder)


def other_kind(kind: str) -> str:
    """A kind with the same marker file where there is one, so that only its content tells them apart."""
    same = [k for k in KINDS if k != kind and KINDS[k].marker == KINDS[kind].marker]
    return (same or [k for k in KINDS if k != kind])[0]


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")


def someone_elses(kind: str, folder: Path) -> None:
    """A folder with a file of the marker's name and other content."""
    foreign(folder)
    (folder / KINDS[kind].marker).write_text('{"name": "my-app", "start_url": "/"}')


def marked_by_link(kind: str, folder: Path) -> None:
    plant(kind, folder.parent / "own")
    foreign(folder)
    (folder / KINDS[kind].marker).symlink_to(folder.parent / "own" / KINDS[kind].marker)


def link(path: Path, to: Path, make: Callable[[Path], object] | None = None) -> Path:
    if make is not None:
        make(to)
    path.symlink_to(to)
    return path


def inside(kind: str, read: Path) -> Path:
    plant(kind, read / "below")
    return read / "below"


FOLDERS: dict[str, tuple[Callable[..., Any], bool, str]] = {
    "a new path": (lambda kind, home, read: None, False, WRITTEN),
    "a new path below new folders": (lambda kind, home, read: home / "a" / "b" / "out", False, WRITTEN),
    "an empty folder": (lambda kind, home, read: (home / "out").mkdir(), False, WRITTEN),
    "its own kind": (lambda kind, home, read: plant(kind, home / "out"), False, "exists already"),
    "its own kind, overwrite": (lambda kind, home, read: plant(kind, home / "out"), True, WRITTEN),
    "its own kind with a file of one's own": (
        lambda kind, home, read: plant(kind, home / "out", extra=lambda out: (out / "thesis.txt").write_text("x")),
        True, r"did not write there and is not replaced: thesis\.txt\. Move",
    ),
    "its own kind with folders of one's own": (
        lambda kind, home, read: plant(kind, home / "out", extra=lambda out: foreign(out / "mine")),
        True, r"did not write there and is not replaced: mine/thesis\.txt\. Move",
    ),
    "its own kind with a link of one's own": (
        lambda kind, home, read: plant(kind, home / "out", extra=lambda out: link(out / "mine", home / "in")),
        True, r"did not write there and is not replaced: mine\. Move",
    ),
    "below an export": (
        lambda kind, home, read: plant("export", home / "done") or home / "done" / "out", False, "lie in an export",
    ),
    "below an index": (
        lambda kind, home, read: plant("index", home / "done") or home / "done" / "a" / "out", True, "lie in an index",
    ),
    "below a run": (
        lambda kind, home, read: plant("run", home / "done") or home / "done" / "out", True,
        r"would lie in a run folder \(.*done\); choose a place outside it, like .*/done-out$",
    ),
    "below a run's artifact": (
        lambda kind, home, read: plant("run", home / "done") or home / "done" / "artifact" / "out",
        True, "lie in a run folder",
    ),
    "another kind of ours": (lambda kind, home, read: plant(other_kind(kind), home / "out"), True, "is not an? "),
    "a foreign folder": (lambda kind, home, read: foreign(home / "out"), True, "never replaced"),
    "a foreign folder, no overwrite": (lambda kind, home, read: foreign(home / "out"), False, "exists already"),
    "a file of the marker's name": (lambda kind, home, read: someone_elses(kind, home / "out"), True, "never replaced"),
    "a marker that is a link": (lambda kind, home, read: marked_by_link(kind, home / "out"), True, "never replaced"),
    "the input": (lambda kind, home, read: plant(kind, read) or read, True, "is what is read"),
    "a folder in the input": (lambda kind, home, read: inside(kind, read), True, "lies in what is read"),
    "a new folder in the input": (lambda kind, home, read: read / "new", False, "lies in what is read"),
    "the parent of the input": (lambda kind, home, read: plant(kind, read.parent) or read.parent, True, "holds what"),
    "a file": (lambda kind, home, read: (home / "out").write_text("mine") and None, True, "is a file"),
    "a link to its own kind": (
        lambda kind, home, read: link(home / "out", home / "real", lambda to: plant(kind, to)), True, "is a link",
    ),
    "a link to an empty folder": (lambda kind, home, read: link(home / "out", home / "e", Path.mkdir), True, "a link"),
    "a link to a file": (lambda kind, home, read: link(home / "out", home / "thesis.txt"), True, "is a link"),
    "a link that leads nowhere": (lambda kind, home, read: link(home / "out", home / "gone"), True, "is a link"),
    "a link as its parent": (
        lambda kind, home, read: link(home / "to", home / "real", Path.mkdir) / "out", False, WRITTEN,
    ),
    "a link into the input as its parent": (
        lambda kind, home, read: link(home / "to", read) / "out", False, "lies in what is read",
    ),
    "below a file": (lambda kind, home, read: home / "thesis.txt" / "out", False, "cannot write"),
}  # fmt: skip
"""Target -> how it is made (returning where it lies, if not at `out`), whether --overwrite is given, what is said."""


@dataclass(frozen=True)
class World:
    """What all commands share: a small model, an artifact, images and predictions."""

    model: str
    backbone: Any
    saved: tuple[tuple[Any, ...], dict[str, Any]]
    template: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("world")
    backbone = make_tiny_backbone(folder=root / "tiny")
    home = root / "home"
    shutil.copytree(root / "tiny", home / "model" / "tiny")
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for i in range(4):
            (home / "in" / "photos" / name).mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / "in" / "photos" / name / f"{i}.png")
    caught: list[Any] = []
    digits = ac.open_data(ac.load_card("digits"), check=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_artifacts, "save_artifact", lambda *args, **kwargs: caught.append((args, kwargs)))
        made_artifacts.save(Path("unused"), "zero_shot", backbone, digits)
    (args, kwargs) = caught[0]
    kwargs.pop("overwrite", None)
    save_artifact(home / "run" / "artifact", *args[1:], **kwargs)
    labels = np.arange(40) % 2
    probs = np.where(labels[:, None] == np.arange(2), 0.9, 0.1).astype(np.float32)
    predictions = Predictions(
        tuple(map(str, range(40))), labels, probs, ("cat", "dog"), groups={"sex": tuple("fm" * 20)}
    )
    for name in ("run", "other"):
        predictions.save(home / name / "predictions.parquet")
        (home / name / "gates.yaml").write_text("gates:\n  - {metric: accuracy, at_least: 0.5}\n")
        (home / name / "report.json").write_text("{}")
    (home / "thesis.txt").write_text("years of work")
    return World(f"local-dir:{root / 'tiny'}", backbone, (args[1:], kwargs), home)


@pytest.fixture
def home(world, tmp_path) -> Path:
    """A copy of the world's files; files are hard links, which no command writes through."""
    shutil.copytree(world.template, tmp_path / "home", copy_function=os.link)
    return tmp_path / "home"


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything below a folder: kind, what a link leads to, and of files which file it is and what it holds."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.name.startswith("run.lock"):
            continue  # a lock stays in a run folder that somebody looked at
        if path.is_symlink():
            found[str(path)] = ("link", str(path.readlink()))
        elif path.is_dir():
            found[str(path)] = ("folder",)
        else:
            found[str(path)] = (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
    return found


def run_embed(world: World, home: Path, out: Path, *, overwrite: bool, cache: Path | None = None) -> None:
    cache = cache or home.parent / "cache"
    embed(str(home / "in" / "photos"), out=out, backbone=world.model, cache=cache, overwrite=overwrite)


def run_export(world: World, home: Path, out: Path, *, overwrite: bool) -> None:
    export(home / "run", to="classifier", out=out, overwrite=overwrite)


def run_save_artifact(world: World, home: Path, out: Path, *, overwrite: bool) -> None:
    args, kwargs = world.saved
    save_artifact(out, args[0], named(world, home), *args[2:], **kwargs, overwrite=overwrite)


def run_save_open_clip(world: World, home: Path, out: Path, *, overwrite: bool) -> None:
    save_open_clip(out, world.backbone.model.state_dict(), named(world, home), overwrite=overwrite)


def named(world: World, home: Path) -> Any:
    """The backbone as if it were loaded from the copy."""
    backbone = copy.copy(world.backbone)
    backbone.name = f"local-dir:{home / 'model' / 'tiny'}"
    return backbone


class ReachedError(Exception):
    """A recipe has got past what it checks first."""


def run_bench(world: World, home: Path, out: Path, *, overwrite: bool, cache: Path | None = None) -> None:
    recipe = load_recipe("few_shot")
    cache = cache or home.parent / "cache"
    cfg = recipe.Config(cards=(str(home / "in" / "photos"),), backbone=world.model, out=out, cache=cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "worker_rank", lambda threads: (_ for _ in ()).throw(ReachedError()))
        try:
            recipe.main(cfg)
        except ReachedError:
            plant("bench", out)


def run_start(world: World, home: Path, out: Path, *, overwrite: bool, cache: Path | None = None) -> None:
    photos = home / "in" / "photos"
    data = ac.open_data(ac.load_card(photos), check=False)
    cache = cache or home.parent / "cache"
    config = {"card": str(photos), "cache": cache, "data_root": None, "backbone": world.model}
    run = start_run(out, config=config, accelerator=make_accelerator(cpu=True), data=data, overwrite=overwrite)
    run.finish()


COMMANDS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "embed": ("index", "in/photos", run_embed),
    "export": ("export", "run/artifact", run_export),
    "save_artifact": ("artifact", "model/tiny", run_save_artifact),
    "save_open_clip": ("open_clip", "model/tiny", run_save_open_clip),
    "few_shot.py": ("bench", "in/photos", run_bench),
    "every other recipe": ("run", "in/photos", run_start),
}
"""Command -> kind of its folder, what it reads, how it is called."""

OTHERWISE = {
    # The bench goes on in its own folder without being asked, and removes nothing there.
    "few_shot.py": dict.fromkeys((name for name in FOLDERS if name.startswith("its own kind")), WRITTEN),
    "every other recipe": {
        "its own kind": "holds an earlier run",
        "a foreign folder": "holds files and is not a run folder",
        "a foreign folder, no overwrite": "holds files and is not a run folder",
        "a file of the marker's name": "no run's",
        "a marker that is a link": "holds files and is not a run folder",
    },
}
"""Command -> target -> what it says instead."""


@pytest.mark.parametrize("target", FOLDERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_folders(world, home, command, target):
    kind, read, call = COMMANDS[command]
    make, overwrite, expected = FOLDERS[target]
    expected = OTHERWISE.get(command, {}).get(target, expected)
    made = make(kind, home, home / read)
    out = made if isinstance(made, Path) else home / "out"
    before = snapshot(home)
    if expected == WRITTEN:
        call(world, home, out, overwrite=overwrite)
        assert KINDS[kind].made(out)
        own = str(out.resolve())
        after = {path: what for path, what in snapshot(home).items() if not f"{path}/".startswith(f"{own}/")}
        kept = {path: what for path, what in before.items() if not f"{path}/".startswith(f"{own}/")}
        new_folders = {str(p): ("folder",) for p in Path(own).parents if str(p) not in before and home in p.parents}
        assert after == kept | new_folders
    else:
        with pytest.raises(AdaptclipError, match=expected):
            call(world, home, out, overwrite=overwrite)
        assert snapshot(home) == before


def run_report(home: Path, out: Path) -> None:
    report(home / "run", out=out)


def run_compare(home: Path, out: Path) -> None:
    compare(home / "run", home / "other", group="sex", out=out)


def run_gate(home: Path, out: Path) -> None:
    gate([home / "run"], junit=out)


def run_card_new(home: Path, out: Path) -> None:
    new(home / "in" / "photos", out=out)


FILE_COMMANDS: dict[str, tuple[str, str, Callable[[Path, Path], None]]] = {
    "report": ("out.json", "run/report.json", run_report),
    "compare": ("out.md", "run/predictions.parquet", run_compare),
    "gate --junit": ("out.xml", "run/gates.yaml", run_gate),
    "card new": ("out.md", "in/photos/cat/0.png", run_card_new),
}
"""Command -> name of its output, a file that it reads, how it is called."""

FILES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a new path": (lambda out, home: None, WRITTEN),
    "a file": (lambda out, home: out.write_text("earlier"), WRITTEN),
    "a folder": (lambda out, home: out.mkdir(), "it is a folder"),
    "a link to a file": (lambda out, home: out.symlink_to(home / "thesis.txt"), "it is a link"),
    "a link to a folder": (lambda out, home: out.symlink_to(home / "in"), "it is a link"),
    "a link that leads nowhere": (lambda out, home: out.symlink_to(home / "gone"), "it is a link"),
    "a pipe": (lambda out, home: os.mkfifo(out), "a pipe or device"),
}
"""Target -> how it is made, what is said."""


@pytest.mark.parametrize("target", FILES)
@pytest.mark.parametrize("command", FILE_COMMANDS)
def test_files(home, command, target):
    name, _, call = FILE_COMMANDS[command]
    make, expected = FILES[target]
    if command == "card new" and target not in ("a new path", "a link that leads nowhere"):
        expected = "exists already"  # a card holds work of one's own: it is never replaced
    make(home / name, home)
    before = snapshot(home)
    if expected == WRITTEN:
        call(home, home / name)
        assert (home / name).read_text() not in ("", "earlier")
        # A run's ledger notes that it was judged, which is no output of the command.
        written = {str(home / "out.json"), str(home / name), str(home / "run" / "judgements.jsonl")}
        assert {path for path in snapshot(home) if path not in before} <= written
    else:
        with pytest.raises(AdaptclipError, match=expected):
            call(home, home / name)
        assert snapshot(home) == before


@pytest.mark.parametrize("command", FILE_COMMANDS)
def test_a_file_that_is_read_is_never_written(home, command):
    name, read, call = FILE_COMMANDS[command]
    out = home / read
    if out.suffix != Path(name).suffix:  # another ending would be refused, or put in its place
        out = home / read.replace(Path(read).suffix, Path(name).suffix)
        out.symlink_to(home / read)
    before = snapshot(home)
    with pytest.raises(AdaptclipError, match=r"itself what is read|it is a link|exists already"):
        call(home, out)
    assert snapshot(home) == before


def test_a_run_reports_beside_its_own_files_and_not_over_them(home):
    for name in ("report.json", "report"):
        with pytest.raises(StorageError, match=r"report\.json is itself what is read"):
            report(home / "run", out=home / "run" / name)
    report(home / "run", out=home / "run" / "mine.html")
    assert (home / "run" / "mine.html").is_file()


def test_a_probe_is_not_written_over_what_it_reads(home):
    before = snapshot(home)
    for out, message in (("run/artifact/manifest.json", "itself what is read"), ("in", "it is a folder")):
        with pytest.raises(StorageError, match=message):
            probe(home / "run", card="specimens", out=home / out)
    assert snapshot(home) == before


def run_predict(home: Path, out: Path) -> None:
    predict(home / "run", [home / "in" / "photos"], out=out)


def run_search(home: Path, out: Path) -> None:
    search(home / "done", "a cat", out=out)


def run_probe(home: Path, out: Path) -> None:
    probe(home / "run", card="specimens", out=out)


def run_recipes_copy(home: Path, out: Path) -> None:
    copy_recipes(["coop"], out=out.parent)


INTO: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    **{name: (out, call) for name, (out, _, call) in FILE_COMMANDS.items()},
    "predict": ("out.csv", run_predict),
    "search": ("out.jsonl", run_search),
    "probe": ("out.json", run_probe),
    "recipes copy": ("coop.py", run_recipes_copy),
}
"""Command -> name of its output, how it is called."""


COMPLETE = [(command, kind) for command in INTO for kind in KINDS if kind != "bench"]


@pytest.mark.parametrize("where", ["", "below"])
@pytest.mark.parametrize(("command", "kind"), COMPLETE)
def test_nothing_is_put_into_what_is_complete(home, monkeypatch, command, kind, where):
    name, call = INTO[command]
    plant(kind, home / "done")
    before = snapshot(home)
    monkeypatch.setattr("adaptclip.artifact.load", None)  # it is refused before a model is loaded
    with pytest.raises(StorageError, match=rf"would lie in {KINDS[kind].words} \(.*done\); choose a place outside it"):
        call(home, home / "done" / where / name)
    assert snapshot(home) == before


@pytest.mark.parametrize("command", ["export", "embed", "save_artifact", "save_open_clip", "every other recipe"])
def test_an_output_in_a_run_would_stop_its_overwriting_and_is_refused(world, home, command):
    """What any command may leave in a run is what `--overwrite` of the run may remove."""
    plant("run", home / "run")
    before = snapshot(home)
    for below in ("x", "artifact/x", "checkpoints/x"):
        with pytest.raises(AdaptclipError, match=r"lies in what is read|would lie in a run folder .* outside it, like"):
            COMMANDS[command][2](world, home, home / "run" / below, overwrite=True)
    assert snapshot(home) == before
    assert strangers(home / "run", "run") == []


PARTS = [
    *[("run", name, kind) for name, kind in KINDS["run"].parts.items()],
    ("run", "head/artifact", "artifact"), ("run", "head/head", "run"),
]  # fmt: skip


@pytest.mark.parametrize(("of", "name", "kind"), PARTS)
def test_a_part_of_a_run_is_written_into_it_and_nothing_else_under_its_name(home, of, name, kind):
    plant(of, home / "done")
    if "/" in name:
        plant("run", home / "done" / "head")
    assert check_folder(home / "done" / name, kind) is False
    for other in KINDS:
        if other != kind:
            with pytest.raises(StorageError, match="would lie in a run folder"):
                check_folder(home / "done" / name, other)


@pytest.mark.parametrize(
    ("command", "name"),
    [("report", "report.html"), ("report", "report.md"), ("gate --junit", "gates.xml"), ("compare", "compare.md")],
)
def test_what_judges_a_run_writes_into_it_what_is_replaced_with_it(home, command, name):
    plant("run", home / "run")
    (home / "run" / "report.json").unlink()
    (home / "run" / "report.json").write_text('{"method": "coop"}')
    for path in [home / "run" / name, home / "run" / f"mine{Path(name).suffix}", home / "run" / "more" / name]:
        before = snapshot(home)
        if path.name == name and path.parent.name == "run":
            INTO[command][1](home, path)
            assert path.is_file()
        else:
            with pytest.raises(StorageError, match=rf"would lie in a run folder .* like .*/run-{path.name}$"):
                INTO[command][1](home, path)
            assert snapshot(home) == before
    assert strangers(home / "run", "run") == []


def test_the_record_of_a_run_is_not_replaced_by_a_report_of_something_else(home):
    plant("run", home / "other")
    before = snapshot(home)
    with pytest.raises(StorageError, match=r"report\.json would lie in a run folder"):
        report(home / "run" / "predictions.parquet", out=home / "other" / "report.json")
    assert snapshot(home) == before


@pytest.mark.parametrize("where", ["", "cat", "of/mine"])
def test_no_table_is_put_among_images_that_are_read(home, monkeypatch, where):
    """There it would be taken for a table of the images when they are read next."""
    photos = home / "in" / "photos"
    before = snapshot(home)
    monkeypatch.setattr("adaptclip.artifact.load", None)
    calls = [
        lambda: run_predict(home, photos / where / "metadata.csv"),
        lambda: report(home / "run", images=photos, out=photos / where / "report.json"),
        lambda: probe(home / "run", card=str(photos), out=photos / where / "probe.json"),
    ]
    for call in calls:
        with pytest.raises(StorageError, match=r"lies among the images that are read \(.*photos\); choose a place out"):
            call()
    assert snapshot(home) == before


CACHES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "beside the images": (lambda home: home / "in" / "cache", WRITTEN),
    "a link to another place": (lambda home: link(home / "in" / "cache", home / "room", Path.mkdir), WRITTEN),
    "hidden among the images": (lambda home: home / "in" / "photos" / ".cache" / "features", WRITTEN),
    "the images' own folder": (lambda home: home / "in" / "photos", "is what is read"),
    "among the images": (lambda home: home / "in" / "photos" / "cache", "lies in what is read"),
    "in a class": (lambda home: home / "in" / "photos" / "cat" / "features", "lies in what is read"),
    "a link among the images": (lambda home: link(home / "c", home / "in" / "photos" / "cat"), "lies in what is read"),
    "around the images": (lambda home: home / "in", "holds what is read"),
    "in an artifact": (lambda home: home / "run" / "artifact" / "cache", "would lie in an artifact"),
    "in an artifact, hidden": (lambda home: home / "run" / "artifact" / ".cache", "would lie in an artifact"),
    "in a run": (lambda home: plant("run", home / "done") or home / "done" / "cache", "would lie in a run folder"),
    "where a link leads in circles": (lambda home: link(home / "c", home / "c"), "cannot write the cache|is a link"),
}
"""Place of --cache -> where that is, what is said."""


@pytest.mark.parametrize("place", CACHES)
@pytest.mark.parametrize("command", ["embed", "few_shot.py", "every other recipe"])
def test_caches(world, home, command, place):
    make, expected = CACHES[place]
    _, _, call = COMMANDS[command]
    cache = make(home)
    before, known = snapshot(home), ac.load_card(home / "in" / "photos").source
    if expected == WRITTEN:
        call(world, home, home / "out", overwrite=False, cache=cache)
        assert ac.load_card(home / "in" / "photos").source == known
        assert [path.suffix for path in list_images(home / "in" / "photos").images] == [".png"] * 8
    else:
        with pytest.raises(StorageError, match=expected):
            call(world, home, home / "out", overwrite=False, cache=cache)
        assert snapshot(home) == before


def test_the_cache_of_a_probe_keeps_clear_of_the_model(home):
    with pytest.raises(StorageError, match=r"the cache cannot be there: .* lies in what is read"):
        probe(home / "run", card="specimens", cache=home / "run" / "cache")


def test_a_run_that_goes_on_does_not_lose_what_was_put_into_its_artifact(home, world):
    out = home / "out"
    run_start(world, home, out, overwrite=False)
    shutil.copytree(home / "run" / "artifact", out / "artifact")
    (out / "notes.txt").write_text("beside the run's own files, where it stays")
    photos = home / "in" / "photos"
    config = {"card": str(photos), "cache": home.parent / "cache", "data_root": None, "backbone": world.model}
    go_on: dict[str, Any] = {"config": config, "accelerator": make_accelerator(cpu=True), "resume": True}
    go_on["data"] = ac.open_data(ac.load_card(photos), check=False)
    start_run(out, **go_on).finish()
    (out / "artifact" / "notes.txt").write_text("mine")
    before = snapshot(out)
    with pytest.raises(StorageError, match=r"did not write there and is not replaced: artifact/notes\.txt\. Move"):
        start_run(out, **go_on)
    assert snapshot(out) == before


@pytest.mark.parametrize("name", [".DS_Store", "._report.html", "Thumbs.db", "__pycache__/read_image.cpython-311.pyc"])
def test_what_systems_leave_behind_is_nobodys_work(tmp_path, name):
    plant("export", tmp_path / "out", "weights.safetensors", "text_encoder/config.json")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).touch()
    assert strangers(tmp_path / "out", "export") == []
    (tmp_path / "out" / "text_encoder" / "model.safetensors").touch()
    (tmp_path / "out" / ".git").mkdir()
    (tmp_path / "out" / ".git" / "HEAD").touch()
    assert strangers(tmp_path / "out", "export") == [".git/HEAD", "text_encoder/model.safetensors"]


RECIPES = {
    "a new path": (lambda home: None, WRITTEN),
    "an empty folder": (lambda home: (home / "out").mkdir(), WRITTEN),
    "a folder of one's own recipes": (lambda home: foreign(home / "out"), WRITTEN),
    "a recipe that was changed": (
        lambda home: (foreign(home / "out"), (home / "out/coop.py").write_text("x")), "differs",
    ),
    "a recipe that is a link": (
        lambda home: (foreign(home / "out"), (home / "out/coop.py").symlink_to(home / "thesis.txt")), "it is a link",
    ),
    "a recipe that is a folder": (lambda home: (home / "out" / "coop.py").mkdir(parents=True), "it is a folder"),
    "a file": (lambda home: (home / "out").write_text("mine"), "cannot write|Not a directory|is a file"),
    "a link to a folder": (lambda home: (home / "out").symlink_to(home / "in"), "is a link"),
    "a link that leads nowhere": (lambda home: (home / "out").symlink_to(home / "gone"), "is a link"),
}  # fmt: skip


@pytest.mark.parametrize("target", RECIPES)
def test_recipes_copy(home, target):
    make, expected = RECIPES[target]
    make(home)
    before = snapshot(home)
    if expected == WRITTEN:
        copy_recipes(["coop"], out=home / "out")
        assert (home / "out" / "coop.py").read_bytes() == (recipes_folder() / "coop.py").read_bytes()
        assert before.items() <= snapshot(home).items()
    else:
        with pytest.raises(AdaptclipError, match=expected):
            copy_recipes(["coop"], out=home / "out", overwrite="differs" not in expected)
        assert snapshot(home) == before


def test_recipes_are_not_copied_over_themselves():
    with pytest.raises(StorageError, match="what is read"):
        copy_recipes([], out=recipes_folder(), overwrite=True)


def test_somebody_elses_run_json_gets_no_lock(home, world):
    someone_elses("run", home / "out")
    with pytest.raises(AdaptclipError, match="no run's"):
        run_start(world, home, home / "out", overwrite=True)
    assert sorted(p.name for p in (home / "out").iterdir()) == ["run.json", "thesis.txt"]


@pytest.mark.parametrize("key", ["cache", "data_root", "backbone", "pretrained", "zero_shot_card"])
def test_a_run_keeps_clear_of_all_that_it_reads(home, key):
    plant("run", home / "out")
    shutil.copytree(home / "in" / "photos", home / "out" / "photos")
    (home / "out" / "weights.safetensors").touch()
    value = {"backbone": f"local-dir:{home / 'out'}", "pretrained": str(home / "out" / "weights.safetensors")}
    config = {key: value.get(key, str(home / "out" / "photos"))}
    before = snapshot(home)
    with pytest.raises(StorageError, match=r"is what is read|holds what is read"):
        start_run(home / "out", config=config, accelerator=make_accelerator(cpu=True), overwrite=True)
    assert snapshot(home) == before


def test_a_cache_is_neither_wiped_nor_mistaken_for_a_file(home, world):
    plant("index", home / "out")
    (home / "out" / "cache").mkdir()
    with pytest.raises(StorageError, match=r"holds what is read \(.*cache\)"):
        embed(str(home / "in/photos"), out=home / "out", backbone=world.model, cache=home / "out/cache", overwrite=True)
    with pytest.raises(StorageError, match="is a file"):
        ac.FeatureCache(home / "thesis.txt")


@pytest.mark.parametrize("spelling", ["in/../out", "./out", "to_home/out", "in/photos/../../out"])
def test_every_spelling_of_a_path_is_the_same_folder(tmp_path, monkeypatch, spelling):
    (tmp_path / "in" / "photos").mkdir(parents=True)
    (tmp_path / "to_home").symlink_to(tmp_path)
    plant("index", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="is what is read"):
        check_folder(Path(spelling), "index", overwrite=True, inputs=[tmp_path / "out"])
    with pytest.raises(StorageError, match="is what is read"):
        check_folder(tmp_path / "out", "index", overwrite=True, inputs=[Path(spelling)])
    assert check_folder(Path(spelling), "index", overwrite=True, inputs=[tmp_path / "in"])


def test_the_folder_where_one_is_can_be_written(tmp_path, monkeypatch):
    plant("index", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    with atomic_folder(Path(), "index", overwrite=True) as new_folder:
        (new_folder / "new").touch()
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("kill", ["before the first rename", "between the renames", "after the second"])
def test_a_kill_leaves_the_old_or_the_new_folder_whole(tmp_path, kill):
    """A process of its own is killed; what it leaves is the old or the new, and the next call finds it in its place."""
    out = tmp_path / "out"
    plant("index", out, "old")
    pid = os.fork()
    if pid == 0:
        renames = {"before the first rename": 0, "between the renames": 1, "after the second": 2}[kill]
        rename, done = Path.rename, [0]

        def counted(self: Path, target: Path) -> Path:
            if done[0] == renames:
                os._exit(9)
            done[0] += 1
            return rename(self, target)

        Path.rename = counted  # type: ignore[method-assign]
        shutil.rmtree = lambda *args, **kwargs: os._exit(9)  # type: ignore[assignment]
        with atomic_folder(out, "index", overwrite=True) as folder:
            plant("index", folder, "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with pytest.raises(StorageError, match="exists already"), atomic_folder(out, "index"):
        raise AssertionError("never reached")
    assert {p.name for p in out.iterdir()} == {"manifest.json", "new" if kill == "after the second" else "old"}


def test_what_came_while_the_folder_was_written_is_not_replaced(tmp_path):
    with pytest.raises(StorageError, match="never replaced"), atomic_folder(tmp_path / "out", "index", overwrite=True):
        foreign(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_the_umask_is_followed(tmp_path, mask):
    before = os.umask(mask)
    try:
        FewShotSplit("c", "d", 1, 1, 0, "nested", (), (), {}).save(tmp_path / "split.json")
        with atomic_folder(tmp_path / "out", "index") as folder:
            (folder / "file").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "split.json").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "split.json"]


def test_without_special_rights(as_somebody):
    write = FewShotSplit("c", "d", 1, 1, 0, "nested", (), (), {}).save
    write(as_somebody / "mine.json")
    with atomic_folder(as_somebody / "out", "index") as folder:
        plant("index", folder)
    (as_somebody / "locked").mkdir()
    (as_somebody / "locked" / "kept.json").write_text("kept")
    plant("index", as_somebody / "locked" / "index")
    (as_somebody / "locked").chmod(0o555)
    for name in ("new.json", "kept.json"):
        with pytest.raises(StorageError, match=rf"cannot write .*{name}: .*Permission denied"):
            write(as_somebody / "locked" / name)
    for name, overwrite in (("new", False), ("index", True)):
        with (
            pytest.raises(StorageError, match=r"cannot write .*Permission denied"),
            atomic_folder(as_somebody / "locked" / name, "index", overwrite=overwrite),
        ):
            raise AssertionError("never reached")
    assert sorted(p.name for p in (as_somebody / "locked").iterdir()) == ["index", "kept.json"]
    assert (as_somebody / "locked" / "kept.json").read_text() == "kept"
    (as_somebody / "locked").chmod(0o000)
    with pytest.raises(StorageError, match="Permission denied"), atomic_folder(as_somebody / "locked" / "new", "index"):
        raise AssertionError("never reached")
    (as_somebody / "locked").chmod(0o755)
