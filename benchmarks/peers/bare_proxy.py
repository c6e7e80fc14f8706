"""A reverse proxy to one unix socket as one would write it with aiohttp, and nothing else: no queue, no slots, no
keys, no typed errors. `python -m benchmarks.peers.bare_proxy SOCKET` prints the port that it took; several of them
share one with `--port`.
"""

from __future__ import annotations

import argparse

import aiohttp
import anyio
import uvloop
from aiohttp import web

HOP_BY_HOP = frozenset({"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})


class Proxy:
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def handle(self, request: web.Request) -> web.StreamResponse:
        up = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        body = await request.read()
        url = f"http://replica{request.path_qs}"
        async with self._session.request(request.method, url, headers=up, data=body) as response:
            answer = web.StreamResponse(status=response.status)
            for name, value in response.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    answer.headers[name] = value
            await answer.prepare(request)
            async for chunk in response.content.iter_any():
                await answer.write(chunk)
            await answer.write_eof()
            return answer


async def serve(socket_path: str, port: int) -> None:
    connector = aiohttp.UnixConnector(path=socket_path, limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", Proxy(session).handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port, reuse_port=True).start()
            print(runner.addresses[0][1], flush=True)
            await anyio.sleep_forever()
        finally:
            await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket")
    parser.add_argument("--port", type=int, default=0)
    chosen = parser.parse_args()
    uvloop.run(serve(chosen.socket, chosen.port))


if __name__ == "__main__":
    main()
