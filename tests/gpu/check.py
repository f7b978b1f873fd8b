# SPDX-License-Identifier: Apache-2.0
"""Checks and times adaptclip on a machine with one CUDA GPU: correctness, then benchmarks; about eight minutes.

    python tests/gpu/check.py OUT                        # everything
    python tests/gpu/check.py OUT --parts coop features  # some parts again; --earlier FILE keeps what FILE has besides
    python tests/gpu/check.py OUT --device cpu --tiny    # only to see that it runs

It writes OUT/gpu_check.json and OUT/gpu_check.md, anew after every part, with the card, driver, torch and commit. It
needs what adaptclip needs and pytest, but no network, no installation of adaptclip and no weights: models are random.
Every part has a process and a time limit of its own, so that one that fails or hangs leaves the others alone; parts
that time nothing run side by side. It exits with 1 where a check failed or a part did not end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "benchmarks", HERE.parent, HERE.parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Deterministic algorithms, which resumption may ask for, need it before the first product on the GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        rows: makes its rows from the parsed arguments, one at a time.
        limit_s: seconds after which it is ended; what it has written by then is kept.
        alone: whether it times something, so that nothing else may run.
    """

    rows: Callable[[argparse.Namespace], Iterator[Row]]
    limit_s: float
    alone: bool = True


def check_rows(args: argparse.Namespace, groups: Callable[[str], bool]) -> Iterator[Row]:
    """Runs the checks of some groups."""
    import torch
    from checks import CHECKS, GPU_ONLY, run_check

    device = torch.device(args.device)
    chosen = [name for name, (group, _) in CHECKS.items() if groups(group)]
    if device.type == "cpu":
        chosen = [name for name in chosen if name not in GPU_ONLY]
    for name in chosen[:2] if args.tiny else chosen:
        row: Row = {"what": "check", "check": name, "passed": True}
        started = time.perf_counter()
        try:
            row["found"] = run_check(name, device)
        except Exception as error:
            row |= {"passed": False, **told_of(error)}
        yield {**row, "seconds": round(time.perf_counter() - started, 2)}


def told_of(error: Exception) -> Row:
    """What a row says of an error."""
    shown = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error}"[:600], "traceback": shown[-3000:]}


def matrix_rows(args: argparse.Namespace, number: int, of: int) -> Iterator[Row]:
    """Runs the matrix of methods on some of the kinds."""
    from tiny_kinds import KINDS

    own = {f"matrix, {kind}" for kind in list(KINDS)[number::of]}
    return check_rows(args, own.__contains__)


def timing_rows(args: argparse.Namespace, name: str, **settings: Any) -> Iterator[Row]:
    """Runs one function of `timing`."""
    import timing
    import torch

    return getattr(timing, name)(timing.Sizes(torch.device(args.device), args.tiny), **settings)


MATRIX_PARTS = 4
PARTS: dict[str, Part] = {
    "identities": Part(partial(check_rows, groups=lambda group: group == "identities"), 120, alone=False),
    "training": Part(partial(check_rows, groups=lambda group: group == "training"), 120, alone=False),
    **{
        f"matrix{i}": Part(partial(matrix_rows, number=i, of=MATRIX_PARTS), 120, alone=False)
        for i in range(MATRIX_PARTS)
    },
    "coop": Part(partial(timing_rows, name="coop_steps"), 100),
    "lora-b16": Part(partial(timing_rows, name="lora_steps", model="ViT-B-16"), 80),
    "lora-l14": Part(partial(timing_rows, name="lora_steps", model="ViT-L-14"), 100),
    "features": Part(partial(timing_rows, name="feature_speeds"), 75),
    "waits": Part(partial(timing_rows, name="waits"), 45),
    "knobs": Part(partial(timing_rows, name="knobs"), 75),
}
"""Name -> part, in the order of importance within those that run side by side and those that run alone."""


# -- running -----------------------------------------------------------------------------------------------------------


