"""`gateway reload`: new settings and certificates without a refused connection."""

from __future__ import annotations

import os
import signal

import msgspec
import typer

from snowdrop.cli.output import JsonFlag, console, context, reported, say_json
from snowdrop.domain.errors import PlatformDownError
from snowdrop.domain.settings import Settings
from snowdrop.engine.local import read_record
from snowdrop.gateway.edge.tls import open_certificate

app = typer.Typer(no_args_is_help=True, help="The HTTP edge.")


@app.command()
def reload(json: JsonFlag = False) -> None:
    """Read the gateway's settings and certificate again: new workers take over, old ones end what they began.

    Open connections and streams go on in the old workers, at most gateway.reload_s_max. Addresses, ports, TLS on
    or off, gateway.workers and gateway.keys_required change at the next `snowdrop up`.
    """
    with reported():
        ctx = context(json=json)
        running = read_record(ctx.layout)
        if running is None or "gateway" not in running.pids:
            raise PlatformDownError("no platform is up", where=str(ctx.layout.root), next_step="`snowdrop up`")
        fresh = ctx.resolved.settings.gateway
        now = msgspec.json.decode(ctx.layout.settings.read_bytes(), type=Settings)
        # Those that came from options of `up` stay: this command was not given them.
        fresh = msgspec.structs.replace(
            fresh, **{name: getattr(now.gateway, name) for name in ("host", "port", "workers")}
        )
        open_certificate(fresh)  # said here, not only in the gateway's log
        written = ctx.layout.settings.with_suffix(".new")
        written.write_bytes(msgspec.json.encode(msgspec.structs.replace(now, gateway=fresh)))
        written.replace(ctx.layout.settings)
        os.kill(running.pids["gateway"], signal.SIGHUP)
        if ctx.json:
            say_json({"reloaded": True})
        else:
            console.print("the gateway reloads: new workers take over, old ones end what they have begun")
