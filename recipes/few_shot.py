# SPDX-License-Identifier: Apache-2.0
"""The few-shot bench: cards x methods x shots x seeds in one run, with tables, curves and intervals.

Protocols all-classes      Zhou et al., IJCV 2022, arXiv:2109.01134, sec. 4.1
          base-to-new      Zhou et al., CVPR 2022, arXiv:2203.05557, sec. 4.1; cross-dataset, domain-shift: 4.2, 4.3
Run       python recipes/few_shot.py --cards my_images/ --backbone ViT-B-16 --pretrained openai
Parallel  accelerate launch --num_processes 4 recipes/few_shot.py …, on a CPU
          torchrun --standalone --nproc_per_node 2 recipes/few_shot.py …: jobs are shared out, none is done twice
Ladder    python recipes/few_shot.py --methods ladder …: from zero-shot to LoRA, and advice at the end
Smoke     python recipes/few_shot.py      (embedded card and model: no download, CPU, a few minutes)
Expected  README.md of this folder. The same command goes on where it was interrupted; more seeds, shots, methods or
          cards add to what is there, and the tables show all of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import adaptclip as ac
from adaptclip.bench.jobs import FeatureStore, JobStore, Worker, earlier_results, launch_id, make_grid, metric_of
from adaptclip.bench.methods import check_backbone, choose_methods, not_published, read_settings
from adaptclip.bench.output import BenchSettings, write_output
from adaptclip.bench.protocols import PROTOCOLS, check_names, check_targets
from adaptclip.bench.runner import Progress, run_jobs, worker_rank
from adaptclip.bench.search import Budget
from adaptclip.clip.loading import local_folders
from adaptclip.data.readers import card_places
from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.files import write_yaml
from adaptclip.methods.registry import named
from adaptclip.outputs import check_cache, check_folder
from adaptclip.settings import ExistingPath
from adaptclip.terminal import say
from adaptclip.training.support import chosen_preset, preset_line


@dataclass(frozen=True)
class Config:
    """A grid of few-shot experiments. Methods have their papers' settings; `settings` changes them."""

    cards: tuple[str, ...] = ("digits",)
    """Names in data_cards/, paths of cards, or folders of images with one folder per class."""
    targets: tuple[str, ...] = ()
    """Cards that are judged and not learnt, for cross-dataset and domain-shift."""
    data_root: ExistingPath | None = None
    """Folder that holds the cards' files; each card's own folder if not given."""
    backbone: str = "starter"
    """open_clip architecture, hf-hub:ORG/NAME, local-dir:FOLDER, or starter (comes with the package)."""
    pretrained: str | None = None
    """open_clip weights tag or checkpoint file; not for the other spellings."""
    image_size: int = 0
    """Side of the images in pixels; 0 is the model's own, another resizes its position embeddings and says so."""
    protocol: Literal["all-classes", "base-to-new", "cross-dataset", "domain-shift", "imbalanced", "missing-class"] = (
        "all-classes"
    )
    """What is learnt and what is judged."""
    methods: tuple[str, ...] = (
        "zero_shot",
        "ss_text",
        "logistic",
        "lp_plus_plus",
        "gda",
        "tip_adapter_f",
        "clap",
        "coop",
    )
    """Names of methods, or ladder: those from cheap to dear, and advice at the end."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Labelled training images per class; 0 means all."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Each chooses the few-shot images and all that a method draws."""
    rule: Literal["nested", "coop"] = "nested"
    """How the images are drawn: 1 shot is part of 2 and so on (nested), or as the published code does (coop)."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image does; what was skipped is listed."""
    settings: tuple[str, ...] = ()
    """Changes of the methods' settings, METHOD.SETTING=VALUE, for example coop.epochs=50 lora.steps=200."""
    preset: Literal["auto", "smoke", "paper"] = "auto"
    """Where settings come from that are not given: the papers, or a short smoke test; auto: smoke for the default."""
    search_trials: int = 0
    """Settings tried per job on its validation images, the published ones first; 0 searches nothing. Needs optuna."""
    search_seconds: float = 0.0
    """No trial is started later than this in a job; 0 sets no limit."""
    metric: Literal["auto", "accuracy", "mean_per_class_accuracy", "labels_macro_auc", "labels_macro_f1"] = "auto"
    """What tables and curves show (auto: accuracy, or the AUC of several labels); the results hold the others too."""
    baseline: str = "zero_shot"
    """Method that paired differences are taken to."""
    threads: int = 1
    """Torch threads of every process on a CPU; their number decides the last bits of sums."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Autocast while training by steps; auto does what accelerate launch was told."""
    cache: Path = Path(".cache/features")
    """Image features, shared by all methods, shots and seeds."""
    out: Path = Path("runs/few_shot")
    """Results, tables and curves; jobs that are done there are not done again."""


