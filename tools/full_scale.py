"""Write what follows from the table of runs and the records of the shipped ones: ``python tools/full_scale.py``.

That is the page chapters/full_scale.md, the queue in data/pretrained/README.md, and which run reads which data set in
data/README.md. Whatever is measured comes from data/pretrained/*/run.json; other people's results are in OTHERS, with
their source. The suite generates all of it again and compares.
"""

from __future__ import annotations

import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nflows_lib.experiments import archive, runs, sheets, table  # noqa: E402

PAGE = ROOT / "chapters" / "full_scale.md"
QUEUE = ROOT / "data" / "pretrained" / "README.md"
SETS = ROOT / "data" / "README.md"

# Runs that the page leaves out, and why.
NOT_SHOWN = {
    "nice-digits": "it is there to try the trainer",
    "unet-horses-early": "a column of the horses' table",
}

# Results that the text compares with, in addition to the papers'.
TUTORIAL, TUTORIAL_SIMPLE, TUTORIAL_DRAWS, REMAKE = 1.020, 1.078, 8, 3.70

# Bits/dim as the authors give them; how the model was trained or scored, as far as their pages say.
WEIGHTED = f"importance-weighted bound with {TUTORIAL_DRAWS} draws"
OTHERS: dict[str, list[tuple[str, str, str]]] = {
    "mnist": [
        ("NICE, the paper {cite:p}`dinh2014nice`", "4.356", "1,500 epochs"),
        (
            "RealNVP in PyTorch, one scale, the UvA course {cite:p}`lippe2022tutorial`",
            f"{TUTORIAL_SIMPLE:.3f}",
            f"200 epochs, {WEIGHTED}; the course's three models have 0.56 to 1.71 million parameters",
        ),
        ("RealNVP of the UvA course, with learned noise", "1.043", f"200 epochs, {WEIGHTED}"),
        (
            "RealNVP of the UvA course, with learned noise and several scales",
            f"{TUTORIAL:.3f}",
            f"200 epochs, {WEIGHTED}",
        ),
        ("RealNVP, as quoted by {cite:t}`grathwohl2019ffjord`", "1.06", "–"),
        ("Glow, as quoted by {cite:t}`grathwohl2019ffjord`", "1.05", "–"),
        ("FFJORD {cite:p}`grathwohl2019ffjord`", "0.99", "–"),
    ],
    "cifar10": [
        ("RealNVP, the paper {cite:p}`dinh2016density`", "3.49", "two scales, networks of 8 blocks"),
        (
            "RealNVP in PyTorch {cite:p}`chute2018realnvp`",
            f"{REMAKE:.2f}",
            "on validation images, best of 25 epochs of 4 minutes on a Titan Xp",
        ),
        ("Glow, the paper {cite:p}`kingma2018glow`", "3.35", "about a week on 8 GPUs (second-hand)"),
        ("Glow in PyTorch {cite:p}`amersfoort2019glow`", "3.39", "batches of 64, one GPU"),
        (
            "Glow in PyTorch {cite:p}`chute2018glow`",
            "3.49",
            "on validation images, 80 epochs of 30 minutes on two 1080 Ti",
        ),
    ],
}

# Which runs are shown under which heading, and the alternative text of their pictures.
SECTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "mnist": (
        "MNIST",
        {
            "glow-mnist": "handwritten strokes in white on black, much the same in all rows; about half can be read as digits",
            "nice-mnist-small": "sixty digits in white on black, many of them legible, with grey specks about them",
            "nice-mnist": "sixty digits in white on black, about half of them legible, with grey specks about them",
        },
    ),
    "cifar10": (
        "CIFAR-10",
        {
            "mixture-cifar10-small": "blurred patches of colour that sharpen from row to row into shapes before a background, "
            "none of which can be named",
            "glow-cifar10-bounded": "blurred patches of colour that sharpen from row to row into shapes like objects before "
            "a background, none of which can be named",
            "glow-cifar10-small": "blurred patches of colour that sharpen from row to row, none of which can be named",
            "realnvp-cifar10-scales": "coarse coloured noise in the first row, blotches with edges in the last",
            "realnvp-cifar10-small": "coloured noise, a little smoother in the last row",
        },
    ),
    "flowers": (
        "Flowers",
        {
            "glow-flowers5-small": "blurred colours, from row to row in larger patches of red, yellow and green; no whole flower"
        },
    ),
    "horses": (
        "Horses",
        {
            "cglow-horses-small": "white silhouettes of a horse on black, frayed and specked in the first row, in the last "
            "with legs, neck and tail of different postures",
            "unet-horses-small": "white silhouettes of a horse on black, alike in each row but for specks at the edges",
        },
    ),
}

