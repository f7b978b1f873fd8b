# SPDX-License-Identifier: Apache-2.0
"""Mutation testing of the metrics and gates rooms: which changes of one operator or number does no fast test notice?

    python tests/benchmarks/mutants.py build/mutants                  # all of them; a second call goes on where it was
    python tests/benchmarks/mutants.py build/mutants --again          # judges survivors anew, after tests were added
    python tests/benchmarks/mutants.py build/mutants --only gap.py --share 0.5

One pytest session is collected; a forked child runs it once and notes which test reaches which line. Every mutant has a
child of its own. A change inside a function is put into the functions that are already loaded, and only the tests that
reach its line run, quickest first, until one fails. Anything else (constants, defaults, definitions of metrics) loads
the package and the unit tests of its room anew. Messages, docstrings, types and decorators are no subject.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib.machinery
import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
"""Names of mutants that no input can tell from the code, each with the reason after a tab."""

SUBJECT = sorted(
    [*ROOT.glob("adaptclip/metrics/*.py"), *ROOT.glob("adaptclip/gates/*.py"), ROOT / "adaptclip/gate_rules.py"]
)

TESTS = [
    "tests/unit/metrics", "tests/unit/gates",
    "tests/statistics/test_against_libraries.py",
]  # fmt: skip

SLOWEST = 1.5
"""Seconds of processor time with the tracer; slower tests are left out: what only they notice is not noticed."""

BUDGET = 2.5
"""Seconds of tests that a mutant is given; four times as many where all is loaded anew."""

MAKERS = {"_rate", "_metric", "_predictive_value", "top_k"}
"""Functions that make metrics while the package is loaded: their mutants are loaded anew too."""

# --- the mutants

_COMPARED: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
_REPLACED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
_OPPOSITE = {"min": "max", "minimum": "maximum", "argmin": "argmax", "any": "all", "ceil": "floor"}
_OPPOSITE |= {after: before for before, after in _OPPOSITE.items()}
_REMOVED = {"sqrt", "abs", "float64", "round", "reversed", "sorted"}
_SILENT = ("_log", "progress_bar", "ElementTree.indent")


@dataclass(frozen=True)
class Mutant:
    """One change of one node; `name` does not depend on line numbers."""

    name: str
    path: Path
    compiled: Callable[[], CodeType]
    lines: frozenset[int]
    in_function: bool


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What stands for a node, one at a time."""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                for new in _COMPARED.get(type(op), ()):
                    yield ast.Compare(node.left, [*node.ops[:i], new(), *node.ops[i + 1 :]], node.comparators)
        case ast.BinOp(op=ast.Pow()):
            yield node.left
        case ast.BinOp() | ast.AugAssign() if type(node.op) in _REPLACED:
            changed = copy.copy(node)
            changed.op = _REPLACED[type(node.op)]()
            yield changed
        case ast.BoolOp():
            yield ast.BoolOp(_REPLACED[type(node.op)](), node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float() as number):
            few = isinstance(number, int) and abs(number) < 20
            for value in (number + 1, number - 1) if few else (number * 2 or 1.0,):
                yield ast.Constant(value)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            if name in _OPPOSITE:
                changed = copy.deepcopy(node)
                setattr(changed.func, "id" if isinstance(node.func, ast.Name) else "attr", _OPPOSITE[name])
                yield changed
            if name in _REMOVED and node.args:
                yield node.args[0]
            for i, keyword in enumerate(node.keywords):
                if keyword.arg not in (None, "strict") and name != "progress_bar":
                    yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
        case ast.If() | ast.IfExp() if not isinstance(node.test, ast.Constant):
            for value in (True, False):
                changed = copy.copy(node)
                changed.test = ast.Constant(value)
                yield changed
        case ast.Return(value=ast.expr()) if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Nodes below that are a subject, with the field and the place in it."""
    skipped = {"annotation", "returns", "decorator_list", "type_params"}
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(_SILENT):
        skipped |= {"args", "keywords"}
    for name, value in ast.iter_fields(node):
        if name in skipped:
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not (isinstance(child, ast.keyword) and child.arg == "strict"):
                yield child, name, i


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a file, in its order."""
    tree, found, seen = ast.parse(path.read_text()), [], defaultdict(int)

    def visit(node: ast.AST, where: list[str], lines: frozenset[int], inside: bool) -> None:
        for child, name, i in list(_children(node)):
            here, reach, within = where, lines, inside
            if isinstance(child, ast.stmt):
                last = child.body[0].lineno - 1 if getattr(child, "body", None) else child.end_lineno or 0  # type: ignore[attr-defined]
                reach = frozenset(range(child.lineno, max(last, child.lineno) + 1))
            if isinstance(child, ast.Lambda):
                reach = frozenset(range(child.lineno, (child.end_lineno or 0) + 1))
            if isinstance(node, ast.FunctionDef | ast.Lambda) and name == "body":
                within = not MAKERS & {*where}
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                here = [*where, child.name]
                within = False if isinstance(child, ast.ClassDef) else inside
            shown = isinstance(child, ast.Constant) and isinstance(node, ast.expr | ast.keyword)
            for new in changes(child):
                ast.fix_missing_locations(ast.copy_location(new, child))
                before = ast.unparse(node if shown else child)
                with _put(node, name, i, new):
                    after = ast.unparse(node if shown else new)
                key = (
                    f"{path.relative_to(ROOT).as_posix()} {'.'.join(here) or '-'}: {_short(before)} -> {_short(after)}"
                )
                seen[key] += 1
                key += f" #{seen[key]}" if seen[key] > 1 else ""

                def compiled(node: ast.AST = node, name: str = name, i: int | None = i, new: ast.AST = new) -> CodeType:
                    with _put(node, name, i, new):
                        return compile(tree, str(path), "exec")

                found.append(Mutant(key, path, compiled, reach, within))
            visit(child, here, reach, within)

    visit(tree, [], frozenset(), False)
    return found


