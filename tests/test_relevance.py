"""What counts as programming, shell and developer tools; texts are our own, the measured sample is real."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.sources.relevance import holds_code, is_relevant

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "relevance.py"


def asks(prompt: str, answer: str = "") -> bool:
    return is_relevant((Message("user", prompt), Message("assistant", answer)))


@pytest.mark.parametrize(
    "prompt",
    [
        "How do I undo the last git commit?",
        "my docker container exits with code 137",
        "Difference between C++ and C#",
        "Explain bash arrays",
        "Write a function that reverses a string",
        "Write a short program for the eight queens",
        "How do I delete a file in the terminal?",
        "用Python写一个排序函数",
        "Pythonで素数を求める",
        "Как написать скрипт?",
        "¿Cómo escribo un programa que lea un archivo?",
        "Wie schreibe ich eine Funktion in Java?",
        "Comment faire un script bash",
        "เขียนโปรแกรมpythonให้หน่อย",
    ],
)
def test_a_question_about_programming_is_relevant_in_any_language(prompt: str) -> None:
    assert asks(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "What is the dress code of a wedding?",
        "How do pythons hunt?",
        "Who was the tallest of Monty Python?",
        "How long does it take to get to Java island by boat?",
        "Write a script for a play about a lighthouse",
        "Explain angular momentum",
        "código postal de Madrid",
        "Quelle est la vue de la tour ?",
        "lua cheia no Brasil",
        "What does a building developer do?",
        "La bella scala",
        "I excel at cooking",
    ],
)
def test_a_word_that_also_means_something_else_is_not_enough(prompt: str) -> None:
    assert not asks(prompt)


@pytest.mark.parametrize(
    "block",
    [
        "```python\nx\n```",
        "~~~sh\nls\n~~~",
        "> ```js\n> a\n> ```",
        "```\ndef area(r):\n    return r\n```",
        "```\n$ ls -la\n```",
        "```\nSELECT name FROM people\n```",
        "```\n<div class='a'>\n```",
        '```\n{\n  "a": 1\n}\n```',
        "```\nint n = f(x);\n```",
        "```\nfor (;;) {\n}\n",
    ],
)
def test_code_in_a_fence_is_relevant_whatever_was_asked(block: str) -> None:
    assert holds_code(f"Like this:\n\n{block}")
    assert asks("Do it for me, please", f"Like this:\n\n{block}")


@pytest.mark.parametrize(
    "block",
    [
        "| day | meal |\n|-----|------|\n| Mon | rice |",
        "  /\\_/\\\n ( o.o )\n  > ^ <",
        "Roses are red;\nviolets are blue,\nand so are you.",
        "For the sauce:\nif you like it hot:\n2 tomatoes, 1 onion",
        "import duties rose\nfrom here to there",
        "1. e4 e5\n2. Nf3 Nc6",
    ],
)
def test_tables_drawings_and_verse_in_a_fence_are_no_code(block: str) -> None:
    assert not holds_code(f"```\n{block}\n```\nprint(1)")


def test_code_between_two_fences_is_not_in_a_fence() -> None:
    assert not holds_code("```\nwhite rice\n```\nprint(1);\n```\nred rice\n```")


@pytest.mark.parametrize("unit", ["a", " ", "`", "(", "x;", "```\n", "a b\n", "a.", "<a ", "select ", "write a short ", "if ("])
def test_no_text_takes_long(unit: str) -> None:
    text = "```\n" + unit * (1_000_000 // len(unit))
    began = time.process_time()
    asks(text, text)
    assert time.process_time() - began < 5  # measured: 0.4 s at most


def test_an_empty_conversation_is_not_relevant() -> None:
    assert not is_relevant(())


def test_the_rule_is_as_good_on_the_labelled_sample_as_its_docstring_says(shared: Path) -> None:
    done = subprocess.run([sys.executable, BENCHMARK, shared / "data" / "openassistant"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "precision 0.83  (10 of 12" in done.stdout and "recall    0.83  (10 of 12" in done.stdout
