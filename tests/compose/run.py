"""Runs `make compose-test`: builds, runs, scales, kills, stops and resumes a whole federation in containers.

Needs a Docker engine and docker compose (v2, or docker-compose 1.29). Without them, or without the base images, it
prints the reason and exits with 0. It removes everything that it starts, including images and volumes, all of which
have unique names.

The images are built as docker-compose.yml says: TORCH_BACKEND and PIP_ARGS in the environment choose where torch and
the other packages come from.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yml"
DOCKERFILES = tuple(ROOT / part / "Dockerfile" for part in ("coordinator", "worker", "keeper"))

RUN = "elastic"
MASKED_RUN = "masked"
LEASE_SECONDS = 10.0  # the default of dispatch.lease_seconds: a killed worker's client expires after it
PULL_SECONDS, BUILD_SECONDS = 300, 1800
PATIENCE = 120.0  # seconds to wait for an event of the run; an import of torch is slow on a loaded machine
OUT_OF_REACH = "{accuracy = 1.01}"
WITHIN_REACH = "{accuracy = 0.9}"
CLIENT_EXPIRED = ("lease of client expired", "leases of clients expired")
"""What a coordinator logs when a client's worker is missing: test_compose_file.py checks that it still does."""
AS_ADMIN = "REDISCLI_AUTH=$(cat /access/redis.password) redis-cli --user admin"  # in the container of Redis

STARTED = time.monotonic()


class Unavailable(Exception):
    """Docker, compose or an image is missing on this machine."""


def say(message: str) -> None:
    print(f"{time.monotonic() - STARTED:7.1f} s  {message}", flush=True)  # noqa: T201


