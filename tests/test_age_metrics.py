"""Estimated ages, retrieved identities and metrics of aged faces with known answers."""

import pytest
import torch
from torch import nn

from condgen.age_metrics import (
    AgedFaces, Gallery, age_with_model, estimate_ages, monotonicity, sharpness)
from condgen.conditions import Classes, Schema
from condgen.models.caae import CAAE

BINS = 10
CENTRES = (torch.arange(BINS) + 0.5) * 8
AGE, WHO = Classes("age", BINS), Classes("identity", 3)
BOTH = ("older", "younger")


class PixelEvaluator(nn.Module):
    """Predicts the bin from the first pixel of channel 0; features are two pixels."""

    def __init__(self, schema):
        super().__init__()
        self.conditions = schema

    def logits(self, x):
        b = (x[:, 0, 0, 0] * 10).round().long()
        age = 60 * nn.functional.one_hot(b, BINS).float()
        pad = x.new_full((len(x), self.conditions.width - BINS), 99.0)
        first = self.conditions[0].name == "age"
        return torch.cat([age, pad] if first else [pad, age], 1)

    def features(self, x):
        return x[:, 1, 0, :2]


EVALUATOR = PixelEvaluator(Schema([AGE, WHO]))


def images_of(bins, features):
    """Images `(n, 3, 4, 4)` for which the evaluator predicts these bins."""
    x = torch.zeros(len(bins), 3, 4, 4)
    x[:, 0, 0, 0] = bins / 10
    x[:, 1, 0, :2] = features
    return x


@pytest.mark.parametrize("schema", [Schema([AGE, WHO]), Schema([WHO, AGE])],
                         ids=["age first", "age last"])
def test_estimated_ages(schema):
    x = images_of(torch.arange(10.0), torch.zeros(10, 2))
    found = estimate_ages(PixelEvaluator(schema), x, CENTRES)
    assert torch.allclose(found, CENTRES.double())


def test_evaluator_without_age_is_refused():
    evaluator = PixelEvaluator(Schema([WHO]))
    with pytest.raises(ValueError, match="of identity; accepted: one of age"):
        estimate_ages(evaluator, torch.zeros(1, 3, 4, 4), CENTRES)


FEATURES = torch.tensor([[0.0, 0.9], [0.9, 0.0], [0.9, 0.9]])
GALLERY = Gallery.from_features(FEATURES.repeat(2, 1).double(),
                                torch.tensor([4, 5, 6]).repeat(2))
INPUT_BIN, IDENTITIES = torch.tensor([0, 4, 9, 4]), torch.tensor([4, 5, 6, 4])
RIGHT_BINS = torch.arange(10.0).repeat(4, 1)


def cells(bins, who):
    """Images of four faces in ten bins, predicted as these bins and identities."""
    return torch.stack([images_of(line, FEATURES[int(k) - 4].expand(10, 2))
                        for line, k in zip(bins, who)])


def test_metrics_of_correct_faces():
    x = cells(RIGHT_BINS, IDENTITIES)
    faces = AgedFaces(x, INPUT_BIN, IDENTITIES, x)
    found = faces.measure(EVALUATOR, GALLERY, CENTRES, CENTRES, BOTH)
    assert found["monotonicity", "both"] == 1
    for direction in BOTH:
        assert found["age_error", direction] == pytest.approx(0, abs=1e-4)
        assert found["mae", direction] == 0 and found["sharpness", direction] == 1
        assert found["identity_accuracy", direction] == 1


def test_metrics_of_faces_one_bin_too_old_and_of_another_person():
    right = cells(RIGHT_BINS, IDENTITIES)
    wrong = cells((RIGHT_BINS + 1).clamp(max=9), [5, 5, 6, 4])
    faces = AgedFaces(wrong, INPUT_BIN, IDENTITIES, right)
    found = faces.measure(EVALUATOR, GALLERY, CENTRES, CENTRES, ("older",))
    names = ("age_error", "identity_accuracy", "mae", "sharpness")
    assert set(found) == {(name, "older") for name in names}
    older = 9 + 5 + 0 + 5
    error = 8 * (older - 3) / older
    assert found["age_error", "older"] == pytest.approx(error, rel=1e-4)
    assert found["identity_accuracy", "older"] == pytest.approx((older - 9) / older)
    assert found["mae", "older"] > 0


def test_cells_select_older_or_younger_bins():
    faces = AgedFaces(torch.zeros(2, 4, 1, 1, 1), torch.tensor([1, 3]), torch.zeros(2))
    older, younger = (faces.cell_mask(direction).tolist() for direction in BOTH)
    assert older == [[False, False, True, True], [False] * 4]
    assert younger == [[True, False, False, False], [True, True, True, False]]
    with pytest.raises(ValueError, match="did you mean 'older'"):
        faces.cell_mask("oldr")


def test_gallery_retrieves_by_cosine_to_the_centred_means():
    centres = torch.tensor([[10.0, 11.0], [11.0, 10.0], [9.0, 9.0]])
    gallery = Gallery(centres, torch.tensor([7, 3, 5]))
    points = torch.tensor([[10.0, 19.0], [10.2, 10.0], [0.0, 0.0]])
    assert gallery.identify(points).tolist() == [7, 3, 5]


def test_sharpness_and_monotonicity():
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
    assert sharpness(blurred) < 0.5 * sharpness(x)
    assert sharpness(0.5 * x + 0.2) == pytest.approx(sharpness(x) / 2)
    assert monotonicity(torch.tensor([[1.0, 2, 3], [3, 2, 1]])) == 0.5
    assert monotonicity(torch.ones(2, 5)) == 0


def test_model_makes_one_image_for_each_bin():
    torch.manual_seed(0)
    model = CAAE((3, 16, 16), [Classes("age", 4)], code=6, width=4).train()
    x = torch.rand(3, 3, 16, 16)
    made = age_with_model(model, x)
    assert made.shape == (3, 4, 3, 16, 16) and model.training
    with torch.no_grad():
        assert torch.equal(made[:, 2], model.eval().edit(x, age=2))
