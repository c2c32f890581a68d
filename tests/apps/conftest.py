"""What the browser tests share: Chromium, and pages that are watched while they are used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "this test needs Chromium: apt-get install chromium"
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any) -> Callable[..., Any]:
    """Opens an address in a window of a size; an error or a request to elsewhere fails the test."""

    @contextmanager
    def opened(url: str, size: tuple[int, int]) -> Iterator[Any]:
        page = browser.new_page(
            viewport={"width": size[0], "height": size[1]},
            reduced_motion="reduce",
            accept_downloads=True,
        )
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        own = (url, "data:", "blob:", "about:")
        page.on("request", lambda sent: sent.url.startswith(own) or wrong.append(sent.url))
        page.goto(url)
        yield page
        page.close()
        assert not wrong

    return opened
