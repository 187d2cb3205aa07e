"""What holds of any conversation: no secret passes, redacting again changes nothing, each turn is learned once or counted."""

from collections import Counter
from pathlib import Path

import pytest
from chats import LLAMA3, PIECES, conversation_of, template_of
from harmless_texts import harmless_texts
from hostile import ALIKE
from hypothesis import given, settings
from hypothesis import strategies as st
from secret_texts import FORMS, Chance, secret_samples
from test_exact import QWEN3
from tiny_models import CHATML

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.examples import make_examples
from mlx_finetune.data.redact import Ledger, Rules, redact_text
from mlx_finetune.data.template import ChatTemplate

FEW = settings(ALIKE, max_examples=40)
COUNTS = [40, pytest.param(400, marks=pytest.mark.long)]
KIM = Rules.for_person(Path("/home/kim"), "kim", emails=True)
SAMPLES = tuple(sample.text for sample in secret_samples(5))
TEXTS = st.sampled_from((*PIECES, *harmless_texts(5), "/home/kim/", "kim@example.org", "password=", "[REDACTED:token:1]"))
BOUNDS = st.sampled_from(("", " ", "\n", "\t", '"', "'", "`", "(", ")", "[", "{", "<", ">", ",", ";", "|", "=", ": ", "\\n", "。"))


@st.composite
def talks(draw: st.DrawFn) -> str:
    """Harmless, secret and odd texts in a row, some of them cut."""
    parts = draw(st.lists(TEXTS | st.sampled_from(SAMPLES) | st.text(max_size=6), min_size=1, max_size=6))
    cut = [part[draw(st.integers(0, 9)) :] if draw(st.booleans()) else part for part in parts]
    return draw(st.sampled_from(("", " ", "\n"))).join(cut)


@pytest.mark.parametrize("count", COUNTS)
def test_redacting_again_changes_nothing_whatever_the_text(count: int) -> None:
    @settings(FEW, max_examples=count)
    @given(text=talks())
    def once(text: str) -> None:
        first = redact_text(text, KIM, Ledger().name)
        assert redact_text(first, KIM, Ledger().name) == first

    once()


@pytest.mark.parametrize("count", COUNTS)
def test_a_makers_key_never_passes_whatever_surrounds_it(count: int) -> None:
    @settings(FEW, max_examples=count)
    @given(st.sampled_from(sorted(FORMS)), st.integers(0, 99), talks(), BOUNDS.filter(bool), BOUNDS.filter(bool), talks())
    def gone(kind: str, seed: int, before: str, left: str, right: str, after: str) -> None:
        secret = FORMS[kind](Chance(seed))
        assert secret not in redact_text(before + left + secret + right + after, KIM, Ledger().name)

    gone()


MESSAGES = st.lists(
    st.builds(
        Message,
        st.sampled_from(("system", "user", "user", "assistant", "assistant", "tool")),
        st.lists(st.sampled_from(PIECES), max_size=5).map("".join),
        st.sampled_from((1.0, 1.0, 0.5, 0.0)),
    ),
    min_size=1,
    max_size=9,
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTemplate]:
    return {name: template_of(tmp_path_factory.mktemp(name), source, eos="<|im_end|>") for name, source in TEMPLATES.items()}


@pytest.mark.parametrize(("name", "count"), [("chatml", 20), *(pytest.param(n, 150, marks=pytest.mark.long) for n in TEMPLATES)])
def test_each_turn_is_learned_once_and_word_for_word_or_counted(name: str, count: int, templates: dict[str, ChatTemplate]) -> None:
    template = templates[name]

    @settings(FEW, max_examples=count)
    @given(messages=MESSAGES, length=st.sampled_from((48, 96, 512)))
    def whole(messages: list[Message], length: int) -> None:
        made = make_examples(conversation_of(messages), template, length)
        counted = made.tally.learned_turns + made.tally.turns_too_long + made.tally.turns_refused.total()
        assert counted == conversation_of(messages).assistant_turns
        turns = [turn for example in made.examples for turn in example.turns]
        assert not any(more > 1 for more in Counter(turns).values())
        for example in made.examples:
            assert len(example.tokens) <= length
            learned = template.decode(example.tokens[example.weights > 0].tolist())
            assert learned == "".join(messages[turn].content.strip() for turn in example.turns)

    whole()
