"""Named runs from the command line to their records: written whole, read back, described by themselves."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from nflows_lib import checkpoint, data, runs, training
from nflows_lib.__main__ import main


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return tmp_path


def test_a_record_comes_back_with_where_it_was_made(root, monkeypatch):
    monkeypatch.setenv("NFLOWS_SEED", "2")
    runs.save("small", {"nats": 1.5, "curve": [1.0, 2.0]})
    record = runs.load("small")
    assert record["nats"] == 1.5
    assert record["curve"] == [1.0, 2.0]
    assert record["run"] == "small"
    assert record["seed"] == 2000
    assert record["torch"] == torch.__version__
    assert record["commit"] == runs.COMMIT
    assert os.listdir(runs.folder("small")) == ["run.json"]


def test_a_failed_write_keeps_the_record_there_is(root, monkeypatch):
    runs.save("small", {"nats": 1.5})

    def disk_full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(runs.os, "replace", disk_full)
    with pytest.raises(OSError, match="no space left"):
        runs.save("small", {"nats": 2.5})
    assert runs.load("small")["nats"] == 1.5


def test_an_unknown_run_is_refused_by_name(root):
    with pytest.raises(ValueError, match=r"run: expected one of \(no record yet\), got 'large'"):
        runs.load("large")
    runs.save("small", {})
    with pytest.raises(ValueError, match="run: expected one of small, got 'large'"):
        runs.load("large")


def test_the_shipped_records_say_what_made_them():
    found = sorted((runs.ROOT / "data" / "pretrained").glob("*/run.json"))
    assert found
    for path in found:
        record = json.loads(path.read_text())
        assert record.keys() >= {"command", "commit", "seed", "python", "torch", "hardware", "minutes", "parameters"}
        assert record["run"] == path.parent.name
        assert not record["commit"].endswith("-dirty")


# --- the command line -------------------------------------------------------------------------------------------------

NAME = "nice-digits"
STEPS = 120


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run, made by the command line."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", NAME, "--steps", str(STEPS), "--draws", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def record(trained) -> dict:
    return json.loads((trained / "run.json").read_text())


def shown(figure: dict) -> str:
    return f"test: {figure['bits_per_dim']:.4f} ± {figure['error']:.4f} bits/dim, {figure['nats']:.1f} nats"


def test_the_record_of_a_run_says_what_it_was(record):
    assert record["run"] == NAME
    assert record["command"] == f"python -m nflows_lib train {NAME} --steps {STEPS}"  # no folders in it
    assert record["commit"] == runs.COMMIT
    assert record["seed"] == 0
    assert record["torch"] == torch.__version__
    assert record.keys() >= {"python", "hardware", "title"}
    assert record["parameters"] == sum(p.numel() for p in runs.find(NAME).model().parameters())
    assert record["steps"] == STEPS
    assert 0 < record["minutes"] < 5
    assert record["settings"]["batch_size"] == 128
    assert record["settings"]["examples"] == len(data.digits("train").images) - runs.find(NAME).held_out
    assert [group["lr"] for group in record["settings"]["optimizer"][1]] == [5e-3, 1e-2]  # not the schedule's last


def test_the_figure_of_a_run_is_in_bits_and_in_nats(record):
    figure = record["figure"]
    assert figure.keys() == {"bits_per_dim", "error", "images", "draws", "nats"}
    assert figure["images"] == len(data.digits("test").images)
    assert figure["draws"] == 2
    assert 0 < figure["error"] < 0.1
    assert 2 < figure["bits_per_dim"] < record["curve"]["training"][0]
    assert figure["nats"] == pytest.approx(64 * math.log(2) * (math.log2(17) - figure["bits_per_dim"]), abs=1e-3)
    assert record["figure_in_half_precision"]["bits_per_dim"] == pytest.approx(figure["bits_per_dim"], abs=0.01)


def test_the_curve_of_a_run_is_in_bits(record):
    curve = record["curve"]
    assert len(curve["step"]) == len(curve["training"]) == STEPS / 2  # at most 100 points
    assert curve["step"][-1] == STEPS
    assert curve["training"][-1] < curve["training"][0]
    assert [step for step, _, _ in curve["held_out"]] == list(range(6, STEPS + 1, 6))
    assert curve["held_out"][-1][1] == pytest.approx(record["figure"]["bits_per_dim"], abs=0.1)


def test_a_run_leaves_a_model_and_samples(trained):
    found = sorted(os.listdir(trained))
    steps = [f"samples-{step:07d}.png" for step in range(6, STEPS + 1, 6)]
    expected = ["run.json", "model.safetensors", "samples.png", training.CHECKPOINT, *steps]
    assert found == sorted(expected)
    tensors, facts = checkpoint.load(trained / "model.safetensors")
    assert facts == {"run": NAME}
    assert {tensor.dtype for tensor in tensors.values() if tensor.dim() == 2} == {torch.float16}
    assert plt.imread(trained / "samples.png").shape[:2] == (6 * 9 + 1, 10 * 9 + 1)


def test_evaluate_gives_the_figure_of_the_record(trained, record, capsys):
    assert main(["evaluate", NAME, "--draws", "2", "--out", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(shown(record["figure_in_half_precision"]))  # of the model as it is stored
    assert "2 draws of the noise" in printed


def test_a_run_without_model_is_evaluated_in_full_precision_from_its_checkpoint(trained, record, tmp_path, capsys):
    (tmp_path / training.CHECKPOINT).write_bytes((trained / training.CHECKPOINT).read_bytes())
    assert main(["evaluate", NAME, "--draws", "2", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(shown(record["figure"]))  # the average's, not the last parameters'


def test_sample_draws_as_many_as_asked_for(trained, tmp_path, capsys):
    target = tmp_path / "some.png"
    assert main(["sample", NAME, "--n", "25", "--out", str(trained), "--to", str(target)]) == 0
    assert plt.imread(target).shape[:2] == (3 * 9 + 1, 10 * 9 + 1)
    assert str(target) in capsys.readouterr().out
    again = tmp_path / "again.png"
    assert main(["sample", NAME, "--n", "25", "--out", str(trained), "--to", str(again)]) == 0
    assert again.read_bytes() == target.read_bytes()
    cold = ["sample", NAME, "--n", "25", "--temperature", "0.1", "--out", str(trained), "--to", str(again)]
    assert main(cold) == 0
    assert again.read_bytes() != target.read_bytes()


def test_runs_lists_every_run(capsys):
    assert main(["runs"]) == 0
    printed = capsys.readouterr().out
    for name, run in runs.RUNS.items():
        assert f"{name}\n    {run.title}" in printed
        assert run.paper is None or str(run.paper[0]) in printed


@pytest.mark.parametrize("command", ["train", "evaluate", "sample"])
def test_an_unknown_run_is_refused_with_the_names_there_are(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "nice-letters"])
    assert caught.value.code != 0
    said = capsys.readouterr().err
    assert "nice-letters" in said
    assert all(name in said for name in runs.RUNS)
    with pytest.raises(ValueError, match=r"run: expected one of nice-digits, .*, got 'nice-letters'"):
        runs.train("nice-letters")


@pytest.mark.parametrize("arguments", [["--budget", "30"], ["--budget", "-5s"], ["--save-every", "1d"]])
def test_a_time_that_is_none_is_refused(arguments, tmp_path, capsys):
    option, text = arguments
    try:
        code = main(["train", NAME, f"{option}={text}", "--out", str(tmp_path)])
    except SystemExit as exit:
        code = exit.code
    assert code not in (0, None)
    assert f"expected a time such as 90s, 30m or 1.5h, got '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "ValueError: steps: expected at least 1, got 0"),
        (["--budget", "0s"], "ValueError: budget: expected seconds above 0, got 0.0"),
        (["--steps", "100", "--budget", "1m"], "ValueError: steps, budget: expected one of them, got 100 and 60.0"),
    ],
)
def test_a_length_that_makes_no_sense_is_refused(arguments, message, tmp_path, capsys):
    assert main(["train", NAME, *arguments, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_with_a_run_in_it_is_not_overwritten(trained, capsys):
    before = (trained / training.CHECKPOINT).read_bytes()
    assert main(["train", NAME, "--steps", "100", "--out", str(trained)]) == 1
    assert "ValueError: folder: expected one without a checkpoint, or resume=True" in capsys.readouterr().err
    assert (trained / training.CHECKPOINT).read_bytes() == before


def test_a_folder_that_cannot_be_made_is_an_error_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", NAME, "--steps", "100", "--out", str(tmp_path / "file" / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_without_a_model_is_not_found(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no checkpoint of nice-digits in"):
        runs.load_flow(NAME, tmp_path)
    assert main(["evaluate", NAME, "--out", str(tmp_path)]) == 1
    assert main(["sample", NAME, "--out", str(tmp_path)]) == 1
    assert "FileNotFoundError: no model.safetensors" in capsys.readouterr().err


def test_another_runs_model_is_refused(tmp_path):
    other = runs.find("nice-mnist-small").model()
    checkpoint.save(tmp_path / "model.safetensors", other.state_dict(), {})
    with pytest.raises(checkpoint.CheckpointError, match="nice-digits: another model's"):
        runs.load_flow(NAME, tmp_path)


def test_a_finished_run_resumed_keeps_its_record(trained, record, tmp_path, capsys):
    """Its length is that of the checkpoint, and so are the command and the figure."""
    (tmp_path / training.CHECKPOINT).write_bytes((trained / training.CHECKPOINT).read_bytes())
    assert main(["train", NAME, "--resume", "--draws", "2", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "run.json").read_text())
    assert {**again, "minutes": None} == {**record, "minutes": None}
    model = "model.safetensors"
    assert (tmp_path / model).read_bytes() == (trained / model).read_bytes()


def test_load_flow_gives_a_flow_to_use(trained):
    flow = runs.load_flow(NAME, trained)
    assert not flow.training
    assert next(flow.parameters()).dtype == torch.float32
    assert flow.sample(2).shape == (2, 64)


def test_figures_and_samples_leave_the_random_state_alone_and_do_not_depend_on_it(trained, tmp_path):
    flow = runs.load_flow(NAME, trained)
    images = data.digits("test")
    figures, pictures = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        figures.append(runs.evaluate(flow, images, draws=1))
        runs.save_samples(flow, (1, 8, 8), tmp_path / "new" / "a.png")
        pictures.append((tmp_path / "new" / "a.png").read_bytes())
        assert torch.equal(torch.get_rng_state(), state)
    assert figures[0] == figures[1]
    assert pictures[0] == pictures[1]
