"""What `inspect` shows is what training is fed: nothing more, nothing less, and no text of a conversation does anything."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import PIECES, STRIPS_THINKING, chat, conversation_of, random_chat, template_of
from tiny_models import CHATML

from mlx_finetune.cli import main
from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.own_contexts import own_contexts
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.shown import KEPT, Folded, Run, folded, overview, runs_of, visible
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.token_text import texts_of_tokens

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "mlx_finetune" / "sample"
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
HOSTILE = "<script>document.title = 'owned'</script> [red]x[/] &amp; \x1b[2J\x07 \u202eevil\r ]]> </div><b>bold</b>"

Answer = tuple[int, str, str]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Runs a verb in an empty folder, without colour; gives back exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Answer:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dataset/ of the sample and hostile/ of one conversation that would do harm, prepared through the command line."""
    folder = tmp_path_factory.mktemp("made")
    messages = [*chat("say " + HOSTILE, "echo " + HOSTILE + " <|im_end|> end", "again"), Message("assistant", "half", 0.5)]
    write_conversations(folder / "hostile.jsonl", [conversation_of(messages, source="<img src=x>")])
    collect = ("collect", SAMPLE / "gptme-logs", "--openassistant", SAMPLE / "openassistant.trees.jsonl")
    into = ("--model", tiny_llama, "--max-length", "512", "--out")
    verbs = (
        (*collect, "--out", folder / "collected"),
        ("prepare", folder / "collected", *into, folder / "dataset"),
        ("prepare", folder / "hostile.jsonl", *into, folder / "hostile"),
    )
    for arguments in verbs:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        assert not exit.value.code
    return folder


def prepared(folder: Path, conversations: Sequence[Conversation], template: ChatTemplate, **settings: Any) -> Dataset:
    write_conversations(folder / "all.jsonl", conversations)
    prepare([folder / "all.jsonl"], template, make_config(settings, "test"), folder / "dataset", {"model": "tiny"})
    return Dataset.open(folder / "dataset")


