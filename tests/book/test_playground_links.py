"""Tests of the links that train a flow in the page and of the elements in the chapters: they show what a text says."""

from __future__ import annotations

import functools
import html
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import nbformat
import pytest
from playwright._impl._driver import compute_driver_executable

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "_extra" / "playground"
NODE = compute_driver_executable()[0]
EMBEDDED = {"01_nice": "scaling", "02_dequantization": "column", "03_realnvp": "tanh"}  # the failure of each element

# The options of trainer.js, which no page can reach from outside; and for each state which of its failures fit.
OPTIONS = """
const vm = require("vm"), fs = require("fs");
Object.assign(globalThis, { HTMLElement: class {}, PlaygroundPage: {}, PlaygroundTraining: {} });
globalThis.customElements = { define() {} };
const code = fs.readFileSync(`${process.argv[1]}/trainer.js`, "utf8");
const names = "globalThis.told = { SETTINGS, FIRST, FAILURES };";
vm.runInThisContext(code.replace("customElements.define(", `${names} $&`));
const { SETTINGS, FIRST, FAILURES } = told;
const each = (entries, tell) => Object.fromEntries(Object.entries(entries).map(([name, entry]) => [name, tell(entry)]));
const values = ({ options }) => (Array.isArray(options) ? options.map(String) : Object.keys(options));
const { data: train, ...options } = each(SETTINGS, values);
const fitting = (state) => Object.keys(FAILURES).filter((name) => FAILURES[name].fits(state));
console.log(JSON.stringify({
  options: { train, ...options },
  first: FIRST,
  failures: each(FAILURES, ({ entry, excludes }) => ({ entry, excludes })),
  fitting: JSON.parse(fs.readFileSync(0, "utf8")).map((state) => fitting({ ...FIRST, ...state, data: state.train })),
}));
"""
# Trains flows, and prints after each number of steps what the page would show of them.
TRAIN = """
const vm = require("vm"), fs = require("fs");
for (const file of ["train.js", "flow.js"]) vm.runInThisContext(fs.readFileSync(`${process.argv[1]}/${file}`, "utf8"));
const { makeData, volumePreservingOptimum, Session } = PlaygroundTraining;
const { choices, variants, after } = JSON.parse(fs.readFileSync(0, "utf8"));
const session = new Session(choices, variants);
const shown = after.map((steps) => {
  while (session.steps < steps) session.step();
  const { flows } = session.picture(3.6, 72);
  return flows.map(({ nll, density }) => ({ nll, lost: density.filter((p) => !Number.isFinite(p)).length }));
});
console.log(JSON.stringify({ shown, best: volumePreservingOptimum(makeData(choices.data), choices.base) }));
"""