def about(device: str) -> Row:
    """The card, its driver, the versions and the commit."""
    import torch

    info: Row = {
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)), "processor": platform.processor() or platform.machine(),
        "commit": output_of("git", "-C", str(HERE), "rev-parse", "HEAD") or os.environ.get("ADAPTCLIP_COMMIT", "?"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip
    if device == "cuda":
        info["card"] = torch.cuda.get_device_name()
        info["card_bytes"] = torch.cuda.get_device_properties(0).total_memory
        info["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "?"
    for name in ("open_clip_torch", "peft", "accelerate", "timm", "transformers"):
        info[name] = version_of(name)
    return info


def output_of(*command: str) -> str:
    """What a program prints, or nothing where there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def version_of(name: str) -> str:
    """The version of an installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def run_here(name: str, args: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    """Runs a part in this process and hands over each row when it is there; an error becomes a row."""
    try:
        for row in PARTS[name].rows(args):
            keep(row)
    except Exception as error:
        keep({"what": "error", **told_of(error)})


def run_apart(name: str, args: argparse.Namespace, until: float) -> Row:
    """Runs a part in a process of its own and returns its rows, how long it took and how it ended."""
    left = min(PARTS[name].limit_s, until - time.monotonic())
    if left < 10:
        return {"ended": "not started: the time is up", "seconds": 0.0, "rows": []}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        own, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        command = [sys.executable, __file__, str(own), "--device", args.device, "--one", name, *["--tiny"] * args.tiny]
        threads = {} if PARTS[name].alone else {"OMP_NUM_THREADS": "2"}
        with log.open("wb") as file:
            try:
                settings: Any = {"stdout": file, "stderr": subprocess.STDOUT, "env": {**os.environ, **threads}}
                code = subprocess.run(command, timeout=left, **settings).returncode
                ended = "done" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                ended = f"ended after {left:.0f} s"
        lines = own.read_text().splitlines() if own.exists() else []
        rows = [json.loads(line) for line in lines]
        part: Row = {"ended": ended, "seconds": time.monotonic() - started, "rows": rows}
        if ended != "done":
            part["log"] = log.read_text(errors="replace")[-3000:]
        return part


def run_parts(names: Iterable[str], args: argparse.Namespace, keep: Callable[[str, Row], None]) -> None:
    """Runs the parts, those that time nothing side by side first, and hands over each when it is done."""
    names = list(names)
    if args.here:
        for name in names:
            started, rows = time.monotonic(), list[Row]()
            run_here(name, args, rows.append)
            keep(name, {"ended": "done", "seconds": time.monotonic() - started, "rows": rows})
        return
    until = time.monotonic() + args.seconds
    together = [name for name in names if not PARTS[name].alone]
    with ThreadPoolExecutor(max(1, len(together))) as pool:
        for name, part in zip(together, pool.map(lambda n: run_apart(n, args, until), together), strict=True):
            keep(name, part)
    for name in names:
        if PARTS[name].alone:
            keep(name, run_apart(name, args, until))


# -- the table ---------------------------------------------------------------------------------------------------------


def markdown(result: Row) -> str:
    """The tables of a result."""
    own = result["about"]
    head = f"# {own.get('card', 'CPU, only to see that it runs')}"
    versions = ", ".join(f"{name} {value}" for name, value in own.items() if name != "card_bytes")
    rows: dict[str, list[Row]] = {}
    for part in result["parts"].values():
        for row in part["rows"]:
            rows.setdefault(row["what"], []).append(row)
    lines = [head, "", versions, "", *verdicts(rows.get("check", []), result["parts"])]
    lines += step_table([*rows.get("CoOp step", []), *rows.get("LoRA step", [])])
    lines += table(
        ("features", "precision", "images/s"),
        [(f"{r['way']}, {r['model']}", r["precision"], f"{r['images_per_s']:,.0f}") for r in rows.get("features", [])],
    )
    for row in rows.get("loop", []):
        places = row["waits"] or {}
        info = f"{milliseconds(row['seconds'])}, {sum(places.values())} waits for the GPU"
        lines += [f"One step of the loop, {row['method']}: {info}", ""]
        lines += [*(f"- {count}x {place}" for place, count in places.items()), ""]
    timed = ("coop_s", "coop_fp32_s", "lora_text_s")
    lines += table(
        ("classes", "joined tokens", "chunk tokens", "CoOp bf16", "CoOp fp32", "LoRA's text bf16"),
        [
            (r["classes"], r["joined"], r["chunk_tokens"], *(milliseconds(r[name]) for name in timed))
            for r in rows.get("knobs", [])
        ],
    )
    return "\n".join(lines) + "\n"


def verdicts(checks: list[Row], parts: Row) -> list[str]:
    """How many checks passed, which did not, and which parts did not end."""
    failed = [row for row in checks if not row["passed"]]
    needed = [row["check"] for row in checks if row["passed"] and row["found"].get("repeatable") is False]
    lines = [f"{len(checks) - len(failed)} of {len(checks)} checks passed.", ""]
    lines += [f"- **{row['check']}**: {row['error']}" for row in failed]
    lines += [f"- repeatable with deterministic algorithms alone: {', '.join(needed)}"] if needed else []
    for name, part in parts.items():
        lines += [f"- part {name}: {part['ended']}"] if part["ended"] != "done" else []
        lines += [f"- part {name}: {row['error']}" for row in part["rows"] if row["what"] == "error"]
    return [line.replace("\n", " ") for line in lines]


def step_table(steps: list[Row]) -> list[str]:
    """The table of training steps."""
    cells = []
    for r in steps:
        budget = f" (budget {r['budget_gib']} GiB)" if r["budget_gib"] != 4 else ""
        run_on = r["published_run_on_classes"]
        scaled = f" (from {run_on:,})" if run_on != r["classes"] else ""
        cells.append(
            (
                f"{r['what']}, {r['model']}{budget}", f"{r['classes']:,}", r["precision"], f"{r['ratio']:.1f}x",
                milliseconds(r["published_s"]) + scaled, milliseconds(r["ours_s"]), gib(r["published_peak_bytes"]),
                gib(r["ours_peak_bytes"]),
            )
        )  # fmt: skip
    head = ("step", "classes", "precision", "ratio", "published", "ours", "peak, published", "peak, ours")
    return table(head, cells)


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Lines of a Markdown table; none where there are no rows."""
    head, cells = list(head), [list(map(str, row)) for row in rows]
    if not cells:
        return []
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)), ""]


def milliseconds(seconds: float) -> str:
    """Milliseconds with three digits that count."""
    return f"{seconds * 1e3:,.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f} ms"


def gib(size: int | None) -> str:
    """GiB, or a dash."""
    return "–" if size is None else f"{size / 2**30:.2f} GiB"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--parts", nargs="*", choices=[*PARTS, "matrix"], default=[*PARTS])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and two checks a part")
    parser.add_argument("--here", action="store_true", help="all in this process, one after another, without limits")
    parser.add_argument(
        "--seconds", type=float, default=480, help="for everything; parts that find no time are left out"
    )
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="gpu_check.json whose other parts are kept")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.parts = [name for name in PARTS if name in args.parts or ("matrix" in args.parts and "matrix" in name)]
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts, writes JSON and table; 1 where a check failed or a part did not end."""
    args = parsed(arguments)
    if args.one:
        with args.out.open("a") as file:
            run_here(args.one, args, lambda row: print(json.dumps(row), file=file, flush=True))
        return 0
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("there is no CUDA GPU; --device cpu --tiny shows that the script runs\n")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    result: Row = {"about": about(args.device), "parts": {}}
    for path in args.earlier:
        result["parts"] |= json.loads(path.read_text())["parts"]

    def keep(name: str, part: Row) -> None:
        result["parts"][name] = part
        (args.out / "gpu_check.json").write_text(json.dumps(result, indent=1))
        (args.out / "gpu_check.md").write_text(markdown(result))
        sys.stdout.write(f"{name}: {part['ended']} after {part['seconds']:.0f} s, {len(part['rows'])} rows\n")
        sys.stdout.flush()

    run_parts(args.parts, args, keep)
    sys.stdout.write("\n" + markdown(result))
    parts = result["parts"].values()
    rows = [row for part in parts for row in part["rows"]]
    wrong = any(row["what"] == "error" or row.get("passed") is False for row in rows)
    return 1 if wrong or any(part["ended"] != "done" for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
