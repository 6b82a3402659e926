"""Tests of overlap and calibration by hand, and of the metrics of models with known predictions."""

from __future__ import annotations

import math
import re

import pytest
import torch
from test_pixelwise import Given
from torch import Tensor, nn

from nflows_lib.data import Images
from nflows_lib.experiments.pixelwise import PixelClassifier
from nflows_lib.experiments.segmentation import calibration, iou, metrics

# --- overlap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 1),
        ([1, 1, 0, 0], [0, 0, 1, 1], 0),
        ([1, 1, 0, 0], [1, 0, 1, 0], 1 / 3),
        ([1, 1, 1, 1], [1, 0, 0, 0], 1 / 4),
        ([0, 1, 1, 1], [1, 1, 1, 0], 1 / 2),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1),
        ([0, 0, 0, 0], [1, 0, 0, 0], 0),
        ([1, 0, 0, 0], [0, 0, 0, 0], 0),
    ],
)
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float32])
def test_iou_by_hand(predicted, true, expected, kind):
    predicted, true = (torch.tensor(values).view(1, 1, 2, 2) for values in (predicted, true))
    assert iou(predicted.to(kind), true).tolist() == pytest.approx([expected])
    assert iou(true, predicted.to(kind)).tolist() == pytest.approx([expected])


def test_iou_is_one_number_an_image():
    torch.manual_seed(0)
    predicted, true = torch.rand(2, 6, 1, 5, 4) > 0.5
    found = iou(predicted, true)
    assert found.shape == (6,)
    for i in range(6):
        assert found[i] == iou(predicted[i : i + 1], true[i : i + 1])
    assert len(found.unique()) > 3


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ([1, 0], torch.ones(2), "predicted: expected a tensor, got list"),
        (torch.ones(2), None, "true: expected a tensor, got None"),
        (torch.ones(2), torch.ones(2), "true: expected shape (N, ...), got (2,)"),
        (torch.tensor([[0.5, 1.0]]), torch.ones(1, 2), "predicted: expected only 0 and 1, got 0.5"),
        (torch.ones(1, 2), torch.tensor([[255, 0]]), "true: expected only 0 and 1, got 255"),
    ],
)
def test_what_is_no_mask_is_named(predicted, true, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        iou(predicted, true)


def test_masks_of_different_shapes_are_named():
    message = re.escape("predicted: expected shape (3, 4), that of true, got (3, 1)")
    with pytest.raises(ValueError, match=f"^{message}$"):
        iou(torch.ones(3, 1), torch.ones(3, 4))


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float32])
def test_calibration_by_hand(kind):
    """One of four bins is empty; an edge belongs to the bin above it, and 1 to the last bin."""
    p = torch.tensor([[0.0, 0.2, 0.25], [0.4, 1.0, 0.8]])
    true = torch.tensor([[0, 1, 1], [1, 1, 0]]).to(kind)
    rows, error = calibration(p, true, bins=4)
    expected = [(0.1, 0.5, 2), (0.325, 1.0, 2), (0.9, 0.5, 2)]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted)
        assert isinstance(row[2], int)
    assert error == pytest.approx((2 * 0.4 + 2 * 0.675 + 2 * 0.4) / 6)


def test_one_bin_is_the_mean_of_all():
    rows, error = calibration(torch.tensor([0.0, 0.5, 1.0, 0.9]), torch.tensor([0, 0, 0, 1]), bins=1)
    assert rows == [(pytest.approx(0.6), 0.25, 4)]
    assert error == pytest.approx(0.35)


def test_calibration_has_ten_bins_by_default():
    p = torch.arange(100) / 100 + 0.005
    rows, _ = calibration(p, p > 0.5)
    assert [count for _, _, count in rows] == [10] * 10
    assert [mean for mean, _, _ in rows] == pytest.approx([0.05 + i / 10 for i in range(10)])


