"""TLS with a private CA and client certificates, to a real server behind a port that accepts TLS only."""

from __future__ import annotations

import datetime
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from cryptography import x509
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool
from typer.testing import CliRunner, Result

from fedqueue.config.tls import Tls
from fedqueue.errors import ConfigurationError, ServerUnavailable
from fedqueue.transport.connection import check, connect
from fedqueue_coordinator.cli.main import app
from fedqueue_coordinator.operator.access.certificates import write_certificates
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from tests.support.sample_run import SampleRun
from tests.support.tls_proxy import TlsProxy

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fill `good` with a CA, `server`, `elsewhere` (for another server name) and `client`; `other` has another CA."""
    root = tmp_path_factory.mktemp("certs")
    write_certificates(root / "good", ["localhost", "127.0.0.1"], ["client"], 30)
    write_certificates(root / "other", ["localhost"], ["client"], 30)
    with pytest.MonkeyPatch.context() as patch:

        class Past(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)

        patch.setattr(datetime, "datetime", Past)
        write_certificates(root / "expired-ca", ["localhost"], ["client"], 30)
        for name, hosts in (("expired", ["localhost"]), ("elsewhere", ["redis.example.org"])):
            if name == "elsewhere":
                patch.undo()
            target = root / name
            target.mkdir()
            for file in ("ca.pem", "ca.key"):
                (target / file).write_bytes((root / "good" / file).read_bytes())
            write_certificates(target, hosts, ["client"], 30)
    return root


def tls(folder: Path, ca: str = "good", client: str | None = "good") -> Tls:
    ca_file = str(folder / ca / "ca.pem") if ca else ""
    pair = (str(folder / client / "client.pem"), str(folder / client / "client.key")) if client else ()
    return Tls(ca_file, *pair)


@pytest.fixture
def proxy(server: EmbeddedServer, folder: Path) -> Iterator[Callable[..., Any]]:
    started = []

    def start(of: str = "good") -> TlsProxy:
        started.append(TlsProxy(server.url.removeprefix("unix://"), folder / of))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_update_passes_through_tls_from_dispatch_to_merge(
    server_client: redis.Redis, proxy: Callable[..., Any], folder: Path
) -> None:
    client = connect(proxy().url, tls=tls(folder))
    run = SampleRun(client)
    claim = run.join().claim(run.dispatch(), 60)
    assert run.post(run.worker(), claim) == ""
    assert run.publish(1, run.updates()) == {1}
    assert server_client.hget(run.keys.head, "version") == b"1", (
        "the server behind the TLS proxy does not have the version"
    )
    client.close()


MEGABYTES = 3


def test_large_blob_comes_through_tls_unchanged(
    server_client: redis.Redis, proxy: Callable[..., Any], folder: Path
) -> None:
    client = connect(proxy().url, tls=tls(folder))
    blob = bytes(range(256)) * 4096 * MEGABYTES
    client.set("blob", memoryview(blob))
    assert client.get("blob") == blob == server_client.get("blob")
    client.close()


def test_sentinels_and_their_primary_are_reached_through_tls(
    server_client: redis.Redis, proxy: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ports accept TLS only and require a client certificate; the sentinel's replies are scripted."""
    primary, sentinel = proxy(), proxy()
    client = connect(f"sentinels://localhost:{sentinel.port}/main", tls=tls(folder))
    pool = client.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    manager = pool.sentinel_manager
    assert manager.sentinels[0].ping()
    monkeypatch.setattr(manager, "discover_master", lambda service: ("127.0.0.1", primary.port))
    client.set("through", "tls")
    assert server_client.get("through") == b"tls"
    client.close()
    manager.sentinels[0].close()


@pytest.mark.parametrize("why", ["a CA that did not sign it", "another host", "no client certificate"])
def test_primary_named_by_a_sentinel_is_verified(
    why: str, proxy: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, options, says = REFUSED[why]
    url = f"sentinels://localhost:{proxy().port}/main"
    client = connect(url, tls=tls(folder, **options))
    address = ("127.0.0.1", proxy(of).port)
    assert isinstance(client.connection_pool, SentinelConnectionPool)
    monkeypatch.setattr(client.connection_pool.sentinel_manager, "discover_master", lambda service: address)
    with pytest.raises(ServerUnavailable) as caught:
        check(client, url)
    assert says in str(caught.value)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a CA that did not sign it": ("good", {"ca": "other"}, "the server's certificate is not signed by redis.ca_file"),
    "no CA of ours": ("good", {"ca": ""}, "is not signed by a CA of this system (self-signed"),
    "an expired server": ("expired", {}, "the server's certificate has expired"),
    "another host": ("elsewhere", {}, "the server's certificate is for another host"),
    "no client certificate": (
        "good", {"client": None}, "the server requires a client certificate: set redis.cert_file",
    ),
    "a client certificate of another CA": (
        "good", {"client": "other"}, "the server does not know the CA of redis.cert_file",
    ),
    "an expired client certificate": ("good", {"client": "expired"}, "redis.cert_file has expired"),
    "an expired CA": (
        "expired-ca", {"ca": "expired-ca", "client": "expired-ca"}, "expired-ca/ca.pem expired on 2020-01-31",
    ),
    "an expired CA of the server": ("expired-ca", {}, "the server's certificate is not signed by redis.ca_file"),
}  # fmt: skip


