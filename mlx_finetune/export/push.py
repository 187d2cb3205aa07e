"""A folder to the Hub: only files of a kind that a model consists of, and only after looking for what must not get out."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_finetune.data.redact import PATTERN_PREFIX, Rules, find
from mlx_finetune.errors import UserError
from mlx_finetune.export.report import FILE as REPORT
from mlx_finetune.export.said_of_weights import said_of_weights
from mlx_finetune.models.hub import HUB_ID, hub_errors

# By name, in the folder itself or in additional_chat_templates. What stands in neither list is not uploaded.
TEXTS = (
    "README.md LICENSE* NOTICE* Modelfile *.jinja config.json generation_config.json adapter_config.json tokenizer_config.json "
    "special_tokens_map.json preprocessor_config.json processor_config.json"
).split()
TEXTS.append(REPORT)
VOCABULARIES = "tokenizer.json vocab.json vocab.txt merges.txt added_tokens.json tokenizer.model spiece.model *.index.json".split()
WEIGHTS = "*.safetensors *.gguf".split()
NEVER = """optimizer.safetensors progress.json manifest.json made_from.json metrics.jsonl samples.jsonl evaluation.json
    config.yaml""".split()
LOOKED_AT = 1 << 24  # bytes at the beginning of a file of weights, where names and metadata stand
LARGEST_TEXT = 1 << 24


@dataclass(frozen=True)
class Finding:
    """Something that must not get out: what kind of thing, in which file and line; line 0 where the file has none."""

    kind: str
    file: str
    line: int


@dataclass(frozen=True)
class Upload:
    """The files that go, by their name in the repository, with their size, and those that stay."""

    files: dict[str, int]
    left_out: list[str]


def choose_files(folder: Path) -> Upload:
    """What of a folder is uploaded.

    Raises:
        UserError: no such folder, a run or a checkpoint of one, or no weights in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", hint="mlx-finetune fuse or export makes one")
    if (folder / "config.yaml").is_file() or (folder / "progress.json").is_file():
        raise UserError(f"{folder}: a run, or a checkpoint of one", hint="push what mlx-finetune fuse or export makes of it")
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in found}
    files = {name: path.stat().st_size for name, path in names.items() if _goes(name) and not path.is_symlink()}
    if not any(_is(name, WEIGHTS) for name in files):
        raise UserError(f"{folder}: no weights in it (*.safetensors or *.gguf)", hint="push what mlx-finetune fuse or export makes")
    return Upload(files, [name for name in names if name not in files])


