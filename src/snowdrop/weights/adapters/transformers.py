"""transformers models from a LoadedModel's tensors.

`from_pretrained(model.path)` works with every framework and needs nothing of this. `pretrained` differs in where
the tensors come from: the node's landing area, as views, so that a second replica has no second copy of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snowdrop.weights.adapters.files import weight_files

if TYPE_CHECKING:
    from snowdrop.weights.loaded import LoadedModel


def pretrained(auto_class: Any, model: LoadedModel, **options: Any) -> Any:
    """`auto_class.from_pretrained` (AutoModel, AutoModelForCausalLM, LlamaForCausalLM) on `model`.

    `options` are those of `from_pretrained`; `dtype` defaults to that of the files, so that nothing is cast and
    nothing copied. transformers renames and checks as it does for files. Raises what `tensors` raises.
    """
    import torch  # noqa: PLC0415 -- only with transformers
    from transformers import AutoConfig, GenerationConfig  # noqa: PLC0415 -- as above

    directory = model.file("config.json").parent
    config = options.pop("config", None) or AutoConfig.from_pretrained(directory)
    model_class = auto_class
    if hasattr(auto_class, "from_config"):
        # The Auto classes want a path. Which class they choose shows without memory on the meta device.
        with torch.device("meta"):
            model_class = type(auto_class.from_config(config))
    tensors = {name: tensor for file in weight_files(directory) for name, tensor in model.tensors(file=file)}
    options.setdefault("dtype", "auto")
    made = model_class.from_pretrained(None, config=config, state_dict=tensors, **options)
    if getattr(made, "generation_config", None) is not None and (directory / "generation_config.json").is_file():
        made.generation_config = GenerationConfig.from_pretrained(directory)
    return made
