"""One server with access control for all tests of a module, with a run in progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import pytest

from fedqueue.errors import ServerUnavailable
from tests.support.acl_server import CLIENTS, KEEPERS, AclServer, GuardedRun


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., AclServer]]:
    servers = []

    def start(shared_worker: bool = False, keepers: Sequence[str] = ()) -> AclServer:
        try:
            folder = tmp_path_factory.mktemp("acl")
            servers.append(AclServer(folder, "sample", CLIENTS, shared_worker, keepers=keepers))
        except ServerUnavailable as error:
            if os.environ.get("CI"):
                pytest.fail(f"CI must run these tests: {error}")
            pytest.skip(str(error))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def guarded(start_server: Callable[..., AclServer]) -> AclServer:
    return start_server(keepers=KEEPERS)


@pytest.fixture
def led(guarded: AclServer) -> GuardedRun:
    return GuardedRun(guarded)
