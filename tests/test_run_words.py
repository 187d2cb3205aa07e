"""What the verbs advise is said by `run` in the words of its file."""

from pathlib import Path

import pytest

from mlx_finetune.running.words import in_words_of_run
from mlx_finetune.training.memory_watch import again

FILE, COMMAND = Path("my road.yaml"), "mlx-finetune run 'my road.yaml'"


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        ("prepare with --max-length 512", "prepare with max_length: 512"),
        ("prepare with --max-length 9, or train with --engine torch", "prepare with max_length: 9, or train with engine: torch"),
        ("start a new run with another --out", "start a new run with another `folder:`"),
        ("leave out --no-gptme, or name --chat FILE", "leave out collect.gptme: false, or name collect.chat: FILE"),
        ("--original names the weights to fuse into", "`hand_back.original:` names the weights to fuse into"),
        (
            f"close other programs, then {again('run')}; or prepare with a smaller --max-length",
            f"close other programs, then {COMMAND}; or prepare with a smaller `max_length:`",
        ),
    ],
)
def test_options_are_keys_of_the_file(hint: str, said: str) -> None:
    assert in_words_of_run(hint, FILE, COMMAND) == f"{said} (in 'my road.yaml')"


@pytest.mark.parametrize(
    "hint", ["mlx-finetune convert m --out DIR keeps its 4 bits", "pip install 'mlx-finetune[torch]'", "write --set rank=8", ""]
)
def test_what_is_to_be_typed_stays(hint: str) -> None:
    assert in_words_of_run(hint, FILE, COMMAND) == hint


@pytest.mark.parametrize("run", ["run", "a b/it's one"])
def test_what_goes_on_with_the_training_goes_on_with_all_of_it(run: str) -> None:
    hint = f"what was saved is whole: make room, then {again(run)} --set grad_checkpoint=1"
    assert in_words_of_run(hint, FILE, COMMAND) == f"what was saved is whole: make room, then {COMMAND} --set grad_checkpoint=1"
