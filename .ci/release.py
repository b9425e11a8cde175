"""`make release-check`: whether this commit can be released under its version; RELEASING.md has all steps.

Prints every problem and exits with 1 if there is one: a tag that is not the version, a changelog without the version,
a placeholder that was never filled in, or authors that differ between pyproject.toml and CITATION.cff.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACEHOLDER = "github.com/OWNER/"
PLACEHOLDER_AUTHOR = "The fedqueue authors"


def main() -> int:
    found = problems(ROOT, os.environ.get("GITHUB_REF_NAME", ""))
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


def problems(root: Path, tag: str) -> list[str]:
    """Return what is wrong with a release of `root` under `tag`; an empty tag is not compared."""
    found = []
    version = version_of(root)
    if tag.startswith("v") and tag != f"v{version}":
        found.append(f"the tag is {tag}, but shared/fedqueue/__init__.py says {version}")
    if not re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", version):
        found.append(f"version {version} is not MAJOR.MINOR.PATCH")
    if f"## [{version}]" not in (root / "CHANGELOG.md").read_text(encoding="utf-8"):
        found.append(f"CHANGELOG.md has no section ## [{version}]")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, url in project["urls"].items():
        if PLACEHOLDER in url:
            found.append(f"pyproject.toml: project.urls.{name} is still a placeholder")
    authors = [author["name"] for author in project["authors"]]
    if PLACEHOLDER_AUTHOR in authors:
        found.append("pyproject.toml: project.authors is still a placeholder")
    cited = cited_authors((root / "CITATION.cff").read_text(encoding="utf-8"))
    if cited != authors:
        found.append(f"CITATION.cff names the authors {cited}, but pyproject.toml names {authors}")
    return found


def cited_authors(text: str) -> list[str]:
    """Return the authors that a CITATION.cff lists, each by `name`, or by `given-names` and `family-names`."""
    _, _, after = text.partition("\nauthors:\n")
    section = re.split(r"^\w", after, maxsplit=1, flags=re.MULTILINE)[0]
    names = []
    for entry in section.split("  - ")[1:]:
        fields = dict(re.findall(r'^ *([\w-]+): *"?(.*?)"?$', entry, re.MULTILINE))
        names.append(fields.get("name") or f"{fields.get('given-names', '')} {fields.get('family-names', '')}".strip())
    return names


def version_of(root: Path) -> str:
    """Return the version, which stands in one place."""
    text = (root / "shared" / "fedqueue" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    return found[1]


if __name__ == "__main__":
    sys.exit(main())
