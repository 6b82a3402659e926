"""The command line of the named runs: ``python -m nflows_lib train nice-digits --budget 30s``.

What a command needs is imported when it runs, so that help, the list of runs and a wrong argument answer at once.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

from nflows_lib.experiments import archive, table


def seconds(text: str) -> float:
    """A time such as 90s, 30m or 1.5h, in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 30m or 1.5h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def length(text: str) -> float:
    """A time above 0, in seconds."""
    if not seconds(text) > 0:
        raise argparse.ArgumentTypeError(f"expected a time above 0, got {text!r}")
    return seconds(text)


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error that has been printed, 130 for a run that was stopped."""
    options = _parser().parse_args(argv)
    try:
        return options.command(options)
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
        )
    except trainer.Interrupted as stopped:
        again = ["-m", "nflows_lib", "train", options.run, "--resume"]
        for name in ("data", "out"):
            again += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
        if processes.rank() == 0:
            print(f"\n{stopped}, and saved.\nTo go on: {processes.launcher()} {shlex.join(again)}", file=sys.stderr)
        return 130
    except NonFiniteLoss as error:
        print(f"NonFiniteLoss: {error}", file=sys.stderr)
        return 1
    if processes.rank() == 0:
        out = options.out or archive.work_folder(options.run)
        record = json.loads((out / archive.RECORD).read_text())
        print(f"{record['steps']:,} steps in {record['minutes']:.1f} minutes on {record['hardware']}")
        print(_figure(record["figure"]))
        print(f"model, record and samples are in {out}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from nflows_lib import settings
    from nflows_lib.experiments import runs

    flow = runs.load_flow(options.run, options.out, settings.device(prefer_gpu=True))
    images = runs.images_of(table.find(options.run), "test", options.data)
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
        paper = f"{run.paper[0]} bits/dim ({run.paper[1]})" if run.paper else "none"
        try:
            figure = archive.load(name)["figure"]
            reached = f"{figure['bits_per_dim']:.3f} ± {figure['error']:.3f} bits/dim"
        except ValueError:
            reached = "no record yet"
        print(f"{name}\n    {run.title}; {run.budget / 60:g} minutes\n    paper: {paper}\n    reached: {reached}")
    return 0


def _figure(figure: dict[str, float]) -> str:
    return (
        f"test: {figure['bits_per_dim']:.4f} ± {figure['error']:.4f} bits/dim, {figure['nats']:.1f} nats on [0, 1); "
        f"{figure['images']:,} images, {figure['draws']} draws of the noise each"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nflows_lib", description="Train, evaluate, sample the named runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a run, or go on with one")
    either = train.add_mutually_exclusive_group()
    either.add_argument(
        "--budget",
        type=length,
        metavar="TIME",
        help="time for the whole run, evaluation included, as 90s, 30m, 1.5h (default: the table's)",
    )
    either.add_argument("--steps", type=count, help="number of updates, instead of a budget")
    train.add_argument("--save-every", type=seconds, default=60.0, metavar="TIME", help="between checkpoints (60s)")
    train.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint, if there is one")
    train.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="with or without torch.compile, which has a slow start, then faster steps (default: with it, if there is "
        "a compiler and the time for the run is longer than ten minutes, on a CPU longer still for a large model; a "
        "resumed run keeps to what it did)",
    )
    train.set_defaults(command=_train)
    evaluate = commands.add_parser("evaluate", help="bits/dim on the test images")
    evaluate.add_argument("--record", action="store_true", help="measure again what the run measures, into run.json")
    evaluate.set_defaults(command=_evaluate)
    sample = commands.add_parser("sample", help="draw samples into a picture")
    sample.add_argument("--n", type=count, default=60, help="how many samples (60)")
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--to", type=Path, default=Path("samples.png"), help="the PNG to write (samples.png)")
    sample.set_defaults(command=_sample)
    for command in (train, evaluate, sample):
        command.add_argument("--data", type=Path, metavar="DIR", help="where the data sets lie (NFLOWS_DATA)")
    for command in (train, evaluate):
        command.add_argument(
            "--draws",
            type=count,
            help="draws of the noise that the figure averages over (default: as few as leave its error what it is)",
        )
    for command in (train, evaluate, sample):
        command.add_argument("run", choices=table.RUNS, metavar="RUN", help=f"one of {', '.join(table.RUNS)}")
        command.add_argument("--out", type=Path, metavar="DIR", help="the run's folder")
    commands.add_parser("runs", help="list the runs").set_defaults(command=_runs)
    return parser
