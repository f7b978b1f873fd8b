# SPDX-License-Identifier: Apache-2.0
"""Every kind of file that is read back: how it is read, what counts as its answer, and what is done to it.

A `Kind` reads a whole folder and returns everything a user would act on: probabilities, labels, scores, verdicts, class
names. Files that the project wrote itself (`ours`) either give exactly the answer of the undamaged ones, or an error.
What a person writes (cards, tables, gates, settings) is its own truth, and another letter is another truth: there only
damage is done after which no honest reading is left (`must_refuse`), or after which the reading must stay what it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import mutations as m
from hostile.mutations import BYTES, ENTRY, STRUCTURE, TEXT, VALUES, Mutation
from hostile.world import NAMES, World, fresh_process
from PIL import Image

import adaptclip as ac
from adaptclip.artifact.export import FORMATS
from adaptclip.artifact.export.stock import CHECK
from adaptclip.bench.jobs import JobStore
from adaptclip.cli import main
from adaptclip.data.shots import FewShotSplit
from adaptclip.data.sources import open_data
from adaptclip.entrypoint import parse
from adaptclip.errors import AdaptclipError

Answer = Any


class CommandError(AdaptclipError):
    """A command left with code 1 and one message on standard error."""


def command(*arguments: object) -> dict[str, Any]:
    """Runs the public command line in this process; returns its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    if stop.value.code == 1:
        said = err.getvalue()
        assert "\nerror: " in said, said
        assert "Traceback" not in said, said
        raise CommandError(said.partition("\nerror: ")[2])
    return {"code": stop.value.code, "printed": out.getvalue()}


@dataclass(frozen=True)
class Kind:
    """One kind of folder with files that are read back.

    Attributes:
        name: as the table of counts calls it.
        folder: the original, relative to a run of the world.
        files: glob of a file -> what is done to it.
        read: folder -> answer.
        ours: written by the project, never by hand.
        must_refuse: mutations after which no honest reading is left.
        called: what an error may call the file, beside its name and its folder.
    """

    name: str
    folder: str
    files: dict[str, tuple[Mutation, ...]]
    read: Callable[[World, Path], Answer]
    ours: bool = True
    must_refuse: tuple[Mutation, ...] = ()
    called: tuple[str, ...] = ()


def _pictures(world: World) -> list[Image.Image]:
    names = ("red/0", "green/3", "blue/5")
    return [Image.open(world.root / "images" / "test" / f"{name}.png").convert("RGB") for name in names]


def read_artifact(world: World, folder: Path) -> Answer:
    """What a loaded artifact says of three images, and of itself."""
    model = ac.load(folder, allow_failed_gates=False)
    found = [asdict(p) for p in model.predict(_pictures(world))]
    manifest = {key: model.manifest[key] for key in ("class_names", "prompt_names", "settings", "verdicts", "method")}
    return {"predictions": found, "manifest": manifest, "window": model.manifest.get("window")}


def read_gate(world: World, folder: Path) -> Answer:
    """Verdicts, numbers and exit code of `adaptclip gate` on a run folder."""
    return command("gate", folder)


def read_report(world: World, folder: Path) -> Answer:
    """What `adaptclip report` writes of a run folder."""
    info = command("report", folder, "--out", folder.parent / "written.json")
    return info, json.loads((folder.parent / "written.json").read_text())


def read_resumed(world: World, folder: Path) -> Answer:
    """Where a killed run ends when it is gone on with: its log, its weights and what they predict."""
    info: dict[str, Any] = {}

    def finish_run(out: Path, adapter: Any, *args: Any, predictions: Any, **settings: Any) -> int:
        info["weights"] = {name: t.tolist() for name, t in adapter.adapter_state().items()}
        info["probabilities"] = (predictions.class_names, predictions.ids, predictions.probs.tolist())
        return 0

    settings = replace(world.config("one", seed=1), out=folder, resume=True, cache=world.scratch / "features")
    with fresh_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ac, "finish_run", finish_run)
        assert world.recipe.main(settings) == 0
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    info["log"] = [(line["step"], line["loss"], line["lr"]) for line in log]
    return info, FewShotSplit.load(folder / "split.json").digest


