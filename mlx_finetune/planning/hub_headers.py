"""config.json and the headers of the safetensors of a model on the Hub: kilobytes by range requests, never the weights."""

from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.hub import hub_errors

Stored = tuple[str, tuple[int, ...], int]


def fetch_headers(name: str) -> tuple[Any, list[Stored]]:
    """config.json, and of each tensor dtype, shape and bytes; no tensors where the model has no safetensors.

    With HF_HUB_OFFLINE=1 the Hub's cache is all there is: config.json, where it is there, and no tensors.

    Raises:
        UserError: the Hub does not have it, does not give it, or cannot be reached; damaged headers.
    """
    from huggingface_hub import constants, get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with hub_errors(name):
        config = read_json(Path(hf_hub_download(name, "config.json")))
        if constants.HF_HUB_OFFLINE:
            return config, []
        try:
            files = get_safetensors_metadata(name).files_metadata
        except NotASafetensorsRepoError:
            return config, []
        except SafetensorsParsingError as error:
            message = " ".join(str(error).split())[:200]
            raise UserError(f"{name}: damaged safetensors on the Hub: {message}", hint="choose another model") from error
    tensors = [tensor for file in files.values() for tensor in file.tensors.values()]
    return config, [(one.dtype, tuple(one.shape), one.data_offsets[1] - one.data_offsets[0]) for one in tensors]
