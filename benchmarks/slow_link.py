"""A slow line to a Redis server for measurements: a TCP proxy with a bandwidth, a latency and breaks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 8192  # bytes that are forwarded at a time
SLACK = 0.02  # seconds by which a late timer is made up for
BUFFER = 64 * 1024  # bytes that a kernel may keep for each connection


@dataclass(frozen=True)
class Break:
    """Cut every connection once `nbytes` bytes went in a direction, and accept no other one for `seconds`."""

    direction: str
    """`down`: to the site; `up`: from the site."""
    nbytes: int
    seconds: float


class SlowLink:
    """Forwards its own loopback port to the unix socket `target`, in a thread; connections share the bandwidth."""

    def __init__(self, target: str, bytes_per_second: float, latency: float = 0.0, breaks: Sequence[Break] = ()):
        """`latency`: seconds one way. Each of `breaks` happens once."""
        self.port = 0
        self.moved = {"down": 0, "up": 0}
        """Bytes forwarded in each direction."""
        self.broken = 0
        """How often the line broke."""
        self._target, self._rate, self._latency = target, bytes_per_second, latency
        self._breaks = list(breaks)
        self._away_until = 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._turn: dict[str, asyncio.Lock] = {}
        self._free = {"down": 0.0, "up": 0.0}  # when the line has forwarded all that it was given
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slow line", daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._turn = {"down": asyncio.Lock(), "up": asyncio.Lock()}
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=listener, limit=BUFFER))
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._cut()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if time.monotonic() < self._away_until:
            writer.transport.abort()
            return
        there, back = await asyncio.open_unix_connection(self._target, limit=BUFFER)
        ends = {writer, back}
        self._open |= ends
        try:
            await asyncio.gather(self._pump(reader, back, "up"), self._pump(there, writer, "down"))
        except asyncio.CancelledError:
            pass  # cancelled because the line stops
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        writer.transport.set_write_buffer_limits(high=BUFFER)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(BLOCK):
                async with self._turn[direction]:  # in turns, as packets of several connections
                    now = time.monotonic()
                    self._free[direction] = max(now - SLACK, self._free[direction]) + len(data) / self._rate
                    await asyncio.sleep(self._free[direction] - now)
                self.moved[direction] += len(data)
                if self._breaks_now(direction):
                    return
                if self._latency:
                    self._loop.call_later(self._latency, self._forward, writer, data)
                else:
                    writer.write(data)
                await writer.drain()
        if self._latency:
            await asyncio.sleep(self._latency)
        writer.transport.abort()

    def _forward(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if not writer.transport.is_closing():
            writer.write(data)

    def _breaks_now(self, direction: str) -> bool:
        for planned in self._breaks:
            if planned.direction == direction and self.moved[direction] >= planned.nbytes:
                self._breaks.remove(planned)
                self._away_until = time.monotonic() + planned.seconds
                self._cut()
                return True
        return False

    def _cut(self) -> None:
        self.broken += 1
        for writer in self._open:
            writer.transport.abort()
