# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of backbones and methods against another open_clip, and tries every architecture that it lists.

    python tests/compat/run_open_clip.py PATH_OF_THE_SOURCES [--dry-run]

Prints how many tests passed and failed, and of the architectures how many are supported, refused by name, or failed.
Leaves with 1 where anything failed. Not a part of the gate: the sources are not here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/unit/clip", "tests/unit/methods")


def source_folder(path: Path) -> Path:
    """The folder that holds the package `open_clip`: the given one, or `src` in it. Raises SystemExit where none is."""
    for folder in (path, path / "src"):
        if (folder / "open_clip" / "version.py").is_file():
            return folder.resolve()
    raise SystemExit(f"{path} holds no open_clip: neither open_clip/version.py nor src/open_clip/version.py")


def environment(source: Path) -> dict[str, str]:
    """That of a process which imports open_clip from there, and adaptclip from this checkout."""
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join([str(source), str(ROOT), str(ROOT / "tests")])}


def run_tests(source: Path) -> Counter[str]:
    """Counts of passed, failed and skipped tests; the names of those that failed are printed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
        subprocess.run(command, cwd=ROOT, env=environment(source), check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    counts: Counter[str] = Counter()
    for case in cases:
        kinds = {child.tag for child in case}
        counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def try_architectures() -> dict[str, Any]:
    """What becomes of every kind of architecture of the open_clip that is imported: "supported", or who refuses it.

    The configuration is checked as `load_backbone` does; the model is built without its weights, its attention split,
    and the layers of both towers found for LoRA. Architectures that differ in their sizes alone are tried once.
    """
    import logging

    import open_clip

    from adaptclip.clip.config_checks import check_config
    from adaptclip.errors import AdaptclipError

    logging.disable(logging.CRITICAL)
    found: dict[str, Any] = {"open_clip": str(Path(open_clip.__file__).parent), "version": open_clip.__version__}
    seen: dict[str, str] = {}
    outcomes: dict[str, str] = {}
    for name in open_clip.list_models():
        config: Any = open_clip.get_model_config(name)
        try:
            check_config(config, where=name)
            key = _kind(config)
            if key not in seen:
                seen[key] = _adapt(config)
            outcomes[name] = seen[key]
        except AdaptclipError as error:
            outcomes[name] = f"refused: {error}"
        except Exception as error:
            outcomes[name] = f"failed: {type(error).__name__}: {error}"
    return {**found, "outcomes": outcomes}


def _kind(config: dict[str, Any]) -> str:
    vision, text = config["vision_cfg"], config["text_cfg"]
    image = vision.get("timm_model_name") or ("resnet" if isinstance(vision.get("layers"), list) else "vit")
    pool = (vision.get("timm_pool"), vision.get("attentional_pool"))
    return str((image, pool, text.get("text_arch"), bool(text.get("hf_model_name")), "multimodal_cfg" in config))


def _adapt(config: dict[str, Any]) -> str:
    import open_clip
    import torch
    from open_clip.transformer import TextTransformer

    from adaptclip.clip.attention import split_attention
    from adaptclip.clip.lora_targets import count_attention, find_targets
    from adaptclip.clip.text import make_text_tower
    from adaptclip.errors import BackboneError

    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    encoder = text.pop("hf_model_name", None)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    more = {"multimodal_cfg": config["multimodal_cfg"]} if "multimodal_cfg" in config else {}
    with torch.device("meta"):
        model = kind(embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=text, **more)  # type: ignore[arg-type]
    split_attention(model)
    info = [f"{count_attention(model, tower)} attentions of the {tower} tower" for tower in ("image", "text")]
    for tower in ("image", "text"):
        find_targets(model, tower)  # type: ignore[arg-type]
    if not encoder and not isinstance(model.text, TextTransformer):
        try:
            make_text_tower(model, open_clip.SimpleTokenizer())
        except BackboneError as error:
            return f"refused: prompts: {error}"
    return f"supported: {', '.join(info)}"


def main(arguments: list[str]) -> int:
    """Runs both parts and prints the counts; the exit code."""
    if "--architectures" in arguments:
        print(json.dumps(try_architectures()))  # noqa: T201
        return 0
    paths = [a for a in arguments if not a.startswith("--")]
    if len(paths) != 1:
        raise SystemExit(__doc__)
    source = source_folder(Path(paths[0]))
    if "--dry-run" in arguments:
        print(f"would run {', '.join(TESTS)} with PYTHONPATH={environment(source)['PYTHONPATH']}")  # noqa: T201
        return 0
    tests = run_tests(source)
    command = [sys.executable, str(Path(__file__).resolve()), "--architectures"]
    info = subprocess.run(command, env=environment(source), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    tried = json.loads(info.stdout.splitlines()[-1])
    outcomes = Counter(text.partition(":")[0] for text in tried["outcomes"].values())
    for name, text in tried["outcomes"].items():
        if not text.startswith("supported"):
            print(f"{name}: {text[:200]}")  # noqa: T201
    print(f"open_clip {tried['version']} from {tried['open_clip']}")  # noqa: T201
    print(f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped")  # noqa: T201
    words = (f"{outcomes[kind]} {kind}" for kind in ("supported", "refused", "failed"))
    print(f"architectures: {', '.join(words)}")  # noqa: T201
    return int(tests["failed"] + outcomes["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
