"""Shows the repository's own pages (README of an example, PROTOCOL.md, …) on the site, and resolves their links.

The files stay where a reader of the repository looks for them. The page of the site is a stub; this extension replaces
the stub's text by the file's, and rewrites each relative link to the page that shows its target.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    "project/architecture": "ARCHITECTURE.md",
    "project/assumptions": "ASSUMPTIONS.md",
    "project/changelog": "CHANGELOG.md",
    "project/contributing": "CONTRIBUTING.md",
    "project/reporting": "SECURITY.md",
    "project/testing": "TESTING.md",
    "reference/protocol": "PROTOCOL.md",
    "gallery/digits": "examples/digits/README.md",
    "gallery/hospitals": "examples/hospitals/README.md",
    "gallery/own-algorithm": "examples/own_algorithm/README.md",
}
"""Page of the site → the file of the repository that it shows."""
SHOWN = {(ROOT / path).resolve(): f"{page}.md" for page, path in PAGES.items()} | {
    (ROOT / "README.md").resolve(): "index.md"
}
LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", replace)
    return {"parallel_read_safe": True}


def replace(app: Sphinx, docname: str, source: list[str]) -> None:
    """The text of the page `docname`, with links that lead where the site has their targets."""
    file = DOCS / f"{docname}.md"
    if docname in PAGES:
        file = ROOT / PAGES[docname]
        app.env.note_dependency(str(file), docname=docname)
        source[0] = file.read_text(encoding="utf-8")
    # The site draws no mermaid: its text is readable, and docs/pictures has the diagrams.
    source[0] = source[0].replace("```mermaid", "```text")
    source[0] = relink(source[0], file.parent, (DOCS / docname).parent)


def relink(text: str, folder: Path, to: Path) -> str:
    """`text`, whose links are relative to `folder`, with links relative to `to`.

    A link to a file of the repository that no page shows becomes plain code: the site does not hold that file.
    """

    def one(match: re.Match[str]) -> str:
        before, target, anchor = match[1], match[2], match[3] or ""
        path = (folder / target).resolve()
        if path.is_dir() and (path / "README.md").exists():
            path = path / "README.md"
        if path in SHOWN:
            path = DOCS / SHOWN[path]
        elif not path.is_relative_to(DOCS) or path.is_dir():
            return f"`{path.relative_to(ROOT)}`" if path.is_relative_to(ROOT) else match[0]
        return f"{before}{os.path.relpath(path, to)}{anchor})"

    return LINK.sub(one, text)