def execute(
    command: list[str], seconds: float = PATIENCE, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


def docker(*arguments: str, seconds: float = PATIENCE) -> str:
    """Return the output of a docker command; raise an error if the command fails."""
    done = execute(["docker", *arguments], seconds)
    if done.returncode:
        raise AssertionError(f"docker {' '.join(arguments)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout.strip()


# Requirements


def require_engine() -> list[str]:
    """Return this machine's compose command; raise Unavailable if there is no engine or no compose."""
    if not shutil.which("docker"):
        raise Unavailable("there is no docker command")
    # Without a server, some clients print an error and exit with 0: ask for a value that only the server has.
    try:
        info = execute(["docker", "info", "--format", "{{.ServerVersion}}"], 20)
    except subprocess.TimeoutExpired:
        raise Unavailable("the Docker engine does not answer within 20 s") from None
    if info.returncode or not info.stdout.strip():
        raise Unavailable(f"no Docker engine answers: {(info.stderr or info.stdout).strip().splitlines()[-1]}")
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and execute([*command, "version"], 20).returncode == 0:
            version = execute([*command, "version", "--short"], 20).stdout.strip()
            say(f"Docker {info.stdout.strip()}, {' '.join(command)} {version}")
            return command
    raise Unavailable("neither docker compose nor docker-compose is installed")


def require_base_images() -> None:
    """Pull each missing image that the test starts; raise Unavailable if that fails."""
    services = yaml.safe_load(COMPOSE_FILE.read_text())["services"].values()
    images = {service["image"] for service in services if "image" in service and "profiles" not in service}
    for path in DOCKERFILES:
        images |= set(re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", path.read_text(), re.MULTILINE))
    for image in sorted(images):
        if execute(["docker", "image", "inspect", image]).returncode == 0:
            continue
        say(f"pulling {image}")
        try:
            pull = execute(["docker", "pull", "--quiet", image], PULL_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{image} is missing, and pulling it takes more than {PULL_SECONDS} s") from None
        if pull.returncode:
            raise Unavailable(f"{image} is missing, and cannot be pulled: {pull.stderr.strip().splitlines()[-1]}")


# The stack


class Stack:
    """One project of docker compose, with settings that can change between two `up`s."""

    def __init__(self, compose: list[str], folder: Path) -> None:
        self.project = f"fedqueue-test-{secrets.token_hex(4)}"
        self._env_file = folder / "env"
        self._compose = [
            *compose, "--project-name", self.project, "--file", str(COMPOSE_FILE), "--env-file", str(self._env_file),
        ]  # fmt: skip
        # Drop the caller's own settings, except those that choose the source of packages.
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith(("FEDQUEUE_", "COMPOSE_"))}
        self._environment.pop("CONFIG", None)
        self._settings = {"FEDQUEUE_NAME": RUN}

    def configure(self, **settings: str) -> None:
        self._settings |= settings
        self._env_file.touch(mode=0o600)
        self._env_file.write_text("".join(f"{name}={value}\n" for name, value in self._settings.items()))

    def compose(self, *arguments: str, seconds: float = PATIENCE) -> str:
        done = execute([*self._compose, *arguments], seconds, self._environment)
        if done.returncode:
            raise AssertionError(f"compose {' '.join(arguments)}:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
        return done.stdout

    def scale(self, workers: int) -> None:
        """Change the number of workers of the running stack, as a user does."""
        self.compose("up", "--detach", "--no-recreate", "--no-deps", "--scale", f"worker={workers}", "worker")

    def containers(self, service: str, *, all_: bool = False) -> list[str]:
        filters = [f"label=com.docker.compose.project={self.project}", f"label=com.docker.compose.service={service}"]
        flags = ["--all"] if all_ else []
        return docker("ps", "--quiet", *flags, *(w for f in filters for w in ("--filter", f))).split()

    def container(self, service: str) -> str:
        (only,) = self.containers(service, all_=True)
        return only

    def status(self) -> dict[str, Any]:
        """Return the output of `fedqueue status` in the coordinator's container; empty before the run exists."""
        done = execute(["docker", "exec", self.container("coordinator"), "fedqueue", "status", "--json"])
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def version(self) -> int:
        return int(self.status().get("version", -1))

    def alive(self) -> int:
        return len(self.status().get("clients_alive", []))

    def abandoned(self) -> dict[str, int]:
        return dict(self.status().get("jobs_abandoned", {}))

    def exit_codes(self) -> dict[str, str]:
        """Return the exit codes of the coordinator and the workers, by container name."""
        containers = [c for service in ("coordinator", "worker") for c in self.containers(service, all_=True)]
        return {inspect(c, ".Name"): inspect(c, ".State.ExitCode") for c in containers}

    def logs(self) -> str:
        return "\n".join(
            f"--- {inspect(container, '.Name')}\n" + "\n".join(output(container)[-25:])
            for service in ("redis", "coordinator", "worker", "keeper-university", "keeper-audit-office")
            for container in self.containers(service, all_=True)
        )

    def remove(self) -> None:
        say("removing containers, networks, volumes and images")
        self.compose("down", "--volumes", "--remove-orphans", "--rmi", "local", "--timeout", "10")
        label = f"label=com.docker.compose.project={self.project}"
        for kind in ("container", "volume", "network"):
            flags = ["--all"] if kind == "container" else []
            assert not docker(kind, "ls", "--quiet", *flags, "--filter", label), f"a {kind} was not removed"


def output(container: str) -> list[str]:
    """Return all lines that the container wrote, across restarts."""
    done = execute(["docker", "logs", container])
    return (done.stdout + done.stderr).splitlines()


def inspect(container: str, what: str) -> str:
    return docker("inspect", "--format", "{{" + what + "}}", container)


def until(what: str, holds: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until `holds()` is true, and return its value; raise AssertionError after `seconds`."""
    started = time.monotonic()
    while not (value := holds()):
        if time.monotonic() - started > seconds:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(0.5)
    say(f"{what}: after {time.monotonic() - started:.1f} s")
    return value


def until_merging(stack: Stack, versions: int = 3) -> None:
    """Wait until `versions` more versions exist."""
    first = stack.version()
    until(f"version {first} + {versions} is merged", lambda: stack.version() >= first + versions)


# The steps of the test


def build(stack: Stack) -> None:
    say("building the images; TORCH_BACKEND and PIP_ARGS say where their packages come from (docs/docker.md)")
    started = time.monotonic()
    stack.compose("build", seconds=BUILD_SECONDS)
    say(f"built in {time.monotonic() - started:.0f} s")


def check_hardening(stack: Stack) -> None:
    """Check that no container runs as root, can write to its image, or has a capability, and that Redis has no port."""
    for service in ("redis", "coordinator", "worker"):
        container = stack.containers(service)[0]
        status = docker("exec", container, "cat", "/proc/1/status")
        user = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
        bounding = re.search(r"^CapBnd:\s+(\w+)", status, re.MULTILINE)
        assert user, status
        assert int(user[1]) != 0, f"{service} runs as root"
        assert bounding, status
        assert int(bounding[1], 16) == 0, f"{service} may get capabilities {bounding[1]}"
        wrote = execute(["docker", "exec", container, "sh", "-c", "touch /opt/x /x || touch /usr/x"]).returncode == 0
        assert not wrote, f"{service} can write to its image"
        assert inspect(container, "json .NetworkSettings.Ports") in ("{}", '{"6379/tcp":null}'), service
        size = int(docker("image", "inspect", "--format", "{{.Size}}", inspect(container, ".Image")))
        say(f"{service}: user {user[1]}, no capabilities, read-only root; image of {size / 1e6:.0f} MB")
    refused = docker("exec", stack.container("redis"), "redis-cli", "ping")
    assert "NOAUTH" in refused, f"Redis answers without a password: {refused}"


FORBIDDEN = f"""
import os, redis
password = open(os.environ["FEDQUEUE_REDIS__PASSWORD_FILE"]).read().strip()
server = redis.Redis("redis", username="worker", password=password, driver_info=None)
run, denied = "fedqueue:{{{RUN}}}:", []
assert server.ping() and server.hget(run + "head", "version"), "it may read the head"
for command in (
    "FLUSHALL", "FLUSHDB", "CONFIG GET *", "CONFIG SET requirepass x", "KEYS *", "SCAN 0", "ACL LIST", "CLIENT LIST",
    "SHUTDOWN NOSAVE", "EVAL return(1) 0", "SCRIPT FLUSH", "MONITOR",
    f"SET {{run}}model:1:0 poison", f"DEL {{run}}model:1:0", f"HSET {{run}}head version 0", f"DEL {{run}}leader",
    f"XADD {{run}}ledger * record x", f"XRANGE {{run}}ledger - +", f"HSET {{run}}config state ended",
    f"XADD {{run}}updates: * kind evaluated", f"RPUSH rq:queue:fedqueue-{RUN}-client-0 job",
):
    try:
        server.execute_command(*command.split())
        raise SystemExit(f"allowed: {{command}}")
    except redis.exceptions.NoPermissionError:
        denied.append(command)
for user in ("coordinator", "admin", "worker-client-0", "default"):
    try:
        redis.Redis("redis", username=user, password=password, driver_info=None).ping()
        raise SystemExit(f"logged in as {{user}}")
    except redis.exceptions.AuthenticationError:
        pass
print(len(denied), os.listdir("access"))
"""


def check_access(stack: Stack) -> None:
    """Check that a worker's secrets allow neither a login as another user nor more than a worker's work."""
    denied = docker("exec", stack.container("redis"), "sh", "-c", f"{AS_ADMIN} acl log")
    assert not denied, f"Redis denied commands that a part needs:\n{denied}"
    done = execute(["docker", "exec", stack.containers("worker")[0], "python", "-c", FORBIDDEN])
    assert done.returncode == 0, done.stdout + done.stderr
    count, _, folders = done.stdout.strip().partition(" ")
    assert folders == "['worker']", folders
    say(f"no needed command was denied; all {count} forbidden commands that were tried are denied to a worker's user")


def check_changed_rules_are_loaded(stack: Stack) -> None:
    """Check that Redis loads changed access rules without a restart, as after an upgrade."""
    who = "user visitor on nopass -@all +ping"
    stack.compose(
        "run", "--rm", "--no-deps", "--entrypoint", "sh", "access", "-c", f"echo '{who}' >> access/server/users.acl"
    )

    def known() -> bool:
        return "visitor" in docker("exec", stack.container("redis"), "sh", "-c", f"{AS_ADMIN} acl users")

    until("Redis has loaded changed rules", known)
    until_merging(stack)
    stack.compose("run", "--rm", "--no-deps", "access")
    until("Redis has loaded the rules that the service writes", lambda: not known())
    until_merging(stack)


def scale(stack: Stack) -> None:
    """Add and remove workers while they train; a worker that is told to stop hands its job back at once."""
    stack.scale(6)
    until("6 workers hold a partition each", lambda: stack.alive() == 6)
    until_merging(stack)
    until("all six have contributed", lambda: len(stack.status()["clients"]) >= 6)
    stack.scale(3)
    until("3 workers are left", lambda: stack.alive() == 3)
    assert len(stack.containers("worker")) == 3
    until_merging(stack)
    expired = [line for line in output(stack.container("coordinator")) if any(text in line for text in CLIENT_EXPIRED)]
    assert not expired, f"a worker that was told to stop let its lease expire: {expired}"
    say(f"jobs abandoned so far: {stack.abandoned()}")


def kill(stack: Stack) -> str:
    """Kill one worker for good, and crash another one and the coordinator, which Docker restarts. Merging continues.

    Returns the client that the killed worker served.
    """
    container = stack.containers("worker")[0]
    killed = served_by(container)[-1]
    docker("kill", container)
    until_merging(stack)
    until(f"{killed}, whose worker was killed, has expired", lambda: stack.alive() == 2, 3 * LEASE_SECONDS)
    until_merging(stack)

    crashed = stack.containers("worker")[0]
    crash(crashed)
    until("the crashed worker is restarted", lambda: inspect(crashed, ".RestartCount") == "1")
    before, after = until("and serves a client again", lambda: len(c := served_by(crashed)) == 2 and c)
    until(
        f"{after} is served, and {before} only until its lease expired", lambda: stack.alive() == 2, 3 * LEASE_SECONDS
    )
    until_merging(stack)

    coordinator = stack.container("coordinator")
    crash(coordinator)
    until("the crashed coordinator is restarted", lambda: inspect(coordinator, ".RestartCount") == "1")
    until_merging(stack)
    say(f"jobs abandoned so far: {stack.abandoned()}")
    return killed


def stop_and_resume(stack: Stack) -> None:
    """Stop and restart all containers, whose state is on the volumes, then set a target that the run can reach."""
    version = stack.version()
    stack.compose("stop")
    codes = {name: code for name, code in stack.exit_codes().items() if code != "137"}  # not the killed worker
    assert set(codes.values()) == {"0"}, codes
    say(f"stopped at version {version} or later; all {len(codes)} processes exited with 0")
    stack.compose("up", "--detach", "--no-recreate", "--scale", "worker=4")
    until(f"the run continues from version {version}", lambda: stack.version() >= version)
    until("4 workers hold a partition each", lambda: stack.alive() == 4)
    until_merging(stack)

    stack.configure(FEDQUEUE_STOP__TARGET=WITHIN_REACH)
    stack.compose("up", "--detach", "--scale", "worker=4")
    coordinator = stack.container("coordinator")
    until("the run reaches its target", lambda: inspect(coordinator, ".State.Status") == "exited")
    assert any("resumed" in line for line in output(coordinator)), "the coordinator did not resume"
    until("the workers exit by themselves", lambda: not stack.containers("worker"))
    codes = stack.exit_codes()
    assert set(codes.values()) == {"0"}, codes


def crash(container: str) -> None:
    """End every process of the container except PID 1, which then ends with the same status."""
    execute(["docker", "exec", container, "sh", "-c", "kill -9 -1"])


def served_by(container: str) -> list[str]:
    """Return the clients that the container's worker has served, one for each start."""
    return re.findall(r"ready +clients=\['([\w-]+)'\]", "\n".join(output(container)))


def check_results(stack: Stack, folder: Path, killed: str) -> None:
    """Check that the results are complete and agree with each other and with the steps of the test."""
    docker("cp", f"{stack.container('coordinator')}:/app/runs/{RUN}", str(folder))
    results = folder / RUN
    for name in ("summary.json", "model.safetensors", "ledger.jsonl", "report.png"):
        assert (results / name).stat().st_size > 0, f"{name} is empty"
    summary = json.loads((results / "summary.json").read_text())
    ledger = [json.loads(line) for line in (results / "ledger.jsonl").read_text().splitlines()]
    versions = [record for record in ledger if record["kind"] == "version"]
    merged = [line for record in versions for line in record["merged"]]
    assert [record["version"] for record in versions] == list(range(1, summary["versions"] + 1))
    assert len(merged) == summary["updates_merged"] == sum(summary["clients"].values())
    assert len({line["job"] for line in merged}) == len(merged), "a job was merged twice"
    assert len(summary["clients"]) >= 6, summary["clients"]
    assert summary["stopped_because"].startswith("target: accuracy"), summary["stopped_because"]
    assert max(h["accuracy"] for h in summary["history"]) >= 0.9
    assert "epoch_lost" not in summary["abandoned_because"], "Redis lost the run"
    assert any(r["kind"] == "abandoned" and r["client"] == killed for r in ledger), f"{killed} had no job to lose"
    say(
        f"{summary['versions']} versions of {summary['updates_merged']} updates from {len(summary['clients'])} clients "
        f"in {summary['seconds']:.0f} s; abandoned {summary['abandoned_because']}, "
        f"rejected {summary['updates_rejected']}; {summary['stopped_because']}"
    )


def kill_a_keeper(stack: Stack) -> None:
    """Run with two keepers, kill one of them while versions are made, start it again, and audit the run."""
    stack.configure(
        FEDQUEUE_NAME=MASKED_RUN, FEDQUEUE_SECURE__KEEPERS='["university", "audit-office"]',
        FEDQUEUE_TRAINING__LOCAL_EPOCHS="1", FEDQUEUE_CLIENTS__COUNT="4",
    )  # fmt: skip
    stack.compose("--profile", "keepers", "up", "--detach", "--scale", "worker=4")
    until("4 workers hold a partition each", lambda: stack.alive() == 4)
    until_merging(stack)
    keeper = stack.container("keeper-university")
    docker("kill", keeper)
    until("the run waits for the keeper", lambda: "keeper university" in stack.status().get("waiting", ""))
    version = stack.version()
    docker("start", keeper)
    until(f"the run continues from version {version}", lambda: stack.version() > version)
    until_merging(stack)
    denied = docker("exec", stack.container("redis"), "sh", "-c", f"{AS_ADMIN} acl log")
    assert not denied, f"Redis denied commands that a part needs:\n{denied}"
    stack.configure(FEDQUEUE_STOP__TARGET=WITHIN_REACH)
    stack.compose("--profile", "keepers", "up", "--detach", "--scale", "worker=4")
    coordinator = stack.container("coordinator")
    until("the run reaches its target", lambda: inspect(coordinator, ".State.Status") == "exited")
    until("the keepers exit by themselves", lambda: not stack.containers("keeper-university"))
    audited = stack.compose("run", "--rm", "--no-deps", "coordinator", "audit", f"runs/{MASKED_RUN}")
    assert "no violations" in audited, audited
    say(audited.strip().splitlines()[-1])


@contextlib.contextmanager
def running_stack(compose: list[str], folder: Path) -> Iterator[Stack]:
    """Yield a stack, and remove it afterwards; on an error, print its logs first."""
    stack = Stack(compose, folder)
    # Jobs are long, so that a worker is nearly always training when it is stopped.
    stack.configure(
        FEDQUEUE_STOP__TARGET=OUT_OF_REACH, FEDQUEUE_STOP__SECONDS="900", FEDQUEUE_TRAINING__LOCAL_EPOCHS="50"
    )  # fmt: skip
    try:
        yield stack
    except BaseException:
        with contextlib.suppress(Exception):
            say(f"the last lines of every container:\n{stack.logs()}")
        raise
    finally:
        stack.remove()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is removed
    try:
        compose = require_engine()
        require_base_images()
    except Unavailable as reason:
        say(f"SKIP: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as name, running_stack(compose, Path(name)) as stack:
        build(stack)
        stack.compose("up", "--detach", "--scale", "worker=4")
        until("4 workers hold a partition each", lambda: stack.alive() == 4)
        until_merging(stack)
        check_hardening(stack)
        check_access(stack)
        check_changed_rules_are_loaded(stack)
        scale(stack)
        killed = kill(stack)
        stop_and_resume(stack)
        check_results(stack, Path(name), killed)
    with tempfile.TemporaryDirectory() as name, running_stack(compose, Path(name)) as stack:
        build(stack)  # the layers are there already
        kill_a_keeper(stack)
    say("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
