"""The weights that what was trained goes into: the original ones, where a run was on weights converted from them."""

from pathlib import Path

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.hub import check_model_folder, model_folder
from mlx_finetune.models.origin import original_folder, read_origin
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.terminal import waiting


def is_quantised(model: Path) -> bool:
    """Whether MLX packed the weights of a folder."""
    return bool(read_json(model / "config.json").get("quantization"))


def original_of(model: Path, named: str) -> Path:
    """The unquantised weights: those that `model` was converted from, as it says itself or as `named` by --original says.

    Raises:
        UserError: they are not there, they are others, or `model` is the original itself.
    """
    origin, quantised = read_origin(model), is_quantised(model)
    if was_awq(model):
        what = f"{model}: AWQ scales weights before it packs them, so what was trained on them does not fit the original ones"
        raise UserError(what, hint="mlx-finetune export RUN --to mlx-lm hands back the adapter, for this model")
    if not named:
        if origin is None and quantised:
            hint = "--original FOLDER or org/name: the unquantised model"
            raise UserError(f"{model}: quantised, and no origin.json says from what", hint=hint)
        return original_folder(model)
    if origin is None and not quantised:
        raise UserError(f"--original {named}: {model} is the original itself", hint="leave it out")
    found = model_folder(named)
    check_model_folder(found, with_template=False)
    same = bool(origin and origin.format == "huggingface" and fingerprint(found) == origin.fingerprint)
    if not (same or (not quantised and origin and origin.format != "huggingface") or (quantised and _is_packed_from(model, found))):
        of = f" ({origin.model})" if origin else ""
        raise UserError(f"--original {named}: not what {model} was converted from{of}", hint="give that one")
    return found


def _is_packed_from(model: Path, original: Path) -> bool:
    """Whether each packed weight lies within a step of its quantisation from the original's."""
    from mlx_finetune.engines.mlx.stored import farthest_weight

    with waiting(f"comparing the quantised weights of {model} with those of {original}"):
        return farthest_weight(original, model) <= 1


def was_awq(model: Path) -> bool:
    """Whether the folder was converted from one that AWQ packed, and that is still there or on the hub."""
    origin = read_origin(model)
    if not origin or origin.format != "huggingface" or not (origin.revision or Path(origin.model).is_dir()):
        return False
    config = read_json(model_folder(origin.model, origin.revision) / "config.json")
    how = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(how, dict) and how.get("quant_method") == "awq"