def sample(mutants: list[Mutant], share: float) -> list[Mutant]:
    """A share of them, drawn with a fixed seed: one of every line first, then a second of every line, and so on."""
    rank: dict[Mutant, tuple[int, float]] = {}
    by_line, rng = defaultdict(list), random.Random(0)
    for mutant in mutants:
        by_line[min(mutant.lines)].append(mutant)
    for found in by_line.values():
        rank |= {mutant: (i, rng.random()) for i, mutant in enumerate(rng.sample(found, len(found)))}
    kept = set(sorted(mutants, key=rank.__getitem__)[: math.ceil(share * len(mutants))])
    return [mutant for mutant in mutants if mutant in kept]


@contextmanager
def _put(node: ast.AST, name: str, i: int | None, new: ast.AST) -> Iterator[None]:
    """Has `new` in a field of a node for a while."""
    kept = getattr(node, name)
    setattr(node, name, new if i is None else [*kept[:i], new, *kept[i + 1 :]])
    yield
    setattr(node, name, kept)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 110 else f"{text[:80]} ... {text[-25:]}"


# --- judging them


def forked(work: Callable[[], Any], seconds: float) -> Any:
    """The JSON-able result of `work` in a child; None where it died or took too long."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
        signal.alarm(int(5 * seconds))
        try:
            result = json.dumps(work()).encode()
            while result:
                result = result[os.write(write, result) :]
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


@dataclass
class Reach:
    """What each test reaches: seconds it takes, and lines of the subject as "path:line"."""

    seconds: dict[str, float] = field(default_factory=dict)
    tests: dict[str, list[str]] = field(default_factory=dict)


def passes(item: pytest.Item, following: pytest.Item | None) -> bool:
    """Runs one test; skipped ones pass."""
    from _pytest.runner import runtestprotocol

    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


class TooSlowError(Exception):
    """A test that takes longer than SLOWEST."""


def _too_slow(*_: Any) -> None:
    raise TooSlowError


def measure_reach(items: list[pytest.Item]) -> Any:
    """Runs everything once with a line tracer."""
    paths, found = {str(path) for path in SUBJECT}, Reach()
    signal.signal(signal.SIGPROF, _too_slow)
    tests: dict[str, set[str]] = defaultdict(set)
    for item, following in zip(items, [*items[1:], None], strict=True):
        lines: set[tuple[str, int]] = set()

        def local(frame: Any, event: str, arg: Any, lines: set[tuple[str, int]] = lines) -> Any:
            lines.add((frame.f_code.co_filename, frame.f_lineno))
            return local

        def trace(frame: Any, event: str, arg: Any, local: Any = local) -> Any:
            return local if frame.f_code.co_filename in paths else None

        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SLOWEST)
        sys.settrace(trace)
        good = passes(item, following)
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        found.seconds[item.nodeid] = time.process_time() - started if good else math.inf
        for path, line in lines:
            tests[f"{Path(path).relative_to(ROOT).as_posix()}:{line}"].add(item.nodeid)
    return [found.seconds, {worker: sorted(names) for worker, names in tests.items()}]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _by_place(code: CodeType) -> dict[tuple[str, int], list[CodeType]]:
    found = defaultdict(list)
    for one in _codes(code):
        found[one.co_name, one.co_firstlineno].append(one)
    return found


class Judge:
    """A pytest plugin that judges mutants in place of running the collected tests."""

    def __init__(self, mutants: list[Mutant], state: Path) -> None:
        self.mutants, self.state = mutants, state
        self.functions: dict[str, list[FunctionType]] = defaultdict(list)
        self.sound: dict[Path, bool] = {}
        self.places: dict[str, dict[tuple[str, int], list[CodeType]]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Takes pytest's own loop's place."""
        worker = self.state / "reach.json"
        items = session.items
        reach = Reach(*json.loads(worker.read_text())) if worker.exists() else Reach()
        fresh = [item for item in items if item.nodeid not in reach.seconds]
        if fresh:
            seconds, tests = forked(lambda: measure_reach(fresh), 3600)
            reach.seconds |= seconds
            for line, names in tests.items():
                reach.tests[line] = [*reach.tests.get(line, ()), *names]
            worker.write_text(json.dumps([reach.seconds, reach.tests]))
        reach.seconds = {name: s for name, s in reach.seconds.items() if s <= SLOWEST}
        by_name = {item.nodeid: item for item in items if item.nodeid in reach.seconds}
        for one in gc.get_objects():
            if type(one) is FunctionType and one.__code__.co_filename.startswith(str(ROOT / "adaptclip")):
                self.functions[one.__code__.co_filename].append(one)
        gc.freeze()
        done = time.perf_counter()
        for i, mutant in enumerate(self.mutants, start=1):
            names = self._order(mutant, reach)
            killer = self._judge(mutant, names, by_name)
            with (self.state / "results.jsonl").open("a") as file:
                file.write(
                    json.dumps(
                        {"mutant": mutant.name, "line": min(mutant.lines), "tests": len(names), "killer": killer}
                    )
                    + "\n"
                )
            if i % 25 == 0 or killer == "":
                rate = (time.perf_counter() - done) / i
                sys.stderr.write(
                    f"{i}/{len(self.mutants)} {rate:.2f} s each {'' if killer else 'SURVIVES ' + mutant.name}\n"
                )
        return True

    def _order(self, mutant: Mutant, reach: Reach) -> list[str]:
        """Tests that reach a mutant, those of its own room and the quickest first, as many as the budget allows."""
        path = mutant.path.relative_to(ROOT).as_posix()
        room = f"tests/unit/{'metrics' if mutant.path.parent.name == 'metrics' else 'gates'}/"
        if mutant.in_function:
            names = {name for line in mutant.lines for name in reach.tests.get(f"{path}:{line}", ())}
        else:  # no line tells which tests depend on a definition
            names = {name for name in reach.seconds if name.startswith(room)}
        left, kept = BUDGET if mutant.in_function else 4 * BUDGET, []
        for name in sorted(names & reach.seconds.keys(), key=lambda name: (room not in name, reach.seconds[name])):
            left -= reach.seconds[name]
            if left > 0:
                kept.append(name)
        return kept

    def _judge(self, mutant: Mutant, names: list[str], by_name: dict[str, pytest.Item]) -> str:
        """The test that notices, "" where none does."""
        try:
            code = mutant.compiled()
        except (SyntaxError, ValueError):
            return "does not compile"
        if not names:
            return ""
        inside = mutant.in_function and self._pairs(mutant, code) is not None
        if not inside and mutant.path not in self.sound:  # loading anew must not fail by itself
            plain = compile(mutant.path.read_text(), str(mutant.path), "exec")
            self.sound[mutant.path] = forked(lambda: anew(mutant, plain, names), 40) == [""]
        if not inside and not self.sound[mutant.path]:
            return ""  # counts as a survivor
        items = [by_name[name] for name in names]
        found = forked(
            lambda: self._inside(mutant, code, items) if inside else anew(mutant, code, names), 8 if inside else 40
        )
        return "died or took too long" if found is None else found[0]

    def _pairs(self, mutant: Mutant, code: CodeType) -> list[tuple[FunctionType, CodeType]] | None:
        """Loaded functions of the file with their changed code; None where they do not correspond."""
        path, pairs = str(mutant.path), []
        if path not in self.places:
            self.places[path] = _by_place(compile(mutant.path.read_text(), path, "exec"))
        old, new = self.places[path], _by_place(code)
        for function in self.functions[path]:
            key = (function.__code__.co_name, function.__code__.co_firstlineno)
            if len(old[key]) != len(new[key]) or function.__code__ not in old[key]:
                return None
            changed = new[key][old[key].index(function.__code__)]
            if changed.co_freevars != function.__code__.co_freevars:
                return None
            if changed != function.__code__:
                pairs.append((function, changed))
        return pairs or None

    def _inside(self, mutant: Mutant, code: CodeType, items: list[pytest.Item]) -> list[str]:
        for function, changed in self._pairs(mutant, code) or []:
            function.__code__ = changed
        for item, following in zip(items, [*items[1:], None], strict=True):
            if not passes(item, following):
                return [item.nodeid]
        return [""]


