# SPDX-License-Identifier: Apache-2.0
"""The documentation: Python and commands run and print what is shown, links lead somewhere, the site is built."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from documents import blocks_of, check_command, commands_of, compare, run_notebook, run_page
from recipe_files import CPU, ROOT
from tiny_clip import write_tiny_checkpoint

import adaptclip as ac
from adaptclip.methods import registry

DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if p.parent.name != "reference")
BY_README = [DOCS / "artifacts.md", DOCS / "command_line.md"]
"""Pages about the runs of the README, with which tests/test_readme.py runs them."""
OTHERS = [
    *BY_README,
    ROOT / "README.md",
    ROOT / "README.ja.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes" / "README.md",
    ROOT / "data_cards" / "README.md",
]
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
RUN = [p for p in PAGES if p not in BY_README and re.search(r"^```(python|bash)", p.read_text(encoding="utf-8"), re.M)]

SLOW = {"tutorial.md": pytest.mark.slow}  # two recipes on 720 test images


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> Path:
    """What a reader of the pages would have: images, a table of patients, a photo, a model's folder."""
    folder = tmp_path_factory.mktemp("things")
    digits = ac.open_data(ac.load_card("digits")).train
    named = [(digits.class_names[c], i) for i, c in enumerate(digits.labels)]
    for name in ("three", "five", "eight"):
        (folder / "my_images" / name).mkdir(parents=True)
        for place, i in enumerate([i for n, i in named if n == name][:24]):
            digits.image(i).save(folder / "my_images" / name / f"{place:02d}.png")
    (folder / "study").mkdir()
    with (folder / "study" / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "diagnosis", "patient", "sex"])
        for place, (name, i) in enumerate([(n, i) for n, i in named if n in ("three", "eight")][:96]):
            digits.image(i).save(folder / "study" / f"{place:03d}.png")
            patient = place // 3
            diagnosis = {"three": "harmless", "eight": "melanoma"}[name]
            table.writerow([f"{place:03d}.png", diagnosis, f"P{patient:02d}", ("female", "male")[patient % 2]])
    (folder / "new_images").mkdir()
    for place in range(3):
        digits.image(place).save(folder / "new_images" / f"{place}.png")
    digits.image(digits.labels.tolist().index(1)).save(folder / "photo.png")
    write_tiny_checkpoint(folder / "my_clip")
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.relative_to(DOCS).as_posix(), marks=SLOW.get(p.name, ())) for p in RUN]
)
def test_a_page_runs_from_top_to_bottom(page, things, tmp_path, monkeypatch):
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    for name in ("data_cards", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    run_page(page.read_text(encoding="utf-8"), page.name, tmp_path, monkeypatch)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_prints_what_it_shows(notebook, tmp_path, monkeypatch):
    text = notebook.read_text(encoding="utf-8")
    assert not re.search(r'"(execution_count)": \d|"(image/png|traceback)"|/(home|root|tmp|Users)/', text)
    pairs = run_notebook(notebook, tmp_path, monkeypatch)
    assert len(pairs) >= 4
    for shown, printed in pairs:
        compare(shown, printed, notebook.name)


def test_every_command_of_the_other_documents_has_flags_that_there_are():
    looked_at = 0
    for page in OTHERS:
        for block in blocks_of(page.read_text(encoding="utf-8")):
            if block.language == "bash":
                for words in commands_of(block.code):
                    check_command(words)
                    looked_at += 1
    assert looked_at >= 25


def test_how_much_is_looked_at():
    """A page that lost its blocks, or a fence that is no longer understood, would pass all of the above."""
    blocks = [(page, block) for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"))]
    commands = [words for _, b in blocks if b.language == "bash" for words in commands_of(b.code)]
    assert sum(b.language == "python" and not b.title for _, b in blocks) >= 15
    assert sum(b.shown is not None for _, b in blocks) >= 22
    assert len(commands) >= 30
    assert len(NOTEBOOKS) == 4
    assert len(RUN) >= 15
    for page, block in blocks:
        assert block.language, f"{page.name} has a block without a language:\n{block.code}"
        if block.language == "yaml":
            assert yaml.safe_load(block.code), page


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1.0\nb", "a 1.01\nb", True),
        ("a 1.0\nb", "a 1.4\nb", False),
        ("a 7", "a 8", False),
        ("a", "a\nb", False),
        ("a\n...", "a\nb", True),
        ("...\nc", "a\nb\nc", True),
        ("b\n...", "a\nb", False),
        ("a 1.0 x …", "a 1.0 x and 9 more", True),
        ("a 1.0 x …", "a 1.0 y and 9 more", False),
    ],
)
def test_what_counts_as_the_same(shown, printed, same):
    if same:
        compare(shown, printed, "page")
    else:
        with pytest.raises(AssertionError, match="page"):
            compare(shown, printed, "page")


