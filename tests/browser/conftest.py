"""Pages in a headless Chromium, which is cut off from the network."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # WebGL without a graphics card


def chromium():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """A browser; where there is none the test is skipped, but in CI that is an error."""
    path = chromium()
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: .ci/run installs one")
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, and what went wrong on it."""

    page: object
    errors: list[str] = field(default_factory=list)

    def broken_images(self) -> list[str]:
        """Captions of images that the browser could not draw; those that are not displayed are tried too."""
        return self.page.evaluate(
            """async () => {
                const bad = [];
                for (const image of document.images) {
                    await image.decode().catch(() => bad.push(image.alt));
                    if (!image.naturalWidth) bad.push(image.alt);
                }
                return bad;
            }"""
        )

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@pytest.fixture
def visit(browser):
    """Open files: ``visit(path, width, height, dark=False, touch=False)``."""
    contexts = []

    def open_page(path, width=1280, height=900, *, dark=False, touch=False, online=False):
        scheme = "dark" if dark else "light"
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=touch, offline=not online)
        contexts.append(context)
        made = Visit(context.new_page())
        made.page.on("console", lambda m: made.errors.append(m.text) if m.type in ("error", "warning") else None)
        made.page.on("pageerror", lambda e: made.errors.append(str(e)))
        made.page.on("requestfailed", lambda r: made.errors.append(f"failed: {r.url[:100]}"))
        made.page.goto(path if isinstance(path, str) else path.as_uri())
        return made

    yield open_page
    for context in contexts:
        context.close()
