"""Snowdrop: a self-hosted serverless platform for AI models.

User code imports this package, so it loads nothing until a name is asked for: no server, no torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
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
    from snowdrop.sdk.api import ResourceSpec as ResourceSpec
    from snowdrop.sdk.api import Rollout as Rollout
    from snowdrop.sdk.api import RolloutStep as RolloutStep
    from snowdrop.sdk.api import Scale as Scale
    from snowdrop.sdk.api import Schedule as Schedule
    from snowdrop.sdk.api import asgi as asgi
    from snowdrop.sdk.api import cancelled as cancelled
    from snowdrop.sdk.api import command as command
    from snowdrop.sdk.api import endpoint as endpoint
    from snowdrop.sdk.api import service as service
    from snowdrop.sdk.api import shutdown as shutdown
    from snowdrop.sdk.api import startup as startup
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
        "ResourceSpec",
        "Rollout",
        "RolloutStep",
        "Scale",
        "Schedule",
        "asgi",
        "cancelled",
        "command",
        "endpoint",
        "service",
        "shutdown",
        "startup",
    }
)

__all__ = sorted(_SDK_NAMES | {"LoadedModel"})  # noqa: PLE0605 -- names resolved by __getattr__


def __getattr__(name: str) -> Any:
    if name in _SDK_NAMES:
        from snowdrop.sdk import api  # noqa: PLC0415 -- loaded on first use

        return getattr(api, name)
    if name == "LoadedModel":
        from snowdrop.weights.loaded import LoadedModel  # noqa: PLC0415 -- loaded on first use

        return LoadedModel
    raise AttributeError(f"module 'snowdrop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SDK_NAMES, "LoadedModel"])
