"""Chat templates that trl, transformers and mlx_lm ship: each turn is learned once, behind what is served, and nothing else."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import chat
from served_oracle import Server, Verdict, judge
from shipped_chats import CONTROL, SHAPES, conversation
from shipped_templates import Row, learned, model_folder, renderers, row_of, shipped, table
from tiny_models import CHATML

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.provenance import Refused, locate
from mlx_finetune.data.rows import rows_of
from mlx_finetune.data.template import ChatTemplate

EVERY, BY_TURNS = ("gptme", "gptme thinking"), [name for name in SHAPES if name not in ("gptme", "gptme thinking")]
OTHERS = 4  # shapes beside those two that each template is asked for in the short run, in turn


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """A few shapes each, one of mild and one of wild contents in turn; trl's twins for training are for the long run."""
    found = []
    for number, one in enumerate(one for one in shipped() if not one.name.endswith("_training")):
        shapes = [*EVERY, *(BY_TURNS[(number * OTHERS + i) % len(BY_TURNS)] for i in range(OTHERS))]
        found.append(row_of(tmp_path_factory.mktemp("model"), one, shapes, [number % 2]))
    return found


def total_of(rows: Sequence[Row]) -> Verdict:
    total = Verdict()
    for row in rows:
        total.add(row.total)
    return total


def test_the_templates_of_all_three_packages_are_found() -> None:
    names = [one.name for one in shipped()]
    counts = Counter(name.partition("/")[0] for name in names)
    assert counts["trl"] >= 70 and counts["transformers"] >= 3 and len(names) == len(set(names))
    assert renderers().keys() >= {"deepseek_v32"}


def test_no_turn_of_any_shipped_template_is_learned_wrongly(rows: list[Row]) -> None:
    wrong = [f"{row.name}: {each}" for row in rows for each in row.total.wrong]
    assert not wrong, "\n".join(wrong)
    total = total_of(rows)
    assert total.exact > 450 and total.inexact.total() < total.exact / 2, table(rows)


def test_chats_as_gptme_sends_them_are_exact_with_every_template(rows: list[Row]) -> None:
    assert not [row.name for row in rows if row.refuses_gptme], table(rows)
    for row in rows[::2]:  # contents without any control token's name
        verdict = row.verdicts.get("gptme")
        assert not verdict or (verdict.exact == 4 and not verdict.inexact), (row.name, verdict)


def test_a_template_that_moves_the_output_of_tools_to_the_front_is_given_another_policy(rows: list[Row]) -> None:
    (row,) = [row for row in rows if row.name == "trl/deepseekv3"]
    assert row.policy == "folded" and "puts a message of role system in front of an earlier one" in row.why


def test_the_oracle_sees_each_kind_of_wrong_example(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, CHATML, (), ("<|im_end|>",))
    template = ChatTemplate.load(folder)
    server, messages = Server(folder, template), [*chat("so?", "word one"), Message("system", "Z"), Message("assistant", "done")]
    pieces = learned(template, messages, ())
    (piece,) = pieces.pieces
    tokens, weights = piece.encoded.tokens, piece.encoded.weights
    assert judge(server, messages, (), pieces).wrong == []
    first = int(np.argmax(weights > 0))
    changes: dict[str, dict[str, Any]] = {
        "stretches are learned for": {"weights": np.where(np.arange(len(weights)) < first + 20, 0, weights)},
        "where no server stops": {"weights": np.where(tokens == 2, 0, weights)},
        "learns 'ord one'": {"weights": np.where(np.arange(len(weights)) == first, 0, weights)},
        "stretches are learned": {"weights": np.ones_like(weights)},
        "or weighs": {"weights": weights / 2},
        "called exact": {"tokens": np.where(np.arange(len(tokens)) == 3, tokens[3] + 1, tokens)},
        "what system said is lost": {"tokens": np.where(tokens == server.tokens("Z")[0], 9, tokens)},
    }
    for reason, change in changes.items():
        changed = replace(piece, encoded=replace(piece.encoded, **change))
        assert reason in " ".join(judge(server, messages, (), replace(pieces, pieces=(changed,))).wrong), reason
    for many, reason in ((2, "times"), (0, "are not 2 turns")):
        assert reason in " ".join(judge(server, messages, (), replace(pieces, pieces=(piece,) * many)).wrong)


def mlx_renderer(apply: Callable[..., str], thinking: bool) -> Callable[[Sequence[Message]], str]:
    """As the wrapper of mlx_lm calls it; what the renderer asserts is a refusal."""

    def render(messages: Sequence[Message]) -> str:
        rows: list[dict[str, Any]] = rows_of(messages)
        try:
            return str(apply(rows, enable_thinking=thinking))
        except (AssertionError, NotImplementedError) as error:
            raise Refused(str(error)) from error

    return render


@pytest.mark.parametrize("thinking", [False, True])
def test_messages_are_found_in_what_the_python_renderers_of_mlx_lm_write(thinking: bool) -> None:
    """Proof by words: each message has one that stands nowhere else."""
    found, refused = 0, Counter[str]()
    for name, apply in renderers().items():
        render = mlx_renderer(apply, thinking)
        for number, shape in enumerate(shape for shape in SHAPES if "x" not in SHAPES[shape] and "y" not in SHAPES[shape]):
            random = np.random.default_rng([number, *name.encode()])
            messages = ChatTemplate.as_learned(conversation(random, shape, CONTROL if number % 2 else ())[0])
            try:
                text, spans = locate(render, messages)
            except Refused as reason:
                refused[str(reason)[:60]] += 1
                continue
            for message, span in zip(messages, spans, strict=True):
                assert (span is None) == (not message.content.strip())
                assert not span or text[span.start : span.end].strip() == message.content.strip()
                found += span is not None
            places = [span.start for span in spans if span]
            assert places == sorted(places)
    assert found > (60 if not thinking else 5), refused


@pytest.mark.long
def test_no_turn_is_learned_wrongly_over_all_shapes_and_many_contents(tmp_path: Path) -> None:
    found = [row_of(tmp_path / str(i), one, list(SHAPES), range(6)) for i, one in enumerate(shipped())]
    wrong = [f"{row.name}: {each}" for row in found for each in row.total.wrong]
    assert not wrong, "\n".join(wrong)
    assert total_of(found).exact > 8000, table(found)
