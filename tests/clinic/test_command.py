"""The doctor on the command line: what it prints, its exit status, and what it says of a target that is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nflows_lib
from nflows_lib import clinic
from nflows_lib.__main__ import main

ROOT = Path(__file__).parents[2]

FLOWS = """
import torch
from torch import nn

from nflows_lib.bijection import Bijection
from nflows_lib.distributions import StandardLogistic
from nflows_lib.flow import Flow
from nflows_lib.models import realnvp_points


class Doubled(Bijection):
    def forward(self, x, context=None):
        return 2 * x, x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return z / 2


class Shifted(nn.Module):
    def forward(self, x, context):
        return x + context, x.new_zeros(len(x))

    def inverse(self, z, context):
        return z - context


class Odd(nn.Module):
    def forward(self, x):
        raise RuntimeError("no forward today")

    def inverse(self, z):
        return z


POINTS = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
NUMBER = 3


def sound():
    return realnvp_points(2, couplings=2).eval(), POINTS


def broken():
    flow, batch = sound()
    return flow.__class__([*flow.chain, Doubled()], flow.base, flow.shape).eval(), batch


def conditional():
    return Shifted().eval(), POINTS, torch.randn(64, 2)


def with_keywords():
    return Shifted().eval(), POINTS, {"context": torch.randn(64, 2), "grad_norms": [1.0, 1.0, 50.0]}


def does_not_run():
    return Odd().eval(), POINTS


def lonely():
    return realnvp_points(2, couplings=2).eval()


def three_things():
    return realnvp_points(2, couplings=2).eval(), POINTS, 3


def unknown_keyword():
    return realnvp_points(2, couplings=2).eval(), POINTS, {"labels": POINTS}


def few():
    return realnvp_points(2, couplings=2).eval(), POINTS[:2]


def raising():
    return {}["the key"]