def taught(row: dict[str, Any]) -> str:
    """What a row of train.jsonl says is learned, as ChatML writes it."""
    return "".join(m["content"].strip() + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant" and m["weight"])


def rows_of_file(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as file:  # not splitlines: a message may hold U+2028
        return [json.loads(line) for line in file]


def test_the_learned_runs_are_the_assistant_messages_and_their_stop_tokens(made: Path, tiny_llama: Path) -> None:
    template = ChatTemplate.load(tiny_llama)
    for name in ("train", "valid"):
        rows = rows_of_file(made / "dataset" / f"{name}.jsonl")
        store = getattr(Dataset.open(made / "dataset"), name)
        assert len(rows) == len(store) > 3
        for row, example in zip(rows, store, strict=True):
            runs = runs_of(example, template)
            assert "".join(run.text for run in runs if run.learned) == taught(row)
            assert sum(len(run.pieces) for run in runs if run.learned) == np.count_nonzero(example.weights)


def test_the_runs_join_to_the_whole_text_whatever_a_conversation_holds(tmp_path: Path) -> None:
    template = template_of(tmp_path, CHATML)
    random = np.random.default_rng(5)
    chats = [random_chat(random) for _ in range(40)]
    texts = [
        template.render(messages) for messages in [*chats, chat("\ufffd" * 50, "👩‍🔬" * 3 + "\ufffd"), chat("".join(PIECES), "好")]
    ]
    for text in texts:
        tokens = template.special.encode(text, add_special_tokens=False).ids
        pieces = template.pieces(tokens)
        assert "".join(pieces) == text == template.special.decode(tokens, skip_special_tokens=False)
        for token, piece in zip(tokens, pieces, strict=True):
            assert token not in template.special_ids or piece == template.special.id_to_token(token)


def test_a_character_of_several_tokens_stands_at_its_last_also_where_bytes_are_tokens() -> None:
    from tokenizers import Tokenizer, decoders, models

    words = {"▁a": 0, "▁": 1, "b": 2, "<unk>": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)  # as Llama 2
    tokens = [0, 0, 1, 1, 2, *(4 + byte for byte in "好你👍\ufffd你\ufffd\ufffd".encode()), 0]
    pieces = texts_of_tokens(lambda ids: str(tokenizer.decode(ids)), tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == "a a  b好你👍\ufffd你\ufffd\ufffd a"
    assert pieces[:8] == ["a", " a", " ", " ", "b", "", "", "好"] and pieces[-1] == " a"


def test_folding_hides_only_context_and_loses_nothing(made: Path, tiny_llama: Path) -> None:
    template = ChatTemplate.load(tiny_llama)
    hidden = 0
    for example in Dataset.open(made / "dataset").train:
        runs = runs_of(example, template)
        parts = folded(runs)
        flat = [run for part in parts for run in (part.runs if isinstance(part, Folded) else (part,))]
        assert "".join(run.text for run in flat) == "".join(run.text for run in runs)
        assert not any(run.learned for part in parts if isinstance(part, Folded) for run in part.runs)
        hidden += sum(part.tokens for part in parts if isinstance(part, Folded))
    assert hidden > 1000
    long = [Run(("x",) * (2 * KEPT + 40), 0.0)]
    assert [part.tokens if isinstance(part, Folded) else len(part.pieces) for part in folded(long)] == [KEPT, 40, KEPT]
    assert folded([Run(("x",) * (2 * KEPT + 39), 0.0)]) == [Run(("x",) * (2 * KEPT + 39), 0.0)]


def test_a_turn_in_a_context_of_its_own_is_told_from_one_rendering(tmp_path: Path) -> None:
    template = template_of(tmp_path / "model", STRIPS_THINKING)
    thinking = "<think>why</think>\n"
    conversations = [
        conversation_of(chat("a", thinking + "one", "b", thinking + "two", "c", "three"), "1"),
        conversation_of(chat("a", "plain", "b", thinking + "later"), "2"),
        conversation_of(chat("only", thinking + "once"), "3"),
        *(conversation_of(chat(*(f"{n} {thinking}{'word ' * 30}{i}" for i in range(10))), f"w{n}") for n in range(4)),
    ]
    dataset = prepared(tmp_path, conversations, template, max_length=400, valid_fraction=0.0)
    examples = overview(dataset.folder / "train.arrow")
    own = own_contexts(dataset.folder / "train.jsonl", examples, range(len(examples)), template)
    tally = dataset.info["train"]
    assert len(own) == len(examples) and sum(own.values()) == tally["turns_of_own_context"] > 5
    tokens = sum(int(examples.tokens[i]) for i, alone in own.items() if alone)
    assert tokens == tally["tokens_of_own_contexts"]
    assert examples.learned.sum() == tally["learned_tokens"] and examples.tokens.sum() == tally["tokens"]
    (dataset.folder / "train.jsonl").unlink()
    assert not any(own_contexts(dataset.folder / "train.jsonl", examples, range(len(examples)), template).values())


def test_without_colour_learned_text_stands_between_marks_and_nothing_moves_the_cursor(
    made: Path, cli: Callable[..., Answer]
) -> None:
    status, out, err = cli("inspect", made / "hostile")
    assert status == 0 and "next: mlx-finetune train" in err
    assert all(sign.isprintable() or sign == "\n" for sign in out)
    assert "⟦echo <script>document.title = 'owned'</script> [red]x[/] &amp; ␛[2J␇ <U+202E>evil␍ ]]> </div><b>bold</b>" in out
    assert "<|im_end|> end⟨<|im_end|>⟩⟧" in out  # the name of a control token in a message is text
    assert "⟦0.5\u00d7 half⟨<|im_end|>⟩⟧" in out and "⟨<|im_start|>⟩user\nagain⟨<|im_end|>⟩" in out


def test_with_colour_the_text_is_the_same_and_markup_of_rich_is_only_text(
    made: Path, cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    status, out, _ = cli("inspect", made / "hostile")
    assert status == 0 and "\x1b[1;32mecho <script>" in out and "⟦" not in out
    assert "[red]x[/] &amp; ␛[2J␇" in re.sub(r"\x1b\[[0-9;]*m", "", out)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = cli("inspect", made / "hostile")[1].partition("── example")[2]  # rich keeps the bold heads of tables
    assert "\x1b" not in plain and "⟦echo" in plain


def test_long_context_is_folded_unless_whole(made: Path, cli: Callable[..., Answer]) -> None:
    note = re.compile(r"^… [\d,]+ tokens of context …$", re.MULTILINE)
    assert len(note.findall(cli("inspect", made / "dataset", "--limit", "100")[1])) > 5
    whole = cli("inspect", made / "dataset", "--limit", "100", "--whole")[1]
    assert not note.search(whole)
    for row in rows_of_file(made / "dataset" / "train.jsonl"):
        assert all(visible(message["content"].strip()) in whole for message in row["messages"])


def test_what_is_shown_is_chosen_by_number_conversation_and_source(made: Path, cli: Callable[..., Answer]) -> None:
    def shown(*arguments: object) -> list[dict[str, Any]]:
        status, out, _ = cli("inspect", made / "dataset", *arguments, "--json")
        assert status == 0
        return list(json.loads(out)["shown"])

    store = Dataset.open(made / "dataset").train
    assert [e["example"] for e in shown("--example", "3", "--example", "1")] == [3, 1]
    spread = [e["example"] for e in shown("--limit", "4")]
    assert len(spread) == 4 and (spread[0], spread[-1]) == (0, len(store) - 1)
    assert len(shown()) == 5
    name = store[2].conversation
    of_one = shown("--conversation", name, "--limit", "100")
    assert [e["example"] for e in of_one] == [i for i, e in enumerate(store) if e.conversation == name]
    assert {e["source"] for e in shown("--source", "gptme", "--limit", "3")} == {"gptme"}
    for one in of_one:
        e = store[one["example"]]
        assert (one["conversation"], one["turns"], one["tokens"]) == (e.conversation, list(e.turns), len(e.tokens))
        assert one["own_context"] is False and sum(run["tokens"] for run in one["runs"]) == one["tokens"]


def test_statistics_are_those_of_the_arrays(made: Path, cli: Callable[..., Answer]) -> None:
    found = json.loads(cli("inspect", made / "dataset", "--json")[1])
    train = [*Dataset.open(made / "dataset").train]
    for source in ("gptme", *{e.source for e in train}):
        here = [e for e in train if e.source == source]
        tokens, learned = sum(len(e.tokens) for e in here), sum(int((e.weights > 0).sum()) for e in here)
        assert found["by_source"][source] == {
            "examples": len(here),
            "conversations": len({e.conversation for e in here}),
            "tokens": tokens,
            "learned_tokens": learned,
            "learned_share": learned / tokens,
        }
    assert [e["tokens"] for e in found["longest"]] == sorted((len(e.tokens) for e in train), reverse=True)[:5]
    assert found["role_policy"]["name"] == "as it is" and found["exact_turns"] == found["learned_turns"] > 20


def test_the_page_holds_everything_escaped_and_asks_for_nothing(made: Path, cli: Callable[..., Answer], tmp_path: Path) -> None:
    status, out, _ = cli("inspect", made / "hostile", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert status == 0 and out.splitlines()[-1] == str(tmp_path / "page.html")
    assert page.count("<script>") == 1 and "<img" not in page and "<b>bold" not in page and "[red]x[/]" in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?:""", page.replace("&lt;img src=x&gt;", ""))
    assert all(sign.isprintable() or sign == "\n" for sign in page)
    text = unescape(re.sub(r"<[^>]*>", "", page[page.index("<article") :]))
    assert f"echo {visible(HOSTILE)} <|im_end|> end<|im_end|>" in text and 'data-weight="0.5">half' in page
    status, _, err = cli("inspect", made / "hostile", "--html", tmp_path / "page.html")
    assert status == 2 and "exists already" in err and (tmp_path / "page.html").read_text(encoding="utf-8") == page


def test_the_page_names_every_conversation_that_it_shows(made: Path, cli: Callable[..., Answer], tmp_path: Path) -> None:
    found = json.loads(cli("inspect", made / "dataset", "--html", "page.html", "--json")[1])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    store = Dataset.open(made / "dataset").train
    articles = page.split("<article")[1:]
    assert found["html"] == "page.html" and len(articles) == len(store) == found["examples"]
    assert all(e.conversation in article for e, article in zip(store, articles, strict=True))
    assert cli("inspect", made / "dataset", "--html", "few.html", "--limit", "3")[0] == 0
    assert (tmp_path / "few.html").read_text(encoding="utf-8").count("<article") == 3


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_the_page_searches_and_runs_nothing_of_a_conversation(
    made: Path, cli: Callable[..., Answer], tmp_path: Path
) -> None:
    def opened(page: Path, fragment: str = "") -> str:
        options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom")
        command = [str(CHROMIUM), *options, page.as_uri() + fragment]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    assert cli("inspect", made / "hostile", "--html", tmp_path / "hostile.html")[0] == 0
    dom = opened(tmp_path / "hostile.html")
    assert "owned</title>" not in dom and "1 of 1 shown" in dom and dom.count("<script>") == 1
    assert cli("inspect", made / "dataset", "--html", tmp_path / "page.html")[0] == 0
    store = Dataset.open(made / "dataset").train
    name = store[2].conversation
    count = sum(e.conversation == name for e in store)
    dom = opened(tmp_path / "page.html", f"#{name}")
    assert f"{count} of {len(store)} shown" in dom and dom.count('hidden=""') == len(store) - count > 0
    assert f"0 of {len(store)} shown" in opened(tmp_path / "page.html", "#nowhere%20to%20be%20found")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--split", "dev"), "--split dev: no such split"),
        (("--split", "test"), "test has no examples"),
        (("--example", "9999"), "--example 9999: "),
        (("--example", "-1"), "--example -1: "),
        (("--conversation", "nobody"), "--conversation nobody: none in "),
        (("--source", "gptmee"), "--source gptmee: none in "),
        (("--limit", "0"), "Invalid value for '--limit'"),
    ],
)
def test_a_mistake_is_one_line_and_a_hint(made: Path, cli: Callable[..., Answer], arguments: tuple[str, ...], line: str) -> None:
    status, out, err = cli("inspect", made / "dataset", *arguments)
    assert (status, out) == (2, "") and line in err and err.count("\n") == 2 and "hint: " in err


def test_what_is_not_prepared_or_lost_its_model_is_refused_in_one_line(
    made: Path, cli: Callable[..., Answer], tmp_path: Path, tiny_llama: Path
) -> None:
    status, _, err = cli("inspect", tmp_path / "nothing")
    assert status == 2 and "not a prepared data set" in err
    folder = tmp_path / "dataset"
    shutil.copytree(made / "dataset", folder)
    info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))

    def with_info(**changes: object) -> str:
        (folder / "dataset.json").write_text(json.dumps(info | changes), encoding="utf-8")
        status, out, err = cli("inspect", folder)
        assert (status, out) == (2, "") and "hint: " in err
        return err

    assert "prepared for a model that is not there" in with_info(model=str(tmp_path / "gone"))
    assert "another tokenizer" in with_info(tokenizer="0" * 16)
    assert "which model" in with_info(model=None)
