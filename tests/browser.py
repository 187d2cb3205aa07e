"""Chromium without a window, driven as a person would: keys, clicks, dark and light, narrow and wide."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowUp": 38, "ArrowDown": 40}


class Page:
    """One page of a browser, spoken to by the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

    def __init__(self, commands: BufferedWriter, answers: BufferedReader) -> None:
        self._commands, self._answers = commands, answers
        self._sent, self._session, self._read = 0, "", b""
        self.log: list[str] = []  # what the page wrote to its console, errors too
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and what it gives back."""
        self._sent += 1
        session = {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps({"id": self._sent, "method": method, "params": parameters} | session).encode() + b"\0")
        self._commands.flush()
        while True:
            message = self._next()
            if message.get("id") == self._sent:
                assert "error" not in message, (method, message["error"])
                return dict(message["result"])

    def wait_for(self, event: str) -> None:
        """Until the browser tells of it."""
        while self._next().get("method") != event:
            pass

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            more = self._answers.read1(2**20)
            assert more, "the browser is gone"
            self._read += more
        raw, _, self._read = self._read.partition(b"\0")
        message = json.loads(raw)
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.log.append(json.dumps(message["params"]))
        return dict(message)

    def open(self, path: Path, fragment: str = "") -> None:
        """Loads a file, whole."""
        self.send("Page.navigate", url="about:blank")
        self.wait_for("Page.loadEventFired")
        self.send("Page.navigate", url=path.as_uri() + fragment)
        self.wait_for("Page.loadEventFired")

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """One key, such as Tab or Enter."""
        event = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.send("Input.dispatchKeyEvent", type="keyDown", text={"Enter": "\r", " ": " "}.get(key, ""), **event)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def write(self, text: str) -> None:
        """Into what has the focus."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """The middle of the first element that fits, with the mouse."""
        place = f"document.querySelector({json.dumps(selector)})"
        x, y = self.ask(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2] }})({place})"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def look(self, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """From now on the window is so large and the person likes this colour scheme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of its own in a browser of its own; the profile is a folder that it may fill."""
    assert CHROMIUM
    to_read, to_write = os.pipe(), os.pipe()

    def as_chromium_expects() -> None:
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read[0], to_write[1])]  # out of the way of 3 and 4
        for place, end in zip((3, 4), ends, strict=True):
            os.dup2(end, place)

    process = subprocess.Popen(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}"],
        preexec_fn=as_chromium_expects,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read[0])
    os.close(to_write[1])
    with os.fdopen(to_read[1], "wb") as commands, os.fdopen(to_write[0], "rb") as answers:
        try:
            yield Page(commands, answers)
        finally:
            process.terminate()
            process.wait(30)
