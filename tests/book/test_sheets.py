"""Tests of the playground's sheets of pictures: the models decode them, files are small, controls are accessible."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import sheets
from axe_playwright_python.sync_playwright import Axe
from mathematics import leave_out_mathematics
from PIL import Image
from playwright.sync_api import Browser, Locator, Page

ROOT = Path(__file__).parents[2]

PLAYGROUND = (ROOT / "chapters" / "playground.md").read_text(encoding="utf-8")
# The mean difference, in levels of 255, between a decoded picture and the stored one. A PNG loses nothing, but half
# precision rounds differently on other machines. A WebP is off by 2 to 3 levels.
BOUND = {"png": 1.5, "webp": 4.5}
# Cells to decode again, each with the cells from which it must differ: another temperature, another draw.
CELLS = {
    "digits-between.png": {0: (2, 34), 16: (14, 50), 144: (142, 178)},
    "flowers-between.webp": {0: (2, 22), 10: (8, 32), 60: (58, 82)},
    "digits-temperature.png": {16 * 12 + 1: (14 * 12 + 1, 18 * 12 + 1, 16 * 12), 8 * 12 + 9: (6 * 12 + 9, 10 * 12 + 9)},
    "flowers-temperature.webp": {7 * 12 + 5: (6 * 12 + 5, 8 * 12 + 5, 7 * 12 + 4)},
    "flowers-scales.webp": {1 * 7 + 2: (7, 8), 2 * 7 + 3: (14,), 7 * 7 + 1: (49, 51)},
}


class Elements(HTMLParser):
    """The attributes of each latent-sheet in the page's source."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "latent-sheet":
            self.found.append({name: value or "" for name, value in attrs})


def elements() -> list[tuple[str, dict[str, str]]]:
    """For each element of the page, the file that it shows and its attributes."""
    parser = Elements()
    parser.feed(PLAYGROUND)
    files = [re.search(r"assets/playground/(\S+)", part)[1] for part in PLAYGROUND.split("<latent-sheet")[1:]]
    return list(zip(files, parser.found, strict=True))


def test_the_page_shows_every_sheet_as_large_as_it_is() -> None:
    shown = {file: [int(said.get(name, 0)) for name in ("columns", "rows", "gap")] for file, said in elements()}
    assert shown == {name: [sheet.columns, sheet.rows, sheet.gap] for name, sheet in sheets.SHEETS.items()}
    for name, sheet in sheets.SHEETS.items():
        side = sheets.model(sheet.model).shape[-1]
        size = tuple(n * (side + sheet.gap) - sheet.gap for n in (sheet.columns, sheet.rows))
        assert Image.open(sheets.FOLDER / name).size == size, name


def test_sheets_are_light() -> None:
    sizes = {name: (sheets.FOLDER / name).stat().st_size for name in sheets.SHEETS}
    assert max(sizes.values()) <= sheets.MAX_BYTES, sizes
    assert sum(sizes.values()) <= sheets.MAX_BYTES_IN_ALL, sizes


@pytest.mark.parametrize("name", sheets.SHEETS)
def test_a_sheet_is_what_its_model_decodes(name: str) -> None:
    stored, cells = sheets.stored(name).astype(float), CELLS[name]
    for cell, now in zip(cells, sheets.decoded(name, list(cells)).astype(float), strict=True):
        off = np.abs(stored - now).mean((1, 2, 3))
        bound = BOUND[name.split(".")[1]]
        assert off[cell] < bound, f"picture {cell}: {off[cell]:.2f} levels off"
        near = {other: round(off[other], 2) for other in cells[cell] if off[other] < 1.5 * bound}
        assert not near, f"picture {cell}: not told apart from {near}"


@pytest.mark.parametrize("name", sheets.SHEETS)
def test_pictures_put_together_come_apart_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = sheets.stored(name)
    image = sheets.put_together(sheets.SHEETS[name], pictures)
    assert image.size == Image.open(sheets.FOLDER / name).size
    image.save(tmp_path / name, format="PNG")
    monkeypatch.setattr(sheets, "FOLDER", tmp_path)
    np.testing.assert_array_equal(sheets.stored(name), pictures)