# The runs on CIFAR-10 that were trained under the same conditions: the row's name, and the record.
SAME_CONDITIONS = {
    "`glow-cifar10-bounded`, trained again": archive.folder("glow-cifar10-bounded") / "run-float32.json",
    "`mixture-cifar10-small`, with mixtures": archive.folder("mixture-cifar10-small") / archive.RECORD,
}

# The numbers of updates after which the runs on CIFAR-10 are compared.
EQUAL_UPDATES = (3_400, 6_600)

# What is measured of the masks of these models: the row's name, where a record has it, and how many digits it is given.
HORSES = {"c-Glow": "cglow-horses-small", "U-Net": "unet-horses-small", "U-Net, early": "unet-horses-early"}
MASKS: dict[str, tuple[str, str, int]] = {
    "bits/dim": ("figure", "bits_per_dim", 3),
    "importance-weighted bound, {most} draws": ("measured", "bits_per_dim_most", 3),
    "IoU of the average of {few} draws": ("measured", "iou", 3),
    "IoU of the average of {most} draws": ("measured", "iou_most", 3),
    "IoU of one draw": ("measured", "iou_one", 3),
    "IoU of the average of {few} draws at temperature 0.5": ("measured", "iou_cold", 3),
    "IoU of two draws": ("measured", "iou_between", 3),
    "coverage of the 80 % interval (area)": ("measured", "area_covered", 3),
    "calibration error": ("measured", "calibration_error", 3),
    "context advantage (nats)": ("measured", "shuffled", 0),
}

HEAD = """\
# Full Scale

% Generated by tools/full_scale.py from data/pretrained/*/run.json: change those, and run `make full-scale`.

The chapters train small models in a minute. This page lists longer runs, most of them on the papers' data: how long each run took and on what
hardware, its score, and samples from the course of its training. Each of our numbers is read from the *record* that the run wrote when it
finished, `data/pretrained/<run>/run.json`. The numbers of other people are quoted.

{hardware} The tables say how far each score is from the paper's, and the text says why.
Larger models, the papers' sizes among them, are ready as named runs ({{ref}}`the last section <full-scale-waiting>`).

Unless a table says otherwise, scores are in bits/dim on test data, lower is better, and ± is the standard error over the test data. Compare only scores of the same kind:

- A flow's score is a *one-draw bound*. Where a table says *10 draws*, the score is the average over ten draws of the noise: an estimate of the same bound, with less error.
- An *importance-weighted bound* with 8 draws is minus the log of the mean of $p$ over 8 draws. On average it is tighter than the one-draw bound, and so a smaller number ({{doc}}`chapter 2 <02_dequantization>`).
- The U-Net's score is an exact probability, without noise.

An *update* is one step of the optimizer.
"""

USE = """\
## Load a trained model

These runs ship with their model: {shipped}. Each model has at most 4 MiB, in half precision. Half precision changed no score by as much as 0.01 bits/dim.
A shipped model loads and samples on a laptop in seconds, and the chapters load it like this:

```python
from nflows_lib.experiments import runs

flow = runs.load_flow("glow-mnist")
images = flow.sample(16, temperature=0.8)  # (16, 1, 28, 28), integers from 0 to 255
```

You can also sample and evaluate from a terminal. `evaluate` needs the data, and `data/README.md` says where they come from; `sample` needs data only for a conditional model.

```sh
python -m nflows_lib sample glow-mnist --n 60 --to samples.png
python -m nflows_lib evaluate glow-mnist --draws 10
```
"""

TEN_MINUTES = """\
(full-scale-ten-minutes)=
## Three runs for ten minutes of one GPU

Three runs are made for nine minutes of one H100 or H200: {models}. `mixture-cifar10-10min` is `glow-cifar10-10min` with a mixture coupling at the end of each scale ({{doc}}`chapter 7 <07_after_glow>`).
`data/pretrained/README.md` gives the arithmetic behind their sizes and the trials on a CPU behind their settings.

```{{list-table}} The runs and the scores that they aim for, in bits/dim on the test images; lower is better.
:name: tab-full-scale-ten-minutes
:header-rows: 1
:widths: 38 27 35

* - model
  - bits/dim
  - how
{rows}
```

{pictures}\
"""

