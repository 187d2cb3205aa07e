"""Conversations as text, in the files that gptme's first collector wrote."""

import csv
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file


def write_rendered(conversations: Iterable[Conversation], template: ChatTemplate, folder: Path) -> Counter[str]:
    """train.csv (one column, `text`) and train.jsonl ({"text": ...}), as gptme's first collector wrote them.

    Gives back how many conversations are not in them because the template would lose or rewrite something, by reason.

    Raises:
        UserError: that is so of every conversation.
    """
    refusals: Counter[str] = Counter()
    first, written = "", 0
    with ExitStack() as files:
        lines = files.enter_context(atomic_file(folder / "train.jsonl"))
        table = csv.writer(files.enter_context(atomic_file(folder / "train.csv")), lineterminator="\n", quoting=csv.QUOTE_ALL)
        table.writerow(["text"])
        for conversation in conversations:
            try:
                template.encode(conversation.messages, conversation.tools)  # proves that nothing is lost
                text = template.render(template.as_learned(conversation.messages), tools=conversation.tools)
            except Refused as refused:
                refusals[str(refused)] += 1
                first = first or f"{conversation.name}: {refused}"
                continue
            table.writerow([text])
            lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += 1
    if not written:
        raise UserError(first or "nothing to render", hint="collect without --model, or name a model whose template takes it")
    return refusals