def test_the_page_says_how_much_each_scale_changes() -> None:
    """The numbers agree as far as the compression allows."""
    levels = re.findall(r"^  - about (\d+) levels?$", PLAYGROUND, re.MULTILINE)
    sides = re.search(
        r"the right pictures differ from one another by (\d+) levels on average, the originals on the left by (\d+)",
        PLAYGROUND,
    )
    rows = sheets.stored("flowers-scales.webp").astype(float).reshape(3, 4, 7, -1)
    changes = np.abs(rows[:, :, 1:] - rows[:, :, :1]).mean((0, 2, 3))
    said = [int(number) for number in levels]
    assert len(said) == 4
    np.testing.assert_allclose(changes[1:], said[1:], rtol=0.1)
    assert changes[0] < said[0] + 3
    others = np.abs(rows - rows[[1, 2, 0]])[:, 3].mean((0, 2))  # coarsest scale, by column: the first is the left side
    np.testing.assert_allclose([others[1:].mean(), others[0]], [int(number) for number in sides.groups()], rtol=0.1)


# --- in a browser -----------------------------------------------------------------------------------------------------


SIZE = {"width": 360, "height": 740}
ALL_READY = "document.querySelectorAll('latent-sheet:not(.ready)').length == 0"


@pytest.fixture(scope="module")
def loaded(browser: Browser, book: Path) -> Iterator[tuple[Page, list[str]]]:
    """The playground on a narrow touch screen, and the errors that its scripts raise."""
    context = browser.new_context(viewport=SIZE, has_touch=True)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if "/playground/" in said.location["url"] else None)
    leave_out_mathematics(page)
    page.goto((book / "chapters" / "playground.html").as_uri())
    page.wait_for_function(ALL_READY)
    assert not errors
    yield page, errors
    context.close()


@pytest.fixture
def page(loaded: tuple[Page, list[str]]) -> Iterator[Page]:
    """The loaded page with new sheets in place of those that a test before has used."""
    page, errors = loaded
    errors.clear()
    page.set_viewport_size(SIZE)
    page.evaluate(
        """() => {
          for (const used of document.querySelectorAll("latent-sheet")) {
            const again = used.cloneNode(true);  // without its shadow root
            again.classList.remove("ready");
            used.replaceWith(again);
          }
          scrollTo(0, 0);
        }"""
    )
    page.wait_for_function(ALL_READY)
    yield page
    page.emulate_media(media="screen")
    assert not errors


def sheet(page: Page, file: str) -> Locator:
    return page.locator("latent-sheet").nth([name for name, _ in elements()].index(file))


def pixels(sheet: Locator) -> str:
    """The canvas's picture, from a screenshot, since scripts cannot read it if the page is a file."""
    return sheet.locator("canvas.view").screenshot().hex()


def shown(sheet: Locator) -> np.ndarray:
    """The canvas's own pixels, (H, W, 3), each of which the page shows as a square."""
    view = sheet.locator("canvas.view")
    size = [view.evaluate(f"view => view.{side}") for side in ("height", "width")]
    photograph = np.asarray(Image.open(io.BytesIO(view.screenshot())).convert("RGB")).astype(float)
    y, x = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, photograph.shape, strict=False))
    return photograph[y[:, None], x]


