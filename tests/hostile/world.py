# SPDX-License-Identifier: Apache-2.0
"""One small world, made once per session: images, tables, cards, a model, two runs, and all that is made from a run.

The second run differs in its seed and in its data's order of classes, so that each of its files is valid and wrong in
the place of the first's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from recipe_files import load_recipe
from tiny_clip import write_tiny_checkpoint

import adaptclip as ac
from adaptclip.artifact import save_artifact
from adaptclip.artifact.export import export_artifact
from adaptclip.data.sources import open_data
from adaptclip.gates import check_gates, load_gates
from adaptclip.methods.lora import LoRA
from adaptclip.predictions import Predictions
from adaptclip.reports.full import build_report
from adaptclip.retrieval import build_index, load_encoder
from adaptclip.training.thresholds import Thresholds

NAMES = ("red", "green", "blue")
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
KILLED_AFTER = 14

GATES = """\
gates:
- {metric: accuracy, at_least: 0.15, min_n: 20}
- metric: accuracy
  group: site
  at_least: 0.01
  min_n: 10
"""

CARD = """\
---
license: cc0-1.0
pretty_name: Colours
adaptclip:
  source: {kind: SOURCE, files: "FILES"}
  splits: {column: part, train: train, test: test}
  columns:
    image: image
    label: label
    cluster: patient
    groups: {site: site}
  class_names: [red, green, blue]
  aliases: {red: crimson}
  templates:
    - "a photo of {}."
  augmentation: {scale: [0.5, 1.0], horizontal_flip: false}
  allow: [similar_images]
  gates:
    - {metric: accuracy, at_least: 0.15, min_n: 20}
    - metric: accuracy
      group: site
      at_least: 0.01
      min_n: 10
