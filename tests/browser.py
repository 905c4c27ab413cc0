"""A page in headless Chromium, spoken to over its debugging pipe: what a reader sees, by mouse and by keyboard."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One tab. `complaints` are errors, and what the page's content security policy refused."""

    def __init__(self, to: int, back: int):
        self.to, self.back, self.unread, self.number, self.session = to, back, b"", 0, None
        self.complaints: list[str] = []
        tab = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params) -> dict:
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self.number, "method": method, "params": params} | session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self.unread:
            more = os.read(self.back, 2**16)
            assert more, "the browser has gone"
            self.unread += more
        one, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(one)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(message["params"]))
        return message

    def open(self, page: Path | str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        answer = self.ask("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        assert "errorText" not in answer, answer
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str):
        """The value of a script, which runs outside the page's policy."""
        done = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """A key with its virtual key code; modifiers: 1 Alt, 2 Ctrl, 4 Meta, 8 Shift."""
        how = dict(key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers)
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, **how)

    def write(self, text: str) -> None:
        """Into the field that has the focus."""
        self.ask("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """In the middle of the first line of an element, scrolled into view."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'nearest'}})")
        x, y, width, height = self.run(f"Object.values({found}.getClientRects()[0].toJSON()).slice(0, 4)")
        at = dict(x=x + width / 2, y=y + height / 2, button="left", clickCount=1)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, **at)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, gone afterwards."""
    (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
    with TemporaryDirectory() as profile:
        options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'  # it reads from 3 and writes to 4
        run = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *options.split(), f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(ours_out, ours_in)
        finally:
            os.close(ours_out)
            os.close(ours_in)
            try:
                run.wait(20)  # it ends where nobody speaks to it, and then writes nothing more into its profile
            finally:
                run.kill()