# The results that these runs aim for; on MNIST an importance-weighted bound.
MARKS: dict[str, list[tuple[str, str, str]]] = {
    "glow-cifar10-10min": [
        (
            "Glow in PyTorch {cite:p}`chute2018glow`",
            "3.63",
            "on validation images, 10 epochs of 30 minutes on two 1080 Ti: 10 GPU-hours",
        ),
        OTHERS["cifar10"][0],
        OTHERS["cifar10"][2],
    ],
    "mixture-cifar10-10min": [],
    "glow-mnist-10min": [
        (
            "RealNVP in PyTorch with learned noise and several scales, the UvA course {cite:p}`lippe2022tutorial`",
            f"{TUTORIAL:.3f}",
            f"200 epochs, {WEIGHTED}",
        )
    ],
}

TAIL = """\
(full-scale-waiting)=
## Larger runs, and several GPUs

These runs have no record yet. A run trains for its default budget unless you give another. The default budgets are only a start: the papers trained for days.

```{{list-table}} Runs without a record.
:name: tab-full-scale-waiting
:header-rows: 1

* - run
  - what it is
  - parameters
  - default budget
  - the paper's bits/dim
{waiting}
```

One command starts a run, and the same command continues a run that was stopped:

```sh
python -m nflows_lib train glow-cifar10 --budget 25m --out DIR --resume
```

A budget is a time, so another machine makes another number of updates in it ({{doc}}`running`). To repeat a run of this page, replace `--budget` by `--steps` with the number of updates of this run.

On several GPUs, run the same command under `torchrun` ({{doc}}`running`). Each process then holds the whole flow and takes its share of every batch:

- The batch is as large as with one process, 64 images for most runs, so each of four GPUs gets 16 images. The number of processes must divide the batch size, and a run must continue with as many processes as it began with.
- The first process sets the ActNorms from the whole first batch and sends its parameters to the others, so that all processes start alike. (In some other implementations each replica sets its ActNorms from its own share of the batch.)
- Batch norms use the statistics of the whole batch, gradients are averaged, and each process draws its own noise.
- One process evaluates and writes.
- No run is compiled under `torchrun`, and `--compile` is refused.

The test suite runs two processes on the CPU and compares the results. For a small conditional flow without noise, losses and parameters are those of one process on the
joint batch, up to the last digits. A Glow that was stopped and continued ends with the same parameters as a Glow that was not stopped.

When a run ends, its folder holds the record, the model, samples, and a sheet of samples from several points of training, like the sheets on this page.
`data/pretrained/README.md` says how to ship the run.
"""


def number(value: float) -> str:
    """A count in words that a table can hold."""
    return f"{value / 1e6:.1f} million" if value >= 999_500 else f"{value / 1e3:.0f} thousand"


def figure(record: dict[str, Any]) -> str:
    return f"{record['figure']['bits_per_dim']:.3f} ± {record['figure']['error']:.3f}"


def machine(record: dict[str, Any]) -> str:
    return "one CPU thread" if record["hardware"] == "1 CPU thread" else record["hardware"]


@cache
def parameters(name: str) -> int:
    """Of a run's model."""
    return sum(parameter.numel() for parameter in runs.build(table.RUNS[name]).parameters())


def epochs(record: dict[str, Any]) -> float:
    """How often a run has seen each of its images."""
    return record["steps"] * record["settings"]["batch_size"] / record["settings"]["examples"]


def how(record: dict[str, Any]) -> str:
    """Parameters, length, draws where there is noise, time and hardware of one run."""
    often = f" ({epochs(record):.1f} epochs)" if "examples" in record["settings"] else ""
    count = record["figure"]["draws"]
    noise = "" if record["run"].startswith("unet") else f"{count} {'draws' if count > 1 else 'draw'}, "
    return (
        f"{number(record['parameters'])} parameters, {record['steps']:,} updates of {record['settings']['batch_size']} "
        f"images{often}, {noise}{record['minutes']:.0f} minutes on {machine(record)}"
    )


def row(*cells: str) -> str:
    return "* - " + "\n  - ".join(cells)


