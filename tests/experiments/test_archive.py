"""Tests of records: they are written whole or not at all, and hold their origin."""

from __future__ import annotations

import json
import os

import pytest
import torch

from nflows_lib.experiments import archive


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setattr(archive, "ROOT", tmp_path)
    return tmp_path


def test_a_record_comes_back_with_where_it_was_made(root, monkeypatch):
    monkeypatch.setenv("NFLOWS_SEED", "2")
    archive.save("small", {"nats": 1.5, "curve": [1.0, 2.0]})
    record = archive.load("small")
    assert record["nats"] == 1.5
    assert record["curve"] == [1.0, 2.0]
    assert record["run"] == "small"
    assert record["seed"] == 2000
    assert record["torch"] == torch.__version__
    assert record["commit"] == archive.commit()
    assert os.listdir(archive.folder("small")) == ["run.json"]


def test_a_failed_write_keeps_the_record_there_is(root, monkeypatch):
    archive.save("small", {"nats": 1.5})

    def disk_full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="no space left"):
        archive.save("small", {"nats": 2.5})
    assert archive.load("small")["nats"] == 1.5


def test_an_unknown_run_is_refused_by_name(root):
    with pytest.raises(ValueError, match=r"run: expected one of \(no record yet\), got 'large'"):
        archive.load("large")
    archive.save("small", {})
    with pytest.raises(ValueError, match="run: expected one of small, got 'large'"):
        archive.load("large")


def test_the_shipped_records_say_what_made_them():
    found = sorted((archive.ROOT / "data" / "pretrained").glob("*/run.json"))
    assert found
    for path in found:
        record = json.loads(path.read_text())
        assert record.keys() >= {"command", "commit", "seed", "python", "torch", "hardware", "minutes", "parameters"}
        assert record["run"] == path.parent.name
        assert not record["commit"].endswith("-dirty")


def test_the_records_of_other_seeds_come_after_the_first(root):
    with pytest.raises(ValueError, match=r"run: expected one of \(no record yet\), got 'small'"):
        archive.load_seeds("small")
    archive.save("small", {"nats": 0})
    assert [record["nats"] for record in archive.load_seeds("small")] == [0]
    for seed in (2, 1):
        archive.write_json(archive.folder("small") / f"run-seed-{seed}.json", {"nats": seed})
    assert [record["nats"] for record in archive.load_seeds("small")] == [0, 1, 2]
