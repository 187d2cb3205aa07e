"""What SECURITY.md promises of strangers' models: their code is not run, and their chat templates reach nothing."""

import ast
import json
import shutil
import tracemalloc
from collections.abc import Callable
from functools import cache
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from finished_runs import conversations, make_base
from hostile_model_readers import READERS
from jinja2 import TemplateError

from mlx_finetune.data.conversation import write_conversations
from mlx_finetune.data.jinja import compiled
from mlx_finetune.errors import UserError
from mlx_finetune.export.probes import tokens_of
from mlx_finetune.models.hub import check_model_folder
from mlx_finetune.models.weights import tensor_headers
from mlx_finetune.own_code import needs_own_code
from mlx_finetune.serving.chat import Chat, Settings
from mlx_finetune.serving.opened import Opened, find_source

PACKAGE = Path(__file__).parents[1] / "mlx_finetune"
Cli = Callable[..., tuple[int, str, str]]
CODE = "import pathlib\npathlib.Path({mark!r}).write_text('run')\nfrom transformers import {base} as {name}\n"
CLASSES = {
    "configuration_x": ("LlamaConfig", "Config"),
    "modeling_x": ("LlamaForCausalLM", "Model"),
    "tokenization_x": ("PreTrainedTokenizerFast", "Tokenizer"),
}
MODELS = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
TOKENIZER = {"AutoTokenizer": ["tokenization_x.Tokenizer", "tokenization_x.Tokenizer"]}


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_hostile(folder: Path, mark: Path, **config: Any) -> Path:
    """A model folder that names its own code wherever transformers and mlx-lm look for it; run, it writes `mark`."""
    for module, (base, name) in CLASSES.items():
        (folder / f"{module}.py").write_text(CODE.format(mark=str(mark), base=base, name=name))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark), base="pipeline", name="generate"))
    for name in ("conftest.py", "sitecustomize.py", "setup.py", "__init__.py", "mlx.py"):
        (folder / name).write_text(CODE.format(mark=str(mark), base="pipeline", name="p"))
    edit(folder / "config.json", auto_map=MODELS, custom_pipelines={"x": {"impl": "modeling_x.Model"}}, **config)
    edit(folder / "tokenizer_config.json", auto_map=TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with base/, a hostile model, and dataset/, prepared with it; mark/ran appears when its code runs."""
    root = tmp_path_factory.mktemp("hostile")
    base = make_base(root)
    (root / "mark").mkdir()
    make_hostile(base, root / "mark" / "ran")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hostile model made without an engine, for what is refused before one is needed; ran appears beside it."""
    root = tmp_path_factory.mktemp("folder")
    READERS["model folder"].write(root / "base")
    (root / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    (root / "base" / "LICENSE").write_text("MIT")
    write_conversations(root / "gptme.jsonl", conversations())
    return make_hostile(root / "base", root / "ran")


def verbs(root: Path, engine: str, out: Path) -> list[tuple[object, ...]]:
    """Each verb that opens a model."""
    base, run = root / "base", out / "run"
    few = [
        f"--set={each}"
        for each in ("steps=2", "batch_size=2", "rank=4", "alpha=8", "eval_every=2", "save_every=2", "sample_prompts=1")
    ]
    made: list[tuple[object, ...]] = [
        (
            "prepare",
            root / "gptme.jsonl",
            "--model",
            base,
            "--out",
            out / "dataset",
            "--max-length",
            256,
            "--openassistant-share",
            0.6,
        ),
        ("plan", "--model", base),
        ("train", "--model", base, "--data", root / "dataset", "--out", run, "--engine", engine, *few),
        ("evaluate", run, "--generate", 1, "--limit", 2),
        ("fuse", run, "--out", out / "fused"),
        ("export", run, "--to", "peft", "--out", out / "peft"),
    ]
    if engine == "mlx":
        made += [("convert", base, "--out", out / "converted"), ("export", base, "--to", "gguf", "--out", out / "gguf")]
    return made


@pytest.mark.long
def test_no_verb_runs_the_code_of_a_models_folder(hostile: Path, engine_name: str, cli: Cli, tmp_path: Path) -> None:
    mark = hostile / "mark" / "ran"
    for verb in verbs(hostile, engine_name, tmp_path):
        status, _, err = cli(*verb)
        assert (status, mark.exists()) == (0, False), (verb, err)
    said = StringIO()
    for place in (str(hostile / "base"), str(tmp_path / "run")):
        opened = Opened(find_source(place, "", engine_name))
        Chat(opened, Settings("", 0, 1, 2, None), out=said).run(StringIO("list 1\n"), said)
    assert said.getvalue() and not mark.exists()
    assert not any(tmp_path.glob("converted/*.py")), "converted folders carry no code"


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "own", "words"),
    [
        ("mlx", {"model_type": "never_heard_of"}, "architecture 'never_heard_of'"),
        ("mlx", {"model_file": "modeling_x.py"}, "model_file 'modeling_x.py' is not supported with MLX"),
        (
            "torch",
            {"model_type": "never_heard_of"},
            "needs Python code of its own (auto_map in config.json), and such code is never run",
        ),
    ],
)
def test_a_model_that_needs_its_own_code_is_refused_by_name(
    engine: str, own: Any, words: str, hostile: Path, cli: Cli, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(hostile / "base", tmp_path / "base"))
    edit(base / "config.json", **own)
    out = ("--out", tmp_path / "run", "--engine", engine, "--set=steps=1")
    status, printed, err = cli("train", "--model", base, "--data", hostile / "dataset", *out)
    assert (status, printed) == (2, "") and words in err and not (hostile / "mark" / "ran").exists(), err


