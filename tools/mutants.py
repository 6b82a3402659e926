r"""Break one line of the library at a time and see whether the tests of its module notice.

``python tools/mutants.py`` tries every break (about an hour), ``python tools/mutants.py 3 7`` tries the third and
the seventh. The tests run in a copy of the working tree, first without a break. If the tests do not notice a break, it
has survived, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds per test file; a break that makes the tests hang is noticed, too

# Three rows per break. The first row names the test files that should notice the break, if necessary the class or
# function that holds the line, and what is wrong. The second row is the line in the library, without its indentation.
# The third row is the line that replaces it.
TABLE = r"""
# test_flow.py: a chain counts the contribution of its last layer alone
- total = total + contribution
+ total = contribution
# test_bijections.py: the output of an image coupling's network is not masked
- return list(parts) if seen.dim() == 2 else [part * ~self.mask for part in parts]
+ return list(parts)
# test_bijections.py: the parities of channel masks are swapped
- return (first == (parity == 0))[:, None, None].repeat(1, *shape[1:])
+ return (first == (parity == 1))[:, None, None].repeat(1, *shape[1:])
# test_bijections.py: the log-determinant of a flow batch norm lacks the factor H W
- log_det = -0.5 * math.prod(x.shape[2:]) * (variance + self.eps).log().sum()
+ log_det = -0.5 * (variance + self.eps).log().sum()
# test_glow.py: the first shift of an ActNorm is not divided by the standard deviation
- layer.bias.copy_(-mean / std)
+ layer.bias.copy_(-mean)
# test_glow.py: the signs of a 1x1 convolution's diagonal are lost
- scale = self.sign * factors.diagonal(dim1=-2, dim2=-1).exp()
+ scale = factors.diagonal(dim1=-2, dim2=-1).exp()
# test_multiscale.py: the log-determinant of a learned prior has the wrong sign
- return torch.cat([eps.flatten(1), inside.flatten(1)], dim=1), log_det - sum_per_example(log_scale)
+ return torch.cat([eps.flatten(1), inside.flatten(1)], dim=1), log_det + sum_per_example(log_scale)
# test_conditional.py: the log-scale from a context is unbounded
- return self.log_scale + log_scale.tanh(), self.bias + bias
+ return self.log_scale + log_scale, self.bias + bias
# test_dequantization.py: noise near 1 is rounded up to the next level
- return torch.minimum(k + eps, torch.nextafter(k + 1, k))
+ return k + eps
# test_distributions.py: a draw from the logistic may be infinite
- return torch.logit(torch.rand_like(like), eps=tail)
+ return torch.logit(torch.rand_like(like))
# test_flow.py: sampling ignores the temperature
- return self.decode(temperature * z, context)
+ return self.decode(z, context)
# test_networks.py in ResNet: residual blocks without their skip connection
- h = h + block(h)
+ h = block(h)
# test_flow.py in nice: the masks of NICE do not alternate
- mask = alternating_mask(dims, i % 2)
+ mask = alternating_mask(dims, 0)
# test_models.py: the networks of RealNVP are equally wide at every scale
- return [*layers, PhaseOrder(shape[0]), FactorOut(shape, from_scale_on(half, left - 1, 2 * width))]
+ return [*layers, PhaseOrder(shape[0]), FactorOut(shape, from_scale_on(half, left - 1, width))]
# test_glow.py in glow: the default width of Glow's networks is half the paper's
- hidden: int = 512,
+ hidden: int = 256,
# test_data.py: test patches are cut from the training part, too
- pixels, step = (pixels[..., :border], 4) if part == "train" else (pixels[..., border:], size)
+ pixels, step = (pixels[..., :border], 4) if part == "train" else (pixels, size)
# test_horses.py: masks are interpolated, and cut to integers
- return seen(masks.float(), "nearest").to(masks.dtype), photographs
+ return seen(masks.float(), "bilinear").to(masks.dtype), photographs
# test_horses.py: photographs that are trained on stay in the test part
- if keep[i] != keep[j]:
+ if keep[i] and keep[j]:
# test_training.py: the learning rate of the first step of a warm-up is 0
- rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
+ rise = min(1.0, step / warmup) if warmup else 1.0
# test_training.py: the moving average takes the weights the wrong way round
- torch._foreach_lerp_(*self.pairs, 1 - kept)
+ torch._foreach_lerp_(*self.pairs, kept)
# test_trainer.py: a checkpoint does not say how much of the shuffle is used up
- "position": self.shuffle.position,
+ "position": 0,
# test_segmentation.py test_runs.py: the mean of p over draws is divided by the number of images
- return log_p.logsumexp(0) - math.log(len(log_p))
+ return log_p.logsumexp(0) - math.log(log_p.shape[-1])
# test_clinic.py: the doctor compares a layer's input with itself
- inputs[name] = args[0], args[0] if args[0].requires_grad else args[0].clone()
+ inputs[name] = args[0], args[0]
# test_clinic.py: the doctor does not see a log-determinant that is infinite
- return bool((record.z.abs() < BEYOND).all() and (record.log_det.abs() < BEYOND).all())
+ return bool((record.z.abs() < BEYOND).all())
# test_clinic.py: the doctor's limit D log n has the wrong sign
- limit, reached = case.dims * math.log(1 / case.spacing), case.data_pass.log_p.mean().item()
+ limit, reached = case.dims * math.log(case.spacing), case.data_pass.log_p.mean().item()
# test_runs.py: a named run trains on its held-out images
- examples[run.held_out :],
+ examples,
# test_checkpoint.py: scales and biases are halved, too
- name: tensor.half() if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor
+ name: tensor.half() if tensor.dtype == torch.float32 else tensor
# test_processes.py: every process takes the first one's share of a batch
- return rows.chunk(world_size())[rank()] if world_size() > 1 else rows
+ return rows.chunk(world_size())[0] if world_size() > 1 else rows
# test_segmentation.py: a probability of 1 has an interval of its own
- which = (p * bins).long().clamp(max=bins - 1)
+ which = (p * bins).long()
# test_export.py: the gain of a coupling is written and not read back
- layer.gain.data.fill_(content["gain"])
+ pass
# test_affine.py: a merged pair forgets to mix the first shift
- matrix, bias = weight @ matrix, (weight @ bias[..., None]).squeeze(-1) + shift
+ matrix, bias = weight @ matrix, bias + shift
# test_affine.py: layers that are watched are merged all the same
- return "as_affine" in vars(definer) and not watched
+ return "as_affine" in vars(definer)
# test_memory.py: a flow that goes back through its inverses forgets the gradient of the log-determinant
- total = (out * gradient).sum() + (log_det * gradient_of_log_det).sum()
+ total = (out * gradient).sum() + 0 * log_det.sum()
# test_control.py: the doctor leaves x.float() in float32
- if function is Tensor.float:
+ if function is Tensor.half:
# test_control.py: the doctor turns float32 into float64 in the test of precision, too
- if torch.get_default_dtype() is torch.float64:
+ if torch.get_default_dtype().is_floating_point:
# test_control.py: the doctor holds noise on another interval at a number of [0, 1)
- drawn.fill_(low + self.level * (high - low))
+ drawn.fill_(self.level)
# test_control.py: the doctor does not put NumPy's random state back
- np.random.set_state(states[1])  # noqa: NPY002
+ np.random.get_state()  # noqa: NPY002
# test_report.py: an error's message is cut only after it is too long
- while words and len(line) + len(words[0]) < 75:
+ while words and len(line) < 75:
# test_report.py: a test that could not run has the sign of one that does not apply
- line = f"{SIGNS[self.why or self.passed]} {self.test:15} {self.measured}"
+ line = f"{SIGNS[self.passed]} {self.test:15} {self.measured}"
# test_whole.py: a layer that gets the log-det so far is asked with that of the batch
- value = torch.zeros(n)
+ value = value[:n]
# test_whole.py: a flow that draws noise counts as its own layer
- if not self.data_pass.records and not self.random:
+ if not self.data_pass.records:
# test_state.py: whatever turns during a pass is a flag of the first batch
- if moved and place.truth(flow) is not truths[place]:
+ if place.truth(flow) is not truths[place]:
# test_state.py in first_batch_flags: flags of a first batch are sought only among those that are False before it
- for value in (False, True):
+ for value in (False,):
# test_state.py: buffers that are saved count as lost, and those that are not as saved
- if key in module._non_persistent_buffers_set and buffer is not None:
+ if key not in module._non_persistent_buffers_set and buffer is not None:
# test_state.py: a mask that was drawn looks made by a rule
- return len(runs.unique()) <= 2
+ return len(runs.unique()) <= 3
# test_whole.py: the log-det of the whole flow is not examined
- whole = [] if case.alone else _whole_log_det(case, done, when, count)
+ whole = []
# test_whole.py: a layer whose log-det cannot be asked for is passed over without a word
- found = None if when else could_not_run(record.title, error)
+ found = None
# test_whole.py in whole_round_trip: the noise of a round trip is not held
- with torch.no_grad(), HeldNoise(0.5):
+ with torch.no_grad(), HeldNoise():
# test_whole.py: an inverse's log-det must have the sign of forward's
- off = (back + record.log_det).abs().max().item()
+ off = (back - record.log_det).abs().max().item()
# test_whole.py: an inverse in the right order is taken for one in forward's order
- if len(forward) > 1 and inverted == forward:
+ if len(forward) > 1 and inverted == forward[::-1]:
# test_whole.py: a scaling of the wrong sign is sought on the wrong side
- if abs(each - 2 * math.log(n)) < 1e-6:
+ if abs(each + 2 * math.log(n)) < 1e-6:
# test_inputs.py: noise that misses the next level by less than 1 is wide enough
- if miss(1.0) < 1e-5:
+ if miss(1.0) < 1.0:
# test_inputs.py: only data whose columns are all constant have a constant column
- if (deviation <= 1e-12 * x.abs().amax(0)).any():
+ if (deviation <= 1e-12 * x.abs().amax(0)).all():
# test_inputs.py: data that the flow itself changes in place are not noticed
- for record in [*case.data_pass.inner_first, case.data_pass.whole]:
+ for record in case.data_pass.inner_first:
# test_learning.py: a gradient may be as wrong as the slope is large
- if abs(slope - truths[0]) > 0.01 * scale:
+ if abs(slope - truths[0]) > 1.01 * scale:
# test_learning.py: a first batch must leave both the mean and the variance wrong to be noticed
- if mean > 0.05 or deviation > 0.05:
+ if mean > 0.05 and deviation > 0.05:
# test_likelihood.py: a log_prob that subtracts the log-det is sought with the wrong sign
- if (said - of_latent + done.log_det).abs().max() <= EXACT * scale:
+ if (said - of_latent - done.log_det).abs().max() <= EXACT * scale:
# test_likelihood.py: samples need only the mean or the spread of the base density
- if abs(off) <= 6 * error and shift < 6 + math.log(case.dims):
+ if abs(off) <= 6 * error or shift < 6 + math.log(case.dims):
# test_state.py: a flow that has loaded a state dict is compared by its shape alone
- same = torch.equal(again.z, case.data_pass.z) and torch.equal(again.log_det, case.data_pass.log_det)
+ same = again.z.shape == case.data_pass.z.shape
# test_state.py: flags that are saved count as forgotten
- forgetful += [type(place.owner(case.flow)).__name__ for place in case.flags if not place.saved]
+ forgetful += [type(place.owner(case.flow)).__name__ for place in case.flags if place.saved]
# test_report.py: the last line says that nothing was found though a test could not run
- return f"no test failed, but {stopped}" if unable else "nothing found"
+ return "nothing found"
# test_report.py: check_flow passes a flow of which a test could not run
- wrong = [f for f in findings if f.test not in allow and (f.passed is False or f.why == COULD_NOT_RUN)]
+ wrong = [f for f in findings if f.test not in allow and f.passed is False]
# test_report.py: an even number of dimensions is called odd
- if len(shape) == 2 and shape[1] % 2:
+ if len(shape) == 2 and not shape[1] % 2:
"""
ENTRY = re.compile(
    r"# (?P<tests>[\w. ]+?\.py)(?: in (?P<within>\w+))?: (?P<what>.+)\n"
    r"- (?P<line>.+)\n\+ (?P<replacement>.+)\n"
)


@dataclass(frozen=True)
class Break:
    """A line of the library, the line that replaces it, and the test files that should notice the change."""

    tests: str
    within: str | None
    what: str
    line: str
    replacement: str

    def place(self, root: Path) -> tuple[Path, int]:
        """The line's file, and its number, counted from 1; SystemExit if several lines or none match."""
        found: list[tuple[Path, int]] = []
        for path in sorted((root / "nflows_lib").rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            blocks = [node for node in ast.walk(ast.parse(text)) if getattr(node, "name", None) == self.within]
            for number, line in enumerate(text.split("\n"), 1):
                inside = self.within is None or any(block.lineno <= number <= block.end_lineno for block in blocks)
                if line.strip() == self.line and inside:
                    found.append((path, number))
        if len(found) != 1:
            places = "".join(f"\n  {path.relative_to(root)}:{number}" for path, number in found)
            sys.exit(
                f"expected this line once in {self.within or 'the library'}: {self.line}\ngot {len(found)}{places}"
            )
        return found[0]


def copy_tree(to: Path) -> None:
    """Copy the working tree to a folder, without the files that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def python(root: Path, *arguments: str, limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy, with the library of the copy, on one thread."""
    # No bytecode is written: a broken file may have the length of the sound file and the same second of writing.
    own = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=root, env=os.environ | own, capture_output=True, text=True, timeout=limit)


