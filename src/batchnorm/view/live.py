"""`batchnorm serve`: the page of a run that grows while the run is written, on this machine alone.

    GET /<token>/          the page
    GET /<token>/events    server-sent events: the version of the run, each time it has changed, and every few seconds
    GET /<token>/news      what a page that is open needs to show the latest version

There is nothing else, and nothing that writes. Whoever does not know the token, or came by another name than that of
this machine (a site whose name was made to point here), gets nothing.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from .feed import Feed
from .page import require_charts

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"
NAMES = [HOST, "localhost"]
TOKEN = "BATCHNORM_TOKEN"

HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def serve(path: str | os.PathLike[str], port: int = 0, say: Callable[[str], object] = print) -> None:
    """Serve the page of a run until Ctrl-C.

    Args:
        path: the run's folder; it need not be there yet.
        port: on 127.0.0.1; 0 for any that is free.
        say: told the page's address, once it can be opened.
    Raises:
        OSError: the port is taken, or not for this user.
        ValueError: no such port; or a token in the environment that can be guessed.
        ModuleNotFoundError: the extra "live" is not installed.
    """
    require_charts()
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        message = f"serve needs {error.name}: pip install 'batchnorm[live]'"
        raise ModuleNotFoundError(message, name=error.name) from None
    token = make_token()
    with _listening(port) as listener:
        config = uvicorn.Config(
            lambda: make_app(path, token, lambda: server.should_exit),
            factory=True,
            log_level="critical",
            access_log=False,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        server = uvicorn.Server(config)
        say(f"http://{HOST}:{listener.getsockname()[1]}/{token}/")
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def make_token() -> str:
    """Return the address's secret part: that of the environment variable BATCHNORM_TOKEN, or a new one."""
    token = os.environ.get(TOKEN)
    if token is None:
        return secrets.token_urlsafe(16)
    if not re.fullmatch(r"[\w-]{16,}", token, re.ASCII):
        cure = "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        raise ValueError(f"{TOKEN} must be 16 or more letters, digits, - and _: {cure}")
    return token


def _listening(port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise ValueError(f"--port must be from 0 to 65535, got {port}")
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise OSError(
            f"port {port} of {HOST}: {error.strerror}; another one: --port 0 takes any that is free"
        ) from None
    return listener


def make_app(path: str | os.PathLike[str], token: str, is_ending: Callable[[], bool] = lambda: False) -> Starlette:
    """Return the ASGI application that serves the page of one run.

    Args:
        path: the run's folder.
        token: without which nothing is answered.
        is_ending: whether the server is about to stop, so that streams must end.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, Response, StreamingResponse
    from starlette.routing import Route

    feed = Feed(path)

    def check(request: Request) -> None:
        if not secrets.compare_digest(request.path_params["token"].encode(), token.encode()):
            raise HTTPException(404)

    async def page(request: Request) -> Response:
        check(request)
        content, policy = await feed.page()
        more = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}
        return HTMLResponse(content, headers=HEADERS | more)

    async def news(request: Request) -> Response:
        check(request)
        layer, channel = (request.query_params.get(name, "") for name in ("layer", "channel"))
        if channel.isdecimal() and len(channel) < 10:
            feed.pin(layer, int(channel))
        return Response(await feed.news(), media_type="application/json", headers=HEADERS)

    async def events(request: Request) -> Response:
        check(request)
        return StreamingResponse(feed.events(is_ending), media_type="text/event-stream", headers=HEADERS)

    @asynccontextmanager
    async def watching(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(feed.watch())
        yield
        task.cancel()
        feed.close()

    routes = {"/{token}/": page, "/{token}/news": news, "/{token}/events": events}
    app = Starlette(
        routes=[Route(where, answer, methods=["GET"]) for where, answer in routes.items()],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=NAMES, www_redirect=False)],
        lifespan=watching,
    )
    app.router.redirect_slashes = False  # an address that is not there is not there
    return app
