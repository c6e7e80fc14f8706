"""Snowdrop: a self-hosted serverless platform for AI models.

User code imports this package, so it loads nothing until a name is asked for: no server, no torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from snowdrop.domain.errors import CallFailedError as CallFailedError
    from snowdrop.domain.errors import CallTimedOutError as CallTimedOutError
    from snowdrop.domain.errors import CallUnavailableError as CallUnavailableError
    from snowdrop.sdk.api import Batch as Batch
    from snowdrop.sdk.api import ChatMessage as ChatMessage
    from snowdrop.sdk.api import ChatRequest as ChatRequest
    from snowdrop.sdk.api import CompletionRequest as CompletionRequest
    from snowdrop.sdk.api import EmbeddingRequest as EmbeddingRequest
    from snowdrop.sdk.api import Embeddings as Embeddings
    from snowdrop.sdk.api import Finish as Finish
    from snowdrop.sdk.api import Image as Image
    from snowdrop.sdk.api import Model as Model
    from snowdrop.sdk.api import QueueSpec as QueueSpec
    from snowdrop.sdk.api import Ref as Ref
    from snowdrop.sdk.api import ResourceSpec as ResourceSpec
    from snowdrop.sdk.api import Rollout as Rollout
    from snowdrop.sdk.api import RolloutStep as RolloutStep
    from snowdrop.sdk.api import Scale as Scale
    from snowdrop.sdk.api import Schedule as Schedule
    from snowdrop.sdk.api import Volume as Volume
    from snowdrop.sdk.api import asgi as asgi
    from snowdrop.sdk.api import cancelled as cancelled
    from snowdrop.sdk.api import command as command
    from snowdrop.sdk.api import endpoint as endpoint
    from snowdrop.sdk.api import ref as ref
    from snowdrop.sdk.api import service as service
    from snowdrop.sdk.api import shutdown as shutdown
    from snowdrop.sdk.api import startup as startup
    from snowdrop.sdk.fanout import acall as acall
    from snowdrop.sdk.fanout import gather as gather
    from snowdrop.sdk.stubs import stub as stub
    from snowdrop.weights.loaded import LoadedModel as LoadedModel

_SDK_NAMES = frozenset(
    {
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
        "asgi",
        "Volume",
        "cancelled",
        "command",
        "endpoint",
        "ref",
        "service",
        "shutdown",
        "startup",
    }
)

_ELSEWHERE = {
    "CallFailedError": "snowdrop.domain.errors",
    "CallTimedOutError": "snowdrop.domain.errors",
    "CallUnavailableError": "snowdrop.domain.errors",
    "LoadedModel": "snowdrop.weights.loaded",
    "acall": "snowdrop.sdk.fanout",
    "gather": "snowdrop.sdk.fanout",
    "stub": "snowdrop.sdk.stubs",
}

__all__ = sorted(_SDK_NAMES | set(_ELSEWHERE))  # noqa: PLE0605 -- names resolved by __getattr__


def __getattr__(name: str) -> Any:
    if name in _SDK_NAMES:
        from snowdrop.sdk import api  # noqa: PLC0415 -- loaded on first use

        return getattr(api, name)
    if name in _ELSEWHERE:
        from importlib import import_module  # noqa: PLC0415 -- loaded on first use

        return getattr(import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module 'snowdrop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SDK_NAMES, *_ELSEWHERE])