def test_port_that_ignores_the_handshake_is_named() -> None:
    """A server without TLS waits for the end of a command, and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"rediss://127.0.0.1:{listening.getsockname()[1]}"
        client = connect(url, retries=0)
        client.connection_pool.connection_kwargs["socket_connect_timeout"] = 0.2
        with pytest.raises(ServerUnavailable, match=r"is it redis:// instead of rediss://\?"):
            check(client, url)


def test_plain_url_to_a_tls_port_names_tls(proxy: Callable[..., Any]) -> None:
    url = proxy().url.replace("rediss", "redis")
    with pytest.raises(ServerUnavailable, match="if this port expects TLS, write rediss:// into the URL"):
        check(connect(url, retries=0), url)


@pytest.mark.parametrize("why", REFUSED)
def test_refused_connection_is_a_one_line_error_at_once(why: str, proxy: Callable[..., Any], folder: Path) -> None:
    of, options, says = REFUSED[why]
    url = proxy(of).url
    with pytest.raises(ServerUnavailable) as caught:
        check(connect(url, tls=tls(folder, **options)), url)
    assert says in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


def test_error_says_that_the_server_has_no_tls(folder: Path, tmp_path: Path) -> None:
    import asyncio
    import threading

    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), []

    async def hello(reader: Any, writer: Any) -> None:
        await reader.read(1)
        writer.write(b"-ERR unknown command\r\n")
        await writer.drain()
        writer.close()

    def serve() -> None:
        listening = loop.run_until_complete(asyncio.start_server(hello, "127.0.0.1", 0))
        ports.append(listening.sockets[0].getsockname()[1])
        ready.set()
        loop.run_forever()
        listening.close()
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait(10)
    with pytest.raises(ServerUnavailable, match="does not speak TLS"):
        check(connect(f"rediss://localhost:{ports[0]}", tls=tls(folder)), "rediss://localhost")
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_plain_connection_to_a_tls_port_is_refused(proxy: Callable[..., Any], folder: Path) -> None:
    client = redis.Redis(port=proxy().port, socket_timeout=5, retry=Retry(NoBackoff(), 0))
    with pytest.raises(redis.ConnectionError):
        client.ping()
    client.close()


# Files


def test_certificates_with_a_plain_url_are_an_error(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="write rediss:// or sentinels://"):
        connect("redis://localhost", tls=tls(folder))


def test_key_without_certificate_is_an_error_naming_both() -> None:
    with pytest.raises(ConfigurationError, match=r"redis\.cert_file: missing; redis\.key_file is set"):
        Tls(key_file="k.pem")


def test_missing_or_mismatched_file_is_named(folder: Path, tmp_path: Path) -> None:
    good = folder / "good"
    with pytest.raises(ConfigurationError, match=r"redis\.ca_file = '/nowhere\.pem'"):
        connect("rediss://localhost", tls=Tls("/nowhere.pem"))
    with pytest.raises(ConfigurationError, match=r"redis\.cert_file .* belongs to redis\.key_file"):
        connect("rediss://h", tls=Tls("", str(good / "client.pem"), str(good / "server.key")))
    (tmp_path / "empty.pem").touch()
    with pytest.raises(ConfigurationError, match=r"redis\.ca_file .* holds no certificates"):
        connect("rediss://h", tls=Tls(str(tmp_path / "empty.pem")))


def test_configured_ca_is_the_only_trusted_one(folder: Path) -> None:
    authorities: list[dict[str, Any]] = tls(folder).context().get_ca_certs()
    subjects = {dict(s[0] for s in ca["subject"])["commonName"] for ca in authorities}
    assert subjects == {"fedqueue test CA"}
    assert tls(folder).context().minimum_version >= ssl.TLSVersion.TLSv1_2


def test_certificates_state_their_purpose_and_keys_are_private(folder: Path) -> None:
    good = folder / "good"
    assert stat.S_IMODE(good.stat().st_mode) == 0o700
    for name in ("ca", "server", "client"):
        assert stat.S_IMODE((good / f"{name}.key").stat().st_mode) == 0o600
    certificate = {
        n: x509.load_pem_x509_certificate((good / f"{n}.pem").read_bytes()) for n in ("ca", "server", "client")
    }
    ca = certificate["ca"].extensions.get_extension_for_class(x509.BasicConstraints)
    assert (ca.critical, ca.value.ca, ca.value.path_length) == (True, True, 0)
    usages = {
        n: list(certificate[n].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        for n in ("server", "client")
    }
    assert usages["server"] == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    assert usages["client"] == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    for name in ("server", "client"):
        certificate[name].verify_directly_issued_by(certificate["ca"])
        assert not certificate[name].extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_certs_command_adds_a_client_to_an_existing_ca(tmp_path: Path) -> None:
    def certs(*words: str) -> Result:
        return CliRunner().invoke(app, ["certs", str(tmp_path / "c"), *words])

    assert certs("--client", "north").exit_code == 0
    identity = (tmp_path / "c" / "ca.pem").read_bytes()
    assert certs("--client", "south").exit_code == 0
    assert (tmp_path / "c" / "ca.pem").read_bytes() == identity
    for name in ("north", "south", "server"):
        issued = x509.load_pem_x509_certificate((tmp_path / "c" / f"{name}.pem").read_bytes())
        issued.verify_directly_issued_by(x509.load_pem_x509_certificate(identity))
    refused = certs("--days", "0").exception
    assert isinstance(refused, ConfigurationError)
    assert str(refused) == "--days = 0: must be at least 1"
