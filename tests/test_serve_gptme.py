"""The real gptme CLI against the server: a tiny model that learned one task by heart does it, in each format."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML
from tiny_models import make_tiny
from tool_chats import QWEN

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gptme_cli import Recording, Session, run_gptme

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, ToolCall, write_conversations
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.serving.listening import in_background
from mlx_finetune.serving.opened import Opened, find_source
from mlx_finetune.training.run import execute, plan_run

TASK = "Save hello.py, then run it."
SAVED, RAN = "Saved to hello.py", "Ran command: `python3 hello.py`\n\n`42`\n\n"
CODE = "print(6 * 7)\n"
ANSWERS = {
    "markdown": (f"```save hello.py\n{CODE}```", "```shell\npython3 hello.py\n```", "```complete\n```"),
    "xml": (
        f'<tool-use>\n<save args="hello.py">\n{CODE}</save>\n</tool-use>',
        "<tool-use>\n<shell>\npython3 hello.py\n</shell>\n</tool-use>",
        "<tool-use>\n<complete>\n</complete>\n</tool-use>",
    ),
}
CALLS = (("save", {"path": "hello.py", "content": CODE}), ("shell", {"command": "python3 hello.py"}), ("complete", {}))


def session(gptme_python: str, place: str | Path, tool_format: str, scratch: Path) -> tuple[Session, Recording, list[str]]:
    source, log = find_source(str(place), "", "torch"), list[str]()
    served = Recording(source, "m", 120)
    with in_background(served, lambda: Opened(source), log=log.append) as url:
        how = ["--tool-format", tool_format, "--system", "short", "--tools", "shell,save"]
        found = run_gptme(Path(gptme_python).parent / "gptme", url, "m", [TASK], how, scratch, 100)
    return found, served, log


def learned_by_heart(root: Path, told: Sequence[Message], turns: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Path:
    write_conversations(root / "c.jsonl", [Conversation((*told, *turns), "gptme", "one", "MIT", {}, tuple(tools))])
    model, windows = root / "base", make_config({"valid_fraction": 0, "max_length": 16384}, "t")
    prepare([root / "c.jsonl"], ChatTemplate.load(model), windows, root / "d", {})
    how = {"model": str(model), "data": str(root / "d"), "out": str(root / "run"), "engine": "torch", "fine_tune_type": "full"}
    how |= {"steps": 40, "learning_rate": 4e-3, "lr_schedule": "constant", "gradient_accumulation": 1}
    plan = plan_run(make_config(how, "t"))
    execute(plan, lambda done, steps, note: None)
    return plan.run


@pytest.mark.long
@pytest.mark.parametrize("tool_format", ["markdown", "xml", "tool"])
def test_gptme_does_a_task_of_two_steps_with_a_model_that_learned_it(gptme_python: str, tmp_path: Path, tool_format: str) -> None:
    changes = {"max_position_embeddings": 32768, "num_hidden_layers": 2}
    base = make_tiny("llama", tmp_path / "base", tokenizer=True, changes=changes)
    (base / "chat_template.jinja").write_text(QWEN if tool_format == "tool" else CHATML)
    before, asking, _ = session(gptme_python, base, tool_format, tmp_path / "before")
    first = next(request for request in asking.asked if request.stream)
    assert first.messages[-1] == Message("user", TASK) and bool(first.tools) == (tool_format == "tool")
    run = learned_by_heart(tmp_path, first.messages, conversation(tool_format), first.tools)
    after, served, log = session(gptme_python, run, tool_format, tmp_path / "after")
    assert before.executed == [] and after.executed[:2] == [SAVED, RAN.split("\n")[0]], after.printed
    assert after.status == 0 and [line.split()[2] for line in log] == ["200"] * len(served.asked)
    results = [m.content for m in served.asked[-1].messages if m.role in ("system", "tool")][-2:]
    assert results == [SAVED, RAN]  # as they were learned, so each turn was asked for with what stands before it in training
    assert [request.stream for request in served.asked].count(False) == 1  # the title, in between


def conversation(tool_format: str) -> list[Message]:
    """The turns of the task and the results between them, as gptme sends them in this format."""
    if tool_format in ANSWERS:
        turns, results = (
            [Message("assistant", text) for text in ANSWERS[tool_format]],
            [Message("system", text) for text in (SAVED, RAN)],
        )
    else:
        made = [ToolCall(f"call0000{i}", name, json.dumps(arguments)) for i, (name, arguments) in enumerate(CALLS)]
        turns = [Message("assistant", "", tool_calls=(call,)) for call in made]
        results = [Message("tool", text, tool_call_id=call.id) for call, text in zip(made, (SAVED, RAN), strict=False)]
    return [turns[0], results[0], turns[1], results[1], turns[2]]
