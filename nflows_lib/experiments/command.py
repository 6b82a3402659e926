"""The command line of the named runs: ``python -m nflows_lib train nice-digits --budget 30s``."""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

from nflows_lib.experiments import archive, processes, runs, sheets, table, trainer
from nflows_lib.training import NonFiniteLoss


def seconds(text: str) -> float:
    """A time such as 90s, 30m or 1.5h, in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 30m or 1.5h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error that has been printed, 130 for a run that was stopped."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        options.command(options)
    except trainer.Interrupted as stopped:
        again = ["-m", "nflows_lib", "train", options.run, "--resume"]
        for name in ("data", "out"):
            again += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
        again += ["--compile"] if options.compile else []
        if processes.rank() == 0:
            print(f"\n{stopped}, and saved.\nTo go on: {processes.launcher()} {shlex.join(again)}", file=sys.stderr)
        return 130
    except (ValueError, OSError, NonFiniteLoss) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _train(options: argparse.Namespace) -> None:
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
    if processes.rank() > 0:
        return
    out = options.out or archive.work_folder(options.run)
    record = json.loads((out / archive.RECORD).read_text())
    print(f"{record['steps']:,} steps in {record['minutes']:.1f} minutes on {record['hardware']}")
    print(_figure(record["figure"]))
    print(f"model, record and samples are in {out}")


def _evaluate(options: argparse.Namespace) -> None:
    flow = runs.load_flow(options.run, options.out)
    print(_figure(runs.evaluate(flow, runs.images_of(table.find(options.run), "test", options.data), options.draws)))
    if options.record:
        print(
            json.dumps(
                runs.measure_again(options.run, options.out or archive.folder(options.run), options.data), indent=1
            )
        )


def _sample(options: argparse.Namespace) -> None:
    flow = runs.load_flow(options.run, options.out)
    run = table.find(options.run)
    contexts = runs.images_of(run, "test", options.data).contexts if run.context_shape else None
    sheets.save_samples(flow, run.shape, options.to, options.n, options.temperature, contexts)
    print(f"{options.n} samples in {options.to}")


def _runs(options: argparse.Namespace) -> None:
    for name, run in table.RUNS.items():
        paper = f"{run.paper[0]} bits/dim ({run.paper[1]})" if run.paper else "none"
        try:
            figure = archive.load(name)["figure"]
            reached = f"{figure['bits_per_dim']:.3f} ± {figure['error']:.3f} bits/dim"
        except ValueError:
            reached = "no record yet"
        print(f"{name}\n    {run.title}; {run.budget / 60:g} minutes\n    paper: {paper}\n    reached: {reached}")


def _figure(figure: dict[str, float]) -> str:
    return (
        f"test: {figure['bits_per_dim']:.4f} ± {figure['error']:.4f} bits/dim, {figure['nats']:.1f} nats on [0, 1); "
        f"{figure['images']:,} images, {figure['draws']} draws of the noise each"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nflows_lib", description="Train, evaluate, sample the named runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a run, or go on with one")
    train.add_argument(
        "--budget",
        type=seconds,
        metavar="TIME",
        help="time for the whole run, as 90s, 30m, 1.5h (default: the table's)",
    )
    train.add_argument("--steps", type=int, help="number of updates, instead of a budget")
    train.add_argument("--save-every", type=seconds, default=60.0, metavar="TIME", help="between checkpoints (60s)")
    train.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint, if there is one")
    train.add_argument("--compile", action="store_true", help="with torch.compile: a slow start, then faster steps")
    train.set_defaults(command=_train)
    evaluate = commands.add_parser("evaluate", help="bits/dim on the test images")
    evaluate.add_argument("--record", action="store_true", help="measure again what the run measures, into run.json")
    evaluate.set_defaults(command=_evaluate)
    sample = commands.add_parser("sample", help="draw samples into a picture")
    sample.add_argument("--n", type=int, default=60)
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--to", type=Path, default=Path("samples.png"), help="the PNG to write (samples.png)")
    sample.set_defaults(command=_sample)
    for command in (train, evaluate, sample):
        command.add_argument("--data", type=Path, metavar="DIR", help="where the data sets lie (NFLOWS_DATA)")
    for command in (train, evaluate):
        command.add_argument("--draws", type=int, default=10, help="draws of the noise that the figure averages over")
    for command in (train, evaluate, sample):
        command.add_argument("run", choices=table.RUNS, metavar="RUN", help=f"one of {', '.join(table.RUNS)}")
        command.add_argument("--out", type=Path, metavar="DIR", help="the run's folder")
    commands.add_parser("runs", help="list the runs").set_defaults(command=_runs)
    return parser