def test_the_pad_shows_the_picture_of_its_place_or_the_corners_mixed(page: Page) -> None:
    page.set_viewport_size({"width": 1200, "height": 900})
    square = sheet(page, "digits-between.png")
    pictures = sheets.stored("digits-between.png").reshape(17, 17, 28, 28, 1).astype(float)
    across, down = square.get_by_label("left to right"), square.get_by_label("top to bottom")
    mixing, said = square.get_by_label("mix the corners' pixels instead"), square.locator("output")
    for column, row, words in (
        (16, 0, "3: 100 %"),
        (0, 16, "0: 100 %"),
        (16, 16, "8: 100 %"),
        (4, 8, "7: 38 %, 3: 13 %, 0: 38 %, 8: 13 %"),
    ):
        across.fill(str(column))
        down.fill(str(row))
        assert said.inner_text() == words
        np.testing.assert_allclose(shown(square), pictures[row, column].repeat(3, 2), atol=1)
        mixing.check()
        x, y = column / 16, row / 16
        top, bottom = ((1 - x) * pictures[i, 0] + x * pictures[i, 16] for i in (0, 16))
        np.testing.assert_allclose(shown(square), ((1 - y) * top + y * bottom).repeat(3, 2), atol=4)
        mixing.uncheck()
    pad, marker = square.locator(".pad"), square.locator(".pad i")
    box, mark = pad.bounding_box(), marker.bounding_box()
    assert [mark[axis] - box[axis] for axis in "xy"] == pytest.approx([n * box["width"] / 17 for n in (4, 8)], abs=1.5)
    pad.hover(position={"x": 30, "y": 30})  # without a button
    pad.press("Control+ArrowRight")
    assert [one.input_value() for one in (across, down)] == ["4", "8"]
    pad.press("ArrowDown")
    assert [one.input_value() for one in (across, down)] == ["4", "9"]


def test_a_row_and_a_draw_are_those_of_the_sheet(page: Page) -> None:
    page.set_viewport_size({"width": 1200, "height": 900})
    twelve = sheet(page, "digits-temperature.png")
    said, lower = twelve.locator("output"), twelve.get_by_role("button", name="lower temperature")
    lower.click()
    assert said.inner_text() == "temperature 0.65"
    rows = sheets.stored("digits-temperature.png").reshape(25, 3, 4, 28, 28, 1)
    tiles = shown(twelve)
    assert tiles.shape == (3 * 28 + 2 * 2, 4 * 28 + 3 * 2, 3)
    for i, j in ((0, 0), (1, 2), (2, 3)):
        tile = tiles[30 * i : 30 * i + 28, 30 * j : 30 * j + 28]
        np.testing.assert_allclose(tile, rows[13, i, j].astype(float).repeat(3, 2), atol=1)
    twelve.get_by_role("slider").press("Home")
    lower.click()
    assert said.inner_text() == "temperature 0.00"
    scales = sheet(page, "flowers-scales.webp")
    scales.get_by_label("yellow").check()
    scales.get_by_label("2", exact=True).check()
    scales.locator("button.main").click()
    draws = sheets.stored("flowers-scales.webp").reshape(3, 4, 7, *sheets.stored("flowers-scales.webp").shape[1:])[1, 1]
    side, found = draws.shape[1], shown(scales)
    assert found.shape == (side, 2 * side + 1, 3)
    for draw, half in ((0, found[:, :side]), (2, found[:, -side:])):
        off = [np.abs(half - other).mean() for other in draws.astype(float)]
        assert off[draw] == min(off) < 1


def test_a_finger_a_key_and_a_slider_move_through_the_square(page: Page) -> None:
    square = sheet(page, "digits-between.png")
    pad, said = square.locator(".pad"), square.locator("output")
    assert said.inner_text() == "7: 14 %, 3: 11 %, 0: 42 %, 8: 33 %"  # the page's start
    side = pad.bounding_box()["width"]
    pad.tap(position={"x": 6, "y": 6})
    assert said.inner_text() == "7: 100 %"
    first = pixels(square)
    pad.tap(position={"x": side - 6, "y": side - 6})
    assert said.inner_text() == "8: 100 %"
    assert pixels(square) != first
    pad.hover(position={"x": 4, "y": side - 6})
    page.mouse.down()
    assert said.inner_text() == "0: 100 %"
    box = pad.bounding_box()
    page.mouse.move(box["x"] - 9, box["y"] - 50)  # a drag beyond the edge stops at the edge
    page.mouse.up()
    assert said.inner_text() == "7: 100 %"
    assert pixels(square) == first
    top = page.evaluate("scrollY")
    for key, place in (("ArrowRight", ["6 %", "0 %"]), ("ArrowDown", ["6 %", "6 %"]), ("ArrowLeft", ["0 %", "6 %"])):
        pad.press(key)
        ranges = square.get_by_role("slider")
        assert [ranges.nth(i).get_attribute("aria-valuetext") for i in range(2)] == place
    assert page.evaluate("scrollY") == top
    square.get_by_label("top to bottom").press("End")
    assert said.inner_text() == "0: 100 %"


