"""A server as a stranger would write it, with aiohttp alone: run as a command by tests of command services."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from aiohttp import WSMsgType, web

HERE = Path()


async def health(_request: web.Request) -> web.Response:
    is_ready = not Path("hold-ready").exists()
    return web.Response(status=200 if is_ready else 503)


async def echo(request: web.Request) -> web.Response:
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "target": request.raw_path,
            "bytes": len(body),
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "environment": {name: value for name, value in os.environ.items() if name.startswith("SNOWDROP_")},
            "argv": sys.argv[1:],
        },
        headers=[("set-cookie", "a=1"), ("set-cookie", "b=2")],
    )


async def stream(request: web.Request) -> web.StreamResponse:
    """Sends one piece and the next only when it is told so, so that a relay that gathers would block the test."""
    answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await answer.prepare(request)
    Path("streaming").touch()
    try:
        for number in range(int(request.query.get("count", "3"))):
            await answer.write(f"data: {number}\n\n".encode())
            while not Path(f"go-{number}").exists():
                await asyncio.sleep(0.005)
    except asyncio.CancelledError:
        Path("cancelled").touch()
        raise
    return answer


async def upload(request: web.Request) -> web.Response:
    total = 0
    async for chunk in request.content.iter_any():
        total += len(chunk)
    return web.json_response(total)


async def chat(request: web.Request) -> web.WebSocketResponse:
    answer = web.WebSocketResponse(protocols=("upper",))
    await answer.prepare(request)
    async for message in answer:
        if message.type is WSMsgType.TEXT and message.data == "bye":
            await answer.close(code=4001, message=b"as you wish")
        elif message.type is WSMsgType.TEXT:
            await answer.send_str(message.data.upper())
        elif message.type is WSMsgType.BINARY:
            await answer.send_bytes(message.data[::-1])
    return answer


async def die(_request: web.Request) -> web.Response:
    os._exit(9)


async def run(options: argparse.Namespace) -> None:
    app = web.Application(client_max_size=1 << 30)
    app.add_routes([
        web.get("/health", health), web.post("/upload", upload), web.get("/stream", stream),
        web.get("/chat", chat), web.post("/die", die), web.route("*", "/{path:.*}", echo),
    ])  # fmt: skip
    print("the server starts", flush=True)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = (
        web.UnixSite(runner, options.socket) if options.socket else web.TCPSite(runner, "127.0.0.1", options.port)
    )
    await site.start()
    ended = asyncio.Event()
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    Path("stopped-in-order").touch()
    await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--socket", default="")
    parser.add_argument("--folder", default=".")
    parser.add_argument("--model", default="")
    parser.add_argument("--stubborn", action="store_true")
    given = parser.parse_args()
    os.chdir(given.folder)
    asyncio.run(run(given))
