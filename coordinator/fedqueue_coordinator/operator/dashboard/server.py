"""The web server of `fedqueue dashboard`: reads runs, and has no way to change one.

| path | answers with |
|---|---|
| `/`, `/static/…` | the page: one HTML file, one script, one style sheet; nothing from elsewhere |
| `/api/runs` | a line for each run |
| `/api/runs/NAME` | everything that is shown of a run |
| `/api/runs/NAME/events` | the same as server-sent events, whenever it has changed |
| `/login` | where a password is set: checks it, and sets a cookie |

Off loopback every path but `/login` needs the cookie. On loopback the Host header has to be a name of loopback, so that
no page from elsewhere can read runs through a name of its own that leads here.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

import redis

from fedqueue.errors import FedqueueError, MissingExtra, RunNotFound
from fedqueue_coordinator.operator.dashboard.sources import RunSources

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise MissingExtra("fedqueue dashboard", "starlette", "dashboard") from None

COOKIE = "fedqueue-session"
MOST_SESSIONS = 1000
EVENT_SECONDS = 1.0
"""Seconds between two looks at a run for each page that shows it."""
ALIVE_SECONDS = 15.0
"""A comment is sent at least so often, so that a proxy keeps the connection, and a closed page is noticed."""
LOGIN_SECONDS = 0.5
"""A wrong password is answered after this time."""
STATIC = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "login.html": "text/html; charset=utf-8",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Sleep = Callable[[float], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether a name or address is one of this machine that no other one reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def make_app(sources: RunSources, password: str, secure: bool = False, sleep: Sleep = asyncio.sleep) -> Starlette:
    """The application; with a `password`, behind a login. `secure`: the server speaks TLS.

    Without a password it must be bound to loopback only.
    """
    page = _Page(sources, password, secure, sleep)
    routes = [
        Route("/", page.static, methods=["GET"]),
        Route("/static/{name}", page.static, methods=["GET"]),
        Route("/login", page.login, methods=["GET", "POST"]),
        Route("/api/runs", page.runs, methods=["GET"]),
        Route("/api/runs/{run}", page.run, methods=["GET"]),
        Route("/api/runs/{run}/events", page.events, methods=["GET"]),
    ]
    app = Starlette(routes=routes)
    app.add_middleware(_Guard, page=page)
    return app


class _Page:
    def __init__(self, sources: RunSources, password: str, secure: bool, sleep: Sleep) -> None:
        self._sources, self._password, self._secure, self._sleep = sources, password, secure, sleep
        self._sessions: dict[str, None] = {}  # in the order of their logins

    def allows(self, request: Request) -> bool:
        """Whether the request may be answered."""
        if not self._password:
            return is_loopback(request.url.hostname or "")
        if request.url.path in ("/login", "/static/style.css"):
            return True
        given = request.cookies.get(COOKIE, "")
        return any(hmac.compare_digest(given.encode(), known.encode()) for known in self._sessions)

    def refusal(self, request: Request) -> Response:
        """The answer to a request that is not allowed."""
        if not self._password:
            return _error(403, "this address is served on loopback only: open it as http://localhost")
        if request.url.path.startswith("/api/"):
            return _error(401, "log in again")
        return RedirectResponse("/login", 303)

    async def static(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in STATIC:
            return _error(404, "no such file")
        folder = resources.files("fedqueue_coordinator.operator.dashboard").joinpath("static")
        return Response(folder.joinpath(name).read_bytes(), media_type=STATIC[name])

    async def login(self, request: Request) -> Response:
        if not self._password:
            return RedirectResponse("/", 303)
        folder = resources.files("fedqueue_coordinator.operator.dashboard").joinpath("static")
        form = folder.joinpath("login.html").read_bytes()
        if request.method == "GET":
            return Response(form, media_type=STATIC["login.html"])
        given = (await request.body())[:4096].decode(errors="replace").partition("password=")[2]
        if not hmac.compare_digest(_decoded(given).encode(), self._password.encode()):
            await self._sleep(LOGIN_SECONDS)
            return Response(form.replace(b"hidden", b""), 403, media_type=STATIC["login.html"])
        session = secrets.token_urlsafe(32)
        self._sessions[session] = None
        while len(self._sessions) > MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, session, httponly=True, samesite="strict", secure=self._secure, path="/")
        return answer

    async def runs(self, request: Request) -> Response:
        return _json(await run_in_threadpool(self._sources.listed))

    async def run(self, request: Request) -> Response:
        try:
            return _json(await run_in_threadpool(self._sources.shown, request.path_params["run"]))
        except RunNotFound as error:
            return _error(404, str(error))
        except (FedqueueError, redis.RedisError) as error:
            return _error(503, str(error))

    async def events(self, request: Request) -> Response:
        return StreamingResponse(
            self._events(request, request.path_params["run"]), media_type="text/event-stream",
            headers={"X-Accel-Buffering": "no"},
        )  # fmt: skip

    async def _events(self, request: Request, name: str) -> AsyncIterator[str]:
        sent, quiet = "", 0.0
        while not await request.is_disconnected():
            try:
                text = _text(await run_in_threadpool(self._sources.shown, name))
            except (FedqueueError, redis.RedisError) as error:
                text = _text({"error": str(error)})
            if text != sent:
                yield f"data: {text}\n\n"
                sent, quiet = text, 0.0
            elif quiet >= ALIVE_SECONDS:
                yield ": still here\n\n"
                quiet = 0.0
            await self._sleep(EVENT_SECONDS)
            quiet += EVENT_SECONDS


class _Guard:
    """Lets through what `_Page.allows`, and adds HEADERS to every answer."""

    def __init__(self, app: Any, page: _Page) -> None:
        self._app, self._page = app, page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        answer = self._app if self._page.allows(request) else self._page.refusal(request)
        await answer(scope, receive, send_with_headers)


def _decoded(form_value: str) -> str:
    from urllib.parse import unquote_plus

    return unquote_plus(form_value)


def _text(value: Any) -> str:
    """JSON on one line; NaN and infinite numbers, which JSON has not, become null."""
    return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _json(value: Any) -> Response:
    return Response(_text(value), media_type="application/json")


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)
