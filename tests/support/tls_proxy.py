"""A loopback port that terminates TLS, requires client certificates, and forwards to a server without TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path

PIECE = 64 * 1024  # bytes


class TlsProxy:
    """Decrypts and forwards its port to the unix socket `target`. Uses threads, because asyncio sends no TLS alert."""

    def __init__(self, target: str, certificates: Path) -> None:
        self._target = target
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        self._context.load_verify_locations(certificates / "ca.pem")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, name="tls proxy", daemon=True).start()

    @property
    def url(self) -> str:
        return f"rediss://localhost:{self.port}"

    def stop(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # until the listening socket is closed
            while True:
                accepted, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        client = self._context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
        with client, contextlib.suppress(OSError):
            try:
                client.do_handshake()
            except ssl.SSLError:  # the alert is sent, and must arrive before the connection is reset
                socket.socket.shutdown(client, socket.SHUT_WR)
                while socket.socket.recv(client, PIECE):
                    pass
                return
            with socket.socket(socket.AF_UNIX) as server:
                server.connect(self._target)
                back = threading.Thread(target=_copy, args=(server, client), daemon=True)
                back.start()
                _copy(client, server)
                back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(PIECE):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
