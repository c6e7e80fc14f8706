"""Weights as user code gets them: tensors over landing areas or files.

Nothing is imported until it is asked for: no framework is loaded by this package itself.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snowdrop.weights.loaded import LoadedModel as LoadedModel
    from snowdrop.weights.standalone import load_directory as load_directory
    from snowdrop.weights.standalone import load_file as load_file
    from snowdrop.weights.standalone import safe_open as safe_open

_STANDALONE = frozenset({"load_directory", "load_file", "safe_open"})

__all__ = sorted(_STANDALONE | {"LoadedModel"})  # noqa: PLE0605 -- names resolved by __getattr__


def __getattr__(name: str) -> Any:
    if name in _STANDALONE:
        from snowdrop.weights import standalone  # noqa: PLC0415 -- loaded on first use

        return getattr(standalone, name)
    if name == "LoadedModel":
        from snowdrop.weights.loaded import LoadedModel  # noqa: PLC0415 -- loaded on first use

        return LoadedModel
    raise AttributeError(f"module 'snowdrop.weights' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