def away(figure: dict[str, float], other: float, digits: int = 2, unit: str = "") -> str:
    """How far one result is from another."""
    difference = figure["bits_per_dim"] - other
    return f"{abs(difference):.{digits}f}{unit} {'above' if difference > 0 else 'below'}"


def quoted(name: str) -> str:
    """The result of a run's paper, marked where it is second-hand."""
    value, whose = table.RUNS[name].paper
    return f"{value}" + (" (second-hand)" if "second-hand" in whose else "")


def ours(name: str, record: dict[str, Any]) -> list[str]:
    """The rows of one of our runs: its result, how far this is from the paper's, and how it was reached."""
    paper = table.RUNS[name].paper
    distance = f", {away(record['figure'], paper[0])} the paper's {quoted(name)}" if paper else ""
    rows = [row(f"`{name}`, ours", f"**{figure(record)}**{distance}", how(record))]
    bound = record.get("measured", {})
    if "draws_in_one_bound" in bound:
        value = f"**{bound['bits_per_dim']:.3f} ± {bound['error']:.3f}**"
        weighted = f"importance-weighted bound with {bound['draws_in_one_bound']} draws"
        rows.append(row(f"`{name}`, the same model", value, weighted))
    return rows


def one_run(name: str, record: dict[str, Any], alt: str) -> str:
    """Its picture and its title, and how to repeat it. The numbers stand in the section's table."""
    stages = record.get("stages")
    picture = sheets.STAGES if stages else archive.SAMPLES
    after = (
        f"The rows are samples after {', '.join(f'{step:,}' for step in stages[:-1])} and {stages[-1]:,} updates; "
        "all samples of a column are drawn with the same seed."
        if stages
        else "Samples at the end of training."
    )
    measured = f" Its score was computed again at commit `{record['measured_at']}`." if "measured_at" in record else ""
    given = " All samples are given the same photograph." if table.RUNS[name].context_shape else ""
    return f"""\
```{{figure}} ../data/pretrained/{name}/{picture}
:alt: {alt[0].upper()}{alt[1:]}.
:name: fig-full-scale-{name}
:width: 100%
:class: full-scale

`{name}`: {table.RUNS[name].title}. {after}{given}
```

The run was made at commit `{record["commit"]}`, with seed {record["seed"]} and torch {record["torch"]}.{measured} Its command is

```sh
{record["command"]}
```
"""


def section(key: str, records: dict[str, dict[str, Any]]) -> str:
    title, alts = SECTIONS[key]
    shown = {name: records[name] for name in alts}
    rows = [line for name, record in shown.items() for line in ours(name, record)]
    rows += [row(*cells) for cells in OTHERS.get(key, [])]
    of = "masks" if key == "horses" else "images"
    count = "10,000 " if key in OTHERS else ""
    text = f"""\
```{{list-table}} {title}: bits/dim on the {count}test {of}; lower is better.
:name: tab-full-scale-{key}
:header-rows: 1
:widths: 38 27 35

* - model
  - bits/dim
  - how
{chr(10).join(rows)}
```
"""
    pictures = [one_run(name, record, alts[name]) for name, record in shown.items()]
    return "\n".join([f"## {title}\n", text, REMARKS[key](shown), *pictures])


def ten_minutes(records: dict[str, dict[str, Any]]) -> str:
    """The section on the runs that are made for a lent GPU: what they aim for, and their results where there are records."""
    rows, pictures = [], []
    for name, marks in MARKS.items():
        record = records.get(name)
        if record is None:
            rows.append(row(f"`{name}`", "not run yet", "–"))
        else:
            rows += ours(name, record)
            pictures.append(one_run(name, record, "rows of ten samples from one seed, early in training first"))
        rows += [row(*cells) for cells in marks]
    *models, last = (f"`{name}` ({number(parameters(name))} parameters)" for name in MARKS)
    models = f"{', '.join(models)} and {last}"
    return TEN_MINUTES.format(models=models, rows="\n".join(rows), pictures="\n".join(pictures))


