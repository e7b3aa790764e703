"""A Chromium without a window, driven over WebDriver by chromedriver's HTTP interface. Owns no page.

with Browser.started(tmp_path) as browser:
    browser.open(url)
    assert browser.run("return document.title") == "m0kit"
"""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

FLAGS = (
    "--headless",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,900",
)
PATIENCE_S = 60.0  # a machine may be busy; nothing is decided by how long it takes
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that WebDriver gives a reference


def missing() -> str:
    """Why there is no browser here, or ""."""
    lacks = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"there is no {' and no '.join(lacks)} on this machine" if lacks else ""


class Browser:
    """One window."""

    def __init__(self, driver: str, session: str, downloads: Path) -> None:
        self._session, self.downloads = f"{driver}/session/{session}", downloads

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator[Self]:
        """With a profile of its own in `folder`."""
        process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            ports = (re.search(r"successfully on port (\d+)", line) for line in process.stdout)
            driver = f"http://127.0.0.1:{next(found[1] for found in ports if found)}"
            downloads = folder / "downloads"
            options = {
                "binary": shutil.which("chromium"),
                "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"],
                "prefs": {"download.default_directory": str(downloads)},
            }
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            made = _post(f"{driver}/session", {"capabilities": {"alwaysMatch": wanted}})
            browser = cls(driver, made["sessionId"], downloads)
            browser.command("timeouts", {"script": int(1000 * PATIENCE_S)})
            try:
                yield browser
            finally:
                _ask(browser._session, None, "DELETE")  # else the browser outlives its driver
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def command(self, path: str, body: dict[str, Any]) -> Any:
        return _post(f"{self._session}/{path}", body)

    def open(self, url: str) -> None:
        self.command("url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a function's body; a promise is waited for."""
        return self.command("execute/sync", {"script": script, "args": arguments})

    def until(self, script: str, *arguments: Any) -> Any:
        """The value of an expression as soon as there is one."""
        end = time.monotonic() + PATIENCE_S
        while not (found := self.run(f"return {script}", *arguments)):
            assert time.monotonic() < end, f"never came: {script}\n{self.run('return document.body.innerText')[:1000]}"
            time.sleep(0.02)
        return found

    def devtools(self, name: str, **parameters: Any) -> Any:
        return self.command("goog/cdp/execute", {"cmd": name, "params": parameters})

    def find(self, selector: str) -> str:
        return self.command("element", {"using": "css selector", "value": selector})[_ELEMENT]

    def click(self, selector: str) -> None:
        self.command(f"element/{self.find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Also the paths of files, a line each."""
        self.command(f"element/{self.find(selector)}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Keys where the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.command("actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """What stands in the window, or with what is below it, as a PNG."""
        found = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def resize(self, width: int, height: int) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def prefer(self, **features: str) -> None:
        """Media features: prefers_color_scheme="dark"."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", features=named)

    def requests(self) -> list[tuple[str, str]]:
        """Methods and URLs of what was asked for over the network since it was last asked."""
        entries = self.command("se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [(one["method"], one["url"]) for one in sent]

    def complaints(self, *, network: bool = False) -> list[str]:
        """Errors and warnings on the console since it was last asked; `network`: answers of 400 and more too."""
        entries = self.command("se/log", {"type": "browser"})
        return [
            entry["message"]
            for entry in entries
            if entry["level"] in ("SEVERE", "WARNING") and (network or entry.get("source") != "network")
        ]


def _post(url: str, body: dict[str, Any]) -> Any:
    return _ask(url, body, "POST")


def _ask(url: str, body: dict[str, Any] | None, method: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(json.load(error)["value"]["message"].partition("\n")[0]) from None
