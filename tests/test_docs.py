"""What the documents say is what there is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])


def test_configuration_page_is_what_the_configuration_says():
    path = ROOT / "docs" / "make_configuration.py"
    spec = importlib.util.spec_from_file_location("make_configuration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "configuration.md").read_text() == module.page(), "run docs/make_configuration.py"


def test_every_option_is_documented():
    plain = {"optimizer", "learning_rate", "batch_size", "mode", "function", "versions", "updates", "seconds", "name"}
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    assert len(rows) > 60
    assert not [name for name, text in rows if not text.strip() and name not in plain | {"seed", "max_steps"}]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_protocol_names_every_script_and_every_key():
    protocol = (ROOT / "PROTOCOL.md").read_text()
    for script in (ROOT / "shared" / "fedqueue" / "transport" / "scripts").glob("*.lua"):
        assert f"`{script.stem}`" in protocol, script.stem
    keys = (ROOT / "shared" / "fedqueue" / "protocol" / "keys.py").read_text()
    for name in re.findall(r'self\._key\(f?"(\w+)', keys):
        assert re.search(rf"`{name}[`:]", protocol), name


def test_every_script_says_its_keys_arguments_and_answer():
    for script in (ROOT / "shared" / "fedqueue" / "transport" / "scripts").glob("*.lua"):
        text = script.read_text()
        head = "\n".join(line for line in text.splitlines() if line.startswith("--"))
        body = "\n".join(line for line in text.splitlines() if not line.startswith("--"))
        assert re.search(r"^-- (Returns|What)", head, re.MULTILINE), script.name
        for kind in ("KEYS", "ARGV"):
            used = {int(n) for n in re.findall(rf"{kind}\[(\d+)\]", body)}
            said = {int(n) for n in re.findall(rf"{kind}\[(\d+)[…\]]", head)}
            assert used <= said, f"{script.name}: {kind} {sorted(used - said)} not in its header"
