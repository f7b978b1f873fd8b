# SPDX-License-Identifier: Apache-2.0
"""What mkdocs does beside mkdocs.yml: shows documents that lie elsewhere in the project, and notebooks as pages."""

from __future__ import annotations

import ast
import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "recipes/README.md",
    "recipes/figures/*.svg",
    "data_cards/*.md",
    "tests/benchmarks/README.md",
)
"""What the site shows from other folders, under its path in the project."""

FENCE = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:)([^)\s#]+)(#[^)\s]*)?\)")
HEAD = re.compile(r"---\n(.*?)\n---\n+(# .*?\n)(.*)", re.S)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the documents of other folders; a card's head, which mkdocs would take for its own, becomes a block."""
    for path in sorted(path for pattern in ELSEWHERE for path in ROOT.glob(pattern)):
        where = path.relative_to(ROOT).as_posix()
        card = HEAD.fullmatch(path.read_text(encoding="utf-8"))
        if card:
            head, title, prose = card.groups()
            text = f"{title}\n{prose}\n## The head of this card\n\n```yaml\n{head}\n```\n"
            files.append(File.generated(config, where, content=text))
        else:
            files.append(File.generated(config, where, abs_src_path=str(path)))
    for notebook in sorted((ROOT / "docs").glob("notebooks/*.ipynb")):
        where = notebook.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        files.append(File.generated(config, where, content=as_markdown(notebook)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the project into links between pages; what the site does not show is no link."""
    # A notebook is there twice, as a page and as the file itself: links lead to the page.
    shown = {source_of(file): file.src_uri for file in sorted(files, key=File.is_documentation_page)}
    here = source_of(page.file)

    def moved(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        found = shown.get(Path(posixpath.normpath(here.parent / target)))
        if found is None:
            return text
        if found == page.file.src_uri and not anchor:
            return match[0]
        path = posixpath.relpath(found, posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({path}{anchor or ''})"

    markdown = markdown.replace("<!-- the names of all methods -->", names_of_methods())
    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


def names_of_methods() -> str:
    """A table of the classes that have variants: their names, and what they say of themselves."""
    rows = []
    for path in sorted((ROOT / "adaptclip" / "methods").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for line in node.body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "variants":
                    assert isinstance(line.value, ast.Dict)
                    names = ", ".join(f"`{ast.literal_eval(key)}`" for key in line.value.keys if key)
                    about = (ast.get_docstring(node) or "").splitlines()[0]
                    rows.append(f"| {names} | `{node.name}` | {about} |")
    return "\n".join(("| names | class | what it is |", "|---|---|---|", *rows))


def source_of(file: File) -> Path:
    """The file of the project that a page shows."""
    for root in (ROOT / "docs", ROOT):
        for path in (root / file.src_uri, (root / file.src_uri).with_suffix(".ipynb")):
            if path.is_file():
                return path
    return ROOT / file.src_uri


def as_markdown(notebook: Path) -> str:
    """A notebook as a page: its cells, with what they printed as text."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        texts = [output.get("text") or output.get("data", {}).get("text/plain", []) for output in cell["outputs"]]
        printed = "".join("".join(text) for text in texts).rstrip()
        if printed:
            parts.append(f"```text\n{printed}\n```")
    title, *rest = parts
    return "\n\n".join((title, f"[Open as a notebook]({notebook.name})", *rest)) + "\n"
