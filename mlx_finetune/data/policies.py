"""What is done to the roles of a chat before a template sees it, where the template alone would raise or lose something.

gptme sends several system messages first and its tools' output as later system messages. Each policy is Jinja in front of the
model's own template: what is trained, what is exported, and so what any server serves, are one text.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime

MARK = "{#- mlx-finetune: "  # begins what stands in front of a template

# Parts of content as OpenAI's format may have it become text; everything but role and content stays with its message.
TEXT = (
    "{%- macro mf_text(content) -%}{%- if content is string -%}{{ content }}{%- elif content -%}"
    "{%- for part in content -%}{{ part.text if part.text is defined else '' }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
# gptme 0.35.1, llm_openai.py: what it makes of later system messages for models whose template takes only one.
FOLD = (
    "{%- set mf = namespace(messages=[]) -%}{%- for m in messages -%}"
    "{%- if m.role == 'system' and not loop.first -%}"
    "{%- set mf.messages = mf.messages + [{'role': 'user', 'content': '<system>\n' + mf_text(m.content) + '\n</system>'}] -%}"
    "{%- else -%}{%- set mf.messages = mf.messages + [m] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = mf.messages -%}"
)
# The model is taught to end a turn at its last word; a client may send blanks behind it, or before it (gptme does beside calls).
TRIM = (
    "{%- set said = messages | selectattr('role', 'equalto', 'assistant') | map(attribute='content') | list -%}"
    "{%- if said != said | map('trim') | list -%}"  # seldom: what follows takes much longer
    "{%- set mf = namespace(messages=[]) -%}{%- for m in messages -%}"
    "{%- set text = mf_text(m.content) | trim -%}"
    "{%- if m.role != 'assistant' or m.reasoning_content is defined or text == mf_text(m.content) -%}"
    "{%- set mf.messages = mf.messages + [m] -%}"
    "{%- elif m.tool_calls is defined and m.tool_calls -%}"
    "{%- set mf.messages = mf.messages + [{'role': 'assistant', 'content': text, 'tool_calls': m.tool_calls}] -%}"
    "{%- else -%}{%- set mf.messages = mf.messages + [{'role': 'assistant', 'content': text}] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = mf.messages -%}{%- endif -%}"
)

# An answer behind another becomes a part of it, as in gptme's own merging of neighbours; one that made calls stays alone.
JOIN = (
    "{%- set mf = namespace(messages=[]) -%}{%- for m in messages -%}"
    "{%- set last = mf.messages[-1] if mf.messages else {'role': ''} -%}"
    "{%- if m.role == 'assistant' and last.role == 'assistant' and not last.tool_calls -%}"
    "{%- set text = mf_text(last.content) + '\n\n' + mf_text(m.content) if mf_text(m.content) else mf_text(last.content) -%}"
    "{%- if m.tool_calls is defined and m.tool_calls -%}"
    "{%- set mf.messages = mf.messages[:-1] + [{'role': 'assistant', 'content': text, 'tool_calls': m.tool_calls}] -%}"
    "{%- else -%}{%- set mf.messages = mf.messages[:-1] + [{'role': 'assistant', 'content': text}] -%}{%- endif -%}"
    "{%- else -%}{%- set mf.messages = mf.messages + [m] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = mf.messages -%}"
)


def _merge(note: str) -> str:
    """Later system and user messages that are neighbours become one message, and so do the leading system messages.

    `note`: what a later system message becomes behind the result of a tool, if it is no user's message there.
    """
    return (
        "{%- set mf = namespace(messages=[], system='', lead=true) -%}{%- for m in messages -%}"
        "{%- if m.role != 'system' -%}{%- set mf.lead = false -%}{%- endif -%}"
        "{%- set last = mf.messages[-1] if mf.messages else {'role': ''} -%}"
        "{%- set text = mf_text(m.content) -%}"
        "{%- if mf.lead -%}{%- set mf.system = mf.system + ('\n\n' if mf.system else '') + text -%}"
        "{%- elif m.role == 'system' or m.role == 'user' -%}"
        "{%- set text = '<system>\n' + text + '\n</system>' if m.role == 'system' else text -%}"
        "{%- if last.role == 'user' -%}"
        "{%- set mf.messages = mf.messages[:-1] + [{'role': 'user', 'content': last.content + '\n\n' + text}] -%}"
        + note
        + "{%- else -%}{%- set mf.messages = mf.messages + [{'role': 'user', 'content': text}] -%}{%- endif -%}"
        "{%- else -%}{%- set mf.messages = mf.messages + [m] -%}{%- endif -%}{%- endfor -%}"
    )


MERGE = _merge("")
# Where a person's words may not follow a result: the notice becomes a part of the result.
MERGE_INTO_RESULTS = _merge(
    "{%- elif m.role == 'system' and last.role == 'tool' -%}"
    "{%- set text = mf_text(last.content) + '\n\n' + text -%}"
    "{%- set mf.messages = mf.messages[:-1] + [{'role': 'tool', 'content': text, 'tool_call_id': last.tool_call_id}] -%}"
)
SYSTEM_FIRST = "{%- set messages = ([{'role': 'system', 'content': mf.system}] if mf.system else []) + mf.messages -%}"
SYSTEM_IN_USER = (
    "{%- if mf.system and mf.messages and mf.messages[0].role == 'user' -%}"
    "{%- set messages = [{'role': 'user', 'content': mf.system + '\n\n' + mf.messages[0].content}] + mf.messages[1:] -%}"
    "{%- elif mf.system -%}{%- set messages = [{'role': 'user', 'content': mf.system}] + mf.messages -%}"
    "{%- else -%}{%- set messages = mf.messages -%}{%- endif -%}"
)
TOOL_ROLE = (
    "{%- set mf = namespace(messages=[], lead=true) -%}{%- for m in messages -%}"
    "{%- if m.role != 'system' -%}{%- set mf.lead = false -%}{%- endif -%}"
    "{%- if m.role == 'system' and not mf.lead -%}"
    "{%- set mf.messages = mf.messages + [{'role': 'tool', 'content': mf_text(m.content)}] -%}"
    "{%- else -%}{%- set mf.messages = mf.messages + [m] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = mf.messages -%}"
)
# As templates of models that also see pictures take it.
PARTS = (
    "{%- set mf = namespace(messages=[]) -%}{%- for m in messages -%}{%- if m.content is string -%}"
    "{%- set mf.messages = mf.messages + [dict(m, content=[{'type': 'text', 'text': m.content}])] -%}"
    "{%- else -%}{%- set mf.messages = mf.messages + [m] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = mf.messages -%}"
)

DATE = re.compile(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)")
FROZEN = "{%- macro strftime_now(format) -%}"
END = "{{- '' }}"  # so that the model's own template begins as it does alone, without a newline taken from it


@dataclass(frozen=True)
class Policy:
    """`name` stands in dataset.json, `what` says it in words, `jinja` does it."""

    name: str
    what: str
    jinja: str

    def before(self, template: str, trim: bool = False, join: bool = False) -> str:
        """The template that applies the policy itself.

        With `trim`, outer blanks are taken off assistant messages first; with `join`, neighbours among them become one.
        """
        jinja = (TRIM if trim else "") + (JOIN if join else "") + self.jinja
        return f"{MARK}{self.name} -#}}{TEXT}{jinja}{END}{template}" if jinja else template


# In the order in which they are tried.
POLICIES = (
    Policy("as it is", "every message in the role that gptme gives it", ""),
    Policy("folded", "later system messages as user, in <system> tags, as gptme folds them for Qwen3.5", FOLD),
    Policy(
        "merged",
        "one system message in front; later ones as user in <system> tags, merged with their neighbours",
        MERGE + SYSTEM_FIRST,
    ),
    Policy(
        "system in user",
        "as merged, with the system message in front of the first user message",
        MERGE + SYSTEM_IN_USER,
    ),
    Policy(
        "merged into results",
        "as merged, but later system messages behind the result of a tool are parts of it",
        MERGE_INTO_RESULTS + SYSTEM_FIRST,
    ),
    Policy(
        "merged into results and user",
        "as merged into results, with the system message in front of the first user message",
        MERGE_INTO_RESULTS + SYSTEM_IN_USER,
    ),
    Policy("tool role", "later system messages in the role tool", TOOL_ROLE),
    Policy("in parts", "each text as a list of one part, as templates of models that see pictures take it", PARTS),
    Policy("folded in parts", "as folded, and each text as a list of one part", FOLD + PARTS),
)


def with_dates(template: str, now: datetime) -> str:
    """The template with the date of `now` wherever it would print that of the day; as it is where that cannot be told."""
    forms = [match[2] for match in DATE.finditer(template)]
    if not forms or len(forms) < template.count("strftime_now("):
        return template
    cases = "".join(
        f"{{%- {'elif' if i else 'if'} format == {json.dumps(form)} -%}}{{{{ {json.dumps(now.strftime(form))} }}}}"
        for i, form in enumerate(sorted(set(forms)))
    )
    return f"{FROZEN}{cases}{{%- endif -%}}{{%- endmacro -%}}{END}{template}"


def policy_of(template: str) -> str:
    """The name of the policy that a template applies itself; empty for a model's own."""
    found = re.match(re.escape(MARK) + r"([a-z ]+?) -#\}", template)
    return found[1] if found else ""


def joins_answers(template: str) -> bool:
    """Whether an assistant's message behind another of his becomes a part of that one."""
    return template.startswith(MARK) and JOIN in template


def prints_date(template: str) -> bool:
    """Whether it prints a date, that of the day or the one that `with_dates` put into it."""
    return "strftime_now(" in template