@pytest.mark.parametrize(
    "command", ["adaptclip gate x.csv --gats y.yaml", "python recipes/coop.py --sed 1", "adaptclip exprot x"]
)
def test_a_wrong_flag_in_a_document_is_found(command, capsys):
    from adaptclip.errors import ConfigError

    with pytest.raises((SystemExit, ConfigError)) as stop:
        check_command(command.split())
    assert not isinstance(stop.value, SystemExit) or stop.value.code == 1


# --- links ---


def anchors_of(path: Path) -> set[str]:
    """The anchors of a page as a repository's site makes them of its headings, and the names of a reference."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.M))


def test_links_lead_somewhere():
    looked_at = 0
    for page in [
        *DOCS.rglob("*.md"),
        *OTHERS,
        *(ROOT / "data_cards").glob("*.md"),
        ROOT / "tests/benchmarks/README.md",
    ]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"
            if anchor:
                assert anchor in anchors_of(there), (
                    f"{page.relative_to(ROOT)} links to {target}#{anchor}: no such heading"
                )
            looked_at += 1
    assert looked_at >= 80


# --- the site ---


class Loads(HTMLParser):
    """Collects what a page loads or links to, and its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        if tag == "link" and given.get("rel") != "canonical":
            self.loaded.append(given.get("href", ""))
        if tag in ("script", "img", "iframe", "source"):
            self.loaded.append(given.get("src", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built with every warning as an error: pages that nobody finds, links and anchors that lead nowhere."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    env = {**CPU, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= 40
    for page in pages:
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.loaded
        for target in parser.loaded:
            assert not re.match(r"\w+:|//", target) or target.startswith("data:"), f"{page.name} loads {target}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:|//)", style.read_text(encoding="utf-8")), style


def test_the_page_on_python_lists_every_method_as_it_is_registered():
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    listed = {
        (name, tuple(re.findall(r"`(\w+)`", names)), on_features)
        for name, names, on_features in re.findall(r"^\| `ac\.(\w+)` \| (.*?) \| .* \| (yes|no) \|$", page, re.M)
    }
    own = [method for method in registry.methods().values() if method.__module__.startswith("adaptclip.")]
    assert listed == {
        (method.__name__, tuple(method.variants), "yes" if method.sits_on_features() else "no") for method in own
    }
    assert {name for name, *_ in listed} < set(ac.__all__)
    assert len(listed) >= 18


@pytest.mark.slow
def test_the_reference_has_every_public_name_once(site):
    named = [
        name
        for page in sorted((DOCS / "reference").glob("*.md"))
        for name in re.findall(r"^::: adaptclip\.(\w+)$", page.read_text(encoding="utf-8"), re.M)
    ]
    assert sorted(named) == sorted(set(ac.__all__) - {"__version__"})
    shown: set[str] = set()
    for page in (site / "reference").glob("*.html"):
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        shown |= parser.ids
    assert {f"adaptclip.{name}" for name in named} <= shown
    methods = (site / "reference" / "methods.html").read_text(encoding="utf-8")
    table = methods[methods.index("<tbody>") : methods.index("</tbody>")]
    cells = re.findall(r"<tr>\n<td>(.*?)</td>", table)
    assert {name for cell in cells for name in re.findall(r"<code>(.*?)</code>", cell)} == set(registry.named())
