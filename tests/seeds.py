"""Run chapters under several seeds, compare what they print, and measure how safely each check holds.

    python tests/seeds.py --seeds 0 1 2 --jobs 2 chapters/*.ipynb

Under every seed each check must hold and each cell must print what is stored, except numbers after a sign ≈
(tests/sanitize.cfg). The slack of a comparison inside a ``check`` is the distance between its two sides, positive if
the comparison holds. The table gives the slack's mean and standard deviation over the seeds, and names every comparison
whose mean is less than three standard deviations from zero: such a claim may fail under a seed that was not tried.
"""

import argparse
import ast
import configparser
import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAFE = 3.0  # the least number of standard deviations between a slack's mean and zero
SLACKS = {ast.Lt: "right - left", ast.LtE: "right - left", ast.Gt: "left - right", ast.GtE: "left - right"}


class Margins(ast.NodeTransformer):
    """A transformer that turns every comparison by size inside a ``check`` into a call that also notes its slack."""

    def __init__(self) -> None:
        self.inside = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        outside, self.inside = self.inside, self.inside or getattr(node.func, "id", None) == "check"
        self.generic_visit(node)
        self.inside = outside
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        key = f"{ast.unparse(node)}"
        self.generic_visit(node)
        if not self.inside or not all(type(operator) in SLACKS for operator in node.ops):
            return node
        sides = [node.left, *node.comparators]
        terms: list[ast.expr] = []
        for left, operator, right in zip(sides[:-1], node.ops, sides[1:], strict=True):
            compared = ast.Compare(left, [operator], [right])
            slack = ast.Lambda(
                ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[]),
                ast.BinOp(right, ast.Sub(), left)
                if isinstance(operator, ast.Lt | ast.LtE)
                else ast.BinOp(left, ast.Sub(), right),
            )
            # The node's position distinguishes two comparisons with the same text.
            name = ast.Constant(f"{node.lineno:03d}: {key}")
            terms.append(ast.Call(ast.Name("_noted", ast.Load()), [name, compared, slack], []))
        whole = terms[0] if len(terms) == 1 else ast.BoolOp(ast.And(), terms)
        return ast.fix_missing_locations(ast.copy_location(whole, node))


def masked(text: str) -> str:
    """The text as nbval compares it, without the numbers that may differ."""
    config = configparser.RawConfigParser()
    config.read(ROOT / "tests" / "sanitize.cfg", encoding="utf-8")
    pattern, replacement = config["measured"]["regex"], config["measured"]["replace"]
    return re.sub(pattern, replacement, text).strip()


def run(chapter: Path) -> list[dict[str, Any]]:
    """Run a chapter's cells under the environment's seed, and return CPU seconds, slacks and failures of each cell."""
    import matplotlib

    matplotlib.use("Agg")  # before pyplot is imported, since there may be no screen
    import matplotlib.pyplot as plt

    from nflows_lib.experiments import notebooks

    cells = [cell for cell in json.loads(chapter.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    slacks: dict[str, float] = {}

    def noted(name: str, holds: Any, slack: Any) -> Any:
        with contextlib.suppress(TypeError, ValueError):
            value = slack()
            least = float(value.min() if hasattr(value, "min") else value)
            slacks[name] = min(least, slacks.get(name, least))
        return holds

    module = type(sys)("__main__")
    module.__dict__["_noted"] = noted
    sys.modules["__main__"] = module
    plt.show = lambda *args, **kwargs: plt.close("all")
    transform, parse = Margins(), ast.parse
    notebooks.ast.parse = lambda *args, **kwargs: transform.visit(parse(*args, **kwargs))
    found = []
    for number, cell in enumerate(cells, start=1):
        slacks.clear()
        printed, raised, started = io.StringIO(), "", time.process_time()
        try:
            with contextlib.redirect_stdout(printed):
                notebooks.run_cell("".join(cell["source"]), f"<{chapter.name}, cell {number}>", module.__dict__)
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - started
        plt.close("all")
        wrong = []
        expected = "raises-exception" in cell["metadata"].get("tags", [])
        if bool(raised) != expected:
            wrong.append(raised or "expected an exception, came none")
        stored = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        if not raised and masked(printed.getvalue()) != masked(stored):
            pairs = zip(masked(printed.getvalue()).splitlines(), masked(stored).splitlines(), strict=False)
            came = next(((a, b) for a, b in pairs if a != b), ("another number of lines", ""))
            wrong.append(f"stored {came[1]!r}, printed {came[0]!r}")
        found.append({"seconds": seconds, "slacks": dict(slacks), "wrong": wrong})
    return found


def run_in_a_process(chapter: Path, seed: int) -> list[dict[str, Any]]:
    environment = os.environ | {"NFLOWS_SEED": str(seed)}
    command = [sys.executable, __file__, "--here", str(chapter)]
    done = subprocess.run(command, cwd=chapter.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        return [{"seconds": 0.0, "slacks": {}, "wrong": [done.stderr[-2000:]]}]
    return json.loads(done.stdout.splitlines()[-1])


def report(chapter: Path, results: dict[int, list[dict[str, Any]]], every: bool) -> bool:
    """Print a chapter's results, and return whether every check held and every text was the stored one."""
    slacks: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    sound = True
    for seed, cells in results.items():
        total = sum(cell["seconds"] for cell in cells)
        wrong = [(number, text) for number, cell in enumerate(cells, start=1) for text in cell["wrong"]]
        slowest = sorted(((cell["seconds"], number) for number, cell in enumerate(cells, start=1)), reverse=True)[:6]
        costs = ", ".join(f"cell {number} {seconds:.1f}" for seconds, number in slowest)
        print(f"{chapter.stem}, seed {seed}: {total:.0f} s ({costs}); {len(wrong)} cells wrong")
        for number, text in wrong:
            print(f"    cell {number}: {text}")
        sound &= not wrong
        for number, cell in enumerate(cells, start=1):
            for name, slack in cell["slacks"].items():
                slacks[number, name][seed] = slack
    if len(results) < 2:
        return sound
    table = []
    for (number, name), by_seed in slacks.items():
        values = list(by_seed.values())
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        ratio = statistics.mean(values) / spread if spread > 0 else float("inf")
        table.append((ratio, number, name, statistics.mean(values), spread, min(values)))
    print(f"{chapter.stem}: mean slack / its standard deviation, over {len(results)} seeds")
    for ratio, number, name, mean, spread, least in sorted(table):
        if every or ratio < SAFE:
            print(f"  {ratio:7.2f}  mean {mean:.4g} sd {spread:.2g} least {least:.4g}  cell {number}, line {name}")
    return sound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--every", action="store_true", help="list every comparison, not only the unsafe ones")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # run one chapter in this process
    options = parser.parse_args()
    if options.here:
        os.chdir(options.chapters[0].parent)
        print("\n" + json.dumps(run(options.chapters[0].resolve())))
        return 0
    sound = True
    chapters = [chapter.resolve() for chapter in options.chapters]
    with ThreadPoolExecutor(options.jobs) as pool:
        pending = {
            chapter: {seed: pool.submit(run_in_a_process, chapter, seed) for seed in options.seeds}
            for chapter in chapters
        }
        for chapter, of_seed in pending.items():
            sound &= report(chapter, {seed: future.result() for seed, future in of_seed.items()}, options.every)
            sys.stdout.flush()
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
