"""What `inspect` shows is what training is fed: nothing more, nothing less, and no text of a conversation does anything."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page
from chats import PIECES, STRIPS_THINKING, chat, conversation_of, random_chat, template_of
from conftest import Answer
from tiny_models import CHATML

from mlx_finetune.cli import main
from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.overview import overview
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.shown import KEPT, Folded, Run, folded, runs_of, visible
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.token_text import texts_of_tokens

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "mlx_finetune" / "sample"
HOSTILE = "<script>document.title = 'owned'</script> [red]x[/] &amp; \x1b[2J\x07 \u202eevil\r ]]> </div><b>bold</b>"


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
        assert len(rows) == len(store) > 1
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
    examples = overview(dataset.folder / "train.arrow", template.special_ids)
    own = [example for example in dataset.train if example.own_context]
    tally = dataset.info["train"]
    assert len(own) == tally["turns_of_own_context"] > 5 and len(examples) > len(own)
    assert all(len(example.turns) == example.exact_turns == 1 for example in own)
    assert sum(len(example.tokens) for example in own) == tally["tokens_of_own_contexts"]
    assert examples.learned.sum() == tally["learned_tokens"] and examples.tokens.sum() == tally["tokens"]


def test_without_colour_learned_text_stands_between_marks_and_nothing_moves_the_cursor(
    made: Path, cli: Callable[..., Answer]
) -> None:
    status, out, err = cli("inspect", made / "hostile")
    assert status == 0 and "next: mlx-finetune train" in err
    assert all(sign.isprintable() or sign == "\n" for sign in out)
    assert "⟦echo <script>document.title = 'owned'</script> [red]x[/] &amp; ␛[2J␇ <U+202E>evil␍ ]]> </div><b>bold</b>" in out
    assert "<|im_end|> end⟨<|im_end|>⟩⟧" in out  # the name of a control token in a message is text
    assert re.search(r"tokens learned with another weight than 1 +5 ", out)  # half and its end
    assert "⟦0.5\u00d7 half⟨<|im_end|>⟩⟧" in out and "⟨<|im_start|>⟩user\nagain⟨<|im_end|>⟩" in out


def test_with_colour_the_text_is_the_same_and_markup_of_rich_is_only_text(
    made: Path, cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    status, out, _ = cli("inspect", made / "hostile")
    assert status == 0 and "\x1b[1;32mecho <script>" in out and "⟦" not in out
    text = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert "[red]x[/] &amp; ␛[2J␇" in text and "\n0.5\u00d7 half<|im_end|>" in text
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
        assert {name: value for name, value in found["by_source"][source].items() if name != "by_role"} == {
            "examples": len(here),
            "conversations": len({e.conversation for e in here}),
            "tokens": tokens,
            "learned_tokens": learned,
            "learned_share": learned / tokens,
        }
    assert [e["tokens"] for e in found["longest"]] == sorted((len(e.tokens) for e in train), reverse=True)[:5]
    for turn in found["longest_turns"]:
        e = train[turn["example"]]
        assert (turn["conversation"], turn["source"]) == (e.conversation, e.source) and turn["message"] in e.turns
    assert found["role_policy"]["name"] == "as it is" and found["exact_turns"] == found["learned_turns"] > 20


def test_a_turn_is_as_long_as_what_the_model_writes_also_around_a_secret(tmp_path: Path) -> None:
    template = template_of(tmp_path / "model", CHATML)
    answers = ["one", "export A=[REDACTED:password:1] B=[REDACTED:password:2] done", "[REDACTED:password:1] three"]
    messages = [m for answer in answers for m in chat("q", answer)]
    messages[3] = Message("assistant", answers[1], 0.5)
    conversations = [conversation_of(messages, "a"), conversation_of(chat("x", "y", "z", answers[1] * 3), "b")]
    dataset = prepared(tmp_path, conversations, template, valid_fraction=0.0)
    assert dataset.info["train"]["placeholder_tokens"] > 0
    examples = overview(dataset.folder / "train.arrow", template.special_ids)
    said = {c.id: [m.content for m in c.messages] for c in conversations}
    names = [examples.conversations[i] for i in examples.turn_examples]
    told = zip(names, examples.turn_messages.tolist(), examples.turn_tokens.tolist(), strict=True)
    for name, message, tokens in told:
        written = said[name][message].removeprefix("[REDACTED:password:1]")  # with which nobody learns to begin
        assert tokens == len(template.prompt_tokens(written + "<|im_end|>"))
    assert len(names) == 5


def test_tokens_by_role_are_those_that_prepare_counted_or_it_is_said_that_there_are_none(
    made: Path, cli: Callable[..., Answer], tmp_path: Path
) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(made / "dataset", folder)
    info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    del_counts = {name: value for name, value in info["train"].items() if name != "tokens_by_role"}

    def with_train(**counts: object) -> None:
        (folder / "dataset.json").write_text(json.dumps(info | {"train": del_counts | counts}), encoding="utf-8")

    with_train()
    assert "tokens by role: not counted when this was prepared" in cli("inspect", folder)[1]
    assert json.loads(cli("inspect", folder, "--json")[1])["by_role"] is None
    found = json.loads(cli("inspect", folder, "--json")[1])
    counted = {}
    for source, counts in found["by_source"].items():
        rest = counts["tokens"] - counts["learned_tokens"]
        counted[source] = {"template": 9, "assistant": counts["learned_tokens"] + 1, "user": rest - 10}
    with_train(tokens_by_role=counted)
    found = json.loads(cli("inspect", folder, "--json")[1])
    for part in (found, *found["by_source"].values()):
        assert list(part["by_role"]) == ["user", "assistant", "template"]
        assert all(sum(role[name] for role in part["by_role"].values()) == part[name] for name in ("tokens", "learned_tokens"))
        assert part["by_role"]["assistant"]["learned_share"] == part["learned_tokens"] / part["by_role"]["assistant"]["tokens"]
    assert re.search(r"chat template +18 ", cli("inspect", folder)[1])
    assert cli("inspect", folder, "--html", "page.html")[0] == 0
    assert "<td>chat template<td>18<td>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_which_turns_are_exactly_as_served_is_told_of_each_example(
    tiny_llama: Path, tmp_path: Path, cli: Callable[..., Answer]
) -> None:
    named = [*chat("what is <|im_start|>?", "a mark"), *chat("and", "more")]
    conversations = [conversation_of(chat("a", "b"), "1"), conversation_of([*chat("hi", "ho"), *named], "2")]
    write_conversations(tmp_path / "all.jsonl", conversations)
    prepare_arguments = ("--model", tiny_llama, "--valid-fraction", "0", "--out", tmp_path / "dataset")
    assert cli("prepare", tmp_path / "all.jsonl", *prepare_arguments)[0] == 0
    dataset = Dataset.open(tmp_path / "dataset")
    tally = dataset.info["train"]
    assert (tally["learned_turns"], tally["exact_turns"]) == (4, 2)
    found = {len(e["turns"]): e for e in json.loads(cli("inspect", tmp_path / "dataset", "--json")[1])["shown"]}
    assert (found[1]["exact_turns"], found[3]["exact_turns"]) == (1, 1)
    out = cli("inspect", tmp_path / "dataset")[1]
    assert "1 of 3 turns exactly as served" in out and out.count("exactly as served") == 2
    assert sum(example.exact_turns for example in dataset.train) == tally["exact_turns"]


def test_the_windows_of_a_conversation_are_numbered(made: Path, cli: Callable[..., Answer]) -> None:
    shown = json.loads(cli("inspect", made / "dataset", "--json", "--limit", "100")[1])["shown"]
    names = [e["conversation"] for e in shown]
    assert [e["part"] for e in shown] == [[names[:i].count(name) + 1, names.count(name)] for i, name in enumerate(names)]
    several = next(e for e in shown if e["part"][1] > 1)
    heading = f"conversation {several['conversation']} (1 of {several['part'][1]})"
    assert heading in cli("inspect", made / "dataset", "--conversation", several["conversation"])[1]


def test_the_page_holds_everything_escaped_and_asks_for_nothing(made: Path, cli: Callable[..., Answer], tmp_path: Path) -> None:
    status, out, _ = cli("inspect", made / "hostile", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert status == 0 and out.splitlines()[-1] == str(tmp_path / "page.html")
    assert page.count("<script>") == 1 and "<img" not in page and "<b>bold" not in page and "[red]x[/]" in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?:""", page.replace("&lt;img src=x&gt;", ""))
    assert all(sign.isprintable() or sign == "\n" for sign in page)
    text = unescape(re.sub(r"<[^>]*>", "", page[page.index("<article") :]))
    assert (
        f"echo {visible(HOSTILE)} <|im_end|> end<|im_end|>" in text
        and 'data-weight="0.5">half</mark><mark class="other"><i>' in page
    )
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


