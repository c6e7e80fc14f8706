"""What user code writes: the decorators that turn a class into a service.

    import snowdrop as sd

    @sd.service(model=sd.Model("minilm"), concurrency=16)
    class Embed:
        @sd.startup
        def load(self, model: sd.LoadedModel) -> None: ...

        @sd.endpoint("/embed")
        async def embed(self, texts: list[str]) -> list[list[float]]: ...

The decorators change nothing about a class or a method but one attribute, so that a service stays an ordinary
class that a test can make and call.
"""

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeVar

from snowdrop.domain.batching import Batch
from snowdrop.domain.cancel import cancelled
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.openai_types import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Embeddings,
    Finish,
)
from snowdrop.domain.rollout import RolloutSpec as Rollout
from snowdrop.domain.rollout import RolloutStep
from snowdrop.domain.service import (
    SERVICE_ATTRIBUTE,
    STAGE_ATTRIBUTE,
    Image,
    Model,
    QueueSpec,
    ResourceSpec,
    Scale,
    Schedule,
)
from snowdrop.domain.volume import Volume
from snowdrop.sdk.ref import Ref, ref
from snowdrop.sdk.schema import Mark, build_spec, check_path
from snowdrop.sdk.servers import asgi, command

__all__ = [
    "Batch",
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "Embeddings",
    "Finish",
    "Image",
    "Model",
    "QueueSpec",
    "Ref",
    "ResourceSpec",
    "Rollout",
    "RolloutStep",
    "Scale",
    "Schedule",
    "Volume",
    "asgi",
    "cancelled",
    "command",
    "endpoint",
    "ref",
    "service",
    "shutdown",
    "startup",
]

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


def service(
    *,
    image: Image | None = None,
    model: Model | Sequence[Model] | None = None,
    models: Mapping[str, Model] | None = None,
    concurrency: int | None = None,
    scale: Scale | None = None,
    accelerator: str | Sequence[str] | None = None,
    queue: QueueSpec | None = None,
    resources: ResourceSpec | None = None,
    startup_s_max: float | None = None,
    import_s_max: float | None = None,
    drain_s_max: float | None = None,
    env: Mapping[str, str] | None = None,
    rollout: Rollout | None = None,
    park_s_max: float | None = None,
    secrets: Mapping[str, str] | Sequence[str] | None = None,
    volumes: Sequence[Volume] | None = None,
    calls: str | Sequence[str] | None = None,
    warm: bool | None = None,
    warm_imports: str | Sequence[str] | None = None,
) -> Callable[[C], C]:
    """Makes a class a service.

    `model` is one model, or several that each name their startup parameter (`Model("a", param="encoder")`);
    `models` gives them by startup parameter instead (`{"encoder": Model("a")}`). `concurrency` is the hard limit
    of requests in one replica at a time; `accelerator` a list in order of preference. `startup_s_max`,
    `import_s_max` and `drain_s_max` bound these stages, in seconds. `rollout` says how new revisions take over,
    `park_s_max` how long requests wait while the revision does not start at all; `secrets` are given by
    environment variable. `calls` names deployments that the service may call beside those that it has a `ref` of,
    in its class or its module. Replicas are forked off a parent that has done `warm_imports`, once the node has
    one; `warm=False` is never. Raises InvalidInputError naming what is wrong.
    """
    options = {name: value for name, value in locals().items() if name in _WANTED}
    given = _given_models(model, models)
    chosen = checked_options(options, given)

    def decorate(cls: C) -> C:
        if not isinstance(cls, type):
            raise InvalidInputError(
                f"`service` decorates a class, not {cls!r}", where="service", next_step="put it above `class ...:`"
            )
        setattr(cls, SERVICE_ATTRIBUTE, build_spec(cls, given, chosen))
        return cls

    return decorate


def startup(function: F) -> F:
    """Marks the method that runs before the first request; its parameters are the service's models."""
    return _mark(function, ("startup",))


def shutdown(function: F) -> F:
    """Marks the method that runs after the last request has been answered."""
    return _mark(function, ("shutdown",))


def endpoint(path: str, *, batch: Batch | None = None) -> Callable[[F], F]:
    """Marks a method that answers requests to `path`. Its signature is the schema of the request.

    With `batch` one call answers several requests: every parameter is a `list[T]` with the values of all of them,
    and the method returns a list with one result for each, in their order; a result that is an exception fails
    that request alone. Clients send and get single values. Raises InvalidInputError naming what is wrong.
    """
    if not isinstance(path, str):
        raise InvalidInputError(
            "`endpoint` needs a path", where="endpoint", next_step='write `@sd.endpoint("/path")`, with the path'
        )
    check_path(path, "endpoint")
    if batch is not None and not isinstance(batch, Batch):
        raise InvalidInputError(
            f"`batch` is {batch!r}",
            where="endpoint(batch)",
            next_step="give it a batch, as in `sd.Batch(size_max=32)`",
        )

    def decorate(function: F) -> F:
        return _mark(function, ("endpoint", path) if batch is None else ("endpoint", path, batch))

    return decorate


