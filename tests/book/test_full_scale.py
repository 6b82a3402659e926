"""The page on the long runs: what it says is what the records say, and every run that is shipped is on it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from nflows_lib.experiments import archive, sheets, table

PRETRAINED = archive.ROOT / "data" / "pretrained"
RECORDS = {path.parent.name: json.loads(path.read_text()) for path in sorted(PRETRAINED.glob("*/run.json"))}

specification = importlib.util.spec_from_file_location("full_scale", archive.ROOT / "tools" / "full_scale.py")
full_scale = importlib.util.module_from_spec(specification)
specification.loader.exec_module(full_scale)


@pytest.fixture(scope="module")
def page() -> str:
    return full_scale.PAGE.read_text(encoding="utf-8")


def test_the_page_is_what_the_script_writes(page):
    assert page == full_scale.page(), "run `make full-scale`"


def test_every_run_is_on_the_page_or_waits(page):
    shown = {name for _, alts in full_scale.SECTIONS.values() for name in alts} | (full_scale.MARKS.keys() & RECORDS)
    assert shown == set(RECORDS) - {"unet-horses-early"}  # chapter 6 has it: the same network, stopped early
    for name in table.RUNS:
        assert (f"* - `{name}`" in page) == (name not in {"nice-digits", "unet-horses-early"})


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "unet-horses-early"])
def test_the_page_gives_figure_command_and_hardware_of_the_record(page, name):
    record = RECORDS[name]
    figure = record["figure"]
    line = page[page.index(f"`{name}`, ours") :]
    assert f"{figure['bits_per_dim']:.3f} ± {figure['error']:.3f}" in line[:100]
    text = page[page.index(f":name: fig-full-scale-{name}\n") :].split("```{figure}")[0]
    for part in (record["command"], record["commit"], f"{record['steps']:,} steps", f"{record['minutes']:.0f} minutes"):
        assert part in text


def test_what_falls_short_of_a_paper_says_by_how_much(page):
    rows = re.findall(
        r"\* - `([\w-]+)`\n  - ([\d.]+) ± [\d.]+\n  - ([\d.]+)(?: \(second-hand\))?\n  - ([\d.]+) (above|below)", page
    )
    assert {name for name, *_ in rows} == {name for name in RECORDS if table.RUNS[name].paper}
    for _, ours, paper, away, side in rows:
        difference = float(ours) - float(paper)
        assert (difference > 0) == (side == "above")
        assert abs(difference) == pytest.approx(float(away), abs=0.006)


def test_another_record_gives_another_page(monkeypatch):
    """A GPU, a longer run, a better figure: what the text says follows."""

    def better(name: str) -> dict:
        record = json.loads(json.dumps(RECORDS[name]))
        figure = record["figure"] | {"bits_per_dim": 0.5}
        more = {"measured": record["measured"] | {"bits_per_dim": 0.5}} if name == "glow-mnist" else {}
        return record | {"hardware": "NVIDIA H100", "minutes": 77.0, "figure": figure} | more

    monkeypatch.setattr(archive, "load", better)
    text = full_scale.page()
    assert "No run on this page had a GPU" not in text
    assert "The runs had NVIDIA H100, and 77 minutes at most." in text
    assert "CPU thread" not in text
    assert "above" not in re.sub(r"see above", "", text)


@pytest.mark.parametrize("name", full_scale.MARKS)
def test_a_ten_minute_run_is_not_run_yet_or_shown_from_its_record(name):
    """A lent GPU must need no further code: its record alone makes the page."""
    shown = {name: RECORDS["glow-mnist"] | {"run": name, "hardware": "NVIDIA H100"}}
    without, text = full_scale.ten_minutes({}), full_scale.ten_minutes(shown)
    assert without.count("not run yet") == len(full_scale.MARKS)
    assert text.count("not run yet") == len(full_scale.MARKS) - 1
    record = RECORDS["glow-mnist"]
    for part in (
        f"`{name}`, ours",
        "on NVIDIA H100",
        f"{name}/stages.png",
        f"{record['measured']['bits_per_dim']:.3f}",
    ):
        assert part in text


def test_the_pictures_of_the_page_are_there(page):
    found = re.findall(r"```\{figure\} \.\./(\S+)\n:alt: (.+)", page)
    assert len(found) == len(RECORDS) - 1
    for path, alt in found:
        assert (archive.ROOT / path).is_file()
        assert len(alt) > 30


@pytest.mark.parametrize("name", [name for name, record in RECORDS.items() if "stages" in record])
def test_a_sheet_of_stages_has_a_row_for_each_of_them(name):
    record, shape = RECORDS[name], table.RUNS[name].shape
    with Image.open(PRETRAINED / name / sheets.STAGES) as sheet:
        assert sheet.size == (10 * (shape[2] + 1) + 1, len(record["stages"]) * (shape[1] + 1) + 1)
    assert record["stages"] == sorted(record["stages"])
    assert record["stages"][-1] == record["steps"]
    assert {step for step, _, _ in record["curve"]["held_out"]} >= set(record["stages"])


def test_what_is_shipped_keeps_the_repository_light():
    sizes = {path: path.stat().st_size for path in Path(PRETRAINED).rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 16 * 2**20
    for folder in PRETRAINED.iterdir():
        assert sum(size for path, size in sizes.items() if folder in path.parents) < 4 * 2**20
