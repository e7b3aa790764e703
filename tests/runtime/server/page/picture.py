"""Draws the page as the README shows it: a sample set, ranked by an artifact.

PYTHONPATH=. python -m tests.runtime.server.page.picture ARTIFACT docs/page.png
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image
from tests.runtime.server.page.browser import Browser
from tests.runtime.server.serving import served, settings_of, until

from m0kit.server.app import build
from m0kit.server.settings import ModelSettings

SIZE = 1000, 880
COLOURS = 128  # few are needed, and a quarter of the bytes remains


def draw(artifact: str, path: Path) -> None:
    """The ranking of the second set, asked twice, so that it shows what is cached."""
    models = (ModelSettings(artifact),)
    app = build(settings_of(models=models))
    ranked = "/documents\\/s/.test(document.querySelector('#totals').textContent)"
    with (
        served(app, app.service.metrics, models=models) as at,
        tempfile.TemporaryDirectory() as folder,
        Browser.started(Path(folder)) as browser,
    ):
        until(lambda: app.is_ready or app.failure)
        browser.prefer(prefers_color_scheme="light", prefers_reduced_motion="reduce")
        browser.resize(*SIZE)
        browser.devtools("Emulation.setScrollbarsHidden", hidden=True)
        browser.open(f"http://127.0.0.1:{at.port}/")
        browser.until("document.querySelectorAll('#samples button').length > 1")
        browser.run("document.querySelectorAll('#samples button')[1].click()")
        browser.until("document.activeElement.closest('#suggestions')")
        for number in (1, 0):
            browser.run("document.querySelectorAll('#suggestions button')[arguments[0]].click()", number)
            browser.until(ranked)
        browser.run("document.activeElement.blur(); scrollTo(0, 0)")
        browser.picture(path, whole=False)
    Image.open(path).quantize(COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    draw(sys.argv[1], Path(sys.argv[2]))
