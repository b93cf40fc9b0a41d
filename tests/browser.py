"""
A headless Chromium, driven through two pipes by its DevTools protocol: no package is needed.

    with Browser() as browser:
        page = browser.open("file:///.../page.html", width=1200)
        page.run("document.title")

Chromium reads commands from file descriptor 3 and answers on 4, as JSON that ends in a zero byte.
"""
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WHY_NOT = "no Chromium here (Debian: apt-get install chromium): pages cannot be opened"
SECONDS = 60        # that a command may take
KEYS = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38,
        "ArrowRight": 39, "ArrowDown": 40, "Home": 36}


def find():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None) if os.name == "posix" else None


class Browser:
    """A browser without a network. One page at a time."""

    def __init__(self):
        self.profile = tempfile.mkdtemp()
        reads, self.commands = os.pipe()
        self.answers, writes = os.pipe()
        for descriptor in (reads, writes):
            os.set_inheritable(descriptor, True)
        # the shell puts the pipes where Chromium looks for them
        command = (f'exec "$0" "$@" 3<&{reads} 4>&{writes}')
        flags = ["--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu",
                 "--no-first-run", "--hide-scrollbars", "--disable-dev-shm-usage",
                 "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking",
                 f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, find(), *flags], pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(reads)
        os.close(writes)
        self.buffer, self.number, self.events = b"", 0, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
        shutil.rmtree(self.profile, ignore_errors=True)

    def read(self, deadline):
        """The next message."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0, deadline - time.monotonic()))
            part = os.read(self.answers, 2 ** 20) if ready else b""
            if not part:
                raise TimeoutError("the browser does not answer")
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method, session=None, **parameters):
        """The result of a command; events that come before it are kept."""
        self.number += 1
        message = dict(id=self.number, method=method, params=parameters)
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.commands, data):]
        deadline = time.monotonic() + SECONDS
        while True:
            found = self.read(deadline)
            if found.get("id") == self.number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return found["result"]
            self.events.append(found)

    def open(self, url, **look):
        """A new page; look: as in `Page.look`."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.look(**look)
        page.send("Page.navigate", url=url)
        page.wait("document.readyState === 'complete'")
        return page


class Page:
    """A page of a browser."""

    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def send(self, method, **parameters):
        """The result of a command to this page."""
        return self.browser.send(method, self.session, **parameters)

    def look(self, width=1200, height=900, dark=False, touch=False):
        """Size of the window, and which of the two colour schemes is wished for."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=touch)
        scheme = [dict(name="prefers-color-scheme", value="dark" if dark else "light")]
        self.send("Emulation.setEmulatedMedia", features=scheme)

    def run(self, script):
        """The value of an expression of JavaScript; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True,
                          returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", script))
        return found["result"].get("value")

    def wait(self, condition, seconds=SECONDS):
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(f"!!({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(condition)
            time.sleep(0.02)

    def press(self, key):
        """Press and release a key that has a name."""
        text = {"Enter": "\r", " ": " "}.get(key)
        fields = dict(key=key, code={" ": "Space"}.get(key, key), windowsVirtualKeyCode=KEYS[key])
        extra = dict(text=text) if text else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **fields, **extra)
        self.send("Input.dispatchKeyEvent", type="keyUp", **fields)

    def type(self, text):
        """Type a text where the focus is."""
        self.send("Input.insertText", text=text)

    def errors(self):
        """What the page complained about: exceptions, errors of the console and of the log."""
        found = []
        for event in self.browser.events:
            told = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(told["exceptionDetails"].get("exception", {}).get("description", "?"))
            if event.get("method") == "Runtime.consoleAPICalled" and told["type"] == "error":
                found.append(str(told["args"]))
            if event.get("method") == "Log.entryAdded" and told["entry"]["level"] == "error":
                found.append(told["entry"]["text"])
        return found

    def requests(self):
        """The addresses that were asked for."""
        return [event["params"]["request"]["url"] for event in self.browser.events
                if event.get("method") == "Network.requestWillBeSent"]

    def picture(self, path, whole=False):
        """A .png of what is seen, or of the whole page."""
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole,
                          **(self.whole() if whole else {}))
        with open(path, "wb") as file:
            file.write(base64.b64decode(found["data"]))

    def whole(self):
        """The rectangle of the whole page."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return dict(clip=dict(x=0, y=0, width=size["width"], height=size["height"], scale=1))
