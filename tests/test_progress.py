"""What is seen while a run goes on: one bar and one line of numbers that fit a terminal, plain lines elsewhere."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_finetune.training.progress import Left, Now, Standing, in_words, training_progress

FULL = Standing(99_999, 99_999, "stepped", 11.234, 11.345, 99_999.4, 312_340_000_000)


def standing(step: int, now: Now, loss: float | None = 1.5, held_out: float | None = 2.0) -> Standing:
    return Standing(step, 20, now, loss if step else None, held_out, 1234.4 if step else None, 3_210_000_000)


def test_a_standing_has_step_losses_speed_and_memory_within_80_columns() -> None:
    assert str(standing(5, "stepped")) == "step 5 of 20 · loss 1.500 · held out 2.000 · 1,234 tokens/s · 3.21 GB"
    assert len(str(FULL)) <= 79 + len("312.34") - len("13.21") + 2  # with two digits more than most machines have
    assert str(Standing(5, 20, "stepped", 1.5)) == "step 5 of 20 · loss 1.500"
    assert str(Standing(0, 20, "measuring", memory=1)) == "measuring the model before the first step"


def test_without_a_terminal_a_line_stands_at_each_tenth_and_for_each_held_out_loss(capsys: pytest.CaptureFixture[str]) -> None:
    with training_progress() as advance:
        for now in ("measuring", "measured"):
            advance(0, 20, standing(0, now))  # type: ignore[arg-type]
        for step in range(1, 21):
            if step % 5:
                advance(step, 20, standing(step, "stepped"))
            else:
                advance(step, 20, standing(step, "measuring"))
                advance(step, 20, standing(step, "measured", held_out=1.0))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0] == "train 0 % step 0 of 20 · held out 2.000 · 3.21 GB"
    assert [int(re.findall(r"step (\d+) of", line)[0]) for line in lines] == [0, 2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    assert "held out 1.000" in lines[3] and lines[3].endswith("0:00:00 left") and "left" not in lines[-1]


def test_time_left_is_told_by_what_this_start_did(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    left = Left()
    assert left.after(50, 100) == ""  # a run that goes on
    now[0] = 120.0
    assert left.after(60, 100) == "0:01:20 left"
    assert in_words(3723.4) == "1:02:03 left"


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_in_a_terminal_the_bar_and_the_numbers_are_two_lines_that_fit(columns: int, tmp_path: Path) -> None:
    program = (
        "import time\nfrom mlx_finetune.training.progress import Standing, training_progress\n"
        "with training_progress() as advance:\n"
        "    for step in range(1, 4):\n"
        "        advance(step, 99_999, Standing(step, 99_999, 'stepped', 1.5, 2.0, 12_345, 13_210_000_000)); time.sleep(0.15)\n"
    )
    reader, writer = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=writer, stdout=subprocess.PIPE, env=environment)
    out, _ = process.communicate(timeout=60)
    os.close(writer)
    screen = os.read(reader, 1_000_000).decode()
    os.close(reader)
    assert out == b"" and process.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert all(len(line) <= columns for line in lines)
    assert any("train" in line and "left" in line for line in lines) or columns < 80
    assert any(line.startswith("step 3 of 99999 · loss 1.500") for line in lines)
    if columns >= 80:
        assert any("held out 2.000 · 12,345 tokens/s · 13.21 GB" in line for line in lines)
