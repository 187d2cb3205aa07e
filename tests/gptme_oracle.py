"""gptme's own answers, for comparison: run by an interpreter that has gptme, with texts on standard input, all as JSON.

For each text: its calls in each format, and the messages that gptme sends of a log with it; besides, the tools that are loaded.
"""

import json
import logging
import sys
from typing import Any

from gptme.llm.llm_openai import _handle_tools, _merge_tool_results_with_same_call_id
from gptme.tools import get_available_tools, init_tools
from gptme.tools.base import ToolUse


def calls(text: str, tool_format: str) -> list[Any]:
    """Name, argument, content; of a native call name, id, arguments."""
    found: list[Any] = []
    for use in ToolUse.iter_from_content(text, tool_format_override=tool_format):
        name, argument = "ipython" if use.tool == "py" else use.tool, " ".join(use.args or [])
        if use.is_runnable and use.call_id:
            found.append((name, use.call_id, use.kwargs))
        elif use.is_runnable:
            is_file = use._format == "markdown" and name in ("save", "append", "patch")
            found.append((name, argument.partition(" ")[2] if is_file else argument, use.content))
    return found


def sent(log: list[dict[str, str]]) -> list[Any]:
    """Role, text, calls and the call that it answers, of each message."""
    given = [{key: value for key, value in row.items() if value} for row in log]
    rows = [row | {"content": [{"type": "text", "text": row.get("content", "")}]} for row in given]
    result = []
    for row in _merge_tool_results_with_same_call_id(_handle_tools(rows)):
        content = row.get("content") or ""
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        made = [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in row.get("tool_calls", ())]
        result.append((row["role"], text, made, row.get("tool_call_id", "")))
    return result


if __name__ == "__main__":
    tools = [tool.name for tool in get_available_tools() if tool.execute and tool.is_available]
    init_tools(tools)
    logging.disable(logging.CRITICAL)
    answers = []
    for text, log in json.load(sys.stdin):
        answers.append([calls(text, "markdown"), calls(text, "xml"), calls(text, "tool"), sent(log)])
    sys.stdout.write("\n" + json.dumps([tools, answers]) + "\n")
