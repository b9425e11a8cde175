"""Checks that the commands, options, variables, paths and users in docker-compose.yml and the Dockerfiles exist."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
import yaml

from fedqueue.config.loading import load_config
from fedqueue.config.names import ENVIRONMENT_PREFIX
from fedqueue.tensors.blobs import CHUNK
from fedqueue_coordinator.cli.main import app as coordinator_app
from fedqueue_coordinator.operator.access.acl import (
    ACL_FILE,
    COORDINATOR,
    PASSWORD_FILE,
    SERVER_FOLDER,
    SHARED_WORKER,
    write_access_folders,
)
from fedqueue_coordinator.operator.access.enrolment import KEEPER_SITES
from fedqueue_keeper.cli import app as keeper_app
from fedqueue_worker.cli import app as worker_app
from tests.compose.run import CLIENT_EXPIRED

ROOT = Path(__file__).parents[1]
KEEPERS = ("university", "audit-office")
SERVICES = ("coordinator", "worker", *(f"keeper-{name}" for name in KEEPERS))
IMAGES = ("coordinator", "worker", "keeper")
OBSERVERS = ("prometheus", "grafana")
BUILT = ("keys", "access", *SERVICES)
APPS = {"fedqueue": coordinator_app, "fedqueue-worker": worker_app, "fedqueue-keeper": keeper_app}
INTERPOLATION = re.compile(r"(?<!\$)\$\{(\w+)(?::?([-?])([^}]*))?\}")
APP_FOLDER = PurePosixPath("/app")  # in the images; has the repository's `examples`


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    return dict(interpolated(yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))))


def interpolated(node: Any) -> Any:
    """Return `node` as compose reads it if only the required variables are set."""
    match node:
        case dict():
            return {key: interpolated(value) for key, value in node.items()}
        case list():
            return [interpolated(value) for value in node]
        case str():
            filled = INTERPOLATION.sub(lambda m: "given" if m[2] == "?" else m[3] or "", node)
            return filled.replace("$$", "$")
    return node


class Dockerfile:
    """Holds the instructions of a Dockerfile by stage."""

    def __init__(self, path: Path) -> None:
        text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
        lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
        self.instructions = [(name, " ".join(rest.split())) for name, rest in lines]
        starts = [i for i, (name, _) in enumerate(self.instructions) if name == "FROM"]
        ends = [*starts[1:], len(self.instructions)]
        self.stages = [self.instructions[a:b] for a, b in zip(starts, ends, strict=True)]

    def last(self, instruction: str) -> str:
        """Return the instruction's last value in the last stage, which becomes the image."""
        return [value for name, value in self.stages[-1] if name == instruction][-1]

    def stage_names(self) -> list[str]:
        return [stage[0][1].partition(" AS ")[2] for stage in self.stages]

    def copies(self) -> list[tuple[str, list[str]]]:
        """List (source stage, source paths) of each COPY; the stage is empty for a copy from the repository."""
        found = []
        for name, value in self.instructions:
            if name == "COPY":
                words = value.split()
                flags = [word for word in words if word.startswith("--")]
                origin = next((f.removeprefix("--from=") for f in flags if f.startswith("--from=")), "")
                found.append((origin, words[len(flags) : -1]))
        return found


@pytest.fixture(scope="module", params=SERVICES)
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dockerfile(service: str, stack: dict[str, Any]) -> Dockerfile:
    return Dockerfile(ROOT / stack["services"][service]["build"]["dockerfile"])


# Commands


def parse(program: str, arguments: list[str]) -> dict[str, Any]:
    """Return the parameters that the program parses from the arguments; raise the program's usage error."""
    command = typer.main.get_command(APPS[program])
    if subcommands := commands(APPS[program]):
        name, *arguments = arguments
        assert name in subcommands, f"{program} {name}: no such command; the commands are {', '.join(subcommands)}"
        command = subcommands[name]
    return dict(command.make_context(program, list(arguments)).params)