def on_mnist(shown: dict[str, dict[str, Any]]) -> str:
    glow, nice = shown["glow-mnist"], shown["nice-mnist-small"]
    tight = glow["measured"]
    assert tight["draws_in_one_bound"] == TUTORIAL_DRAWS
    return f"""\
**Glow.** Our Glow differs from the paper's in its first layers: a logit with α = 0.0001, and dequantization noise that two couplings learn
({{doc}}`chapter 3 <03_realnvp>`). The logit helps because four pixels of five are black. A density on [0, 1] must put the mass of all black pixels into 1/256 of the
axis; after the logit this interval is wide. In short trials, which left no records, the logit improved the score more than the learned noise did.

The UvA course's scores are importance-weighted bounds, so compare them with the second row of the table. There our Glow is {away(tight, TUTORIAL, 3, " bits/dim")} the course's
best model ({TUTORIAL:.3f}) and {away(tight, TUTORIAL_SIMPLE, 3, " bits/dim")} the course's simplest model ({TUTORIAL_SIMPLE:.3f}).
On its training images our Glow ended at {glow["curve"]["training"][-1]:.3f} bits/dim, about as on the test images. So its size or its training time is the limit, not the number of images.
The papers that quote scores for RealNVP, Glow and FFJORD do not say how many draws of the noise were used: compare these scores with caution.

**NICE.** NICE's couplings have no scale factor, and our NICE has no logit. `nice-mnist-small` scores {nice["figure"]["bits_per_dim"] - glow["figure"]["bits_per_dim"]:.1f} bits/dim worse than `glow-mnist`.
The two NICE models were trained with different budgets, threads and weight decay, so the order of their scores is not an effect of size alone.
"""


def on_cifar10(shown: dict[str, dict[str, Any]]) -> str:
    glow, scales = shown["glow-cifar10-bounded"], shown["realnvp-cifar10-scales"]
    return f"""\
**Glow.** Two things keep `glow-cifar10-bounded` from the paper's score. It has 1/{parameters("glow-cifar10") / glow["parameters"]:.0f} of the parameters of the paper's model, and its training was
short: the other people's Glows in the table trained for days on GPUs.

**RealNVP.** After {epochs(scales):.1f} epochs `realnvp-cifar10-scales` is {away(scales["figure"], REMAKE, 2, " bits/dim")} the best of the PyTorch project's 25 epochs ({REMAKE:.2f}, on validation images).

{held_out(shown)}
The black square in the second row of {{numref}}`fig-full-scale-glow-cifar10-small` shows values of a sample that were not finite: the couplings of that model can divide by
almost nothing. The couplings of `glow-cifar10-bounded` cannot ({{ref}}`chapter 5 <sec-scale>`).

{same_conditions()}
"""


def same_conditions() -> str:
    """The table of the runs with and without mixtures, each trained in 45 minutes of one thread."""
    found = {label: archive.read_json(path) for label, path in SAME_CONDITIONS.items()}
    rows = [row(label, figure(record), how(record)) for label, record in found.items()]
    glow, mixture = (record["figure"]["bits_per_dim"] for record in found.values())
    gain = glow - mixture
    return f"""\
**A mixture coupling.** Two runs were trained under the same conditions: at the same time on one machine, one thread each, float32 networks, and no AVX-512 instructions (`data/pretrained/README.md` says how).
So the first row is not the run of {{numref}}`tab-full-scale-cifar10`, which had another processor and made three times as many updates. The two models have as many parameters, but `mixture-cifar10-small` has twice the steps, smaller batches and a higher rate as well as the mixtures.
It was meant to score 0.05 bits/dim better, and scores {gain:.4f} better. {{doc}}`Chapter 7 <07_after_glow>` explains the mixture and this result.

```{{list-table}} Two runs on CIFAR-10 under the same conditions: bits/dim on the 10,000 test images; lower is better.
:name: tab-full-scale-mixture
:header-rows: 1
:widths: 38 27 35

* - model
  - bits/dim
  - how
{chr(10).join(rows)}
```
"""


