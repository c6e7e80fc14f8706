"""`store keys ls|rotate|trust|distrust`: who may say what a model's name means. Not API keys: those are `key`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from snowdrop.cli.output import Context, JsonFlag, console, context, errors, human_age, reported, say_json
from snowdrop.content.layout import ref_key
from snowdrop.content.origin import Origin, open_origin
from snowdrop.content.refs import fetch_ref, sign_again, verify_ref
from snowdrop.content.signing import KeyStore, Signer
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.errors import SnowdropError
from snowdrop.wire.api import Info, PutModel, StoreModels

app = typer.Typer(no_args_is_help=True, help="Keys that sign models' names: list, rotate, trust, distrust.")


@app.command("ls")
def list_keys(json: JsonFlag = False) -> None:
    """List trusted keys and which of them signs here."""
    with reported():
        ctx = context(json=json)
        store = KeyStore(ctx.layout.keys)
        keys, signing = store.list_keys(), store.signing_key_id()
        if ctx.json:
            say_json({"signing": signing, "trusted": keys})
            return
        if not keys:
            console.print("no keys yet; `snowdrop up` or the first push makes one")
        for key in keys:
            age = human_age(time.time_ns(), key.added_unix_ns)
            console.print(f"{key.key_id}  added {age} ago  {'SIGNS HERE' if key.key_id == signing else key.note}")
            console.print(f"  {key.public_key}", style="dim", soft_wrap=True)


@app.command()
def rotate(json: JsonFlag = False) -> None:
    """Make a new signing key and sign all models' names again with it; the old key stays trusted."""
    with reported():
        ctx = context(json=json)
        store = KeyStore(ctx.layout.keys)
        models = ctx.client.get(StoreModels, "store", "models").models
        old, new = store.signing_key_id(), store.rotate()
        signed, failed = sign_models(ctx, new, list(models))
        if ctx.json:
            say_json({"old": old, "new": new.key_id, "signed": signed, "failed": failed})
        else:
            console.print(f"new key {new.key_id} signs here; {signed} of {len(models)} models are signed with it")
            if old is not None and not failed:
                console.print(
                    f"  next: `snowdrop store keys distrust {old}` when no other reader needs it", style="dim"
                )
        if failed:
            raise typer.Exit(1)


@app.command("sign")
def sign(json: JsonFlag = False) -> None:
    """Sign the names of models that the current key has not signed; ends a rotation that was cut short."""
    with reported():
        ctx = context(json=json)
        signer = KeyStore(ctx.layout.keys).signer()
        models = ctx.client.get(StoreModels, "store", "models").models
        signed, failed = sign_models(ctx, signer, list(models))
        if ctx.json:
            say_json({"key": signer.key_id, "signed": signed, "failed": failed})
        else:
            console.print(f"signed {signed} of {len(models)} models with key {signer.key_id}")
        if failed:
            raise typer.Exit(1)


@app.command()
def trust(
    public_key: Annotated[str, typer.Argument(help="64 hex digits, from `store keys ls` of the other platform.")],
    note: Annotated[str, typer.Option(help="Whose it is.")] = "",
    json: JsonFlag = False,
) -> None:
    """Believe names that another platform signs."""
    with reported():
        ctx = context(json=json)
        key = KeyStore(ctx.layout.keys).trust(public_key, note)
        if ctx.json:
            say_json(key)
        else:
            console.print(f"trusted key {key.key_id}")


@app.command()
def distrust(key_id: str, json: JsonFlag = False) -> None:
    """Refuse names signed by a key from now on."""
    with reported():
        ctx = context(json=json)
        key = KeyStore(ctx.layout.keys).distrust(key_id)
        if ctx.json:
            say_json({"distrusted": key.key_id})
        else:
            console.print(f"key {key.key_id} is no longer trusted")


def sign_models(ctx: Context, signer: Signer, models: list[ModelRecord]) -> tuple[int, list[str]]:
    """Signs each model's ref again unless it is signed by `signer` already. (done, names that failed)"""
    info = ctx.client.get(Info, "info")
    origin = open_origin(info.origin_url, info.origin)
    done, failed = 0, list[str]()
    for model in models:
        try:
            done += _sign_model(ctx, origin, signer, model)
        except SnowdropError as error:
            # The others are signed all the same: a rotation should not stop at the first broken ref.
            failed.append(f"{model.tenant}/{model.name}")
            errors.print(f"{model.tenant}/{model.name}: {error}")
    return done, failed


def _sign_model(ctx: Context, origin: Origin, signer: Signer, model: ModelRecord) -> int:
    key = ref_key(model.artefact.key_domain, model.tenant, model.name)
    ref = verify_ref(fetch_ref(origin, key), KeyStore(ctx.layout.keys).trusted(), where=key)
    if ref.key_id == signer.key_id:
        return 1
    body = PutModel(ref=sign_again(ref, signer).decode(), source=model.source)
    ctx.client.of(model.tenant).send(ModelRecord, "PUT", "models", model.name, body=body)
    return 1