def in_node(script: str, told: Any) -> Any:
    """What a script prints that reads what it is told."""
    ran = subprocess.run([NODE, "-e", script, str(SCRIPTS)], input=json.dumps(told), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def states_of(text: str) -> list[dict[str, str]]:
    """The states of all links and elements in a text; a key may occur once in each."""
    found = re.findall(r'(?:href="[^"#]*#|\bat=")(train=[^"]*)"', text)
    pairs = [parse_qsl(html.unescape(address), strict_parsing=True) for address in found]
    assert all(len(dict(one)) == len(one) for one in pairs), found
    return [dict(one) for one in pairs]


@functools.cache
def sources() -> dict[str, str]:
    """The text of each page by its name: of a notebook, its Markdown cells."""
    pages = {}
    for path in sorted((ROOT / "chapters").iterdir()):
        if path.suffix == ".md":
            pages[path.stem] = path.read_text(encoding="utf-8")
        elif path.suffix == ".ipynb":
            cells = nbformat.read(path, as_version=4).cells
            pages[path.stem] = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return pages


@functools.cache
def everything() -> list[tuple[str, dict[str, str]]]:
    """Each state with the name of its page."""
    return [(page, state) for page, text in sources().items() for state in states_of(text)]


@functools.cache
def known() -> dict[str, Any]:
    return in_node(OPTIONS, [state for _, state in everything()])


def broken_of(state: dict[str, str]) -> list[str]:
    return [name for name in state.get("broken", "").split(",") if name]


def test_every_page_with_a_failure_of_the_trainer_trains_it() -> None:
    """The other tests would pass if the search found no link."""
    pages = [page for page, _ in everything()]
    least = {"01_nice": 6, "02_dequantization": 3, "03_realnvp": 3, "clinic": 10, "playground": 1}
    assert {page: pages.count(page) for page in least if pages.count(page) < least[page]} == {}


def test_every_address_has_only_keys_and_values_that_the_trainer_knows() -> None:
    options = known()["options"]
    free = {"seed": r"\d{1,4}", "beside": "[01]", "own": r"(?:[\w-]{2})+", "in": r"[\w-]+", "broken": r"[\w,]*"}
    for page, state in everything():
        for key, value in state.items():
            assert key in options or key in free, (page, state)
            assert value in options[key] if key in options else re.fullmatch(free[key], value), (page, state)


def test_every_failure_of_an_address_is_one_and_fits_the_rest() -> None:
    """What the trainer ignores in silence, for instance a missing tanh in NICE, would be a sound flow."""
    for (page, state), fitting in zip(everything(), known()["fitting"], strict=True):
        broken = broken_of(state)
        assert set(broken) <= set(fitting), (page, state)
        assert len(set(broken)) == len(broken), (page, state)
        assert not {known()["failures"][name].get("excludes") for name in broken} & set(broken), (page, state)


def test_the_clinic_trains_every_failure_in_its_entry() -> None:
    entries = re.split(r"^\(clinic-(\w+)\)=$", sources()["clinic"], flags=re.MULTILINE)
    texts = dict(zip(entries[1::2], entries[2::2], strict=True))
    for name, failure in known()["failures"].items():
        linked = {broken for state in states_of(texts[failure["entry"].lower()]) for broken in broken_of(state)}
        assert name in linked, f"{failure['entry']} does not train {name}"


@pytest.mark.parametrize("chapter", EMBEDDED)
def test_an_element_in_a_chapter_has_its_scripts_and_the_same_state_as_its_link(chapter: str) -> None:
    """Jupyter shows the link alone, and runs no script."""
    text = sources()[chapter]
    (element,) = re.findall(r"^<flow-trainer compact .*?^</flow-trainer>$", text, flags=re.DOTALL | re.MULTILINE)
    inside, link = states_of(element)
    assert inside == link
    assert broken_of(inside) == [EMBEDDED[chapter]]
    scripts = re.findall(r'^<script src="\.\./playground/(\w+)\.js"></script>$', text, flags=re.MULTILINE)
    assert scripts == ["page", "train", "flow", "trainer"]


def trained(chapter: str, *after: int, sound: bool = True) -> dict[str, Any]:
    """What a chapter's element shows after numbers of steps: the sound flow, if it is wanted, and the broken one."""
    state = next(state for page, state in everything() if page == chapter and broken_of(state) == [EMBEDDED[chapter]])
    first = known()["first"]
    chosen = {key: type(first[key])(value) for key, value in state.items() if key not in ("train", "broken")}
    choices = {**first, **chosen, "data": state["train"], "own": []}
    variants = [[], broken_of(state)] if sound else [broken_of(state)]
    return in_node(TRAIN, {"choices": choices, "variants": variants, "after": after})


def test_what_chapter_1_says_of_its_element() -> None:
    """Without the layer the loss stops near 3.01 nats; with the layer it falls below D log 4."""
    found = trained("01_nice", 300)
    assert found["best"] == pytest.approx(3.01, abs=0.005)
    ((sound, broken),) = found["shown"]
    assert broken["nll"] == pytest.approx(found["best"], abs=0.1)
    assert sound["nll"] < 2 * math.log(4) - 0.2


def test_what_chapter_2_says_of_its_element() -> None:
    """With a repeated column the loss falls below 0 and goes on falling."""
    (early,), (late,) = trained("02_dequantization", 200, 800, sound=False)["shown"]
    assert early["nll"] > 0 > late["nll"]


def test_what_chapter_3_says_of_its_element() -> None:
    """Far from the moons the density without a tanh is no finite number; the sound flow's is one everywhere."""
    ((sound, broken),) = trained("03_realnvp", 200)["shown"]
    assert sound["lost"] == 0
    assert broken["lost"] > 0.02 * 72**2
    assert broken["nll"] == pytest.approx(sound["nll"], abs=0.5)