def stopping():
    raise SystemExit("two\\nlines")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a module of flows."""
    (tmp_path / "own_flows.py").write_text(FLOWS)
    (tmp_path / "does_not_import.py").write_text("import own_flows\n\nraise KeyError('at import')\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_flows", None)


def test_a_sound_flow_gives_status_0(folder, capsys):
    assert main(["doctor", "own_flows:sound"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("64 examples of shape (2,), 2 layers with an inverse, evaluation mode\n✓ finite ")
    assert printed.out.endswith("\nnothing found\n")
    assert printed.err == ""
    assert str(folder) not in sys.path


def test_a_broken_flow_gives_status_1_and_its_picture(folder, capsys):
    assert main(["doctor", "own_flows:broken", "--picture", "layers.png"]) == 1
    printed = capsys.readouterr().out
    assert "✗ log-det" in printed
    assert printed.endswith("picture in layers.png\n")
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "begin"), [("layers.svg", b"<?xml"), ("layers.pdf", b"%PDF")])
def test_a_picture_may_be_of_vectors(folder, monkeypatch, name, begin):
    monkeypatch.setattr(clinic, "doctor", lambda *args, **options: [])
    assert main(["doctor", "own_flows:conditional", "--picture", name]) == 0
    assert (folder / name).read_bytes().startswith(begin)


def test_a_function_may_return_a_context_or_keywords(folder, capsys):
    main(["doctor", "own_flows:conditional"])
    assert "no context was given" not in capsys.readouterr().out
    assert main(["doctor", "own_flows:with_keywords"]) == 1
    printed = capsys.readouterr().out
    assert "no context was given" not in printed
    assert "✗ gradients       the longest gradient is 50 times as long as the median one" in printed


def test_a_file_is_named_by_its_path(folder, monkeypatch):
    monkeypatch.setattr(clinic, "doctor", lambda *args, **options: [])
    (folder / "deep").mkdir()
    (folder / "deep" / "neighbour.py").write_text(FLOWS)
    (folder / "deep" / "another.py").write_text("from neighbour import sound\n")
    assert main(["doctor", f"{Path('deep') / 'another.py'}:sound"]) == 0
    sys.modules.pop("neighbour")


def test_a_test_that_could_not_run_gives_status_1(folder, monkeypatch):
    unable = clinic.Finding(None, "RuntimeError: something", test="finite", why="could not run")
    monkeypatch.setattr(clinic, "doctor", lambda *args, **options: [unable])
    assert main(["doctor", "own_flows:sound"]) == 1
    too_large = clinic.Finding(None, "too many", test="finite", why="too large")
    monkeypatch.setattr(clinic, "doctor", lambda *args, **options: [too_large])
    assert main(["doctor", "own_flows:sound"]) == 0


def test_a_flow_that_does_not_run_has_a_report_and_no_picture(folder, capsys):
    assert main(["doctor", "own_flows:does_not_run", "--picture", "layers.png"]) == 1
    printed = capsys.readouterr()
    assert "RuntimeError: no forward today" in printed.out
    assert printed.err == "ValueError: --picture: expected a flow whose forward runs, so there is no picture\n"
    assert not (folder / "layers.png").exists()


def line(text: str) -> str:
    """The place of a line of the module, as a message names it."""
    return f"(own_flows.py, line {FLOWS[: FLOWS.index(text)].count(chr(10)) + 1})"


KINDS = "(flow, batch), (flow, batch, context) or (flow, batch, keywords)"
FORM = "target: expected module:function or path/to/file.py:function, got"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("own_flows", f"{FORM} 'own_flows'"),
        (":sound", f"{FORM} ':sound'"),
        ("own_flows:", f"{FORM} 'own_flows:'"),
        ("no_flows:f", "no_flows cannot be imported: ModuleNotFoundError: No module named 'no_flows'"),
        ("does_not_import:f", "does_not_import cannot be imported: KeyError: 'at import' (does_not_import.py, line 3)"),
        ("no/where.py:f", "target: expected a file that exists, got 'no/where.py'"),
        ("own_flows:glow", "target: expected a function of own_flows, which has nothing called 'glow'"),
        ("own_flows:NUMBER", "target: expected a function, got 'NUMBER' of own_flows, of type int"),
        ("own_flows:lonely", f"own_flows:lonely: expected it to return {KINDS}, got Flow"),
        ("own_flows:three_things", f"own_flows:three_things: expected it to return {KINDS}, got (Flow, Tensor, int)"),
        (
            "own_flows:unknown_keyword",
            "own_flows:unknown_keyword: expected keywords among context, base, grad_norms, report, got 'labels'",
        ),
        ("own_flows:few", "batch: expected a tensor (B, ...) of at least 8 examples, got (2, 2)"),
        ("own_flows:raising", f"own_flows:raising raised KeyError: 'the key' {line('return {}')}"),
        ("own_flows:stopping", f"own_flows:stopping raised SystemExit: two lines {line('raise SystemExit')}"),
    ],
)
def test_a_target_that_is_none_is_named_in_one_line(folder, capsys, target, message):
    assert main(["doctor", target]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"ValueError: {message}\n"
    assert printed.out == ""


def test_a_picture_of_another_format_is_refused(folder, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "own_flows:sound", "--picture", "layers.jpg"])
    assert caught.value.code == 2
    message = "argument --picture: expected a file name in .png, .pdf, .svg, got 'layers.jpg'"
    assert message in capsys.readouterr().err


def test_help_needs_no_torch(folder):
    """The command imports torch when it runs, so help answers at once."""
    script = (
        "import sys\nfrom nflows_lib.__main__ import main\n"
        "try:\n    main(['doctor', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "MODULE:FUNCTION" in done.stdout


def test_the_package_has_the_doctor_and_its_check():
    assert nflows_lib.check_flow is clinic.check_flow
    assert nflows_lib.doctor is clinic.doctor
    with pytest.raises(AttributeError, match="has no attribute 'layer_picture'"):
        _ = nflows_lib.layer_picture
