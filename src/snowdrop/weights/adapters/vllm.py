"""vLLM's load format `snowdrop`: `vllm serve DIRECTORY --load-format snowdrop`.

Registered by the entry point `vllm.general_plugins`, which vLLM calls in every one of its processes. Weights come
through Snowdrop's own readers in load order. In the process that holds a LoadedModel (`offer`) they come from the
node's landing area; in the processes that vLLM starts, from the directory, mounted or complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from snowdrop.domain.errors import CorruptContentError, NotFoundError
from snowdrop.weights.adapters.files import weight_files
from snowdrop.weights.loaded import LoadedModel

if TYPE_CHECKING:
    import torch

LOAD_FORMAT = "snowdrop"
_offered: dict[str, LoadedModel] = {}


def offer(model: LoadedModel) -> str:
    """The path to give vLLM as `model`, whose weights it then takes from `model` if it runs in this process.

    It does so with VLLM_ENABLE_V1_MULTIPROCESSING=0 and one device; its own processes read the directory.
    """
    path = str(model.path)
    _offered[path] = model
    return path


def weights_of(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the model at `path`, in load order.

    Raises NotFoundError if it is no directory: Snowdrop's models are local by the time vLLM sees them.
    """
    if not Path(path).is_dir():
        raise NotFoundError(
            "load format `snowdrop` needs a directory",
            where=path,
            next_step="push the model and name its path: `LoadedModel.path`, or `snowdrop model mount`",
        )
    model = _offered.get(path) or LoadedModel.from_directory(path)
    for file in weight_files(Path(path)):
        yield from model.tensors(file=file)


def check_loaded(parameters: set[str], loaded: set[str] | None, *, is_quantized: bool) -> None:
    """Raises CorruptContentError if the files left a parameter as it was, where vLLM says what it loaded.

    A quantised model has parameters that no file holds, and is vLLM's own affair.
    """
    if loaded is None or is_quantized:
        return
    missing = sorted(parameters - loaded)
    if missing:
        raise CorruptContentError(
            f"{len(missing)} parameters are in none of the files, as {missing[0]!r}",
            where="model",
            next_step="the files belong to another model than config.json says, or are not all there",
        )


def register() -> None:
    """Makes the load format known to vLLM. May be called more than once."""
    from snowdrop.weights.adapters import vllm_loader  # noqa: PLC0415 -- only in vLLM's processes

    vllm_loader.register(LOAD_FORMAT)
