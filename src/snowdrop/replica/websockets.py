"""Websockets of a replica, as uvicorn serves them, but for how a drain ends them."""

from __future__ import annotations

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class PatientWebSocket(WebSocketsSansIOProtocol):
    """A drain lets it end by itself, as it does a stream; `Servable.cut` ends those that outlast the bound."""

    def shutdown(self) -> None:
        if self.close_sent:
            super().shutdown()
