"""A model's name to a folder on this machine, and whether that folder holds what training needs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.config_checks import check_config
from mlx_finetune.models.tokenizer_checks import check_tokenizer
from mlx_finetune.models.weights import tensor_headers
from mlx_finetune.own_code import refuse_kernels

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Never *.py (a stranger's code) nor *.bin (pickles, and the same weights again).
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "spiece.model", "LICENSE*", "NOTICE*", "README.md"]
# The same weights in another layout or for another engine (original/, onnx/ ...).
UNWANTED = ["*.py", "*.bin", "*/*.safetensors", "*/*.json", "*/*.txt", "consolidated*.safetensors"]
PICKLES = ["pytorch_model*.bin"]  # where a model has no safetensors, for what reads them without running them
WEIGHTS = (".safetensors", ".bin", ".gguf")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def model_folder(name: str | Path, revision: str | None = None, pickles: bool = False) -> Path:
    """The folder of a model: `name` itself where it is a folder, else downloaded into (or found in) the Hub's cache.

    Only a name such as org/name that is no local path reaches for the network; HF_HUB_OFFLINE=1 keeps it to the cache.
    `revision`: the commit of the Hub to take. `pickles`: takes *.bin too where there are no safetensors.

    Raises:
        UserError: neither a folder nor a Hub id; the Hub does not have it, does not give it, or cannot be reached.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise UserError(f"{name}: a file, not a model folder", hint="give the Hugging Face folder that holds config.json")
    if not HUB_ID.fullmatch(str(name)):
        raise UserError(f"{name}: no such model folder", hint="give a local folder or a Hub id such as org/name")
    return _download(str(name), revision, pickles)


def folder_in_cache(name: str) -> Path | None:
    """What the Hub's cache holds of the model `name`, which may be a part of it; None where that is nothing. No network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def hub_revision(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache holds; None of any other folder."""
    return folder.name if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--") else None


def check_hub_id(name: str, said: str) -> None:
    """Raises UserError where a name that was given, by what is `said` before it, is no id of the Hub."""
    if name and not HUB_ID.fullmatch(name):
        raise UserError(f"{said} {name}: no id of the Hub", hint="write it as org/name, or leave it out")


def check_links(folder: Path) -> None:
    """What is copied from a model's folder is to lie in it, or, as in the Hub's cache, in that of all its revisions.

    Weights may lie elsewhere, on another disk: nothing but weights is read from them.

    Raises:
        UserError: a file is a link to another place, of which a copy could be handed on.
    """
    top = folder.resolve()
    home = top.parents[1] if hub_revision(top) else top
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        is_read = path.is_file() or path.name == "additional_chat_templates"
        if is_read and not path.resolve().is_relative_to(home) and not path.name.endswith(WEIGHTS):
            raise UserError(f"{path}: a link out of the folder", hint="put the file itself there, or take the link away")


def check_model_folder(folder: Path, with_template: bool = True) -> None:
    """Reads the folder's headers and settings, not its weights. `with_template`: a chat template has to be there too.

    Raises:
        UserError: no such folder, links out of it, no config.json, no or broken safetensors, no tokenizer, no chat template.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder", hint="give a local folder or a Hub id such as org/name")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json", hint="give the Hugging Face folder that holds config.json and *.safetensors")
    check_links(folder)
    config = read_json(folder / "config.json")
    check_config(config, f"{folder / 'config.json'}")
    refuse_kernels(folder / "config.json", config)
    tensor_headers(folder)
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise UserError(
            f"{folder}: no tokenizer ({' or '.join(TOKENIZERS[:2])})",
            hint="copy the model's tokenizer files into the folder",
        )
    if (folder / "tokenizer.json").is_file():
        check_tokenizer(folder / "tokenizer.json")
    if with_template and not _has_chat_template(folder):
        raise UserError(
            f"{folder}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)",
            hint="choose the instruct or chat version of the model: it brings its template",
        )


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _download(name: str, revision: str | None, pickles: bool) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
        if pickles and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=PICKLES, ignore_patterns="*/*"))
    return folder


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """What goes wrong between us and the Hub, said as a UserError about the model `name`."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise UserError(
            f"{name}: no such model folder, and no Hub id", hint="give a local folder or a Hub id such as org/name"
        ) from error
    except GatedRepoError as error:
        hint = f"accept its terms on https://huggingface.co/{name}, then run: hf auth login"
        raise UserError(f"{name}: the Hub gives this model only to people who accepted its terms", hint) from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; for a private model run: hf auth login"
        raise UserError(f"{name}: no such local folder, and the Hub has no such model", hint) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"{name}: the Hub answered: {_first_line(error)}", hint="try again later, or give a local folder"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = _first_line(error.__cause__ or error)
        hint = "give a local folder, or download it once with a network (HF_HUB_OFFLINE unset)"
        raise UserError(f"{name}: no such local folder, not in the Hub's cache, and no way to the Hub: {reason}", hint) from error
    except HTTPError as error:
        raise UserError(
            f"{name}: the download broke off: {_first_line(error)}", hint="run it again: it goes on where it stopped"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
