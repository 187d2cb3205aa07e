"""The pages of `inspect --html` and `report` in a real browser, made of talks that would do harm: nothing runs, nothing is sent."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import Page
from finished_runs import make_base, make_run
from reported_runs import write_answers, write_evaluation

from mlx_finetune.cli import main
from mlx_finetune.data.conversation import Conversation, Message, write_conversations

pytestmark = pytest.mark.long

ATTACKS = """\
<script>owned()</script>
</script><script>owned()</script>
<!--<script>owned()</script>-->
--><script>owned()</script><!--
</title><script>owned()</script>
</style><style>body{background:url(AWAY)}</style>
<img src=AWAY onerror=owned()>
<img src=x onerror="owned()">
"><svg/onload=owned()>
' onmouseover='owned()' x='
" autofocus onfocus="owned()
<a href="javascript:owned()">javascript:owned()</a>
<iframe srcdoc="<script>parent.owned()</script>"></iframe>
<object data=AWAY></object><embed src=AWAY>
<link rel=stylesheet href=AWAY><link rel=dns-prefetch href=AWAY>
<meta http-equiv=refresh content="0;url=AWAY">
<form action=AWAY id=f><button form=f formaction=javascript:owned()>x</button></form>
<base href=AWAY>
<math><mtext></math><img src=x onerror=owned()>
&lt;script&gt;owned()&lt;/script&gt; &#60;script&#62;owned()&#60;/script&#62;
\\u003cscript\\u003eowned()\\u003c/script\\u003e
${owned()} {{constructor.constructor('owned()')()}}
]]><script>owned()</script>""".splitlines()


@pytest.fixture(scope="module")
def away() -> Iterator[Any]:
    """A server that is not to be asked; `asked` holds what it was."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.asked.append(self.path)  # type: ignore[attr-defined]
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Says nothing."""

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pages(away: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both pages; every attack stands in every place that a log, a model or a run can fill."""
    root = tmp_path_factory.mktemp("pages")
    attacks = "\n".join(ATTACKS).replace("AWAY", f"http://127.0.0.1:{away.server_port}/")
    made = [
        Conversation(
            (Message("user", attacks), Message("assistant", f"```shell\n{attacks}\n```")), source, attacks.splitlines()[i], "MIT"
        )
        for i, source in enumerate(("gptme", ATTACKS[0], ATTACKS[9]))
    ]
    base = make_base(root)
    write_conversations(root / "hostile.jsonl", made)
    told = ("--max-length", "4096", "--valid-fraction", "0", "--openassistant-share", "0")
    run = make_run(root, "torch")
    write_evaluation(run, note=attacks)
    write_answers(run)
    for verb in (
        ("prepare", root / "hostile.jsonl", "--model", base, "--out", root / "hostile", *told),
        ("inspect", root / "hostile", "--whole", "--html", root / "inspect.html"),
        ("report", run),
    ):
        with pytest.raises(SystemExit) as exit:
            main([str(each) for each in verb])
        assert not exit.value.code, verb
    return {"inspect": root / "inspect.html", "report": run / "report.html"}


def visit(page: Page, path: Path, fragment: str = "") -> None:
    page.open(path, fragment)
    page.ask("document.querySelectorAll('*').forEach(e => e.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))), 1")
    page.press("Tab")
    time.sleep(0.3)


@pytest.mark.parametrize("name", ["inspect", "report"])
def test_nothing_of_a_conversation_runs_and_no_request_leaves(name: str, pages: dict[str, Path], page: Page, away: Any) -> None:
    text = pages[name].read_text(encoding="utf-8")
    assert text.count("<script") == 1 and "owned()" in text, "the attacks are on the page"
    for fragment in ("", "#<img src=x onerror=owned()>", "#javascript:owned()"):
        page.log.clear()
        visit(page, pages[name], fragment)
        assert page.log == [] and away.asked == []
        outside = "[...document.querySelectorAll('a, form, [src], [srcdoc], [onload], [onerror], base, meta[http-equiv=refresh]')]"
        assert page.ask(f"{outside}.filter(e => !(e.getAttribute('href') || '').startsWith('#')).length") == 0
        assert page.ask("document.scripts.length") == 1 and page.ask("performance.getEntriesByType('resource').length") == 0


@pytest.mark.parametrize("name", ["inspect", "report"])
def test_where_an_escape_were_forgotten_the_pages_policy_would_still_hold(
    name: str, pages: dict[str, Path], page: Page, away: Any, tmp_path: Path
) -> None:
    text = pages[name].read_text(encoding="utf-8")
    holes = "\n".join(each for each in ATTACKS if "refresh" not in each).replace("AWAY", f"http://127.0.0.1:{away.server_port}/")
    harm = "<script>window.ran = true</script><img src=x onerror='window.ran = true'>"
    (tmp_path / "open.html").write_text(text.replace("</h1>", f"</h1>{harm}{holes}", 1), encoding="utf-8")
    page.log.clear()
    visit(page, tmp_path / "open.html")
    assert page.ask("window.ran === undefined") is True and away.asked == []
    assert any("Content Security Policy" in line for line in page.log), "the browser tried, and was told no"
    (tmp_path / "without.html").write_text(f"<!DOCTYPE html>{harm}", encoding="utf-8")
    visit(page, tmp_path / "without.html")
    assert page.ask("window.ran === true") is True, "without a policy it would have run"
