"""A TCP proxy that a test can slow down or make cut connections, even in the middle of a command."""

from __future__ import annotations

import asyncio
import contextlib
import threading

PIECE = 64 * 1024  # bytes


class TcpProxy:
    """Forwards its own loopback port to `target`, in a thread."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = 0
        self.delay = 0.0
        """Seconds by which each piece is late."""
        self.cuts = 0
        """How often connections were cut."""
        self._left: int | None = None  # bytes until the cut
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def drop(self) -> None:
        """Cut every connection now."""
        self._loop.call_soon_threadsafe(self._cut)

    def cut_after(self, nbytes: int) -> None:
        """Cut every connection after `nbytes` more bytes, even in the middle of a command or reply."""
        self._left = nbytes

    def retarget(self, port: int) -> None:
        """Forward to another server from now on."""
        self._target = port
        self.drop()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._cut()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    def _cut(self) -> None:
        self.cuts += 1
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, back}
        self._open |= ends
        try:
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        except asyncio.CancelledError:
            pass  # cancelled because the proxy stops
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(PIECE):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self._left is not None:
                    self._left -= len(data)
                    if self._left <= 0:
                        writer.write(data[: len(data) + self._left])
                        self._left = None
                        await asyncio.sleep(0)
                        self._cut()
                        return
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
