"""The real gptme CLI against our server: which requests it sends, what the server answers, and which calls gptme executed.

    python benchmarks/gptme_cli.py RUN_OR_MODEL --gptme .venv/gptme/bin/gptme "Save hello.py, then run it."

gptme executes what the model writes, in a scratch folder: confined where bwrap or sandbox-exec is there, else with your rights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_finetune.evaluation.confined import confined, confinement
from mlx_finetune.evaluation.gptme_eval import programs_of
from mlx_finetune.serving.answer import Question
from mlx_finetune.serving.listening import in_background
from mlx_finetune.serving.opened import Opened, find_source
from mlx_finetune.serving.requests import ChatRequest
from mlx_finetune.serving.served import Served

EXECUTED = ("Ran command", "Ran allowlisted command", "Executed code block", "Saved to ", "Appended to ", "Patch successfully")
FORMATS = ("markdown", "xml", "tool")


@dataclass(frozen=True)
class Recording(Served):
    """Notes what is asked."""

    asked: list[ChatRequest] = field(default_factory=list)

    def question(self, request: ChatRequest) -> Question:
        """See `Served.question`."""
        self.asked.append(request)
        return super().question(request)


@dataclass(frozen=True)
class Session:
    """One run of the CLI: its exit status, seconds, what it printed, and the messages of its log."""

    status: int | None  # None: it was ended, for it took too long
    seconds: float
    printed: str
    log: list[dict[str, Any]]

    @property
    def executed(self) -> list[str]:
        """The first line of the result of each call that gptme ran."""
        lines = [str(message["content"]).split("\n")[0] for message in self.log if message["role"] == "system"]
        return [line for line in lines if line.startswith(EXECUTED)]


def run_gptme(
    gptme: Path, url: str, name: str, prompts: Sequence[str], options: Sequence[str], scratch: Path, limit: float = 120,
    steps: int = 8,
) -> Session:  # fmt: skip
    """Runs the CLI in `scratch`/work, with a home of its own, confined where the system can; prompts one after the other."""
    work, home = scratch / "work", scratch / "home"
    for folder in (work, home):
        folder.mkdir(parents=True)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "ANTHROPIC_", "XDG_", "GPTME_"))
    }
    environment |= {"HOME": str(home), "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none", "GPTME_TIKTOKEN_TIMEOUT": "0"}
    environment |= {f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "CACHE", "STATE")}
    environment |= {"GPTME_LOGS_HOME": str(scratch / "logs"), "GPTME_CHECK": "false", "TERM": "dumb", "GPTME_MAX_STEPS": str(steps)}
    chained = [word for prompt in prompts for word in ("-", prompt)][1:]
    command = [str(gptme), "-m", f"local/{name}", "--non-interactive", "--no-confirm", *options, *chained]
    command = confined(confinement("auto"), command, (work, scratch), Path.home(), programs_of(gptme))
    began = time.monotonic()
    status: int | None
    try:
        done = subprocess.run(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False
        )
        status, printed = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status, printed = None, (error.stdout or b"") + (error.stderr or b"")
    paths = sorted((scratch / "logs").glob("*/conversation.jsonl"))
    log = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return Session(status, time.monotonic() - began, printed.decode(errors="replace"), log)


def shown(tool_format: str, session: Session, lines: Sequence[str], asked: Sequence[ChatRequest]) -> dict[str, Any]:
    """The figures of one session."""
    statuses = [int(line.split()[2]) for line in lines if line.startswith("POST")]
    return {
        "format": tool_format,
        "status": session.status,
        "seconds": round(session.seconds, 1),
        "requests": len(statuses),
        "answers": {str(status): statuses.count(status) for status in sorted(set(statuses))},
        "streamed": sum(request.stream for request in asked),
        "with tools": sum(bool(request.tools) for request in asked),
        "executed": session.executed,
    }


def main() -> None:
    """Serves, and runs one session in each format."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", help="RUN_OR_MODEL")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--gptme", type=Path, required=True, help="the program")
    parser.add_argument("--engine", default="")
    parser.add_argument("--base", action="store_true", help="ask the base of the run")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--system", default="short", help="as gptme takes it: full, short, or a prompt of your own")
    parser.add_argument("--tools", default="shell,save,patch")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--limit", type=float, default=120, help="seconds for a session")
    parser.add_argument("--steps", type=int, default=8, help="answers in a session")
    parser.add_argument("--show", action="store_true", help="print what gptme printed")
    options = parser.parse_args()
    source = find_source(options.model, "", options.engine)
    name = source.named()
    served, log = Recording(source, name, options.max_tokens), list[str]()
    with tempfile.TemporaryDirectory() as scratch, in_background(served, lambda: Opened(source), log=log.append) as url:
        model = f"{name}-base" if options.base else name
        for tool_format in options.formats:
            log.clear()
            served.asked.clear()
            how = ["--tool-format", tool_format, "--system", options.system, "--tools", options.tools]
            place = Path(scratch) / tool_format
            session = run_gptme(options.gptme.absolute(), url, model, options.prompts, how, place, options.limit, options.steps)
            print(json.dumps(shown(tool_format, session, log, served.asked)), flush=True)
            if options.show or session.status not in (0, None):
                print(session.printed[-4000:], file=sys.stderr)


if __name__ == "__main__":
    main()
