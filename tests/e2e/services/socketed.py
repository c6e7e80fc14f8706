"""An ASGI app, without any framework: a websocket that echoes, and plain HTTP."""

from typing import Any

import snowdrop as sd


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            if message.get("text") == "bye":
                await send({"type": "websocket.close", "code": 4001, "reason": "bye"})
                return
            await send({"type": "websocket.send", "text": message["text"][::-1]})
    else:
        headers = dict(scope["headers"])
        last = headers.get(b"last-event-id", b"none")
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        )
        for number in range(3):
            event = b"id: %d\ndata: %b %b\n\n" % (number, last, headers[b"traceparent"])
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


service = sd.asgi(
    app,
    concurrency=4,
    scale=sd.Scale(min=0, max=2, idle_s=1),
    resources=sd.ResourceSpec(memory_bytes_max=256 << 20),
)
