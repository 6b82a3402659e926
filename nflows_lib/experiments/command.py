"""The command line: ``python -m nflows_lib train nice-digits --budget 30s``, and ``doctor`` for a flow of your own.

A command imports what it needs when it runs, so that help, the list of runs and a wrong argument answer at once.
"""

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nflows_lib.experiments import archive, table


def seconds(text: str) -> float:
    """The seconds of a time such as 90s, 30m or 1.5h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 30m or 1.5h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def length(text: str) -> float:
    """The seconds of a time above 0 and up to a year."""
    if not seconds(text) > 0:
        raise argparse.ArgumentTypeError(f"expected a time above 0, got {text!r}")
    if seconds(text) > table.YEAR:
        raise argparse.ArgumentTypeError(f"expected a time up to a year, {table.YEAR // 3600}h, got {text!r}")
    return seconds(text)


def count(text: str, most: int) -> int:
    """The whole number from 1 to ``most`` that a text spells."""
    if not text.isdecimal() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    if len(text) > 20 or int(text) > most:
        raise argparse.ArgumentTypeError(f"expected at most {most:,}, got {text!r}")
    return int(text)


def factor(text: str) -> float:
    """The finite number, at least 0, that a text spells."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text!r}")
    return value


def picture(text: str, suffixes: Sequence[str]) -> Path:
    """The path of a picture to write: its suffix names one of the formats, and its folder exists."""
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        raise argparse.ArgumentTypeError(f"expected a file name in {', '.join(suffixes)}, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status.

    The status is 0, or 1 after a printed error, 130 if the run was stopped, or 141 if nobody reads the output.
    """
    options = _parser().parse_args(argv)
    try:
        status = options.command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of the output, for example head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 128 + 13
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _train(options: argparse.Namespace) -> int:
    from nflows_lib.experiments import processes, runs, trainer
    from nflows_lib.training import NonFiniteLoss

    try:
        runs.train(
            options.run,
            options.out,
            data_folder=options.data,
            steps=options.steps,
            budget=options.budget,
            draws=options.draws,
            save_every=options.save_every,
            resume=options.resume,
            compiled=options.compile,
            download=options.download,
        )
    except trainer.Interrupted as stopped:
        again = ["-m", "nflows_lib", "train", options.run, "--resume"]
        for name in ("data", "out"):
            again += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
        if processes.rank() == 0:
            command = f"{processes.launcher()} {shlex.join(again)}"
            print(f"\n{stopped}, and saved.\nTo go on: {command}", file=sys.stderr)
        return 130
    except NonFiniteLoss as error:
        print(f"NonFiniteLoss: {error}", file=sys.stderr)
        return 1
    if processes.rank() == 0:
        out = options.out or archive.work_folder(options.run)
        record = archive.read_json(out / archive.RECORD, "figure")
        print(f"{record['steps']:,} steps in {record['minutes']:.1f} minutes on {record['hardware']}")
        print(_figure(record["figure"]))
        print(f"model, record and samples are in {out}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from nflows_lib import settings
    from nflows_lib.experiments import runs

    flow = runs.load_flow(options.run, options.out, settings.device(prefer_gpu=True))
    images = runs.images_of(table.find(options.run), "test", options.data, download=options.download)
    print(_figure(runs.evaluate(flow, images, options.draws)))
    if options.record:
        out = options.out or archive.folder(options.run)
        print(json.dumps(runs.measure_again(options.run, out, options.data), indent=1))
    return 0


def _sample(options: argparse.Namespace) -> int:
    from nflows_lib import settings
    from nflows_lib.experiments import runs, sheets

    flow = runs.load_flow(options.run, options.out, settings.device(prefer_gpu=True))
    run = table.find(options.run)
    contexts = runs.images_of(run, "test", options.data).contexts if run.context_shape else None
    sheets.save_samples(flow, run.shape, options.to, options.n, options.temperature, contexts)
    print(f"{options.n} samples in {options.to}")
    return 0


def _runs(options: argparse.Namespace) -> int:
    for name, run in table.RUNS.items():
        paper = f"{run.paper[0]} bits/dim ({run.paper[1]})" if run.paper else "no result to compare with"
        reached = "no record yet"
        if archive.is_recorded(name):
            figure = archive.load(name, "figure")["figure"]
            reached = f"{figure['bits_per_dim']:.3f} ± {figure['error']:.3f} bits/dim"
        budget = f"{run.budget / 60:g} minutes"
        print(f"{name}\n    {run.title}\n    budget: {budget}\n    paper: {paper}\n    reached: {reached}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from nflows_lib import clinic
    from nflows_lib.clinic import own, registry

    flow, batch, keywords = own.flow_and_batch(options.target)
    findings = clinic.doctor(flow, batch, **keywords)
    wrong = any(finding.passed is False or finding.why == registry.COULD_NOT_RUN for finding in findings)
    if options.picture is not None:
        sys.stdout.flush()
        if any(finding.test == "it runs" for finding in findings):
            raise ValueError("--picture: expected a flow whose forward runs, so there is no picture")
        given = {name: keywords[name] for name in ("context", "base") if name in keywords}
        clinic.layer_picture(flow, batch, **given).savefig(options.picture)
        print(f"picture in {options.picture}")
    return int(wrong)


def _figure(figure: dict[str, float]) -> str:
    return (
        f"test: {figure['bits_per_dim']:.4f} ± {figure['error']:.4f} bits/dim, {figure['nats']:.1f} nats on [0, 1); "
        f"{figure['images']:,} images, {figure['draws']} draws of the noise per image"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nflows_lib",
        description="Train, evaluate and sample the named runs, or examine a flow of your own.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(commands, "train", "train a run, or resume one")
    either = train.add_mutually_exclusive_group()
    either.add_argument(
        "--budget",
        type=length,
        metavar="TIME",
        help="the time for the whole run, evaluation included, as 90s, 30m or 1.5h (default: the table's budget)",
    )
    either.add_argument(
        "--steps", type=partial(count, most=10**9), metavar="N", help="the number of updates, instead of a budget"
    )
    train.add_argument(
        "--save-every",
        type=seconds,
        default=60.0,
        metavar="TIME",
        help="the time between two checkpoints (default: 60s)",
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the run's folder, if it has one"
    )
    train.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile, which makes the first step slow and the others faster, or do not use it (default: use "
        "it if there is a compiler and the budget is above ten minutes, on a CPU also above two seconds per parameter "
        "tensor; a resumed run does what it did before)",
    )
    train.set_defaults(command=_train)
    evaluate = _command(commands, "evaluate", "print a run's bits/dim on the test images")
    evaluate.add_argument(
        "--record",
        action="store_true",
        help="also measure the run's further metrics again, and write them to its run.json",
    )
    evaluate.set_defaults(command=_evaluate)
    sample = _command(commands, "sample", "draw a run's samples into a PNG")
    sample.add_argument(
        "--n", type=partial(count, most=10_000), default=60, metavar="N", help="the number of samples (default: 60)"
    )
    sample.add_argument(
        "--temperature", type=factor, default=1.0, metavar="T", help="multiply the latents by T (default: 1)"
    )
    sample.add_argument(
        "--to",
        type=partial(picture, suffixes=archive.PICTURES),
        default=Path("samples.png"),
        metavar="FILE",
        help="the PNG to write (default: samples.png)",
    )
    sample.set_defaults(command=_sample)
    for command in (train, evaluate, sample):
        command.add_argument(
            "--data",
            type=Path,
            metavar="DIR",
            help="the folder that holds the data sets (default: NFLOWS_DATA, else data/)",
        )
    for command in (train, evaluate):
        command.add_argument(
            "--download",
            action="store_true",
            help="first fetch the data set into that folder, if it is missing and torchvision can fetch it",
        )
        command.add_argument(
            "--draws",
            type=partial(count, most=10_000),
            metavar="N",
            help="the number of draws of the noise that each image's log-likelihood averages over (default: the "
            "number beyond which the standard error would shrink by less than 1 %%, at most 10)",
        )
    for command in (train, evaluate, sample):
        command.add_argument("run", choices=table.RUNS, metavar="RUN", help=f"one of {', '.join(table.RUNS)}")
    work = (
        "the run's folder, which gets the model, the record and the samples (default: runs/RUN next to the data sets)"
    )
    train.add_argument("--out", type=Path, metavar="DIR", help=work)
    for command in (evaluate, sample):
        command.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: the shipped run's)")
    _command(commands, "runs", "list the runs, with their budgets and results").set_defaults(command=_runs)
    doctor = _command(
        commands, "doctor", "examine a flow of your own; the exit status is 1 if a test failed or could not run"
    )
    doctor.add_argument(
        "--picture",
        type=partial(picture, suffixes=(".png", ".pdf", ".svg")),
        metavar="FILE",
        help="also draw each layer's errors and its log-scales into this file",
    )
    doctor.add_argument(
        "target",
        metavar="MODULE:FUNCTION",
        help="a function without arguments, as my_flow:example or path/to/my_flow.py:example, that returns "
        "(flow, batch), (flow, batch, context), or (flow, batch, keywords) with a dict of nflows_lib.doctor's keywords",
    )
    doctor.set_defaults(command=_doctor)
    return parser


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A command's parser: its text stands in the list of commands and at the head of its own help."""
    return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