def main(cfg: Config) -> int:
    """Cards → few-shot splits → jobs, shared out over the processes → results → tables, curves, page, advice."""
    launch = launch_id()
    check(cfg)
    cards = [ac.load_card(name) for name in (*cfg.cards, *cfg.targets)]
    check_names([card.name for card in cards])
    places = [card_places(card, cfg.data_root) for card in cards]
    read = [*local_folders(cfg.backbone), *(path for own, _ in places for path in own)]
    roots = [path for _, around in places for path in around]
    check_folder(cfg.out, "bench", overwrite=True, inputs=[*read, cfg.cache], roots=roots)
    check_cache(cfg.cache, read, roots)
    process = worker_rank(cfg.threads)
    methods = choose_methods(cfg.methods, new_names=PROTOCOLS[cfg.protocol].new_names)
    settings = read_settings(cfg.settings, methods)
    preset = chosen_preset(cfg.preset, " ".join(cfg.cards), cfg.backbone)
    budget = Budget(cfg.search_trials, cfg.search_seconds) if cfg.search_trials else None

    accelerator = ac.make_accelerator(cfg.mixed_precision, 1)
    data = [ac.open_data(card, data_root=cfg.data_root, on_bad_image=cfg.on_bad_image) for card in cards]
    metric = metric_of(cfg.metric, [own.several for own in data])
    sources = {own.card.name: own for own in data[: len(cfg.cards)]}
    backbone = ac.clip_of(data[0], cfg.backbone, cfg.pretrained, image_size=cfg.image_size, device=accelerator.device)
    check_backbone(settings, backbone, data[0].class_names, ac.parse_objective("auto", data[0]).name)
    grid = make_grid(
        sources, data[len(cfg.cards) :], backbone, protocol=cfg.protocol, settings=settings,
        shots=cfg.shots, seeds=cfg.seeds, rule=cfg.rule, budget=budget, preset=preset,
    )  # fmt: skip
    store = JobStore(cfg.out / "jobs", launch)
    worker = Worker(grid, FeatureStore(ac.FeatureCache(cfg.cache), backbone, store.folder / "encoding"), accelerator)
    earlier = earlier_results(store, grid)
    changes, all_methods = (*cfg.settings, *earlier.changes), dict.fromkeys((*methods, *earlier.methods))
    shown = BenchSettings(
        protocol=cfg.protocol, backbone=" ".join(filter(None, (backbone.name, cfg.pretrained, backbone.digest[:12]))),
        metric=metric, baseline=cfg.baseline, num_jobs=len(grid.jobs) + len(earlier.results),
        num_seeds=len({*cfg.seeds, *(result["job"]["seed"] for result in earlier.results)}),
        give_advice="ladder" in cfg.methods, changes=(*changes, *(["preset=smoke"] if preset == "smoke" else [])),
        not_published=not_published(tuple(all_methods), changes, preset=preset, searched=budget is not None),
        search=f"{cfg.search_trials} trials per job" if budget else "",
        worries=tuple(f"{d.card.name}: {worry}" for d in data for worry in d.worries),
    )  # fmt: skip
    if process.rank == 0:
        write_yaml(cfg.out / "config.yaml", asdict(cfg))
        say(preset_line(cfg.preset, preset, ", ".join(cfg.settings) or "no setting is changed"))

    first = process.rank == 0
    progress = Progress(grid.jobs, store, metric=metric, processes=process.size, show=first)
    stopped = False
    try:
        with progress:
            run_jobs(grid.jobs, worker.run, store, progress, wait=first)
    except KeyboardInterrupt:
        stopped = True  # what is there is shown
    if not first:
        return 0  # process 0 tells
    failures = [failure for job in grid.jobs if (failure := store.failure(job.key))]
    results = [result for job in grid.jobs if (result := store.result(job.key))]
    said = write_output(cfg.out, [*results, *earlier.results], failures, shown)
    for sentence in said:
        say(f"- {sentence}")
    for failure in failures:
        say(f"failed: {failure['job']}: {failure['error']}: {failure['message']}", several_lines=True)
    print(f"{len(results)} of {len(grid.jobs)} jobs: {cfg.out}/index.html, tables.md, tables.tex, results.csv, curves")
    if earlier.results:
        print(f"the tables also show {len(earlier.results)} jobs that earlier commands did in this folder")
    if earlier.num_others:
        print(f"not in the tables: {earlier.num_others} results in {store.folder} of other data, settings or versions")
    if stopped:
        print("stopped by Ctrl-C: the same command goes on with the jobs that are left")
    return 130 if stopped else 1 if failures else 0


def check(cfg: Config) -> None:
    """Raises ConfigError for what a program, unlike the command line, can get wrong, and for an empty grid."""
    if cfg.protocol not in PROTOCOLS:
        raise ConfigError(f"no protocol {cfg.protocol!r}. {did_you_mean(cfg.protocol, PROTOCOLS)}")
    if cfg.baseline not in named():
        raise ConfigError(f"no method {cfg.baseline!r} for --baseline. {did_you_mean(cfg.baseline, named())}")
    check_targets(cfg.protocol, cfg.targets)
    for name in ("cards", "shots", "seeds"):
        values = getattr(cfg, name)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"--{name} needs one value or more, each once; got {values or 'none'}")
    if cfg.threads < 1 or cfg.search_trials < 0:
        raise ConfigError(f"threads must be 1 or more and search_trials 0 or more: {cfg.threads}, {cfg.search_trials}")


if __name__ == "__main__":
    ac.launch(main, Config)