def shown_on(page: Page) -> list[str]:
    """The headings of the examples that a person sees."""
    heads = "[...document.querySelectorAll('article')].filter(a => a.checkVisibility()).map(a => a.querySelector('b').textContent)"
    return list(page.ask(heads))


def test_in_a_browser_nothing_of_a_conversation_runs_and_one_can_link_to_a_search(
    made: Path, cli: Callable[..., Answer], tmp_path: Path, page: Page
) -> None:
    assert cli("inspect", made / "hostile", "--html", tmp_path / "hostile.html")[0] == 0
    page.open(tmp_path / "hostile.html")
    assert page.ask("document.title") == f"train of {made / 'hostile'}" and page.ask("document.scripts.length") == 1
    assert page.ask("document.images.length") == 0 and shown_on(page) == ["example 0"]
    assert cli("inspect", made / "dataset", "--html", tmp_path / "page.html")[0] == 0
    store = Dataset.open(made / "dataset").train
    of_one = [f"example {i}" for i, e in enumerate(store) if e.conversation == store[2].conversation]
    page.open(tmp_path / "page.html", f"#{store[2].conversation}")
    assert shown_on(page) == of_one and page.ask("counter.textContent") == f"{len(of_one)} of {len(store)} shown"
    page.open(tmp_path / "page.html", "#nowhere%20to%20be%20found")
    assert shown_on(page) == [] and page.log == []