def test_the_corners_pixels_can_be_mixed_instead(page: Page) -> None:
    square = sheet(page, "digits-between.png")
    for label in ("left to right", "top to bottom"):
        square.get_by_label(label).press("Home")
    corner = pixels(square)
    mixing = square.get_by_label("mix the corners' pixels instead")
    mixing.check()
    assert pixels(square) == corner  # a corner shows one picture
    square.get_by_label("left to right").fill("8")
    mixed = pixels(square)
    mixing.uncheck()
    assert pixels(square) != mixed


def test_the_temperature_is_read_out(page: Page) -> None:
    wanted = {"digits-temperature.png": ["0.70", "0.75", "1.20"], "flowers-temperature.webp": ["0.7", "0.8", "1.2"]}
    for file, values in wanted.items():
        twelve = sheet(page, file)
        slider, said = twelve.get_by_role("slider"), twelve.locator("output")
        seen = {pixels(twelve)}
        assert said.inner_text() == f"temperature {values[0]}"
        twelve.get_by_role("button", name="higher temperature").tap()
        seen.add(pixels(twelve))
        assert [said.inner_text(), slider.get_attribute("aria-valuetext")] == [f"temperature {values[1]}", values[1]]
        assert said.get_attribute("aria-live") == "polite"
        slider.press("End")
        seen.add(pixels(twelve))
        assert said.inner_text() == f"temperature {values[2]}"
        assert said.get_attribute("aria-live") == "off"  # the slider itself says the value
        assert len(seen) == 3


def test_a_scale_can_be_drawn_again_until_the_first_draw_returns(page: Page) -> None:
    scales = sheet(page, "flowers-scales.webp")
    again, said = scales.get_by_role("button", name="next draw"), scales.locator("output")
    seen = []
    for i in range(6):
        assert said.inner_text().endswith(f"scale 4 drawn again, {i + 1} of 6.")
        seen.append(pixels(scales))
        again.press("Enter")
    assert len(set(seen)) == 6
    assert pixels(scales) == seen[0]
    scales.get_by_label("2", exact=True).check()
    assert "scale 2 drawn again, 1 of 6" in said.inner_text()
    scales.get_by_label("pink").check()
    assert len({seen[0], pixels(scales)}) == 2


def test_controls_are_large_and_nothing_sticks_out(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    targets = page.locator("latent-sheet").locator("button, input[type=range], label.pill, .row label")
    heights = targets.evaluate_all("all => all.map((one) => one.getBoundingClientRect().height)")
    assert len(heights) == 2 * 5 + 2 * 4 + 8
    assert min(heights) >= 44


def test_on_paper_the_whole_sheet_is_there(page: Page) -> None:
    images = page.locator("latent-sheet img")
    assert not any(images.nth(i).is_visible() for i in range(images.count()))
    page.emulate_media(media="print")
    assert images.count() == len(sheets.SHEETS)
    assert all(images.nth(i).is_visible() for i in range(images.count()))
    assert not page.locator("latent-sheet button").first.is_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_in_the_sheets(page: Page, theme: str) -> None:
    page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
    found = Axe().run(page, context={"include": [["latent-sheet"]]}).response["violations"]
    assert not found, [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]