def _goes(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if file in NEVER or file.startswith("."):
        return False
    return (not folder and _is(file, [*TEXTS, *VOCABULARIES, *WEIGHTS])) or (
        folder == "additional_chat_templates" and file.endswith(".jinja")
    )


def _is(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def find_private(folder: Path, files: Sequence[str], home: Path, allow: Sequence[str] = ()) -> list[Finding]:
    """Secrets, and paths of this machine, in the files; `allow`: texts, or patterns behind `re:`, that may stay.

    Texts are searched for both, and so is what a file of weights says of itself. Vocabularies, and the other bytes before the
    weights, only for the home folder and the folder itself: half of a vocabulary looks like a secret.
    """
    rules = Rules(allow=tuple(allow))
    places = [str(place) for place in dict.fromkeys((home, folder.resolve())) if len(place.parts) > 1]
    found: list[Finding] = []
    for name in files:
        if _is(name, TEXTS) or "/" in name:
            found += _in_text(folder / name, name, rules, places)
        else:
            found += _in_bytes(folder / name, name, places, allow)
            found += (Finding(one.kind, name, 0) for text in said_of_weights(folder / name) for one in find(text, rules))
    return list(dict.fromkeys(found))


def _in_text(path: Path, name: str, rules: Rules, places: Sequence[str]) -> Iterator[Finding]:
    if path.stat().st_size > LARGEST_TEXT:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes are too many for a text of this name", hint="move it out of the folder"
        )
    text = path.read_bytes().decode("utf-8", "replace")
    for one in find(text, rules):
        yield Finding(one.kind, name, _line(text, one.start))
    for place in places:
        for start in _starts(text, place):
            if not _is_allowed(_word(text, start), rules.allow):
                yield Finding("path of this machine", name, _line(text, start))
    if name.endswith(".json"):
        for value in _local_paths(text):
            if not any(place in value for place in places) and not _is_allowed(value, rules.allow):
                yield Finding("path of this machine", name, _line(text, max(0, text.find(json.dumps(value)[1:-1]))))


def _in_bytes(path: Path, name: str, places: Sequence[str], allow: Sequence[str]) -> Iterator[Finding]:
    with path.open("rb") as file:
        head = file.read(LOOKED_AT)
    for place in places:
        if place.encode() in head and not _is_allowed(place, allow):
            yield Finding("path of this machine", name, 0)


def _starts(text: str, place: str) -> Iterator[int]:
    return (found.start() for found in re.finditer(rf"{re.escape(place)}(?![\w.-])", text))


def _word(text: str, start: int) -> str:
    found = re.compile(r"[^\s\"'`<>|]+").match(text, start)
    return found[0] if found else ""


def _line(text: str, start: int) -> int:
    return text.count("\n", 0, start) + 1


def _is_allowed(value: str, allow: Sequence[str]) -> bool:
    patterns = [one.removeprefix(PATTERN_PREFIX) for one in allow if one.startswith(PATTERN_PREFIX)]
    return any(re.search(pattern, value) for pattern in patterns) or any(value.startswith(one) for one in allow if one)


def _local_paths(text: str) -> Iterator[str]:
    """Values of JSON that are absolute paths to something on this machine; those of its makers' machines are not here."""
    try:
        values = [json.loads(text)]
    except (ValueError, RecursionError):
        return
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str) and len(value) < 4096 and "\0" not in value:
            path = Path(value)
            if path.is_absolute() and len(path.parts) > 2 and _exists(path):
                yield value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name, or a folder into which this user may not look
        return False


def check_repo(repo: str) -> None:
    """Raises UserError where that is no name of a repository."""
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"{repo}: not the name of a repository", hint="write it as owner/name, the owner being you or your group")


def open_api() -> Any:
    """The Hub's client, with the token of this machine.

    Raises:
        UserError: there is none.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("not logged in to the Hub", hint="hf auth login, with a token that may write")
    return HfApi()


def push(api: Any, folder: Path, repo: str, files: Sequence[str], public: bool) -> str:
    """Uploads the files in one commit and gives back its address. `api`: a huggingface_hub.HfApi.

    Makes the repository where there is none, private unless `public`.

    Raises:
        UserError: the repository is public and `public` was not asked for; the Hub does not have it so, or is not reached.
    """
    from huggingface_hub import CommitOperationAdd

    with hub_errors(repo), _refusals(repo):
        is_private = _privacy(api, repo)
        if is_private is None:
            api.create_repo(repo, private=not public)
        elif not (is_private or public):
            raise UserError(f"{repo}: is there already, and public", hint="--public pushes to it; or choose another name")
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in files]
        done = api.create_commit(repo, operations, commit_message="Upload by mlx-finetune")
    return str(done.commit_url)


def _privacy(api: Any, repo: str) -> bool | None:
    """Whether the repository is private; None where there is none."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return bool(api.repo_info(repo).private)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    """What the Hub says to one who writes, where it is another thing than it says to one who reads."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) in (401, 403):
            hint = "hf auth login, with a token that may write; the owner is to be you or a group of yours"
            raise UserError(f"{repo}: the Hub does not let you write there", hint=hint) from error
        raise
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo}: HF_HUB_OFFLINE is set, so there is no way to the Hub", hint="HF_HUB_OFFLINE=0") from error
    except HTTPError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repo}: the Hub was not reached: {reason}", hint="run it again: files that arrived whole are kept"
        ) from error