def test_in_a_browser_source_search_and_folds_work_by_keyboard(
    made: Path, cli: Callable[..., Answer], tmp_path: Path, page: Page
) -> None:
    assert cli("inspect", made / "dataset", "--html", tmp_path / "page.html")[0] == 0
    examples = [*enumerate(Dataset.open(made / "dataset").train)]
    page.open(tmp_path / "page.html")
    assert len(shown_on(page)) == len(examples)
    page.press("Tab")  # to the search
    page.press("Tab")  # to the sources
    page.press("ArrowDown")
    first = min({e.source for _, e in examples})
    assert page.ask("source.value") == first and shown_on(page) == [f"example {i}" for i, e in examples if e.source == first]
    page.press("ArrowUp")
    page.press("Tab")
    page.press(" ")
    folds = "[...document.querySelectorAll('details')].map(d => d.open)"
    assert set(page.ask(folds)) == {True} and page.ask("unfold.getAttribute('aria-pressed')") == "true"
    page.press(" ")
    page.press("Tab")  # to the first context
    page.press("Enter")
    assert page.ask(folds)[0] and not any(page.ask(folds)[1:])


def test_in_a_browser_what_is_searched_unfolds_and_a_click_folds_it(
    made: Path, cli: Callable[..., Answer], tmp_path: Path, page: Page
) -> None:
    assert cli("inspect", made / "dataset", "--html", tmp_path / "page.html")[0] == 0
    page.open(tmp_path / "page.html")
    inside = "document.querySelectorAll('article details')[0]"
    word = max(re.findall(r"\w+", page.ask(f"{inside}.lastChild.textContent")), key=len)
    assert not page.ask(f"{inside}.lastChild.parentElement.open")
    page.click("#search")
    page.write(word.upper())
    page.ask("new Promise(done => setTimeout(done, 300))")  # it waits for a pause in typing
    texts = page.ask("texts.map(text => text)")
    assert shown_on(page) == [f"example {i}" for i, text in enumerate(texts) if word.lower() in text] and page.ask(f"{inside}.open")
    page.click("article details summary")
    assert not page.ask(f"{inside}.open")
    page.ask("search.value = ''; apply()")
    assert len(shown_on(page)) == len(texts) and not any(page.ask("[...document.querySelectorAll('details')].map(d => d.open)"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_everything_can_be_read_in_any_scheme_and_width(
    scheme: str, made: Path, cli: Callable[..., Answer], tmp_path: Path, page: Page
) -> None:
    for name in ("dataset", "hostile"):
        assert cli("inspect", made / name, "--html", tmp_path / f"{name}.html")[0] == 0
        for width in (360, 1200):
            page.look(width, 800, scheme)
            page.open(tmp_path / f"{name}.html")
            assert page.ask("document.documentElement.scrollWidth") <= width
        colours = page.ask("""[...document.querySelectorAll('body, body *')].filter(e => e.checkVisibility()).map(e => {
            let ground = e; while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
            return [e.closest('svg') ? '' : getComputedStyle(e).color, getComputedStyle(ground).backgroundColor] })""")
        pairs = {(text, ground) for text, ground in colours if text}
        assert len(pairs) > 4 and min(contrast(*pair) for pair in pairs) >= 4.5  # WCAG 2.2, 1.4.3
        grounds = page.ask("['body', 'mark'].map(s => getComputedStyle(document.querySelector(s)).backgroundColor)")
        assert contrast(*grounds) < 21 and (contrast("rgb(255, 255, 255)", grounds[0]) > 10) == (scheme == "dark")
    lines = page.ask("['mark', 'mark.other'].map(s => getComputedStyle(document.querySelector(s)).borderBottomStyle)")
    assert lines == ["solid", "dotted"]  # what is learned is told without colour too


def contrast(one: str, other: str) -> float:
    """Of two colours as browsers write them: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    light = []
    for colour in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(float(np.dot((0.2126, 0.7152, 0.0722), linear)) + 0.05)
    return max(light) / min(light)


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
