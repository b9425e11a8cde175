"""Settings of the documentation site; `make docs` builds it. Needs no network."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_ext"))

from fedqueue import __version__  # noqa: E402

project = "fedqueue"
_metadata = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
author = ", ".join(person["name"] for person in _metadata["authors"])
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "repository_pages",
    "generated_reference",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
highlight_language = "none"  # an indented block is often a command or a formula; a fenced block names its language
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|np|npt|pydantic|collections|pathlib|typing|structlog|annotated_types)(\..*)?"),
    # Names that a signature shows and that are no part of the public API.
    (r"py:.*", r"(fedqueue|fedqueue_coordinator|fedqueue_worker|fedqueue_keeper)\..*"),
    (r"py:.*", r"[A-Za-z_]+(\[.*)?"),
]

myst_enable_extensions = ["colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # CHANGELOG and generated pages may skip a level

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
smartquotes = False  # `--option` keeps its two hyphens
copybutton_prompt_text = "$ "

html_theme = "furo"
html_title = f"fedqueue {release}"
html_static_path = ["_static"]
html_css_files = ["fedqueue.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5f99", "color-brand-content": "#1f5f99"},
    "dark_css_variables": {"color-brand-primary": "#7ab8f5", "color-brand-content": "#7ab8f5"},
}