def held_out(shown: dict[str, dict[str, Any]]) -> str:
    """The runs on CIFAR-10 at the same time and after as many updates, by the images that each of them held out."""
    names = ["realnvp-cifar10-scales", "glow-cifar10-small", "glow-cifar10-bounded"]
    scales, *glows = (shown[name] for name in names)
    minutes, images = scales["minutes"], 50_000 - scales["settings"]["examples"]

    def nearest(record: dict[str, Any], updates: int) -> tuple[int, float, float]:
        return min(record["curve"]["held_out"], key=lambda point: abs(point[0] - updates))

    rows = []
    for name in names:
        record = shown[name]
        pace = record["minutes"] / record["steps"]
        in_time = [value for step, value, _ in record["curve"]["held_out"] if step * pace <= minutes]
        cells = [f"{in_time[-1]:.3f}"]
        for updates in EQUAL_UPDATES:
            step, value, _ = nearest(record, updates)
            close = abs(step - updates) < 0.05 * updates
            cells.append(f"{value:.3f} after {step:,}" if close else "–")
        rows.append(row(f"`{name}`", *cells))
    values = [[nearest(glow, updates)[1] for glow in glows] for updates in EQUAL_UPDATES]
    gap = max(abs(one - other) for one, other in values)
    headings = "\n  - ".join(f"near {updates:,} updates" for updates in EQUAL_UPDATES)
    return f"""\
**At equal cost.** The runs differ in their time and in their number of updates. The next table compares three of them after the same time and after about as many updates.

```{{list-table}} Bits/dim of {images} training images that each run held out, at equal time and at equal numbers of updates; lower is better.
:name: tab-full-scale-equal
:header-rows: 1

* - run
  - after {minutes:.0f} minutes
  - {headings}
{chr(10).join(rows)}
```

After about as many updates the two Glows differ by {gap:.3f} bits/dim at most. Both are scored on the same images, and no record holds the standard error of their difference.
So do not read the order of their final scores as an effect of the bounded scale factor: each is one run, and `glow-cifar10-bounded` made more updates.
"""


def on_flowers(shown: dict[str, dict[str, Any]]) -> str:
    return """\
The set holds about four thousand photographs of five kinds of flower, and nobody has published where they come from. So the score cannot be compared with other people's;
it is here for readers who train on the same folder. The run on Flowers-102 itself, `glow-flowers`, waits for a GPU. At 64×64 a flow of this size learns colours and
textures, but not a whole flower.
"""


def on_horses(shown: dict[str, dict[str, Any]]) -> str:
    return f"""\
The masks are binary, so these scores are small. No split of the set is published, so the scores cannot be compared with other people's.

{masks()}"""


