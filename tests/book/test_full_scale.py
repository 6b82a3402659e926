"""The page on the long runs, the queue of runs and the list of data sets agree with the table and the records."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import re
import statistics
from pathlib import Path

import pytest
from PIL import Image

from nflows_lib import data
from nflows_lib.experiments import archive, image_sets, runs, sheets, table

PRETRAINED = archive.ROOT / "data" / "pretrained"
RECORDS = {path.parent.name: json.loads(path.read_text()) for path in sorted(PRETRAINED.glob("*/run.json"))}

specification = importlib.util.spec_from_file_location("full_scale", archive.ROOT / "tools" / "full_scale.py")
full_scale = importlib.util.module_from_spec(specification)
specification.loader.exec_module(full_scale)


@pytest.fixture(scope="module")
def page() -> str:
    return full_scale.PAGE.read_text(encoding="utf-8")


def test_page_and_tables_are_what_the_script_writes():
    for path, text in full_scale.everything().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make full-scale`"


def test_a_file_without_the_marks_of_its_table_is_named(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("no table\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md: expected one <!-- written by"):
        full_scale.with_table(path, "| a |")


def test_every_run_is_on_the_page_or_waits(page):
    shown = {name for _, alts in full_scale.SECTIONS.values() for name in alts} | (full_scale.MARKS.keys() & RECORDS)
    assert shown == set(RECORDS) - full_scale.NOT_SHOWN.keys()
    for name in table.RUNS:
        assert (f"* - `{name}`" in page) == (name not in full_scale.NOT_SHOWN)


def test_a_new_run_needs_no_other_entry(monkeypatch):
    """A new run appears on the page, in the queue and among the readers of its data set without further edits."""
    monkeypatch.setitem(table.RUNS, "nice-new", dataclasses.replace(table.find("nice-mnist-small"), title="A new one"))
    assert "* - `nice-new`\n  - A new one\n" in full_scale.page()
    assert "| `nice-new` | 15 minutes | 4.356 (Dinh et al. 2014" in full_scale.queue()
    (line,) = [line for line in full_scale.readers().splitlines() if "`nice-new`" in line]
    assert line.startswith("| `mnist` | `nice-mnist-small`, ")


def test_the_queue_has_the_shortest_run_without_a_record_first():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in full_scale.queue().splitlines()[2:]]
    waiting = [row for row in rows if row[0] != "–"]
    assert [int(row[0]) for row in waiting] == list(range(1, len(waiting) + 1))
    minutes = [table.find(row[1].strip("`")).budget for row in waiting]
    assert minutes == sorted(minutes)
    assert {row[1].strip("`") for row in rows} >= table.RUNS.keys() - full_scale.NOT_SHOWN.keys()
    assert not {row[1].strip("`") for row in waiting} & RECORDS.keys()


def test_every_data_set_is_described_and_told_who_reads_it():
    """The README names the function that fetches a data set, and the runs of the table that read it."""
    described, _, generated = full_scale.SETS.read_text(encoding="utf-8").partition("<!-- written by")
    loaders = {name: getattr(home, name) for home in (data, image_sets) for name in runs.DATA if hasattr(home, name)}
    fetched = [name for name, load in loaders.items() if "download" in inspect.signature(load).parameters]
    assert set(fetched) == {"mnist", "cifar10", "svhn", "celeba", "flowers102"}
    for name in fetched:
        assert f"`{name}`" in described
    for name, run in table.RUNS.items():
        (line,) = [line for line in generated.splitlines() if f"`{name}`" in line]
        assert line.startswith(f"| `{run.data}` |")


@pytest.mark.parametrize("name", sorted(RECORDS.keys() - full_scale.NOT_SHOWN.keys()))
def test_the_page_gives_figure_command_and_hardware_of_the_record(page, name):
    record = RECORDS[name]
    figure = record["figure"]
    line = page[page.index(f"`{name}`, ours") :].split("\n* - ")[0]
    for part in (
        f"{figure['bits_per_dim']:.3f} ± {figure['error']:.3f}",
        f"{record['steps']:,} updates",
        f"{record['minutes']:.0f} minutes on",
    ):
        assert part in line
    text = page[page.index(f":name: fig-full-scale-{name}\n") :].split("```{figure}")[0]
    for part in (table.RUNS[name].title, record["command"], record["commit"], f"seed {record['seed']}"):
        assert part in text


def test_what_falls_short_of_a_paper_says_by_how_much(page):
    rows = re.findall(
        r"\* - `([\w-]+)`, ours\n  - \*\*([\d.]+) ± [\d.]+\*\*, ([\d.]+) (above|below) the paper's ([\d.]+)", page
    )
    assert {name for name, *_ in rows} == {name for name in RECORDS if table.RUNS[name].paper}
    for name, ours, away, side, paper in rows:
        assert float(paper) == table.RUNS[name].paper[0]
        difference = float(ours) - float(paper)
        assert (difference > 0) == (side == "above")
        assert abs(difference) == pytest.approx(float(away), abs=0.006)


def cells(page: str, name: str) -> list[list[str]]:
    """The rows of the page's table of that name."""
    body = page[page.index(f":name: {name}\n") :].split("\n```")[0]
    return [line.split("\n  - ") for line in body.split("\n* - ")[1:]]