def anew(mutant: Mutant, code: CodeType, names: list[str]) -> list[str]:
    """Loads package and tests again with the changed file."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith((str(ROOT / "adaptclip"), str(ROOT / "tests"))):
            del sys.modules[name]
    parts = mutant.path.relative_to(ROOT).with_suffix("").parts
    target = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target_: Any = None) -> Any:
            spec = super().find_spec(fullname, path) if fullname == target else None
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = lambda module: exec(code, module.__dict__)  # type: ignore[method-assign]
            return spec

    class Only:
        failed = ""

        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            rank = {name: i for i, name in enumerate(names)}
            items[:] = sorted((item for item in items if item.nodeid in rank), key=lambda item: rank[item.nodeid])

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                self.failed = self.failed or report.nodeid

    sys.meta_path.insert(0, Finder)
    only = Only()
    files = sorted({name.split("::")[0] for name in names})
    status = pytest.main(["-x", "-q", "-s", "-p", "no:cacheprovider", *files], plugins=[only])
    return [only.failed or ("" if status == 0 else f"pytest exits with {int(status)}")]


def _table(mutants: list[Mutant], killers: dict[str, str], equivalent: dict[str, str]) -> str:
    """Markdown: per file how many, killed, equivalent and surviving."""
    rows = ["| file | mutants | killed | equivalent | survivors |", "|---|---|---|---|---|"]
    total = [0, 0, 0, 0]
    by_file = defaultdict(list)
    for mutant in mutants:
        if mutant.name in killers:
            by_file[mutant.path.relative_to(ROOT).as_posix()].append(mutant.name)
    for path, names in by_file.items():
        killed = sum(bool(killers[name]) for name in names)
        same = sum(not killers[name] and name in equivalent for name in names)
        row = [len(names), killed, same, len(names) - killed - same]
        total = [a + b for a, b in zip(total, row, strict=True)]
        rows.append(f"| `{path}` | {' | '.join(map(str, row))} |")
    rows.append(f"| together | {' | '.join(map(str, total))} |")
    share = total[1] / max(total[0] - total[2], 1)
    return "\n".join(
        [*rows, "", f"{total[1]} of {total[0] - total[2]} that can be told apart were killed: {100 * share:.1f} %."]
    )


def main() -> None:
    """Judges the mutants that were not judged yet, and prints the table and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path, help="folder of what was measured and judged so far")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of paths")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants of each file, spread over its lines")
    parser.add_argument("--again", action="store_true", help="judge survivors again")
    parser.add_argument("--table", action="store_true", help="judge nothing")
    args = parser.parse_args()
    args.state.mkdir(parents=True, exist_ok=True)
    results = args.state / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    killers = {entry["mutant"]: entry["killer"] for entry in map(json.loads, lines)}
    mutants = []
    for path in SUBJECT:
        found = mutants_of(path) if any(part in path.as_posix() for part in args.only) else []
        mutants += sample(found, args.share)
    equivalent = {}
    if EQUIVALENT.exists():
        equivalent = dict(line.split("\t", 1) for line in EQUIVALENT.read_text().splitlines() if "\t" in line)
    again = {name for name, killer in killers.items() if args.again and not killer and name not in equivalent}
    todo = [mutant for mutant in mutants if mutant.name not in killers or mutant.name in again]
    todo.sort(key=lambda mutant: (not mutant.in_function, mutant.name in killers))
    if todo and not args.table:
        os.chdir(ROOT)
        os.environ["HF_HUB_OFFLINE"] = "1"
        tests = [name for name in TESTS if Path(name).exists()]
        pytest.main(["-q", "-s", "-p", "no:cacheprovider", *tests], plugins=[Judge(todo, args.state)])
        killers |= {entry["mutant"]: entry["killer"] for entry in map(json.loads, results.read_text().splitlines())}
    sys.stdout.write(_table(mutants, killers, equivalent) + "\n\n")
    for mutant in mutants:
        if killers.get(mutant.name) == "" and mutant.name not in equivalent:
            sys.stdout.write(f"line {min(mutant.lines)}: {mutant.name}\n")


if __name__ == "__main__":
    main()
