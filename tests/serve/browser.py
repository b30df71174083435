"""A Chromium without a window, told what to do over its debugging pipe: messages of JSON, each ended by a zero byte."""

import contextlib
import fcntl
import json
import os
import subprocess
import time

# Above the two that the browser reads and writes.
SPARE_DESCRIPTOR = 20
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--incognito", "--no-first-run"),
    "--remote-debugging-pipe",
)


class Page:
    """One page; `evaluate` gives the value of a JavaScript expression in it."""

    def __init__(self, to_browser, from_browser):
        self._to, self._from, self._count, self._session = to_browser, from_browser, 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method, **params):
        """The result of a command; what else the browser says is passed over."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            said = json.loads(self._read())
            if said.get("id") == self._count:
                assert "error" not in said, said
                return said["result"]

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression, seconds=60):
        """Until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression} is still false; the page says {self.evaluate(SHOWN)!r}"
            time.sleep(0.02)

    def _read(self):
        data = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser has gone"
            data += byte
        return data


SHOWN = "document.body.innerText"


@contextlib.contextmanager
def open_page(browser, folder):
    """A page of a browser that ends with the block; `folder` is for its profile."""
    inner_read, to_browser = os.pipe()
    from_browser, inner_write = os.pipe()
    inner = [fcntl.fcntl(end, fcntl.F_DUPFD, SPARE_DESCRIPTOR) for end in (inner_read, inner_write)]
    joined = f'exec "$@" 3<&{inner[0]} 4>&{inner[1]}'
    words = [browser, *OPTIONS, f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        ["bash", "-c", joined, "bash", *words], pass_fds=inner, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for end in (inner_read, inner_write, *inner):
        os.close(end)
    with os.fdopen(to_browser, "wb") as to, os.fdopen(from_browser, "rb") as back:
        try:
            yield Page(to, back)
        finally:
            process.terminate()
            process.wait()
