"""A page in headless Chromium, through its debugging pipe: what it prints, what scripts find, how it looks."""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120  # seconds for one answer


class Page:
    """An open page. ``problems`` are the messages of its console and its exceptions so far."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers, self._left, self._count = commands, answers, b"", 0
        self.problems: list[str] = []
        self._session = None

    def open(self, url: str) -> None:
        """Opens a page and waits until it is loaded."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=url)
        while self.run("document.readyState") != "complete":
            time.sleep(0.05)

    def ask(self, method: str, **params):
        """Sends a command, and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            told = answer.get("params", {})
            if answer.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(told["exceptionDetails"]))
            if answer.get("method") == "Runtime.consoleAPICalled":
                self.problems.append(str(told["args"]))
            if answer.get("method") == "Log.entryAdded":
                self.problems.append(told["entry"]["text"])
            if answer.get("method") == "Network.requestWillBeSent" and told["request"]["url"].startswith("http"):
                self.problems.append(f"asks for {told['request']['url']}")

    def run(self, script: str):
        """The value of a JavaScript expression."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Presses a key, as "Home", and lets it go."""
        code = {"End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def size(self, width: int, height: int) -> None:
        """Sets the size of the window, in pixels."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def dark(self, on: bool) -> None:
        """The reader's theme."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: pathlib.Path, whole: bool = False) -> None:
        """Writes a PNG of what is seen, or of the whole page."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def _next(self):
        while b"\0" not in self._left:
            assert select.select([self._answers], [], [], PATIENCE)[0], "Chromium does not answer"
            more = os.read(self._answers, 1 << 20)
            assert more, "Chromium has ended"
            self._left += more
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def started(profile: pathlib.Path):
    """Starts Chromium, with a folder for its profile; yields a ``Page``."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    def connect() -> None:  # Chromium reads commands from file descriptor 3 and answers on 4
        first, second = os.dup(theirs_in), os.dup(theirs_out)
        os.dup2(first, 3)
        os.dup2(second, 4)

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    child = subprocess.Popen(
        [CHROMIUM, *flags, f"--user-data-dir={profile}"],
        preexec_fn=connect,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(ours_out, ours_in)
    finally:
        child.kill()
        child.wait()
        os.close(ours_out)
        os.close(ours_in)