def masks() -> str:
    """How good the masks of three models are, by every measure, over the seeds of each run."""
    records = {label: archive.load_seeds(name) for label, name in HORSES.items()}
    first = records["c-Glow"][0]
    images, error = first["figure"]["images"], first["measured"]["iou_error"]
    few, most = first["measured"]["samples"], first["measured"]["most"]
    early = records["U-Net, early"]
    rows = [
        row("parameters", *(f"{found[0]['parameters']:,}" for found in records.values())),
        row(
            "updates of each seed",
            *(", ".join(f"{record['steps']:,}" for record in found) for found in records.values()),
        ),
        row(
            "minutes of each seed",
            *(", ".join(f"{record['minutes']:.0f}" for record in found) for found in records.values()),
        ),
    ]
    for name, (part, key, digits) in MASKS.items():
        cells = []
        for found in records.values():
            values = [record[part][key] for record in found]
            cells.append(f"{statistics.mean(values):,.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        rows.append(row(name.format(few=few, most=most), *cells))
    return f"""\
**Masks.** How good are the masks as predictions? The next table compares three models over {len(early)} seeds: *c-Glow* is `{HORSES["c-Glow"]}`, *U-Net* is
`{HORSES["U-Net"]}`, and *U-Net, early* is `{HORSES["U-Net, early"]}`, the same U-Net stopped after three minutes, about where its held-out score was best (commit
`{early[0]["commit"]}`, `{early[0]["command"]}`). The table has these measures:

- *bits/dim*: as in the first table of this section; lower is better.
- *importance-weighted bound*: minus the log of the mean likelihood over {most} draws of the noise, in bits/dim; lower is better. The U-Nets have no noise, so their two rows agree.
- *IoU* (intersection over union): the number of pixels that are horse in both masks, divided by the number that are horse in at least one, averaged over the {images} test horses. Higher is better. The average of several draws counts a pixel as horse where it exceeds 1/2. A U-Net predicts its average without draws, so three of its rows agree.
- *IoU of two draws*: the IoU of two draws for the same photograph. A value of 1 means that all draws are alike.
- *coverage of the 80 % interval*: the share of test horses whose true area lies between the 10 % and the 90 % quantile of the areas of {most} draws. The area is the number of horse pixels. A calibrated model has 0.8.
- *calibration error*: pixels are sorted into ten bins by the model's probability of horse. The error is the distance between a bin's mean probability and its share of horse pixels, averaged over all pixels. Lower is better.
- *context advantage*: by how many nats a mask is likelier given its own photograph than given another one, averaged over the test horses. The number grows with the model's confidence, so a larger one need not mean a better model.

```{{list-table}} Masks of the {images} test horses: mean ± standard deviation over {len(early)} seeds.
:name: tab-full-scale-masks
:header-rows: 1
:widths: 31 23 23 23

* - measure
  - {f"{chr(10)}  - ".join(records)}
{chr(10).join(rows)}
```

An IoU of one run has a standard error of {error:.3f} over the {images} horses (c-Glow, seed {first["seed"]}). {{doc}}`Chapter 6 <06_cglow>` says what each model is good for.
"""


REMARKS = {"mnist": on_mnist, "cifar10": on_cifar10, "flowers": on_flowers, "horses": on_horses}


def all_records() -> dict[str, dict[str, Any]]:
    """The records of the shipped runs, in the order of the table."""
    return {name: archive.load(name) for name in table.RUNS if (archive.folder(name) / archive.RECORD).exists()}


def page() -> str:
    """The whole page, as it should stand in the file."""
    records = all_records()
    missing = {name for _, alts in SECTIONS.values() for name in alts} - records.keys()
    if missing:
        raise ValueError(f"SECTIONS: expected runs with a record, got {', '.join(sorted(missing))}")
    hardware = sorted({machine(record) for record in records.values()})
    without_gpu = all("CPU" in name for name in hardware)
    waiting = [
        row(
            f"`{name}`",
            run.title,
            number(parameters(name)),
            f"{run.budget / 60:.0f} minutes",
            quoted(name) if run.paper else "–",
        )
        for name, run in table.RUNS.items()
        if name not in records and name not in NOT_SHOWN
    ]
    head = HEAD.format(
        hardware=("No run on this page had a GPU. " if without_gpu else "")
        + f"The runs had {' or '.join(hardware)}, and took {max(r['minutes'] for r in records.values()):.0f} minutes at most."
    )
    shipped = ", ".join(f"`{name}`" for name in records if (archive.folder(name) / archive.MODEL).exists())
    parts = [
        head,
        *(section(key, records) for key in SECTIONS),
        USE.format(shipped=shipped),
        ten_minutes(records),
        TAIL.format(waiting="\n".join(waiting)),
    ]
    return "\n".join(parts)


def queue() -> str:
    """The table of what is next and what has been reached: runs without a record first, the shortest at the top."""
    records = all_records()
    waiting = [name for name in table.RUNS if name not in records and name not in NOT_SHOWN]
    waiting.sort(key=lambda name: table.RUNS[name].budget)
    rows = ["| next | run | budget | to beat | reached | with | kept |", "|:--|:--|:--|:--|:--|:--|:--|"]
    for name in [*waiting, *records]:
        run, record = table.RUNS[name], records.get(name)
        cells = ["–", f"`{name}`", f"{run.budget / 60:.0f} minutes"]
        cells.append(f"{run.paper[0]} ({run.paper[1]})" if run.paper else "–")
        if record is None:
            cells[0] = str(waiting.index(name) + 1)
            cells += ["–", "–", "–"]
        else:
            kept = "record and model" if (archive.folder(name) / archive.MODEL).exists() else "record"
            cells += [figure(record), f"{record['minutes']:.0f} minutes on {machine(record)}", kept]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def readers() -> str:
    """The table of which run reads which data set."""
    rows = ["| data set, as the table of runs names it | runs that read it |", "|---|---|"]
    for word in runs.DATA:
        names = [f"`{name}`" for name, run in table.RUNS.items() if run.data == word]
        rows.append(f"| `{word}` | {', '.join(names)} |")
    return "\n".join(rows)


def with_table(path: Path, content: str) -> str:
    """A file's text with this table between its two marks, which stay.

    Raises:
        ValueError: the file does not have both marks, once each.
    """
    text = path.read_text(encoding="utf-8")
    start, end = "<!-- written by tools/full_scale.py -->", "<!-- end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{path.name}: expected one {start} and, after it, one {end}")
    before, after = text.partition(start)[0], text.partition(end)[2]
    return f"{before}{start}\n\n{content}\n\n{end}{after}"


def everything() -> dict[Path, str]:
    """The texts of all files that this script writes, as they should be."""
    return {PAGE: page(), QUEUE: with_table(QUEUE, queue()), SETS: with_table(SETS, readers())}


if __name__ == "__main__":
    for path, text in everything().items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)} written")
