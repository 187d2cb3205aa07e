"""Small chat templates that want user and assistant in turn, as Gemma's and Mistral's do."""

from tiny_models import CHATML

ALTERNATES = (
    "{% set first = 1 if messages[0].role == 'system' else 0 %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% if not loop.first %}{{ raise_exception('one system message') }}{% endif %}"
    "{% elif (m.role == 'user') != (loop.index0 % 2 == first) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% endfor %}"
) + CHATML
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ALTERNATES
# As Gemma 3: the system message in front of the first user message, contents trimmed, no role but user and model.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set lead = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (lead if loop.first else '') }}"
    "{{ m.content | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# As Gemma 2, which takes no system message at all.
GEMMA2 = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA


TURN_BY_TURN = (
    "{% if messages[0].role == 'system' %}{% set lead = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% set ns = namespace(index=0) %}{% for m in rest %}{% if not (m.role == 'tool' or m.tool_calls is defined) %}"
    "{% if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}{% endif %}{% endfor %}{{ bos_token }}"
)


def _mistral(first: str, user: str, calls: str, result: str) -> str:
    """One system message; user and assistant in turn, where calls and results do not count."""
    answer = "{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}"
    start = TURN_BY_TURN + first + "{% for m in rest %}{% if m.role == 'user' %}" + user
    end = "{% else %}{{ raise_exception('only user, assistant and tool') }}{% endif %}{% endfor %}"
    return f"{start}{{% elif m.tool_calls is defined %}}{calls}{answer}{{% elif m.role == 'tool' %}}{result}{end}"


# As Mistral Nemo: system prompt and schemas at the last user message, no text beside a call, its id of nine characters.
NEMO = _mistral(
    "",
    "{% if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + (lead + '\n\n' if loop.last and lead is defined else '') + m.content + '[/INST]' }}",
    "{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('Tool call IDs should be of length 9!') }}{% endif %}"
    "{{ ', \"id\": \"' + c.id + '\"}' + ('' if loop.last else ', ') }}{% endfor %}{{ ']<|im_end|>' }}",
    "{{ '[TOOL_RESULTS]{\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}",
)
# As Ministral 3: system prompt and schemas in front, text and calls in one turn.
MINISTRAL = _mistral(
    "{% if lead is defined %}{{ '[SYSTEM_PROMPT]' + lead + '[/SYSTEM_PROMPT]' }}{% endif %}"
    "{% if tools %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}",
    "{{ '[INST]' + m.content + '[/INST]' }}",
    "{{ m.content }}{% for c in m.tool_calls %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson) }}"
    "{% endfor %}{{ '<|im_end|>' }}",
    "{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}",
)
