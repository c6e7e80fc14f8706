"""The class that vLLM calls. Imported in vLLM's processes alone, by `vllm.register`."""

from __future__ import annotations

import torch
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from snowdrop.domain.errors import InvalidInputError
from snowdrop.weights.adapters.vllm import check_loaded, weights_of


class SnowdropModelLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is not there when types are checked
    """See `vllm.weights_of`; has no settings of its own."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        if load_config.model_loader_extra_config:
            raise InvalidInputError(
                "load format `snowdrop` has no settings",
                where="model_loader_extra_config",
                next_step="leave --model-loader-extra-config out",
            )

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to do: the directory is there, and its bytes come as they are read."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fills a model that vLLM has made."""
        path = getattr(model_config, "model_weights", "") or model_config.model
        loaded = model.load_weights(weights_of(path))
        check_loaded(_own_parameters(model), loaded, is_quantized=model_config.quantization is not None)


def _own_parameters(model: torch.nn.Module) -> set[str]:
    """Parameters that files must hold; scales and the like are made by modules after loading."""
    found: set[str] = set()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if not hasattr(method, "process_weights_after_loading"):
            found |= {f"{name}.{each}" if name else each for each, _ in module.named_parameters(recurse=False)}
    # A parameter that has several names is listed, and loaded, under one of them.
    return found & {name for name, _ in model.named_parameters()}


def register(load_format: str) -> None:
    """Registers the class, once: vLLM warns of a second time."""
    try:
        known = type(get_model_loader(LoadConfig(load_format=load_format)))
    except ValueError:
        known = None
    if known is not SnowdropModelLoader:
        register_model_loader(load_format)(SnowdropModelLoader)