def test_entrypoint_is_a_script_of_the_project(dockerfile: Dockerfile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (program,) = json.loads(dockerfile.last("ENTRYPOINT"))  # the exec form, so that signals reach the program
    assert program in project["scripts"]
    assert program in APPS


def test_command_is_accepted_by_the_program(dockerfile: Dockerfile, stack: dict[str, Any], service: str) -> None:
    (program,) = json.loads(dockerfile.last("ENTRYPOINT"))
    for arguments in (json.loads(dockerfile.last("CMD")), stack["services"][service]["command"]):
        parameters = parse(program, arguments)
        config = ROOT / parameters["config"]
        assert config.is_file()
        assert config.relative_to(ROOT).parts[0] == "examples"  # the folder that is in the image


def test_worker_claims_any_free_partition(stack: dict[str, Any]) -> None:
    assert parse("fedqueue-worker", stack["services"]["worker"]["command"])["partition"] == ["auto"]


# Variables of the environment


def settings(stack: dict[str, Any], service: str) -> dict[str, str | None]:
    return dict(stack["services"][service]["environment"])


EXAMPLES: dict[str, str] = {
    "FEDQUEUE_NAME": "second",
    "FEDQUEUE_SEED": "1",
    "FEDQUEUE_CLIENTS__MIN_AVAILABLE": "2",
    "FEDQUEUE_TRAINING__LOCAL_EPOCHS": "2",
    "FEDQUEUE_STOP__VERSIONS": "10",
    "FEDQUEUE_STOP__SECONDS": "600",
    "FEDQUEUE_STOP__TARGET": "{accuracy = 0.9}",
    "FEDQUEUE_OBSERVABILITY__METRICS_ADDRESS": "0.0.0.0:9464",
    "FEDQUEUE_SECURE__KEEPERS": '["university", "audit-office"]',
}
"""A value for each setting that compose passes on."""


def test_every_setting_is_a_key_of_the_configuration(stack: dict[str, Any], service: str) -> None:
    environment = {name: value or EXAMPLES[name] for name, value in settings(stack, service).items()}
    assert all(name.startswith(ENVIRONMENT_PREFIX) for name in environment)
    config = load_config(ROOT / "examples/digits/federation.toml", environment=environment)
    assert config.redis.url == environment["FEDQUEUE_REDIS__URL"]
    assert config.redis.password_file == environment["FEDQUEUE_REDIS__PASSWORD_FILE"]
    assert len(config.clients.ids) == int(environment["FEDQUEUE_CLIENTS__COUNT"]) >= 12
    assert config.stop.target == {"accuracy": 0.9}
    assert config.secure.keepers == KEEPERS


def test_unknown_setting_is_an_error(stack: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="nosuch"):
        load_config(
            ROOT / "examples/digits/federation.toml",
            environment={**EXAMPLES, "FEDQUEUE_CLIENTS__NOSUCH": "1"},
        )


def test_each_part_has_its_own_user_and_the_file_no_password(stack: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    assert not re.search(r"REDIS_PASSWORD|requirepass|://[^@\s]*:[^@\s]*@", text)
    keepers = {f"keeper-{name}": f"keeper-{name}" for name in KEEPERS}
    for service, user in {"coordinator": COORDINATOR, "worker": SHARED_WORKER, **keepers}.items():
        url = urlsplit(settings(stack, service)["FEDQUEUE_REDIS__URL"])
        assert (url.scheme, url.username, url.password, url.port) == ("redis", user, None, 6379)
        assert stack["services"][service]["depends_on"][url.hostname] == {"condition": "service_healthy"}
        assert settings(stack, service)["FEDQUEUE_REDIS__PASSWORD_FILE"] == f"access/{user}/{PASSWORD_FILE}"


def test_each_part_mounts_only_its_own_secret(stack: dict[str, Any]) -> None:
    mounts = {name: part.get("volumes", []) for name, part in stack["services"].items()}
    held = {name: [mount for mount in of_part if mount.startswith("access")] for name, of_part in mounts.items()}
    assert held == {
        "keys": [],
        "access": [
            f"access:{APP_FOLDER}/access",
            *(f"access-{user}:{APP_FOLDER}/access/{user}" for user in (SERVER_FOLDER, COORDINATOR, SHARED_WORKER)),
            *(f"access-keeper-{name}:{APP_FOLDER}/access/keeper-{name}" for name in KEEPERS),
        ],
        "redis": ["access-server:/access:ro"],
        "coordinator": [f"access-coordinator:{APP_FOLDER}/access/coordinator:ro"],
        "worker": [f"access-worker:{APP_FOLDER}/access/worker:ro"],
        **{f"keeper-{name}": [f"access-keeper-{name}:{APP_FOLDER}/access/keeper-{name}:ro"] for name in KEEPERS},
        **{name: [] for name in OBSERVERS},
    }


def test_access_rules_are_written_before_redis_reads_them(stack: dict[str, Any], tmp_path: Path) -> None:
    redis = stack["services"]["redis"]
    assert redis["depends_on"] == {"access": {"condition": "service_completed_successfully"}}
    parameters = parse("fedqueue", stack["services"]["access"]["command"])
    assert parameters["shared_worker"]
    assert parameters["dir_per_user"]
    assert parameters["output"] == Path("access")
    write_access_folders(tmp_path, "digits", ["client-0"], shared_worker=True)
    for path in (f"/access/{ACL_FILE}", f"/access/{PASSWORD_FILE}"):
        assert path in str(redis["command"]) + str(redis["healthcheck"])
        assert (tmp_path / SERVER_FOLDER / Path(path).name).exists()
    assert f"\naclfile /access/{ACL_FILE}\n" in redis["command"][-1]
    assert "FEDQUEUE_NAME" in redis["environment"], "access rules differ by run, so a new run must restart Redis"


# Paths


def ignored(path: str) -> bool:
    """Whether .dockerignore excludes the path: it excludes everything, then allows some paths."""
    rules = [r for r in (ROOT / ".dockerignore").read_text().splitlines() if r and not r.startswith("#")]
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    return not any(fnmatch(path, rule) or path.startswith(f"{rule}/") for rule in allowed)


def test_copied_paths_exist_and_reach_the_build(dockerfile: Dockerfile) -> None:
    sources = [source for origin, paths in dockerfile.copies() if not origin for source in paths]
    assert "examples" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    assert {origin for origin, _ in dockerfile.copies() if origin} <= set(dockerfile.stage_names())


def test_every_package_of_the_wheel_is_copied(dockerfile: Dockerfile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    sources = {source for _, paths in dockerfile.copies() for source in paths}
    needed = {*project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], project["project"]["readme"]}
    assert needed | set(project["project"]["license-files"]) <= sources


def test_secrets_and_results_stay_out_of_the_build() -> None:
    for path in (".env", ".git", ".venv", "runs", "tests", "docker-compose.yml"):
        assert ignored(path)


def test_volumes_are_declared_and_writable(stack: dict[str, Any]) -> None:
    mounts = {name: part.get("volumes", []) for name, part in stack["services"].items()}
    named = [mount for all_ in mounts.values() for mount in all_ if not mount.startswith("./")]
    assert {mount.partition(":")[0] for mount in named} == set(stack["volumes"])
    coordinator = Dockerfile(ROOT / "coordinator/Dockerfile")
    assert coordinator.last("WORKDIR") == str(APP_FOLDER)
    # The defaults of --output and security.keys are relative to the working directory.
    assert mounts["coordinator"][:2] == [f"runs:{APP_FOLDER}/runs", f"keys:{APP_FOLDER}/keys:ro"]
    for name in BUILT:  # a new volume takes its owner from the image's folder at the mount point
        image = Dockerfile(ROOT / stack["services"][name]["build"]["dockerfile"])
        made = next(value for kind, value in image.stages[-1] if kind == "RUN" and "mkdir" in value)
        folders, given = (set(part.split()) for part in made.split("chown"))
        for mount in mounts[name]:
            folder = PurePosixPath(mount.split(":")[1])
            assert str(folder) in folders or any(f.startswith(f"{folder}/") for f in folders), f"{folder} is missing"
            assert given & {str(folder), str(folder.parent)}, f"{folder} is not the user's"


def test_keys_are_made_first_and_private_ones_stay_apart(stack: dict[str, Any]) -> None:
    for name in SERVICES:
        assert stack["services"][name]["depends_on"]["keys"] == {"condition": "service_completed_successfully"}
    mounts = {name: part.get("volumes", []) for name, part in stack["services"].items()}
    assert not [mount for mount in mounts["worker"] if mount.startswith("keys:")], "a worker has the coordinator's keys"
    assert not [mount for mount in mounts["redis"] if "keys" in mount]
    assert not [mount for mount in mounts["access"] if "keys" in mount]
    folder = settings(stack, "worker")["FEDQUEUE_SECURITY__KEYS"]
    assert f"site-keys:{APP_FOLDER}/{folder}:ro" in mounts["worker"]
    parse("fedqueue", stack["services"]["keys"]["command"])
    assert stack["services"]["keys"]["command"][-1] == folder


def test_each_keeper_has_a_key_and_a_log_of_its_own(stack: dict[str, Any]) -> None:
    mounts = {name: part.get("volumes", []) for name, part in stack["services"].items()}
    for name in KEEPERS:
        service = f"keeper-{name}"
        assert stack["services"][service]["profiles"] == ["keepers"]
        assert parse("fedqueue-keeper", stack["services"][service]["command"])["name"] == name
        folder = settings(stack, service)["FEDQUEUE_SECURITY__KEYS"]
        assert [m for m in mounts[service] if "access" not in m] == [f"{service}:{APP_FOLDER}/{folder}"]
        holders = {part for part, held in mounts.items() if any(m.startswith(f"{service}:") for m in held)}
        assert holders == {"keys", service}
        assert f"{service}:{APP_FOLDER}/keys/{KEEPER_SITES}/{name}" in mounts["keys"]


def test_redis_writes_where_its_volume_is(stack: dict[str, Any]) -> None:
    mounts = {name: part.get("volumes", []) for name, part in stack["services"].items()}
    folder = mounts["redis"][0].partition(":")[2]
    assert f"dir {folder}\n" in stack["services"]["redis"]["command"][-1]


# The images


def test_image_runs_as_an_unprivileged_user(dockerfile: Dockerfile, stack: dict[str, Any], service: str) -> None:
    user = dockerfile.last("USER")
    assert re.fullmatch(r"([1-9]\d{3,}):\1", user), user
    created = next(value for name, value in dockerfile.stages[-1] if name == "RUN" and value.startswith("useradd"))
    words = shlex.split(created)
    assert words[words.index("--uid") + 1] == user.partition(":")[0]
    assert "user" not in stack["services"][service]
    assert stack["services"]["redis"]["user"] == "redis"


@pytest.mark.parametrize("name", ["redis", *BUILT])
def test_every_service_is_hardened(stack: dict[str, Any], name: str) -> None:
    part = stack["services"][name]
    assert part["read_only"] is True
    assert part["cap_drop"] == ["ALL"]
    assert part["security_opt"] == ["no-new-privileges:true"]
    assert part["init"] is True
    assert "ports" not in part


def test_observers_start_on_demand_and_on_loopback(stack: dict[str, Any]) -> None:
    for name in OBSERVERS:
        part = stack["services"][name]
        assert part["profiles"] == ["observe"]
        assert (part["read_only"], part["cap_drop"]) == (True, ["ALL"])
        assert all(port.startswith("127.0.0.1:") for port in part.get("ports", []))
        assert all((ROOT / mount.split(":")[0]).exists() for mount in part["volumes"] if mount.startswith("./"))


def test_prometheus_scrapes_every_part_that_has_metrics(stack: dict[str, Any]) -> None:
    jobs = yaml.safe_load((ROOT / "observe" / "prometheus.yml").read_text())["scrape_configs"]
    found = [found for job in jobs for found in job["dns_sd_configs"]]
    assert {name for one in found for name in one["names"]} == set(SERVICES)
    assert {one["port"] for one in found} == {9464}


def test_server_refuses_values_larger_than_a_chunk(stack: dict[str, Any]) -> None:
    assert f"\nproto-max-bulk-len {CHUNK}\n" in stack["services"]["redis"]["command"][-1]


def test_images_are_built_by_the_same_steps() -> None:
    """With equal steps the engine builds them once, and the images share the layer that has torch."""
    worker = Dockerfile(ROOT / "worker" / "Dockerfile")
    shared = [i for i, (name, _) in enumerate(worker.stages[-1]) if name == "COPY"][-1]
    for image in (Dockerfile(ROOT / name / "Dockerfile") for name in IMAGES):
        assert image.stages[:-1] == worker.stages[:-1]
        assert image.stages[-1][: shared + 1] == worker.stages[-1][: shared + 1]


def test_only_the_coordinators_image_has_plots_and_numba() -> None:
    coordinator, worker, keeper = (Dockerfile(ROOT / name / "Dockerfile") for name in IMAGES)
    copied = ("COPY", "--from=coordinator-extras /extras/ /")
    assert copied in coordinator.stages[-1]
    assert copied not in worker.stages[-1] + keeper.stages[-1]


def test_torch_is_the_cpu_build_unless_told_otherwise(dockerfile: Dockerfile, stack: dict[str, Any]) -> None:
    arguments = dict(value.split("=", 1) for name, value in dockerfile.instructions if name == "ARG")
    assert arguments["TORCH_BACKEND"] == "cpu"
    for service in SERVICES:
        build = stack["services"][service]["build"]
        assert build["args"].keys() <= arguments.keys()
        assert build["args"]["TORCH_BACKEND"] == "cpu"


def test_versions_are_the_pinned_ones(dockerfile: Dockerfile) -> None:
    installs = [
        part
        for name, value in dockerfile.instructions
        if name == "RUN"
        for part in re.split(r"&&|;", value)
        if "install" in part.split() and "uv==" not in part and "--no-deps" not in part
    ]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in part for part in installs)


# The documentation


def compose_variables() -> set[str]:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    passed = yaml.safe_load(text)["x-settings"]
    return {match[1] for match in INTERPOLATION.finditer(text)} | set(passed)


def test_documented_variables_and_commands_exist() -> None:
    text = (ROOT / "docs/docker.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:FEDQUEUE_\w+|[A-Z]{3,}_[A-Z]+)\b", text)) - {"FEDQUEUE_SECTION__KEY"}
    given = {"FEDQUEUE_REDIS__PASSWORD_FILE", "FEDQUEUE_SECURITY__KEYS", "REDISCLI_AUTH"}  # set in the file itself
    assert named - given == compose_variables() - {"CONFIG"}
    assert all(name in (ROOT / "docker-compose.yml").read_text(encoding="utf-8") for name in given)
    assert "`CONFIG`" in text
    used = {*re.findall(r"`fedqueue (\w+)", text), *re.findall(r"exec coordinator fedqueue (\w+)", text)}
    assert used == {"init", "status"}
    assert used <= commands(coordinator_app).keys()


def commands(app: typer.Typer) -> dict[str, Any]:
    return getattr(typer.main.get_command(app), "commands", {})  # a program with a single command has no subcommands


def test_coordinator_logs_what_the_compose_test_looks_for() -> None:
    """`make compose-test` searches the log for a lease that expired although its worker was told to stop."""
    source = (ROOT / "coordinator/fedqueue_coordinator/service/portions.py").read_text(encoding="utf-8")
    assert all(f'"{text}"' in source for text in CLIENT_EXPIRED)
