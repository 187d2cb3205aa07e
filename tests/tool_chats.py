"""Small chat templates that write native tool calls as real ones do, and conversations with such calls."""

import json
from typing import Any

from mlx_finetune.data.conversation import Message, ToolCall

# As Qwen2.5 and Hermes: schemas in the system message, calls in <tool_call> tags, results as a user's <tool_response>.
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'You are Q.') }}"
    "{{ '\n\n<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{% if call.function is defined %}{% set call = call.function %}{% endif %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + call.name + '\", \"arguments\": ' + (call.arguments | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif not (tools and loop.first and m.role == 'system') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3.1: one call a turn in place of the content, results written as JSON under another role.
LLAMA = (
    "{% for m in messages %}"
    "{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    '{{ \'<|im_start|>assistant<|endoftext|>\n\n{"name": "\' + call.name + \'", "parameters": \' + (call.arguments | tojson) }}'
    "{{ '}<|im_end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>ipython<|endoftext|>\n\n' + (m.content | tojson) + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '<|endoftext|>\n\n' }}"
    "{% if loop.first and tools %}{% for tool in tools %}{{ (tool | tojson(indent=4)) + '\n\n' }}{% endfor %}{% endif %}"
    "{{ (m.content | trim) + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|endoftext|>\n\n' }}{% endif %}"
)
# As Mistral v3: no header before a turn, schemas before the last user message, ids of nine characters.
MISTRAL = (
    "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    '{{ \'{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) }}'
    "{% if call.id | length != 9 %}{{ raise_exception('Tool call IDs should be of length 9!') }}{% endif %}"
    "{{ ', \"id\": \"' + call.id + '\"}' + ('' if loop.last else ', ') }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + (m.content | tojson) + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
SHELL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "shell",
        "description": "Runs a command.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
SAVE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "save", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}},
}
TOOLS = (SHELL, SAVE)


def call(identifier: str, name: str = "shell", **arguments: Any) -> ToolCall:
    return ToolCall(identifier, name, json.dumps(arguments))


def calling(*calls: ToolCall, content: str = "", weight: float = 1.0) -> Message:
    return Message("assistant", content, weight, tool_calls=calls)


def result(identifier: str, content: str) -> Message:
    return Message("tool", content, tool_call_id=identifier)


def session(content: str = "") -> list[Message]:
    """A question, a call of the shell, its result, a file saved, its result, and the answer."""
    return [
        Message("system", "You are kind."),
        Message("user", "What is here?"),
        calling(call("call00001", command='echo "a\tb"\nls -la'), content=content),
        result("call00001", 'a.txt\n"b".txt\n'),
        calling(call("call00002", "save", path="é.py", content="print('x')\n", times=3, really=True)),
        result("call00002", "Saved."),
        Message("assistant", "Two files."),
    ]