def _mark(function: F, mark: Mark) -> F:
    name = getattr(function, "__qualname__", repr(function))
    kind: object = function
    if not isinstance(kind, FunctionType | staticmethod | classmethod):
        raise InvalidInputError(
            f"`{mark[0]}` decorates a method, not {function!r}",
            where=mark[0],
            next_step=f"write `@sd.{mark[0]}` directly above `def`",
        )
    if getattr(function, STAGE_ATTRIBUTE, None) is not None:
        raise InvalidInputError(
            f"{name} is marked twice", where=name, next_step="use one of startup, endpoint and shutdown on it"
        )
    setattr(function, STAGE_ATTRIBUTE, mark)
    return function


def _is_method(value: object) -> bool:
    # staticmethod and classmethod objects get their own refusal, which knows the class.
    return callable(value) or hasattr(value, "__func__")


def _given_models(model: object, models: object) -> tuple[Any, ...]:
    """The models in order, named by the keys of `models`; whether they are models is not known yet."""
    if models is None:
        if model is None:
            return ()
        return tuple(model) if isinstance(model, list | tuple) else (model,)
    if model is not None or not isinstance(models, Mapping):
        raise InvalidInputError(
            "`model` and `models` are both given" if model is not None else f"`models` is {models!r}",
            where="service(models)",
            next_step='give `models={"encoder": sd.Model("a"), ...}` alone, or `model`',
        )
    return tuple(
        Model(each.name, param=param, lazy=each.lazy) if isinstance(each, Model) else each
        for param, each in models.items()
    )


_WANTED: dict[str, tuple[type | tuple[type, ...], str]] = {
    "image": (Image, 'an image, as in `sd.Image.from_requirements("requirements.txt")`'),
    "concurrency": (int, "a whole number"),
    "scale": (Scale, "a scale, as in `sd.Scale(min=0, max=4)`"),
    "accelerator": (tuple, "a name or a list of names"),
    "queue": (QueueSpec, "a queue, as in `sd.QueueSpec(length_max=100)`"),
    "resources": (ResourceSpec, "resources, as in `sd.ResourceSpec(cpus=2)`"),
    "startup_s_max": ((int, float), "seconds"),
    "import_s_max": ((int, float), "seconds"),
    "drain_s_max": ((int, float), "seconds"),
    "env": (dict, "a dict of str to str"),
    "rollout": (Rollout, "a rollout, as in `sd.Rollout(steps=(sd.RolloutStep(weight=0.1),))`"),
    "park_s_max": ((int, float), "seconds"),
    "secrets": (dict, "a dict of variable to secret, or a list of secrets"),
    "volumes": (tuple, 'a list of volumes, as in `[sd.Volume(target="/data", name="cache")]`'),
    "calls": (tuple, "a name or a list of names"),
    "warm": (bool, "True or False"),
    "warm_imports": (tuple, "a module or a list of modules"),
}


def secret_names(secrets: object) -> Any:
    """`("hf-token",)` is short for `{"HF_TOKEN": "hf-token"}`."""
    if isinstance(secrets, Mapping):
        return dict(secrets)
    if isinstance(secrets, list | tuple):
        return {str(name).upper().replace("-", "_"): name for name in secrets}
    return secrets


def checked_options(given: Mapping[str, Any], models: Sequence[object]) -> dict[str, Any]:
    """Options of `service` as fields of ServiceSpec, without those that are None. Raises InvalidInputError."""
    for name in given:
        if name not in _WANTED:
            raise InvalidInputError(
                f"there is no option `{name}`", where=name, next_step=f"there are: {', '.join(sorted(_WANTED))}"
            )
    options = dict.fromkeys(_WANTED) | {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    for name in ("accelerator", "calls", "warm_imports"):
        options[name] = (options[name],) if isinstance(options[name], str) else options[name]
    options["env"] = dict(options["env"]) if isinstance(options["env"], Mapping) else options["env"]
    options["secrets"] = secret_names(options["secrets"])
    _check_types(options, models)
    return {name: value for name, value in options.items() if value is not None}


def _check_types(options: Mapping[str, Any], models: Sequence[object]) -> None:
    """msgspec checks types when it decodes, not when user code calls a constructor; this does."""
    for name, value in options.items():
        kind, wanted = _WANTED[name]
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise InvalidInputError(
                f"`{name}` is {value!r}", where=f"service({name})", next_step=f"give it {wanted}"
            )
    names = [*(options["accelerator"] or ()), *(options["calls"] or ()), *(options["warm_imports"] or ())]
    texts = [*names]
    for mapping in (options["env"], options["secrets"]):
        texts += [*(mapping or {}), *(mapping or {}).values()]
    for text in texts:
        if not isinstance(text, str):
            raise InvalidInputError(
                f"{text!r} is no text",
                where="service(accelerator, calls, env, secrets, warm_imports)",
                next_step="give names and values as str",
            )
    for each in options["volumes"] or ():
        if not isinstance(each, Volume):
            raise InvalidInputError(
                f"{each!r} is no volume",
                where="service(volumes)",
                next_step='write `sd.Volume(target="/data", name="...")`',
            )
    for each in models:
        if not isinstance(each, Model):
            raise InvalidInputError(
                f"{each!r} is no model", where="service(model)", next_step='write `sd.Model("name")`'
            )
