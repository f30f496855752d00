"""A real browser for the tests of pages: Debian's Chromium, driven by Playwright; skipped with its reason elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@dataclass
class Tab:
    """A page in the browser, and what happened in it.

    Attributes:
        page: Playwright's page.
        errors: what its console and its scripts complained of.
        requests: addresses that it asked for, those of its own folder and of data URLs left out.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def _saw_message(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _saw_request(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.requests.append(request.url)

    def listen(self) -> None:
        """Write down what happens from now on."""
        self.page.on("console", self._saw_message)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._saw_request)


@dataclass
class Browser:
    """A browser that opens tabs of its own, with nothing kept between them."""

    chromium: Any

    def open(
        self, address: str | Path, size: dict[str, int] | None = None, scheme: str = "light"
    ) -> Tab:
        """Open a file or an address.

        Args:
            address: of the page.
            size: of the window; that of a desk unless told.
            scheme: `light` or `dark`.
        """
        context = self.chromium.new_context(viewport=size or DESK, color_scheme=scheme)
        context.set_default_timeout(60_000)
        tab = Tab(context.new_page())
        tab.listen()
        tab.page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
        return tab

    def close_tabs(self) -> None:
        """Close all that `open` has opened."""
        for context in self.chromium.contexts:
            context.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Browser]:
    """A browser; its tabs are closed after each test."""
    opened = Browser(chromium)
    yield opened
    opened.close_tabs()