def test_what_is_calibrated_has_an_error_near_zero_and_what_is_sure_of_itself_has_not():
    torch.manual_seed(0)
    p = torch.rand(200_000)
    true = torch.rand(200_000) < p
    _, error = calibration(p, true)
    assert error < 5 * 0.5 / 20_000**0.5
    sharper = (4 * torch.logit(p.double())).sigmoid()
    assert calibration(sharper, true)[1] > 0.1
    assert calibration(1 - p, true)[1] > 0.3
    assert calibration(torch.ones(4), torch.ones(4)) == ([(1.0, 1.0, 4)], 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(3)), "probabilities: expected shape (3,), that of true, got (2, 3)"),
        ((torch.zeros(3), torch.zeros(3), 0), "bins: expected at least 1, got 0"),
        ((torch.zeros(3), torch.zeros(3), 2.5), "bins: expected a whole number, got 2.5"),
        (([0.5], torch.zeros(1)), "probabilities: expected a tensor, got list"),
        ((torch.zeros(1), [0]), "true: expected a tensor, got list"),
        ((torch.zeros(2), torch.tensor([0.5, 1.0])), "true: expected only 0 and 1, got 0.5"),
        ((torch.zeros(2), torch.tensor([0.0, torch.nan])), "true: expected only 0 and 1, got nan"),
        (
            (torch.tensor([0.5, 1.5]), torch.zeros(2)),
            "probabilities: expected values in [0, 1], got some from 0.5 to 1.5",
        ),
        (
            (torch.tensor([-0.5, 1.0]), torch.zeros(2)),
            "probabilities: expected values in [0, 1], got some from -0.5 to 1",
        ),
        (
            (torch.tensor([0.5, torch.nan]), torch.zeros(2)),
            "probabilities: expected values in [0, 1], got some from nan",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        calibration(*arguments)


# --- metrics ----------------------------------------------------------------------------------------------------------

TRUE = torch.tensor([[[[1, 1], [0, 0]]], [[[1, 0], [0, 0]]]], dtype=torch.uint8)


class Scripted(nn.Module):
    """A model of masks that draws given masks in turn; log p is less by the squared distance from the context."""

    def __init__(self, *draws: Tensor) -> None:
        super().__init__()
        self.where = nn.Parameter(torch.zeros(()))
        self.draws, self.asked, self.calls = list(draws), [], 0

    def sample(self, n: int, temperature: float = 1.0, context: Tensor | None = None) -> Tensor:
        self.asked.append((n, temperature, context))
        return self.draws[len(self.asked) - 1].long()

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        return -7 - (y - context).square().flatten(1).sum(1)


def test_metrics_of_draws_by_hand():
    """Draws of the first image are always right; of the second, two are right and three are its complement."""
    right, half = TRUE, torch.stack([TRUE[0], 1 - TRUE[1]])
    model = Scripted(right, half, right, half, half, half, half, half)
    context = TRUE.float()
    found = metrics(model, Images(TRUE, torch.zeros(2), 2, context), samples=3, most=5)
    assert [temperature for _, temperature, _ in model.asked] == [1.0] * 5 + [0.5] * 3
    for n, _, given in model.asked:
        assert n == 2
        assert torch.equal(given, context)
    assert (found["samples"], found["most"]) == (3, 5)
    assert found["iou"] == 1.0  # of the second the mean of three is 2/3
    assert found["iou_error"] == 0.0
    assert found["iou_most"] == 0.5  # of five it is 2/5
    assert found["iou_one"] == pytest.approx((5 + 2) / 10)
    assert found["iou_between"] == 0.5  # of the first with the second and of the third with the fourth
    assert found["iou_cold"] == 0.5  # all three cold ones were right of the first image alone
    assert found["area_covered"] == 1.0  # of the second 1 and 3 were drawn, and 1 is true
    assert [row[2] for row in found["calibration"]] == [2, 1, 3, 2]
    assert found["calibration"][1] == [0.4, 1.0, 1]
    assert found["calibration_error"] == pytest.approx((1 * 0.6 + 3 * 0.6) / 8)
    assert found["shuffled"] == pytest.approx(1.0)  # the masks differ in one pixel
    assert model.calls == 5 + 2 * 5
    assert found["bits_per_dim_most"] == pytest.approx(7 / (4 * math.log(2)))


def test_the_error_of_the_overlap_is_over_images():
    found = metrics(
        Scripted(*[torch.stack([TRUE[0], 1 - TRUE[1]])] * 3), Images(TRUE, torch.zeros(2), 2, TRUE.float()), 1, 2
    )
    assert found["iou"] == 0.5
    assert found["iou_error"] == pytest.approx(0.5)
    assert found["area_covered"] == 0.5  # three ones where there is one
    assert found["iou_between"] == 1.0


def test_samples_that_differ_from_one_another_say_so():
    one, other = torch.zeros_like(TRUE), torch.zeros_like(TRUE)
    one[..., 0], other[..., 1] = 1, 1
    found = metrics(Scripted(one, other, other, one, one, one), Images(TRUE, torch.zeros(2), 2, TRUE.float()), 2, 4)
    assert found["iou_between"] == 0.0
    assert found["iou"] == found["iou_most"] == 0.0  # a mean of 1/2 everywhere is no more than 1/2
    assert found["iou_cold"] > 0.0


@pytest.mark.parametrize(("samples", "most"), [(0, 5), (6, 5), (1, 1)])
def test_too_few_samples_are_named(samples, most):
    with pytest.raises(ValueError, match=rf"^samples, most: expected .* got {samples} and {most}$"):
        metrics(*classifier(3), samples=samples, most=most)


def test_the_closer_bound_is_the_mean_of_likelihoods():
    """The draws of the noise differ: log p alternates between -1 and -3."""

    class Noisy(Scripted):
        def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
            self.calls += 1
            return torch.full((len(y),), -1.0 if self.calls % 2 else -3.0)

    found = metrics(Noisy(*[TRUE] * 5), Images(TRUE, torch.zeros(2), 2, TRUE.float()), 1, 4)
    mean = (math.exp(-1) + math.exp(-3)) / 2
    assert found["bits_per_dim_most"] == pytest.approx(-math.log(mean) / (4 * math.log(2)))


def test_the_middle_of_the_areas_is_80_percent_of_them():
    """The 11 draws have 0 to 10 ones; true areas are inside of the interval and beyond either end."""
    areas = [0, 1, 2, 5, 9, 10]
    true = (torch.arange(16) < torch.tensor(areas)[:, None]).view(-1, 1, 4, 4).to(torch.uint8)
    draws = [(torch.arange(16) < n).expand(len(areas), 16).view(-1, 1, 4, 4).to(torch.uint8) for n in range(11)]
    found = metrics(Scripted(*draws, draws[0]), Images(true, torch.zeros(6), 2, true.float()), 1, 11)
    assert found["area_covered"] == pytest.approx(4 / 6)


def classifier(n: int = 30) -> tuple[PixelClassifier, Images]:
    """A classifier whose logits are its contexts, and masks drawn from it."""
    torch.manual_seed(0)
    contexts = 2 * torch.randn(n, 2, 4, 4)
    model = PixelClassifier(Given(), (1, 4, 4), 2)
    return model, Images(model.sample(n, context=contexts).to(torch.uint8), torch.zeros(n), 2, contexts)


def test_metrics_of_a_classifier_are_those_of_its_mean():
    model, images = classifier()
    p = (images.contexts[:, 1:] - images.contexts[:, :1]).sigmoid()
    found = metrics(model, images, samples=2, most=4)
    overlap = iou(p > 0.5, images.images)
    assert found["iou"] == found["iou_most"] == pytest.approx(overlap.mean().item())
    assert found["iou_error"] == pytest.approx(overlap.std().item() / 30**0.5)
    rows, error = calibration(p, images.images)
    assert found["calibration_error"] == pytest.approx(error)
    assert found["calibration"] == [[round(mean, 4), round(share, 4), count] for mean, share, count in rows]
    own, other = (model(images.images, c) for c in (images.contexts, images.contexts.roll(1, 0)))
    assert found["shuffled"] == pytest.approx((own - other).mean().item())
    assert found["shuffled"] > 1
    assert 0 < found["iou_one"] < found["iou"]
    assert 0 < found["iou_between"] < 1


def test_metrics_repeat_and_leave_the_random_state_alone():
    model, images = classifier()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(metrics(model, images, samples=2, most=4))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]


def test_metrics_draw_ten_and_a_hundred_by_default():
    found = metrics(*classifier(n=3))
    assert (found["samples"], found["most"]) == (10, 100)