def test_the_table_of_the_horses_follows_from_the_records(page):
    """Ten measures of three models over three seeds, each defined in the list before the table."""
    models = ["cglow-horses-small", "unet-horses-small", "unet-horses-early"]
    seeds = [
        [json.loads((PRETRAINED / name / f"run{part}.json").read_text()) for part in ("", "-seed-1", "-seed-2")]
        for name in models
    ]
    head, parameters, updates, minutes, *rows = cells(page, "tab-full-scale-masks")
    labels = ["c-Glow", "U-Net", "U-Net, early"]
    assert head == ["measure", *labels]
    assert parameters[1:] == [f"{found[0]['parameters']:,}" for found in seeds]
    assert updates[1:] == [", ".join(f"{record['steps']:,}" for record in found) for found in seeds]
    assert minutes[1:] == [", ".join(f"{record['minutes']:.0f}" for record in found) for found in seeds]
    keys = ["bits_per_dim_most", "iou", "iou_most", "iou_one", "iou_cold", "iou_between", "area_covered"]
    keys += ["calibration_error", "shuffled"]
    definitions = page[page.index("**Masks.**") : page.index(":name: tab-full-scale-masks")]
    for label, name in zip(labels, models, strict=True):
        assert f"*{label}* is `{name}`" in definitions.replace("\n", " ")
    for (name, *found), key in zip(rows, ["bits_per_dim", *keys], strict=True):
        part, digits = ("figure" if key == "bits_per_dim" else "measured"), (0 if key == "shuffled" else 3)
        values = [[record[part][key] for record in runs_of] for runs_of in seeds]
        assert found == [f"{statistics.mean(v):,.{digits}f} ± {statistics.stdev(v):.{digits}f}" for v in values]
        measure = (
            "IoU of two draws" if name == "IoU of two draws" else re.split(r",| of the average| of one| \(", name)[0]
        )
        assert f"- *{measure}*" in definitions
    error = seeds[0][0]["measured"]["iou_error"]
    assert f"a standard error of {error:.3f} over the {seeds[0][0]['figure']['images']} horses" in page


def test_the_table_at_equal_cost_follows_from_the_records(page):
    names = ["realnvp-cifar10-scales", "glow-cifar10-small", "glow-cifar10-bounded"]
    head, *rows = cells(page, "tab-full-scale-equal")
    limit = RECORDS[names[0]]["minutes"]
    assert head == ["run", f"after {limit:.0f} minutes", "near 3,400 updates", "near 6,600 updates"]
    for name, (run, in_time, *after) in zip(names, rows, strict=True):
        record = RECORDS[name]
        points = {step: value for step, value, _ in record["curve"]["held_out"]}
        last = max(step for step in points if step * record["minutes"] / record["steps"] <= limit)
        assert (run, in_time) == (f"`{name}`", f"{points[last]:.3f}")
        for updates, cell in zip((3_400, 6_600), after, strict=True):
            nearest = min(points, key=lambda step: abs(step - updates))
            close = abs(nearest - updates) < 0.05 * updates
            assert cell == (f"{points[nearest]:.3f} after {nearest:,}" if close else "–")
    (gap,) = re.findall(r"the two Glows differ by ([\d.]+) bits/dim at most", page)
    differences = [abs(float(rows[1][i].split()[0]) - float(rows[2][i].split()[0])) for i in (2, 3)]
    assert float(gap) == pytest.approx(max(differences), abs=0.0011)


def test_another_record_gives_another_page(monkeypatch):
    """The text follows a record with a GPU, a longer run and a better result."""

    def better(name: str) -> dict:
        record = json.loads(json.dumps(RECORDS[name]))
        figure = record["figure"] | {"bits_per_dim": 0.5}
        more = {"measured": record["measured"] | {"bits_per_dim": 0.5}} if name == "glow-mnist" else {}
        return record | {"hardware": "NVIDIA H100", "minutes": 77.0, "figure": figure} | more

    monkeypatch.setattr(archive, "load", better)
    monkeypatch.setattr(archive, "read_json", lambda path, *keys: better(path.parent.name))
    text = full_scale.page()
    assert "No run on this page had a GPU" not in text
    assert "The runs had NVIDIA H100, and took 77 minutes at most." in text
    assert "CPU thread" not in text
    assert "above" not in re.sub(r"see above", "", text)


@pytest.mark.parametrize("name", full_scale.MARKS)
def test_a_ten_minute_run_is_not_run_yet_or_shown_from_its_record(name):
    """The record of a run on a lent GPU makes its part of the page without further code."""
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
    assert len(found) == len(RECORDS.keys() - full_scale.NOT_SHOWN.keys())
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