def failure(root: Path, names: Sequence[str]) -> str:
    """The first test in these files that fails; "" if all pass."""
    files = [str(path) for name in names for path in (root / "tests").rglob(name)]
    if sorted(Path(file).name for file in files) != sorted(names):
        sys.exit(f"expected each of {', '.join(names)} once below tests/, got {', '.join(files) or 'none'}")
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:nbval"]
    try:
        done = python(root, "-m", "pytest", *options, *files, limit=LIMIT * len(files))
    except subprocess.TimeoutExpired:
        return f"{LIMIT} s without an end"
    failed = re.search(r"^(?:FAILED|ERROR) (?:[\w./-]*/)?(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1, 2) or bool(done.returncode) != bool(failed):
        sys.exit(f"pytest ended with status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return failed[1] if failed else ""


def main() -> None:
    assert not ENTRY.sub("", TABLE).strip(), f"TABLE: cannot read {ENTRY.sub('', TABLE)}"
    breaks = dict(enumerate((Break(**entry.groupdict()) for entry in ENTRY.finditer(TABLE)), 1))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "numbers", nargs="*", type=int, metavar="N", help="the numbers of the breaks to try (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="list the breaks and their places, and try none")
    arguments = parser.parse_args()
    if unknown := set(arguments.numbers) - set(breaks):
        parser.error(f"N: expected numbers from 1 to {len(breaks)}, got {', '.join(map(str, sorted(unknown)))}")
    chosen = {number: breaks[number] for number in arguments.numbers or breaks}
    places = {number: change.place(ROOT) for number, change in chosen.items()}
    if arguments.list:
        for number, (path, line) in places.items():
            print(f"{number:2} {path.relative_to(ROOT)}:{line}: {chosen[number].what}")
        return
    begin, verdicts = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "tree"
        copy_tree(root)
        imported = python(root, "-c", "import nflows_lib; print(nflows_lib.__file__)").stdout.strip()
        if not Path(imported).is_relative_to(root):
            sys.exit(f"expected Python to import the library in {root}, got {imported}")
        if failed := failure(root, list(dict.fromkeys(" ".join(change.tests for change in chosen.values()).split()))):
            sys.exit(f"expected tests that pass while nothing is broken, got a failure of {failed}")
        print(f"   {'passed':8} {time.perf_counter() - begin:5.1f} s  without a break, with {imported}", flush=True)
        for number, change in chosen.items():
            start, (original, at) = time.perf_counter(), places[number]
            path = root / original.relative_to(ROOT)
            text = path.read_text(encoding="utf-8")
            lines = text.split("\n")
            lines[at - 1] = lines[at - 1].replace(change.line, change.replacement)
            ast.parse("\n".join(lines))  # any test would notice a line that is not Python
            path.write_text("\n".join(lines), encoding="utf-8")
            failed = failure(root, change.tests.split())
            path.write_text(text, encoding="utf-8")
            verdicts.append("noticed" if failed else "SURVIVED")
            row = f"{number:2} {verdicts[-1]:8} {time.perf_counter() - start:5.1f} s  {change.what}"
            print(row + (f" ({failed})" if failed else ""), flush=True)
    counts = (f"{verdicts.count(verdict)} {verdict}" for verdict in ("noticed", "SURVIVED"))
    print(f"{len(chosen)} breaks: {', '.join(counts)}, in {(time.perf_counter() - begin) / 60:.1f} minutes")
    sys.exit("SURVIVED" in verdicts)


if __name__ == "__main__":
    main()
