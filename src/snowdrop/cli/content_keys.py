"""`model keys ls|rotate`: the keys that name a tenant's private content."""

from __future__ import annotations

import typer

from snowdrop.cli.output import JsonFlag, console, context, reported, say_json, table
from snowdrop.content.keys import key_domain, rotate_key, tenant_keys
from snowdrop.domain.ids import TenantId

app = typer.Typer(no_args_is_help=True, help="Keys of the tenant's private content: list, rotate.")


@app.command("ls")
def list_keys(json: JsonFlag = False) -> None:
    """List the ids of the tenant's keys, the one for new pushes last. The keys themselves are not shown."""
    with reported():
        ctx = context(json=json)
        domains = [key_domain(key) for key in tenant_keys(ctx.layout.content_keys, TenantId(ctx.tenant))]
        if ctx.json:
            say_json([{"key_domain": domain, "is_current": domain == domains[-1]} for domain in domains])
            return
        shown = table("key domain", "used for")
        for domain in domains:
            shown.add_row(domain, "new pushes" if domain == domains[-1] else "what was pushed before")
        console.print(shown if domains else "no keys yet; the first `snowdrop model push --private` makes one")


@app.command()
def rotate(json: JsonFlag = False) -> None:
    """Make a new key for new pushes. What was pushed before stays readable."""
    with reported():
        ctx = context(json=json)
        domain = key_domain(rotate_key(ctx.layout.content_keys, TenantId(ctx.tenant)))
        if ctx.json:
            say_json({"key_domain": domain})
            return
        console.print(f"new private pushes of {ctx.tenant} are named in {domain}")
        console.print(f"  back up {ctx.layout.content_keys / (ctx.tenant + '.json')}", style="dim")
