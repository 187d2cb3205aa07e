"""Three chats in every file that may hold them."""

import json
from pathlib import Path

from mlx_finetune.data.sources import gather
from mlx_finetune.data.sources.chat_formats import read

ROWS = [
    {"messages": [{"role": "user", "content": f"Question {i} ✓"}, {"role": "assistant", "content": "Yes."}]} for i in range(1, 4)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
BOM = "\ufeff"


def questions(source: Path | str) -> list[str]:
    """The first message of each conversation."""
    return [conversation.messages[0].content for conversation in gather(read(source)).conversations]


EXPECTED = ["Question 1 ✓", "Question 2 ✓", "Question 3 ✓"]
PACKED: dict[str, str] = {
    "lines.jsonl": LINES,
    "no_name_that_helps": LINES,
    "lines.json": LINES,
    "bom.jsonl": BOM + LINES,
    "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "blank_lines.jsonl": "\n  \n" + LINES.replace("\n", "\n\n\t\n"),
    "no_last_newline.jsonl": LINES[:-1],
    "list.json": json.dumps(ROWS),
    "list.jsonl": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "pretty.txt": BOM + "\n" + json.dumps(ROWS, indent=2).replace("\n", "\r\n"),
    "list_of_lines.json": "[" + LINES.strip().replace("\n", ",\n") + "]",
    "list_of_lines.jsonl": "[\n" + LINES.strip().replace("\n", ",\n") + "\n]\n",
    "data.json": json.dumps({"version": 1, "data": ROWS}),
    "train.json": json.dumps({"train": ROWS}, indent=1),
    "train_first.json": json.dumps({"train": ROWS, "test": ROWS}, indent=1),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "lists.jsonl": "".join(json.dumps(row["messages"]) + "\n" for row in ROWS),
    "far_away.json": " " * 3 * 2**20 + json.dumps(ROWS, indent=1),
    "documents.txt": "<|endoftext|>\n".join(CHATML.format(question) for question in EXPECTED),
}


def text_table(folder: Path, name: str) -> Path:
    """A parquet file of the rows, and of one more column that only one of them fills."""
    import pyarrow
    import pyarrow.parquet

    path = folder / name
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": 2}}}]
    rows = [*ROWS, {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None, "tool_calls": calls}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path
