"""The HTTP/2 listener as its owner sees it: its socket, and the process that is kept on it."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

from snowdrop.domain.errors import InvalidInputError, SnowdropError
from snowdrop.domain.settings import GatewaySettings
from snowdrop.gateway.edge.server import BACKLOG
from snowdrop.gateway.workers import STOP_MARGIN_S, Kept
from snowdrop.wire.processes import own_process


def listen_http2(gateway: GatewaySettings) -> socket.socket:
    """The listening socket. Raises SnowdropError if it cannot be had, or what serves it is not installed."""
    if importlib.util.find_spec("hypercorn") is None:
        raise InvalidInputError(
            "HTTP/2 needs hypercorn", where="gateway.http2", next_step="pip install 'snowdrop[http2]'"
        )
    family = socket.AF_INET6 if ":" in gateway.host else socket.AF_INET
    try:
        return socket.create_server((gateway.host, gateway.http2_port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise SnowdropError(
            f"HTTP/2 cannot be served: {getattr(error, 'strerror', None) or error}",
            where=f"gateway.host={gateway.host}, gateway.http2_port={gateway.http2_port}",
            next_step="choose another port, or stop what uses it",
        ) from error


def kept_http2(state: Path, gateway: GatewaySettings, listen_fd: int) -> Kept:
    """The listener's process. It is never replaced: at SIGHUP it loads the certificate again."""

    def command(_life: str, ready_fd: int) -> list[str]:
        made = [*own_process("snowdrop.main"), "gateway-http2", "--state", str(state)]
        return [*made, "--ready-fd", str(ready_fd), "--listen-fd", str(listen_fd)]

    return Kept(
        name="http2",
        command=command,
        pass_fds=(listen_fd,),
        stop_s_max=gateway.shutdown_s_max + STOP_MARGIN_S,
        replace_s_max=0.0,
    )
