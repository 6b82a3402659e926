"""Records of full-scale runs: written whole, read back, described by themselves."""

from __future__ import annotations

import json
import os

import pytest
import torch

from nflows_lib import runs


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