---
Squares of three colours, drawn by a test.
"""


def _draw_images(folder: Path) -> list[dict[str, str]]:
    """Writes 54 images and returns their rows."""
    draw, rows = np.random.default_rng(0), []
    for part, count in (("train", 6), ("test", 12)):
        for name in NAMES:
            (folder / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(COLOURS[name] + draw.integers(-90, 90, (24, 24, 3)), 0, 255).astype(np.uint8)
                file = f"images/{part}/{name}/{i}.png"
                Image.fromarray(pixels).save(folder / file)
                patient = f"{part}-{name}-{i // 2}"
                rows.append({"image": file, "label": name, "part": part, "site": "AB"[i % 2], "patient": patient})
    return rows


def write_tables(folder: Path, rows: list[dict[str, str]], *, source: Path) -> None:
    """Writes the rows as CSV, JSON lines and Parquet, with a card for each."""
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [{**row, "image": {"bytes": (source / row["image"]).read_bytes(), "path": None}} for row in rows]
    pq.write_table(pa.Table.from_pylist(cells), folder / "images.parquet")
    for suffix, kind in (("csv", "manifest"), ("jsonl", "manifest"), ("parquet", "parquet")):
        text = CARD.replace("SOURCE", kind).replace("FILES", f"images.{suffix}")
        (folder / f"{suffix}.md").write_text(text)


@dataclass
class World:
    """Folders of valid files; nobody writes to them after `make_world`.

    Attributes:
        root: holds all.
        scratch: a copy of the first run's folder beside it, for caches and data that reading may write to.
        recipe: recipes/coop.py.
        model: name of the tiny checkpoint.
    """

    root: Path
    recipe: Any
    model: str

    @property
    def scratch(self) -> Path:
        return self.root.with_name("scratch")

    def config(self, name: str, **changes: Any) -> Any:
        """Settings of a short CoOp run that writes to `name` below the root."""
        return self.recipe.Config(
            card=str(self.root / name / "data" / "csv.md"), backbone=self.model, shots=2, epochs=8, views=1, n_ctx=2,
            batch_size=2, save_every=1, cache=self.root / name / "features", out=self.root / name / "run", **changes,
        )  # fmt: skip


@contextmanager
def fresh_process() -> Iterator[None]:
    """What a command or recipe finds when it starts in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _killed(steps: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    def train_steps(*args: Any, **settings: Any) -> Iterator[Any]:
        for step, batch in steps(*args, **settings):
            yield step, batch
            if step == KILLED_AFTER:
                raise KeyboardInterrupt

    return train_steps


def make_world(root: Path, patch: pytest.MonkeyPatch) -> World:
    """Makes everything twice: `root/one` is what gets damaged, `root/two` holds the same files of another run."""
    model = write_tiny_checkpoint(root / "model", context_length=32, width=32, embed_dim=16)
    world = World(root, load_recipe("coop"), f"local-dir:{model}")
    rows = _draw_images(root)
    for name in ("one", "two"):
        seed = seed_of(name)
        patch.setenv("ADAPTCLIP_CACHE", str(root / name / "kept"))
        (root / name / "data").mkdir(parents=True)
        shutil.copytree(root / "images", root / name / "data" / "images")
        write_tables(root / name / "data", rows[:: 1 if seed == 1 else -1], source=root)
        _make_runs(world, name, seed, patch)
        _make_from_run(world, name)
        _make_bench(world, name, seed)
    return world


def _make_runs(world: World, name: str, seed: int, patch: pytest.MonkeyPatch) -> None:
    """A finished run, and one that was killed half way."""
    with fresh_process():
        assert world.recipe.main(world.config(name, seed=seed)) in (0, 2, 3)
    killed = replace(world.config(name, seed=seed), out=world.root / name / "killed")
    with fresh_process(), patch.context() as during:
        during.setattr(ac, "train_steps", _killed(ac.train_steps))
        with pytest.raises(KeyboardInterrupt):
            world.recipe.main(killed)


def seed_of(name: str) -> int:
    """Seed of what is made at random for a run of the world."""
    return {"one": 1, "two": 2}[name]


def _make_from_run(world: World, name: str) -> None:
    """Artifacts of other kinds, an index, exports, a bundle, and predictions of some model."""
    folder = world.root / name
    run, out = folder / "run", folder
    backbone = ac.load_backbone(world.model)
    data = open_data(ac.load_card(folder / "data" / "csv.md"))
    judged = Predictions.load(run / "predictions.parquet")
    (folder / "gates.yaml").write_text(GATES)
    verdicts = check_gates(judged, None, load_gates(folder / "gates.yaml"))
    info: dict[str, Any] = {"report": build_report(judged), "verdicts": verdicts}
    torch.manual_seed(seed_of(name))
    sigmoid = ac.LinearProbe(backbone, data.prompt_names, head="clap", objective="sigmoid")
    lora = LoRA(backbone, data.prompt_names, rank=2)
    with torch.no_grad():
        for parameter in [*sigmoid.trainable_parameters(), *lora.trainable_parameters()]:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    values = Thresholds("f1", np.array([0.2, 0.3, 0.4]), 9, np.array([3, 3, 3]), ("red",))
    save_artifact(out / "sigmoid", sigmoid, backbone, data, None, method="linear_probe", thresholds=values, **info)
    save_artifact(out / "lora", lora.eval(), backbone, data, None, method="lora", **info)
    encoder, named = load_encoder(backbone=world.model)
    ac.FeatureCache(out / "cache").get(backbone, data.test)
    build_index(out / "index", encoder, named, [data.test], cache=ac.FeatureCache(folder / "features"))
    export_artifact(run, "classifier", out / "classifier", allow_failed_gates=True)
    export_artifact(out / "lora", "open_clip", out / "open_clip", allow_failed_gates=True)
    write_tiny_checkpoint(out / "bundle", context_length=32, width=32, embed_dim=16, seed=0 if name == "one" else 1)
    head = ["id", "label", "site", *(f"prob_{c}" for c in NAMES)]
    lines = [",".join(head)]
    for i in range(len(judged)):
        cells = [str(judged.ids[i]), NAMES[judged.labels[i]], judged.groups["site"][i]]
        lines.append(",".join([*cells, *(f"{value:.6f}" for value in judged.probs[i])]))
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")


def _make_bench(world: World, name: str, seed: int) -> None:
    few_shot = load_recipe("few_shot")
    with fresh_process():
        few_shot.main(
            few_shot.Config(
                cards=(str(world.root / name / "data" / "csv.md"),), backbone=world.model, methods=("zero-shot", "gda"),
                shots=(1, 2), seeds=(seed,), cache=world.root / name / "features", out=world.root / name / "bench",
            )
        )  # fmt: skip