def read_log(world: World, folder: Path) -> Answer:
    """The same but the log: what can be read of it is used, what cannot is said, and the weights are what they were.

    It has no digest, so that a changed digit in it is not seen; a killed run may leave its last line without an end.
    """
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if stat.S_ISREG(log.stat().st_mode) else []
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("adaptclip").addHandler(handler)
    try:
        info, split = read_resumed(world, folder)
    finally:
        logging.getLogger("adaptclip").removeHandler(handler)
    steps = [step for step, *_ in info.pop("log")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 24
    assert all(map(_is_json, lines)) or "lines cannot be read" in said.getvalue(), "a line was lost silently"
    return info, split


def _is_json(line: bytes) -> bool:
    try:
        return "step" in json.loads(line.decode("utf-8-sig"))
    except ValueError:
        return False


def read_features(world: World, folder: Path) -> Answer:
    """Features of the test images, out of a cache."""
    data = open_data(ac.load_card(world.scratch / "data" / "csv.md"))
    found = ac.FeatureCache(folder).get(ac.load_backbone(world.model), data.test)
    return found.values.tolist()


def read_fingerprints(world: World, folder: Path) -> Answer:
    """Which images are equal or look alike, with kept digests of images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTCLIP_CACHE", str(folder))
        return _data(world.root / "one" / "data" / "csv.md")  # whose digests are kept in `folder`


def read_index(world: World, folder: Path) -> Answer:
    return command("search", folder, "a photo of a crimson", "--format", "jsonl", "--top-k", 40)


def read_bundle(world: World, folder: Path) -> Answer:
    """What an artifact predicts on the model that it was trained on: other weights must not pass for them."""
    model = ac.load(world.root / "one" / "run", backbone=f"local-dir:{folder}", allow_failed_gates=True)
    return [asdict(p) for p in model.predict(_pictures(world))]


def read_bundle_alone(world: World, folder: Path) -> Answer:
    """Features by the model of an exported open_clip folder."""
    model = ac.load_backbone(f"local-dir:{folder}")
    pixels = torch.stack([model.transform(picture) for picture in _pictures(world)])
    return model.encode_image(pixels).tolist(), model.transform_spec, model.encode_text(model.tokenizer(NAMES)).tolist()


def read_classifier(world: World, folder: Path) -> Answer:
    """What the example in the README of an exported classifier does: no adaptclip, so any error of Python will do."""
    try:
        exec(compile(CHECK, "README.md", "exec"), {"folder": folder, "json": json, "hashlib": hashlib})
    except (SystemExit, Exception) as error:
        raise AdaptclipError(f"the example ends for {folder}: {error!r}") from error
    names = json.loads((folder / "classes.json").read_text())["class_names"]
    return names, FORMATS["classifier"].read(folder)(_pictures(world)).logits.tolist()


def _data(card: Path) -> Answer:
    data = open_data(ac.load_card(card))
    info: dict[str, Any] = {"classes": data.class_names, "prompts": data.prompt_names, "notes": data.notes}
    for name, images in data.parts.items():
        info[name] = (images.ids, images.labels.tolist(), images.groups, images.clusters)
    return info, [gate.model_dump() for gate in data.card.gates], data.card.templates, data.card.augmentation


def read_card(name: str) -> Callable[[World, Path], Answer]:
    """The images that a card describes, and how it judges them."""
    return lambda world, folder: _data(folder / name)


def read_predictions(world: World, folder: Path) -> Answer:
    """Verdicts on the predictions of some model in a table."""
    return command("gate", folder / "predictions.csv", "--gates", folder / "gates.yaml")


def read_config(world: World, folder: Path) -> Answer:
    return parse(world.recipe.Config, ["--config", str(folder / "config.yaml")])


def read_bench(world: World, folder: Path) -> Answer:
    """Results of a bench; a job without one is done again, which gives the same."""
    board, known = JobStore(folder / "jobs", "another launch"), JobStore(world.root / "one" / "bench" / "jobs", "x")
    keys = sorted(path.stem for path in (world.root / "one" / "bench" / "jobs").glob("*.json"))
    assert len(keys) == 4
    return [board.result(key) or known.result(key) for key in keys]


_JSON = (*BYTES, *ENTRY, *TEXT, *VALUES, *STRUCTURE)
_BINARY = (m.flip_early, m.flip_anywhere, *BYTES, *ENTRY, m.other_run)
_YAML = (*ENTRY, *TEXT, *STRUCTURE, m.alias_bomb, m.empty, m.missing)
_BY_HAND = tuple(change for change in _YAML if change is not m.drop_key)  # what is left out has a default
_BROKEN = (
    m.duplicate_key, m.not_an_object, m.deep, m.alias_bomb, m.empty, m.missing, m.directory, m.link_to_secret,
    m.dangling_link, m.link_to_itself, m.fifo, m.utf16, m.nul_bytes,
)  # fmt: skip
_CSV = (
    *ENTRY, *TEXT, m.empty, m.missing, m.column_twice, m.column_twice, m.columns_moved, m.index_column, m.cell_missing,
    m.cell_more, m.header_missing, m.open_quote, m.latin1,
)  # fmt: skip
_CSV_BROKEN = (
    m.empty, m.missing, m.directory, m.link_to_secret, m.dangling_link, m.link_to_itself, m.fifo, m.nul_bytes,
    m.deep_line, m.column_twice, m.cell_missing, m.cell_more, m.header_missing, m.open_quote, m.latin1,
)  # fmt: skip

_GONE = (m.empty, m.missing, m.dangling_link, m.link_to_itself)
_LOG = (*(change for change in (*BYTES, *ENTRY) if change not in _GONE), *TEXT, m.other_run)
"""Whether a log that is not there has ever been, nobody can know."""

KINDS: tuple[Kind, ...] = (
    Kind("artifact", "run/artifact", {"manifest.json": (*_JSON, m.other_run, m.boolean), "adapter.safetensors": _BINARY,
         "README.md": (m.flip_anywhere, *ENTRY, m.missing)}, read_artifact),
    Kind("artifact, sigmoid", "sigmoid", {"manifest.json": (*VALUES, *VALUES, *STRUCTURE)}, read_artifact),
    Kind("artifact, LoRA", "lora", {"manifest.json": (*VALUES, m.other_run), "adapter_config.json": _JSON,
         "adapter_model.safetensors": _BINARY}, read_artifact),
    Kind("run, gated", "run", {"predictions.parquet": _BINARY, "zero_shot_predictions.parquet": _BINARY,
         "gates.yaml": (*BYTES, *_YAML, m.number), "report.json": (*BYTES, *ENTRY)}, read_gate),
    Kind("run, reported", "run", {"report.json": _JSON, "validation_predictions.parquet": _BINARY}, read_report),
    Kind("run, resumed", "killed", {"run.json": _JSON,
         "split.json": (*_JSON, m.other_run), "config.yaml": (*BYTES, *ENTRY),
         "checkpoints/*.safetensors": (*_BINARY, *BYTES)}, read_resumed),
    Kind("run, its log", "killed", {"metrics.jsonl": _LOG}, read_log),
    Kind("feature cache", "cache", {"*/key.json": (*BYTES, *ENTRY, m.not_an_object),
         "*/*.safetensors": (*_BINARY, *BYTES, *BYTES)}, read_features),
    Kind("fingerprint cache", "kept", {"fingerprints/bytes-*.parquet": (*_BINARY, *BYTES),
         "fingerprints/pictures-*.parquet": (*_BINARY, *BYTES)}, read_fingerprints),
    Kind("index", "index", {"manifest.json": _JSON, "names.json": (*BYTES, *VALUES, *STRUCTURE, m.other_run),
         "vectors.safetensors": _BINARY}, read_index),
    Kind("export, classifier", "classifier", {
         "classifier.safetensors": (*BYTES, m.other_run), "classes.json": (*VALUES, *STRUCTURE, m.cut, m.missing),
         "open_clip_model.safetensors": BYTES, "open_clip_config.json": (*VALUES, *STRUCTURE),
         "check.json": (m.letter, m.drop_key, m.not_an_object)}, read_classifier),
    Kind("export, open_clip", "open_clip", {
         "open_clip_model.safetensors": (*BYTES, *ENTRY, m.other_run), "open_clip_config.json": _JSON,
         "check.json": _JSON, "classes.json": (m.fifo, m.link_to_secret, m.letter)}, read_bundle_alone),
    Kind("open_clip bundle", "../model", {"open_clip_config.json": _JSON,
         "open_clip_model.safetensors": (*BYTES, *ENTRY)}, read_bundle),
    Kind("bench store", "bench", {"jobs/*.json": (*_JSON, m.other_run)}, read_bench),
    Kind("card", "data", {"csv.md": _BY_HAND}, read_card("csv.md"), ours=False, must_refuse=_BROKEN),
    Kind("gates file", ".", {"gates.yaml": _BY_HAND}, read_predictions, ours=False, must_refuse=_BROKEN),
    Kind("settings file", "run", {"config.yaml": _BY_HAND}, read_config, ours=False, must_refuse=_BROKEN,
         called=("save_every", "lr", "memory_gib", "batch_size", "epochs", "views")),
    Kind("table, CSV", "data", {"images.csv": _CSV}, read_card("csv.md"), ours=False, must_refuse=_CSV_BROKEN,
         called=("card csv",)),
    Kind("table, JSON lines", "data", {"images.jsonl": (m.cut, m.deep_line, *ENTRY, *TEXT, m.empty, m.missing)},
         read_card("jsonl.md"), ours=False, must_refuse=_CSV_BROKEN,
         called=("card jsonl",)),
    Kind("table, Parquet", "data", {"images.parquet": (m.cut, m.extend, m.empty, m.missing, m.nul_tail, *ENTRY)},
         read_card("parquet.md"), ours=False, must_refuse=_CSV_BROKEN,
         called=("card parquet",)),
    Kind("predictions, CSV", ".", {"predictions.csv": _CSV}, read_predictions, ours=False, must_refuse=_CSV_BROKEN),
)  # fmt: skip


def cases() -> Iterator[tuple[Kind, str, Mutation, int]]:
    """Every (kind, file, mutation, seed); a mutation that stands twice in a list is drawn twice."""
    for kind in KINDS:
        for file, listed in kind.files.items():
            seen: dict[str, int] = {}
            for mutation in listed:
                seed = seen[mutation.__name__] = seen.get(mutation.__name__, 0) + 1
                yield kind, file, mutation, seed


def quick(world: World, patch: pytest.MonkeyPatch) -> None:
    """Loads the undamaged model once for all: it is never what is damaged, except where another folder is named."""
    import adaptclip.artifact
    import adaptclip.retrieval.encoding

    loaded: dict[tuple[Any, ...], Any] = {}
    real = ac.load_backbone

    def load_backbone(name: str = "starter", pretrained: str | None = None, **settings: Any) -> Any:
        if name != world.model or pretrained is not None:
            return real(name, pretrained, **settings)
        key = tuple(sorted((k, str(v)) for k, v in settings.items()))
        if key not in loaded:
            loaded[key] = real(name, **settings)
        return loaded[key]

    for place in (ac, adaptclip.artifact, adaptclip.retrieval.encoding):
        patch.setattr(place, "load_backbone", load_backbone)
    torch.set_num_threads(1)
