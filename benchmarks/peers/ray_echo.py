"""The echo service on Ray Serve, as its documentation would write it: `python ray_echo.py PORT`.

It ends with its standard input.
"""

import json
import sys

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse


async def events(count):
    for number in range(count):
        yield b"data: " + json.dumps({"number": number}).encode() + b"\n\n"


@serve.deployment(num_replicas=1, max_ongoing_requests=512, ray_actor_options={"num_cpus": 0})
class Echo:
    async def __call__(self, request: Request) -> Response:
        body = await request.json()
        if request.url.path.endswith("/events"):
            return StreamingResponse(events(body["count"]), media_type="text/event-stream")
        return JSONResponse({"text": body["text"]})


def main():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config={"enable_access_log": False}
    )
    serve.run(Echo.bind(), route_prefix="/")
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
