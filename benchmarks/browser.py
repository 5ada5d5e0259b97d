"""Opens a folder of feature pages in Chromium, from the disk, and says how long it takes; needs PySide6 alone.

PySide6 (6.8: `pip install PySide6`) brings a Chromium. Without a screen:
QT_QPA_PLATFORM=offscreen QTWEBENGINE_CHROMIUM_FLAGS="--no-sandbox --disable-gpu" python benchmarks/browser.py FOLDER
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as everything here that is run

from PySide6.QtCore import QEventLoop, QSize, QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineSettings, qWebEngineChromiumVersion
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication


class Page(QWebEnginePage):
    """A page that keeps what it complains of."""

    def __init__(self):
        super().__init__()
        self.said = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        """Chromium's console."""
        self.said.append(f"{message} ({source.rpartition('/')[2]}:{line})")


class Browser:
    """A window without a screen."""

    def __init__(self, width, height):
        self.app = QApplication.instance() or QApplication([])
        self.view, self.page = QWebEngineView(), Page()
        self.view.setPage(self.page)
        self.page.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, False)
        self.view.resize(QSize(width, height))
        self.view.show()

    def wait(self, seconds):
        """Lets the browser work."""
        loop = QEventLoop()
        QTimer.singleShot(int(1000 * seconds), loop.quit)
        loop.exec()

    def run(self, code):
        """What a piece of JavaScript gives."""
        loop, found = QEventLoop(), []

        def keep(value):
            found.append(value)
            loop.quit()

        self.page.runJavaScript(code, 0, keep)
        loop.exec()
        return found[0]

    def until(self, code, limit=60):
        """Seconds until it is true."""
        started = time.perf_counter()
        while not self.run(code):
            self.wait(0.005)
            if time.perf_counter() - started > limit:
                raise TimeoutError(f"{code} after {limit} s; the page said {self.page.said}")
        return time.perf_counter() - started

    def open(self, url, ready):
        """Seconds from the address to a page that `ready` says can be used."""
        self.run("window.before = true")
        started = time.perf_counter()
        self.view.load(url)
        self.until(f"!window.before && document.documentElement !== null && ({ready})")
        return time.perf_counter() - started

    def picture(self, path):
        """What it shows now."""
        self.wait(0.4)
        self.view.grab().save(str(path))


READY = "document.documentElement.dataset.ready === 'yes' && document.querySelectorAll('.row').length > 0"
NODES = "document.getElementsByTagName('*').length"


def main():
    """Times of opening, of a card, of sorting and of a search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--search", default="the")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=[1440, 900])
    parser.add_argument("--latent", type=int)
    arguments = parser.parse_args()
    browser = Browser(*arguments.size)
    url = QUrl.fromLocalFile(str((arguments.folder / "index.html").resolve()))
    opened = []
    for _ in range(arguments.rounds):
        opened.append(round(browser.open(url, READY), 3))
    found = {"nodes of the index": browser.run(NODES)}
    own = "performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart"
    found |= {"seconds to a usable index": opened, "of which Chromium counts, ms": browser.run(own)}
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        browser.picture(arguments.pictures / "index.png")
    latent = browser.run("all.latents[order[0]]") if arguments.latent is None else arguments.latent
    started = time.perf_counter()
    browser.run(f"location.hash = '#latent-{int(latent)}'; 0")
    browser.until("document.querySelector('#detail article') !== null")
    found |= {"seconds to a card": round(time.perf_counter() - started, 3), "nodes with a card": browser.run(NODES)}
    if arguments.pictures:
        browser.picture(arguments.pictures / "card.png")
    timed = "(() => {{ const t = performance.now(); {0}; return performance.now() - t; }})()"
    found["ms of a sort"] = round(browser.run(timed.format("heads[1].click()")), 1)
    if arguments.pictures:
        browser.picture(arguments.pictures / "sorted.png")
    asked = f"search.value = {json.dumps(arguments.search)}; search.dispatchEvent(new Event('input'))"
    found["ms of a search"] = round(browser.run(timed.format(asked)), 1)
    found["found"] = browser.run("document.getElementById('count').value")
    if arguments.pictures:
        browser.picture(arguments.pictures / "search.png")
    print(json.dumps(found | {"said": browser.page.said, "chromium": qWebEngineChromiumVersion()}, indent=1))


if __name__ == "__main__":
    main()
