"""A real browser on the operator's page: Debian's Chromium, driven by Playwright, with axe-core in it.

async with Browser(pictures) as browser:
    view = await browser.open(url)
    await view.says("All is well")
    await view.inspect("all-well")     # axe in light and dark, 360 px, keyboard, console; three pictures
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal, Self

import pytest
from playwright.async_api import Browser as Chromium
from playwright.async_api import (
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    ViewportSize,
    async_playwright,
    expect,
)
from program import DEADLINE_S

AXE = Path(__file__).parent.parent / "data" / "axe" / "axe.min.js"
DESK: ViewportSize = {"width": 1120, "height": 860}
PHONE: ViewportSize = {"width": 360, "height": 740}
TIMEOUT_MS = DEADLINE_S * 1_000
expect.set_options(timeout=TIMEOUT_MS)
GRAVE = ("serious", "critical")
TOO_WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
FROM_THE_TOP = """() => {
  scrollTo(0, 0);
  const start = document.createElement('span');
  start.tabIndex = -1;
  document.body.prepend(start);
  start.focus();
  start.remove();
}"""
CONTRAST = {"runOnly": {"type": "rule", "values": ["color-contrast"]}, "resultTypes": ["violations"]}
"""All that the dark scheme can change."""
REACHED = """() => {
  const at = document.activeElement;
  if (!at || at === document.body) return null;
  const box = at.getBoundingClientRect();
  return {tag: at.tagName, top: Math.round(box.top + scrollY), left: Math.round(box.left), id: at.id,
          ring: getComputedStyle(at).outlineStyle};
}"""


class View:
    """One page, and everything that went wrong on it."""

    def __init__(self, page: Page, pictures: Path) -> None:
        self.page = page
        self.complaints: list[str] = []
        self._pictures = pictures
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def section(self, name: str) -> Locator:
        """A part of the page by its heading: as a screen reader finds it."""
        return self.page.get_by_role("region", name=name, exact=True)

    async def says(self, headline: str) -> None:
        """Waits for the headline, a heading in a live region."""
        heading = self.page.get_by_role("status").get_by_role("heading", level=2)
        await expect(heading).to_contain_text(headline)

    async def shows(self, section: str, *texts: str) -> None:
        """Waits for texts in a part of the page, visible."""
        part = self.section(section)
        await expect(part).to_be_visible(timeout=TIMEOUT_MS)
        for text in texts:
            await expect(part).to_contain_text(text)

    async def inspect(self, name: str, *, leaving: bool = False) -> None:
        """Looks at the page in every way, and takes its pictures: ``name.png``, -dark and -phone.

        ``leaving``: the sink may go away meanwhile, of which a browser complains.
        """
        schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
        for scheme in schemes:
            await self.page.emulate_media(color_scheme=scheme)
            await self._accessible(f"{name}, {scheme}", {} if scheme == "light" else CONTRAST)
            await self.picture(name if scheme == "light" else f"{name}-dark")
        await self.page.emulate_media(color_scheme="light")
        await self._by_keyboard()
        await self.page.set_viewport_size(PHONE)
        assert not await self.page.evaluate(TOO_WIDE), f"{name}: it scrolls sideways at 360 px"
        await self.picture(f"{name}-phone")
        await self.page.set_viewport_size(DESK)
        assert leaving or self.complaints == []

    async def picture(self, name: str) -> None:
        """Takes the upper part of the page as it is now."""
        await self.page.evaluate("scrollTo(0, 0)")
        await self.page.screenshot(path=self._pictures / f"{name}.png")

    async def part(self, section: str, name: str) -> None:
        """Takes one part of the page alone."""
        await self.section(section).screenshot(path=self._pictures / f"{name}.png")

    async def _accessible(self, what: str, options: dict[str, Any]) -> None:
        found: dict[str, Any] = await self.page.evaluate("options => axe.run(document, options)", options)
        grave = [
            (one["id"], one["help"], [node["html"][:200] for node in one["nodes"]])
            for one in found["violations"]
            if one["impact"] in GRAVE
        ]
        assert grave == [], what
        assert len(found["passes"]) > (0 if options else 20), "axe looked at the page"

    async def _by_keyboard(self) -> None:
        """Tab goes from top to bottom, first to the skip link, and what is reached can be seen to be."""
        await self.page.evaluate(FROM_THE_TOP)
        await self.page.keyboard.press("Tab")
        first = await self.page.evaluate(REACHED)
        assert first["tag"] == "A", "the skip link comes first"
        before = 0
        for _ in range(30):
            await self.page.keyboard.press("Tab")
            reached = await self.page.evaluate(REACHED)
            if reached is None or reached["tag"] == "A":
                break
            assert reached["top"] >= before, reached
            assert reached["ring"] != "none", reached
            before = reached["top"]
        await self.page.evaluate("document.activeElement.blur()")


class Browser:
    """Chromium, as long as the block lasts. A skip where there is none, which CI does not allow."""

    def __init__(self, pictures: Path) -> None:
        self._pictures = pictures
        self._playwright = async_playwright()
        self._chromium: Chromium | None = None

    async def __aenter__(self) -> Self:
        program = shutil.which("chromium")
        if program is None:
            pytest.skip("no chromium here: apt-get install chromium")
        driver = await self._playwright.__aenter__()
        self._chromium = await driver.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._chromium is not None
        await self._chromium.close()
        await self._playwright.__aexit__()

    async def open(self, url: str, **options: Any) -> View:
        """The page at ``url``, in a context of its own; ``options`` are Playwright's for a context."""
        assert self._chromium is not None
        context: BrowserContext = await self._chromium.new_context(
            viewport=DESK,
            reduced_motion="reduce",
            **options,
        )
        await context.add_init_script(path=AXE)  # not as a script of the page: it takes none but its own
        view = View(await context.new_page(), self._pictures)
        await view.page.goto(url)
        return view
