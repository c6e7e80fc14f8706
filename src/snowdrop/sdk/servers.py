"""Services that are no class: a command that serves HTTP, and an ASGI app, said in one line of a module.

    chat = sd.command(["vllm", "serve", "{model}", "--port", "{port}"], model=sd.Model("llama"), openai=True)
    site = sd.asgi(app, concurrency=32)

The variable's name becomes the deployment's. Options that both share are those of `sd.service`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.servers import OPENAI_PATHS, AsgiSpec, CommandSpec
from snowdrop.domain.service import SERVICE_ATTRIBUTE, Model, ServiceSpec

CONCURRENCY = 16
"""Servers of their own take several requests at once; a class takes one unless it says otherwise."""


class ServedApp:
    """What `sd.command` and `sd.asgi` return. `app` is the ASGI app or its factory, None for a command."""

    def __init__(self, spec: ServiceSpec, app: Callable[..., Any] | None = None) -> None:
        setattr(self, SERVICE_ATTRIBUTE, spec)
        self.app = app

    @property
    def spec(self) -> ServiceSpec:
        found: ServiceSpec = getattr(self, SERVICE_ATTRIBUTE)
        return found

    def __repr__(self) -> str:
        return f"<service {self.spec.class_name}>"


def command(
    argv: Sequence[str],
    *,
    model: Model | Sequence[Model] | None = None,
    port: int | None = None,
    ready: str | None = None,
    openai: bool | Sequence[str] = False,
    stop_s_max: float | None = None,
    **options: Any,
) -> ServedApp:
    """A service that is a server's command line, without a shell.

    `argv` may hold `{model}` (`{model:NAME}` if there are several), `{port}` or `{socket}`, `{host}`, `{python}`,
    `{code}`, `{deployment}`. `port` is for a server that always listens there. `ready` is the path that answers
    2xx once it can serve ("/health" by default; "" for a mere connection), within `startup_s_max`. With `openai`
    clients of OpenAI's API reach it by the deployment's name: True for chat, completions and embeddings, or the
    paths that it has. Other options as of `sd.service`. Raises InvalidInputError naming what is wrong.
    """
    if isinstance(argv, str) or not all(isinstance(word, str) for word in argv):
        raise InvalidInputError(
            "the command is not a list of words", where="command", next_step='write ["vllm", "serve", "{model}"]'
        )
    chosen = {"port": port, "ready": ready, "stop_s_max": stop_s_max}
    spec = CommandSpec(argv=tuple(argv), **{k: v for k, v in chosen.items() if v is not None})  # type: ignore[arg-type]
    # Programs read files: those are fetched as they are read, with no tensors beside them in memory.
    models = tuple(msgspec.structs.replace(each, lazy=True) for each in _distinct(_models(model)))
    return ServedApp(_spec(models, options, command=spec, openai=openai_paths(openai)))


def asgi(
    app: Callable[..., Any],
    *,
    model: Model | Sequence[Model] | None = None,
    models: Mapping[str, Model] | None = None,
    factory: bool = False,
    lifespan: Literal["auto", "on", "off"] = "auto",
    openai: bool | Sequence[str] = False,
    **options: Any,
) -> ServedApp:
    """A service that is an ASGI app (Starlette, FastAPI, Django, ...), mounted at the deployment's root.

    Its lifespan's startup is the startup stage; the models are in `state["models"]` of the lifespan and of every
    request, by parameter. With `factory`, `app` is a function that takes the models by name and returns the app.
    Streams and websockets work. Other options as of `sd.service`.
    """
    if not callable(app):
        raise InvalidInputError(
            f"{app!r} is no ASGI app", where="asgi(app)", next_step="give the app object itself"
        )
    given = _distinct(_models(model) if models is None else _models(models))
    kind = AsgiSpec(is_factory=factory, lifespan=lifespan)
    return ServedApp(_spec(given, options, asgi=kind, openai=openai_paths(openai)), app)


def openai_paths(wanted: bool | Sequence[str]) -> tuple[str, ...]:
    """The paths of the dialect for what `openai=` was given."""
    if isinstance(wanted, bool):
        return OPENAI_PATHS if wanted else ()
    if isinstance(wanted, str):
        return (wanted,)
    return tuple(wanted)


def _spec(models: tuple[Model, ...], options: Mapping[str, Any], **kind: Any) -> ServiceSpec:
    from snowdrop.sdk.api import checked_options  # noqa: PLC0415 -- it imports this module

    return ServiceSpec(
        class_name="", models=models, **{"concurrency": CONCURRENCY, **checked_options(options, models)}, **kind
    )


def _models(given: object) -> tuple[Model, ...]:
    if given is None:
        return ()
    if isinstance(given, Mapping):
        return tuple(
            Model(each.name, param=param, lazy=each.lazy) if isinstance(each, Model) else each
            for param, each in given.items()
        )
    found = tuple(given) if isinstance(given, list | tuple) else (given,)
    if len(found) > 1:  # several cannot all go by the default: each goes by its name then
        found = tuple(
            Model(each.name, param=each.name.replace("-", "_"), lazy=each.lazy)
            if isinstance(each, Model) and each.param == "model"
            else each
            for each in found
        )
    for each in found:
        if not isinstance(each, Model):
            raise InvalidInputError(f"{each!r} is no model", where="model", next_step='write `sd.Model("name")`')
    return found


def _distinct(models: tuple[Model, ...]) -> tuple[Model, ...]:
    params = [model.param for model in models]
    for model in models:
        if params.count(model.param) > 1:
            raise InvalidInputError(
                f"several models go by the name `{model.param}`",
                where=f"model {model.name}",
                next_step='name each: sd.Model("a", param="encoder")',
            )
    return models
