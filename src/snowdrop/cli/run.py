"""`run` and `deploy-command`: a model, or any server, as a deployment without a service file."""

from __future__ import annotations

import importlib.util
import json as json_module
import math
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from snowdrop import engines
from snowdrop.cli.models import manifest_of, push_model
from snowdrop.cli.output import Context, JsonFlag, console, context, errors, human_bytes, reported, say_json
from snowdrop.cli.publishing import publish_revision
from snowdrop.content.ingest import Filter, SourceOptions
from snowdrop.content.keys import load_keyring
from snowdrop.content.origin import open_origin
from snowdrop.content.readback import read_small_file
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.domain.ids import NAME_CHARS_MAX, parse_name
from snowdrop.domain.manifest import Manifest
from snowdrop.domain.servers import CommandSpec
from snowdrop.domain.service import Image, Model, ResourceSpec, Scale, ServiceSpec
from snowdrop.policy.engines import EMBEDDER, LLAMA_CPP, TRANSFORMERS, VLLM, EngineChoice, ModelFacts, choose
from snowdrop.sdk.inspect import describe_service
from snowdrop.wire.api import Deployed, Info

ENGINES_FOLDER = Path(engines.__file__).parent
CONTEXT_TOKENS = 4096
MEMORY_BYTES_MIN = 4 << 30
WORK_BYTES = 2 << 30
"""Beside the weights: the interpreter, its libraries and what a request needs."""
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.tflite", "original/*")
"""What hubs keep of a model beside safetensors and GGUF, and no engine here reads."""
VLLM_STARTUP_S_MAX = 3_600.0
FOLDERS = {LLAMA_CPP: "llamacpp", TRANSFORMERS: "transformers_chat", EMBEDDER: "embedder"}
NEEDS = {LLAMA_CPP: ("xllamacpp",), TRANSFORMERS: ("torch", "transformers"), EMBEDDER: ("torch", "transformers")}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for."""

    concurrency: int | None
    context: int
    scale: Scale
    cpus: float | None
    memory: str | None
    extra: tuple[str, ...]


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """What `run --json` prints. `deployed` is None with --dry-run."""

    name: str
    model: str
    engine: str
    reason: str
    spec: ServiceSpec
    deployed: Deployed | None = None


def run(
    model: Annotated[str, typer.Argument(help="A pushed model, a directory or .gguf file, or hf://org/name.")],
    *,
    name: Annotated[str | None, typer.Option(help="Name of the deployment; the model's by default.")] = None,
    engine: Annotated[str | None, typer.Option(help="llama.cpp, vllm, transformers or embedder.")] = None,
    file: Annotated[str | None, typer.Option(help="Which GGUF file, if there are several.")] = None,
    context_tokens: Annotated[
        int, typer.Option("--context", min=16, help="Tokens of one conversation (llama.cpp, vllm).")
    ] = CONTEXT_TOKENS,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests in one replica at a time.")] = None,
    minimum: Annotated[int, typer.Option("--min", min=0, help="Replicas kept even without load.")] = 0,
    maximum: Annotated[int, typer.Option("--max", min=1, help="Replicas never exceeded.")] = 1,
    idle_s: Annotated[float, typer.Option(help="Seconds without a request before all go.")] = 300.0,
    cpus: Annotated[float | None, typer.Option(help="CPUs of a replica; all of the node by default.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of a replica, as 8G; by the model's size.")] = None,
    arg: Annotated[list[str] | None, typer.Option(help="A further word for the engine; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deployed, and stop.")] = False,
    json: JsonFlag = False,
) -> None:
    """Serve a model of a known format in one line, with an engine that fits, for OpenAI's clients.

    A directory or a hub's model is pushed first. With --dry-run nothing is pushed and nothing deployed.
    """
    with reported():
        ctx = context(json=json)
        scale = Scale(min=minimum, max=max(minimum, maximum), idle_s=idle_s)
        wanted = Wanted(
            concurrency=concurrency,
            context=context_tokens,
            scale=scale,
            cpus=cpus,
            memory=memory,
            extra=tuple(arg or ()),
        )
        chosen_name = parse_name(name or _slug(model), what="deployment name")
        facts, record = _facts(ctx, model, chosen_name, file=file, dry_run=dry_run)
        has_vllm = importlib.util.find_spec("vllm") is not None
        choice = choose(facts, has_vllm=has_vllm, wanted=engine, file=file)
        _check_installed(choice.engine)
        info = ctx.client.get(Info, "info")
        model_name = record.name if record is not None else chosen_name
        spec = _spec(choice, model_name, chosen_name, facts, wanted=wanted, info=info)
        ran = Ran(name=chosen_name, model=model_name, engine=choice.engine, reason=choice.reason, spec=spec)
        if not dry_run:
            if record is None:
                raise AssertionError("pushed or found above")
            ran = msgspec.structs.replace(ran, deployed=_deploy(ctx, chosen_name, spec, choice))
        _say(ctx, ran, info)


def deploy_command(
    name: Annotated[str, typer.Argument(help="Name of the deployment.")],
    words: Annotated[
        list[str],
        typer.Argument(help="The command, after --, with {model}, {port} or {socket} where they belong."),
    ],
    *,
    model: Annotated[list[str] | None, typer.Option(help="A pushed model; may be repeated.")] = None,
    port: Annotated[int | None, typer.Option(help="The port it always listens on, if it is not told one.")] = None,
    ready: Annotated[
        str, typer.Option(help="Path that answers 2xx once it can serve; empty: a connection is enough.")
    ] = "/health",
    openai: Annotated[bool, typer.Option("--openai", help="It speaks OpenAI's API.")] = False,
    code: Annotated[Path | None, typer.Option(help="Folder to have at {code}, where the command starts.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in one replica at a time.")] = 16,
    minimum: Annotated[int, typer.Option("--min", min=0, help="Replicas kept even without load.")] = 0,
    maximum: Annotated[int, typer.Option("--max", min=1, help="Replicas never exceeded.")] = 1,
    idle_s: Annotated[float, typer.Option(help="Seconds without a request before all go.")] = 60.0,
    startup_s_max: Annotated[float, typer.Option(help="How long it may take until it is ready.")] = 600.0,
    cpus: Annotated[float, typer.Option(help="CPUs of a replica.")] = 1.0,
    memory: Annotated[str, typer.Option(help="Memory of a replica, as 8G.")] = "4G",
    env: Annotated[list[str] | None, typer.Option(help="K=V: an environment variable, not secret.")] = None,
    json: JsonFlag = False,
) -> None:
    """Serve any server as a command: snowdrop deploy-command llm --model m -- vllm serve {model} --port {port}."""
    from snowdrop.sdk.servers import command  # noqa: PLC0415 -- with the options of the SDK

    with reported():
        ctx = context(json=json)
        chosen = parse_name(name, what="deployment name")
        served = command(
            words,
            model=[Model(each) for each in model or ()] or None,
            port=port,
            ready=ready,
            openai=openai,
            concurrency=concurrency,
            scale=Scale(min=minimum, max=max(minimum, maximum), idle_s=idle_s),
            startup_s_max=startup_s_max,
            resources=ResourceSpec(cpus=cpus, memory_bytes_max=parse_bytes(memory, "--memory")),
            env=dict(_pair(word) for word in env or ()),
        )
        spec = msgspec.structs.replace(served.spec, class_name=chosen)
        deployed = _publish(ctx, chosen, spec, code)
        if ctx.json:
            say_json(deployed)
            return
        console.print(f"{'deployed' if deployed.created else 'updated'} {chosen}: revision {deployed.revision}")
        console.print(f"  {deployed.url}")
        if spec.openai:
            _say_openai(chosen, spec.openai, deployed.url)


def parse_bytes(text: str, where: str) -> int:
    """`8G`, `512M` or plain bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise InvalidInputError(f"{text!r} is no size", where=where, next_step="write it as 8G or 512M")
    return int(float(found[1]) * 1024 ** "_KMGT".index(found[2].upper() or "_"))


def _slug(model: str) -> str:
    """A name from a model's name, path or address: `hf://org/SmolLM2-135M@main` gives `smollm2-135m`."""
    last = model.rstrip("/").rsplit("/", 1)[-1].partition("@")[0].removesuffix(".gguf")
    return re.sub(r"[^a-z0-9]+", "-", last.lower())[:NAME_CHARS_MAX].strip("-") or "model"


def _facts(
    ctx: Context, model: str, name: str, *, file: str | None, dry_run: bool
) -> tuple[ModelFacts, ModelRecord | None]:
    """What the model is, and its record; pushes what is not pushed yet, unless it is a dry run."""
    local = Path(model).expanduser()
    is_path = local.exists() and ("/" in model or local.is_dir() or local.suffix == ".gguf")
    if not is_path and "://" not in model:
        try:
            record = ctx.client.get(ModelRecord, "models", model)
        except NotFoundError as error:
            raise NotFoundError(
                f"there is no model {model!r}, and no such directory or file",
                where="model",
                next_step="`snowdrop model ls` lists models; a hub's model is hf://org/name",
            ) from error
        return _pushed_facts(ctx, record), record
    if is_path and dry_run:
        return _local_facts(local), None
    if dry_run:
        raise InvalidInputError(
            "what a model of a hub is shows only once it has been pushed",
            where="--dry-run",
            next_step=f"`snowdrop model push {name} {model}` first, then `snowdrop run {name} --dry-run`",
        )
    if is_path and local.is_file():
        chosen = SourceOptions(chosen=Filter((local.name,), ()))
        record = push_model(ctx, name, str(local.parent), chosen)
    else:
        source = str(local) if is_path else model
        record = push_model(ctx, name, source, SourceOptions(chosen=wanted_files(file, is_hub=not is_path)))
    return _pushed_facts(ctx, record), record


def wanted_files(file: str | None, *, is_hub: bool) -> Filter:
    """What is pushed of a model: of several GGUF files the one that was named; of a hub's no second copies."""
    return Filter((file, "*.json") if file is not None else (), OTHER_FORMATS if is_hub else ())


def _pushed_facts(ctx: Context, record: ModelRecord) -> ModelFacts:
    manifest: Manifest = manifest_of(ctx, record)
    info = ctx.client.get(Info, "info")
    hasher = load_keyring(ctx.layout.content_keys).hasher(record.artefact.key_domain)
    config = read_small_file(open_origin(info.origin_url, info.origin), manifest, "config.json", hasher)
    return facts_of(tuple((entry.path, entry.size) for entry in manifest.files), config)


def _local_facts(path: Path) -> ModelFacts:
    if path.is_file():
        return facts_of(((path.name, path.stat().st_size),), None)
    found = sorted(each for each in path.rglob("*") if each.is_file())
    files = tuple((each.relative_to(path).as_posix(), each.stat().st_size) for each in found)
    config = path / "config.json"
    return facts_of(files, config.read_bytes() if config.is_file() else None)


def facts_of(files: tuple[tuple[str, int], ...], config: bytes | None) -> ModelFacts:
    """Raises InvalidInputError for a config.json that is none."""
    try:
        said: Any = json_module.loads(config) if config else {}
    except ValueError as error:
        raise InvalidInputError(
            f"config.json is no JSON: {error}",
            where="config.json",
            next_step="push the model again, or use --engine",
        ) from error
    said = said if isinstance(said, dict) else {}
    names = said.get("architectures")
    return ModelFacts(
        files=files,
        architectures=tuple(str(each) for each in names) if isinstance(names, list) else (),
        model_type=str(said.get("model_type") or ""),
    )


def _check_installed(engine: str) -> None:
    missing = [name for name in NEEDS.get(engine, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInputError(
            f"the engine {engine} needs {', '.join(missing)}, which replicas do not have",
            where="environment",
            next_step=f"pip install {' '.join(missing)}",
        )


def _spec(
    choice: EngineChoice, model: str, name: str, facts: ModelFacts, *, wanted: Wanted, info: Info
) -> ServiceSpec:
    node_cpus = max((node.cpus for node in info.nodes), default=1.0)
    cpus = node_cpus if wanted.cpus is None else wanted.cpus
    weights = sum(size for path, size in facts.files if path.endswith((".safetensors", ".gguf")))
    if choice.file:
        weights = dict(facts.files)[choice.file]
    asked = None if wanted.memory is None else parse_bytes(wanted.memory, "--memory")
    fitting = max(MEMORY_BYTES_MIN, weights + WORK_BYTES)
    resources = ResourceSpec(cpus=cpus, memory_bytes_max=fitting if asked is None else asked)
    common: dict[str, Any] = {"scale": wanted.scale, "resources": resources}
    if choice.engine in {LLAMA_CPP, VLLM}:
        concurrency = wanted.concurrency or (4 if choice.engine == LLAMA_CPP else 64)
        argv = _llamacpp(choice, concurrency, cpus, wanted) if choice.engine == LLAMA_CPP else _vllm(wanted)
        return ServiceSpec(
            class_name=name,
            models=(Model(model, lazy=True),),
            command=CommandSpec(argv=argv),
            openai=choice.openai,
            concurrency=concurrency,
            startup_s_max=VLLM_STARTUP_S_MAX,
            env={"HF_HUB_OFFLINE": "1"},
            image=Image(requirements=("vllm",) if choice.engine == VLLM else NEEDS[LLAMA_CPP]),
            **common,
        )
    if wanted.extra:
        raise InvalidInputError(
            f"the engine {choice.engine} takes no further words", where="--arg", next_step="leave it out"
        )
    spec = describe_service(ENGINES_FOLDER / FOLDERS[choice.engine] / "service.py", None)
    if wanted.concurrency is not None:
        common["concurrency"] = wanted.concurrency
    return msgspec.structs.replace(spec, models=(Model(model),), env={**spec.env, "HF_HUB_OFFLINE": "1"}, **common)


def _llamacpp(choice: EngineChoice, concurrency: int, cpus: float, wanted: Wanted) -> tuple[str, ...]:
    return (
        *("{python}", "{code}/serve.py", "--model", "{model}/" + choice.file, "--alias", "{deployment}"),
        *("--host", "{host}", "--port", "{port}", "--context", str(wanted.context)),
        *("--parallel", str(concurrency), "--threads", str(max(1, math.floor(cpus))), *wanted.extra),
    )


def _vllm(wanted: Wanted) -> tuple[str, ...]:
    return (
        *("vllm", "serve", "{model}", "--host", "{host}", "--port", "{port}"),
        *("--served-model-name", "{deployment}", "--max-model-len", str(wanted.context), *wanted.extra),
    )


def _deploy(ctx: Context, name: str, spec: ServiceSpec, choice: EngineChoice) -> Deployed:
    folder = FOLDERS.get(choice.engine)
    return _publish(ctx, name, spec, ENGINES_FOLDER / folder if folder else None)


def _publish(ctx: Context, name: str, spec: ServiceSpec, folder: Path | None) -> Deployed:
    """Deploys with the code in `folder`; a command without code still gets a folder that says what it is."""
    if folder is not None:
        return publish_revision(ctx, name, spec, folder)[0]
    with tempfile.TemporaryDirectory(prefix="snowdrop-") as made:
        Path(made, "service.json").write_bytes(msgspec.json.format(msgspec.json.encode(spec)))
        return publish_revision(ctx, name, spec, Path(made))[0]


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key.isidentifier():
        raise InvalidInputError(f"{word!r} is not K=V", where="--env", next_step="write it as --env MODE=fast")
    return key, value


def _say(ctx: Context, ran: Ran, info: Info) -> None:
    if ctx.json:
        say_json(ran)
        return
    memory = human_bytes(ran.spec.resources.memory_bytes_max)
    console.print(f"engine {ran.engine}: {ran.reason}")
    told = f"{ran.spec.concurrency} requests at a time, {ran.spec.resources.cpus:g} CPUs, {memory}"
    console.print(f"  {ran.name}: model {ran.model}, {told}", style="dim")
    if ran.spec.command is not None:
        console.print(f"  {' '.join(ran.spec.command.argv)}", style="dim", soft_wrap=True, markup=False)
    if ran.deployed is None:
        errors.print("dry run: nothing was pushed or deployed")
        return
    console.print(
        f"{'deployed' if ran.deployed.created else 'updated'} {ran.name}: revision {ran.deployed.revision}"
    )
    _say_openai(ran.name, ran.spec.openai_paths, ran.deployed.url, base=info.gateway_url)


def _say_openai(name: str, paths: tuple[str, ...], url: str, *, base: str | None = None) -> None:
    """How to call it, to copy."""
    root = base or url.rsplit("/", 1)[0]
    console.print(f"  base_url {root}/v1, model {name}")
    body: dict[str, Any] = {"model": name}
    if paths[0].endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": "Hello!"}]
    elif paths[0].endswith("embeddings"):
        body["input"] = ["a flower in the snow"]
    else:
        body["prompt"] = "Hello"
    line = f"curl {root}{paths[0]} -H 'content-type: application/json' -d '{json_module.dumps(body)}'"
    console.print(f"  {line}", style="dim", soft_wrap=True, markup=False)