@pytest.mark.long
def test_a_model_is_opened_without_the_code_that_its_folder_names(hostile: Path, engine_name: str) -> None:
    opened = Opened(find_source(str(hostile / "base"), "", engine_name))
    said = StringIO()
    Chat(opened, Settings("", 0, 1, 2, None), out=said).run(StringIO("list 1\n"), said)
    assert said.getvalue() and not (hostile / "mark" / "ran").exists()
    assert tokens_of(hostile / "base", ["list 1"]) and not (hostile / "mark" / "ran").exists()


WITHOUT = ("PeftModel", "LoraConfig", "PeftConfig")  # which have no such setting: they read an adapter


@cache
def calls() -> list[tuple[str, str, dict[str, str], str]]:
    """Of the whole package: file, what is called, by which keywords, and the file's text."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                last = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                keywords = {each.arg or "": each.value for each in node.keywords}
                if last in LOOKED_AT or keywords.keys() & {"shell", "allow_pickle"}:
                    found.append((path.name, ast.unparse(node.func), {n: ast.unparse(v) for n, v in keywords.items()}, source))
    return found


def test_every_call_that_opens_a_strangers_files_says_that_code_is_not_run() -> None:
    """Said, and not left to a default: transformers asks on the terminal where nothing is said."""
    opened = [call for call in calls() if call[1].endswith(("from_pretrained", "load_mlx_lm")) and not call[1].startswith(WITHOUT)]
    for file, name, told, source in opened:
        in_a_dictionary = "" in told and '"trust_remote_code": False' in source
        assert told.get("trust_remote_code") == "False" or in_a_dictionary, f"{file}: {name}"
    assert len(opened) > 8


def test_what_code_a_folder_asks_for_is_named(folder: Path, tmp_path: Path) -> None:
    READERS["config.json"].write(tmp_path)
    assert needs_own_code(folder) == "auto_map in config.json" and needs_own_code(tmp_path) == ""


@pytest.mark.long
def test_a_tokenizer_that_needs_its_own_code_is_refused_by_name(folder: Path, tmp_path: Path, cli: Cli) -> None:
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    edit(base / "config.json", model_type="never_heard_of")
    edit(base / "tokenizer_config.json", tokenizer_class="Tokenizer")
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text("{}")
    status, _, err = cli("prepare", folder.parent / "gptme.jsonl", "--model", base, "--out", tmp_path / "dataset")
    assert status == 2 and "is never run" in err and not (folder.parent / "ran").exists(), err


def test_kernels_of_the_hub_are_not_fetched_because_a_config_says_so(folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    for asked in ("somebody/kernel", {"": "somebody/kernel"}, "sdpa|somebody/kernel"):
        edit(base / "config.json", attn_implementation=asked)
        with pytest.raises(UserError, match="attn_implementation"):
            check_model_folder(base)
    edit(base / "config.json", attn_implementation=None, text_config={"experts_implementation": "somebody/kernel"})
    with pytest.raises(UserError, match="experts_implementation"):
        check_model_folder(base)


ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "by filter": "{{ ''|attr('__class__') }}",
    "by map": "{{ ['']|map(attribute='__class__')|list }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "a bound method": "{{ messages.append.__self__ }}",
    "a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "loop": "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "cycler": "{{ cycler.__init__.__globals__.os }}",
    "joiner": "{{ joiner.__init__.__globals__.os }}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "self": "{{ self.__dict__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "dict": "{{ dict.__call__.__globals__ }}",
    "now": "{{ strftime_now.__globals__ }}",
    "change": "{{ messages.append({}) }}",
    "pop": "{{ messages[0].pop('role') }}",
    "import": "{% import '/etc/passwd' as x %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_chat_template_reaches_nothing_but_the_messages(name: str) -> None:
    """Refused, or empty: what is undefined in a template, and what the sandbox hides, is."""
    messages = [{"role": "user", "content": "a"}]
    try:
        text = compiled(ESCAPES[name]).render(messages=messages)
    except (TemplateError, TypeError) as refused:  # TypeError: no loader for other files
        text = "" if "loader" in str(refused) or isinstance(refused, TemplateError) else str(refused)
    assert text in ("", "['']", "[Undefined]") and messages == [{"role": "user", "content": "a"}]


def test_a_template_that_makes_endless_text_is_ended() -> None:
    with pytest.raises((OverflowError, TemplateError)):
        compiled("{% for i in range(10**9) %}x{% endfor %}").render(messages=[])


LINKS = {
    "LICENSE": ".ssh/id_rsa",
    "extra.json": ".docker/config.json",
    "README.md": "notes.md",
    "additional_chat_templates": ".ssh",
}


@pytest.mark.parametrize("name", LINKS)
def test_what_a_link_in_a_models_folder_leads_to_is_not_copied(name: str, folder: Path, tmp_path: Path, cli: Cli) -> None:
    home, base = tmp_path / "home", Path(shutil.copytree(folder, tmp_path / "base"))
    for place in (".ssh/id_rsa", ".docker/config.json", "notes.md", ".ssh/key.jinja"):
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        (home / place).write_text('{"private": 1}')
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(home / LINKS[name])
    for verb in (("convert", base), ("export", base, "--to", "gguf"), ("prepare", folder.parent / "gptme.jsonl", "--model", base)):
        status, _, err = cli(*verb, "--out", tmp_path / "out")
        assert status == 2 and f"{base / name}: a link out of the folder" in err and not (tmp_path / "out").exists(), err


def test_links_within_the_hubs_cache_and_to_weights_on_another_disk_are_followed(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "elsewhere" / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("a" * 40)
    for each in (blobs, snapshot, tmp_path / "own"):
        each.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
        (tmp_path / "own" / path.name).symlink_to(path) if path.suffix == ".safetensors" else shutil.copy(path, tmp_path / "own")
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    check_model_folder(tmp_path / "own")
    check_model_folder(tmp_path / "cache" / snapshot.relative_to(tmp_path / "elsewhere"))
    (tmp_path / "shortcut").symlink_to(snapshot, target_is_directory=True)
    check_model_folder(tmp_path / "shortcut")
    (snapshot / "NOTICE").symlink_to(tmp_path / "own" / "config.json")
    with pytest.raises(UserError, match="NOTICE: a link out of the folder"):
        check_model_folder(snapshot)


def test_a_header_that_claims_petabytes_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    """Of the header itself, and of a tensor."""
    base = tmp_path
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**38, 2**10], "data_offsets": [0, 2**50]}}).encode()
    for begins in (
        (2**60).to_bytes(8, "little"),
        len(header).to_bytes(8, "little") + header,
        (2**40).to_bytes(8, "little") + b"{" * 100,
    ):
        (base / "model.safetensors").write_bytes(begins + b"\0" * 64)
        tracemalloc.start()
        with pytest.raises(UserError, match=r"model\.safetensors"):
            tensor_headers(base)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()


@pytest.mark.long
def test_data_sets_of_the_hub_bring_no_program() -> None:
    """datasets ran a repository's script up to version 3."""
    from datasets import load_dataset

    assert "trust_remote_code" not in signature(load_dataset).parameters


SINKS = ("eval", "exec", "compile", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "shelve.open")
LOOKED_AT = {each.rpartition(".")[2] for each in SINKS} | {"from_pretrained", "load_mlx_lm", "load", "loads"}
PICKLE_OF_OURS, YAML_OF_PLAIN_VALUES = "examples.py", "reading.py"


def test_nothing_is_executed_that_was_read() -> None:
    """Beside ruff's S rules, which `noqa` can silence: no shell, and torch's own pickles with weights_only alone."""
    for file, name, told, _ in calls():
        where = f"{file}: {name}"
        assert name not in SINKS and told.get("shell", "False") == "False" and told.get("allow_pickle", "False") == "False", where
        assert name not in ("pickle.load", "pickle.loads") or file == PICKLE_OF_OURS, where
        assert name != "torch.load" or told.get("weights_only") == "True", where
        assert name != "yaml.load" or file == YAML_OF_PLAIN_VALUES, where
    assert any(name == "torch.load" for _, name, _, _ in calls())
