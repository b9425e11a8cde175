"""Calls an ASGI application in this process: no socket, no thread."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit


@dataclass
class Answer:
    """What the application answered."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    """By their names in lower case."""
    body: bytes = b""

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class AsgiClient:
    """A client that keeps the cookies that it is given."""

    def __init__(self, app: Any, base: str) -> None:
        self.app, self.base, self.cookies = app, urlsplit(base), dict[str, str]()

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, path: str, form: Mapping[str, str]) -> Answer:
        return self.request("POST", path, urlencode(form).encode())

    def request(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Call the application until its answer is complete, or it raises."""
        answer = Answer()
        headers = [(b"host", self.base.netloc.encode())]
        if self.cookies:
            headers.append((b"cookie", "; ".join(f"{k}={v}" for k, v in self.cookies.items()).encode()))
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": self.base.scheme,
            "headers": headers, "client": ("127.0.0.1", 1), "server": (self.base.hostname, self.base.port or 80),
        }  # fmt: skip
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()  # the client stays
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
            else:
                answer.body += message.get("body", b"")

        try:
            asyncio.run(self.app(scope, receive, send))
        finally:
            if cookie := answer.headers.get("set-cookie"):
                name, _, value = cookie.partition(";")[0].partition("=")
                self.cookies[name] = value
            self.last = answer
        return answer
