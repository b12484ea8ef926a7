"""Measurements of the AVAE's losses, codes and samples, each on inputs whose answer is
known.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condgen.experiments.avae_factors import (
    BINS, blurred_as, blurred_faces, compare_marginals, fit_codes, linear_fit, marginal,
    pair_distances, pose_rows, principal_codes, r_squared, read_factors,
    yaw_regression)
from condgen.experiments.avae_losses import (
    GRID, RATES, LoneDiscriminator, WatchedAVAE, agreement_rows, effective_pixels,
    faces_of_side, large_faces, loss_numbers, loss_per_image, normality, pixel_errors,
    rank_correlation, sorted_distance, training_failed)
from condgen.experiments.portraits import portraits_with_factors
from condgen.experiments.relatives import detail
from condgen.faces import FACTORS
from condgen.training import fit


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_normality_of_known_distributions(rng):
    normal = normality(3 + 2 * torch.randn(40_000, generator=rng))
    assert all(abs(value) < 0.06 for value in normal.values())
    skewed = normality(torch.empty(40_000).exponential_(generator=rng))
    assert skewed["skewness"] == pytest.approx(2, abs=0.15)
    assert skewed["excess_kurtosis"] == pytest.approx(6, abs=1.5)
    assert skewed["ks_distance"] > 0.1
    flat = normality(torch.linspace(0, 1, 1001))
    assert flat["excess_kurtosis"] == pytest.approx(-1.2, abs=0.01)


def test_normality_ignores_place_and_scale(rng):
    x = torch.rand(500, generator=rng).double()
    assert normality(x) == pytest.approx(normality(5 + 3 * x), abs=1e-9)
    assert normality(-x)["skewness"] == pytest.approx(-normality(x)["skewness"])


def test_effective_pixels_count_independent_ones(rng):
    errors = torch.rand(20_000, 64, generator=rng)
    assert effective_pixels(errors) == pytest.approx(64, rel=0.05)
    pairs = errors[:, :32].repeat(1, 2)
    assert effective_pixels(pairs) == pytest.approx(32, rel=0.05)
    common = torch.rand(20_000, 1, generator=rng)
    assert effective_pixels(common + 0 * errors) == pytest.approx(1)
    assert effective_pixels(common * errors) < 8


def test_sorted_distance_is_the_best_plan_and_a_metric(rng):
    a, b, c = torch.randn(3, 6, generator=rng)
    plans = [(a - b[list(order)]).abs().mean().item()
             for order in itertools.permutations(range(6))]
    assert sorted_distance(a, b) == pytest.approx(min(plans), abs=1e-6)
    assert sorted_distance(a, a.flip(0)) == 0
    assert sorted_distance(a, b) == sorted_distance(b, a)
    assert sorted_distance(a, c) <= sorted_distance(a, b) + sorted_distance(b, c) + 1e-6
    assert sorted_distance(a, b) >= (a.mean() - b.mean()).abs() - 1e-6


def test_sorted_distance_refuses_samples_of_other_sizes():
    with pytest.raises(ValueError, match="accepted: two of"):
        sorted_distance(torch.zeros(3), torch.zeros(4))


def test_rank_correlation_sees_order_only(rng):
    a, b = torch.randn(2, 60, generator=rng)
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a.exp()) == pytest.approx(-1)
    assert rank_correlation(a, b) == pytest.approx(rank_correlation(a.exp(), b**3))
    assert abs(rank_correlation(a, b)) < 0.4


def test_faces_of_a_side_are_averages_of_the_same_faces():
    large = large_faces("tiny")
    small = faces_of_side("tiny", 16)
    assert small.shape == (3, 16, 16) and len(small.images) == len(large.images)
    means = [data.images.float().mean((1, 2, 3)) for data in (small, large)]
    assert (means[0] - means[1]).abs().max() < 0.6  # of 255


def test_the_lone_discriminator_moves_its_autoencoder_only():
    torch.manual_seed(0)
    model = LoneDiscriminator((1, 16, 16), width=4)
    x = torch.rand(64, 1, 16, 16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    error = loss_per_image(model, x).mean()
    data = SimpleNamespace(name="noise", sha256="0", conditions=model.conditions,
                           table=lambda split: {"x": (255 * x).byte(),
                                                "c": torch.zeros(64, 0)})
    fit(model, data, images=640, progress=False)
    moved = {name.split(".")[0] for name, p in model.named_parameters()
             if not torch.equal(p, before[name])}
    assert moved == {"energy_encoder", "energy_decoder"}
    assert loss_per_image(model, x).mean() < error


def test_pixel_errors_have_the_energy_as_their_mean():
    torch.manual_seed(0)
    model, x = LoneDiscriminator((3, 16, 16), width=4), torch.rand(5, 3, 16, 16)
    errors = pixel_errors(model, x)
    assert errors.shape == (5, 768)
    energy = model.energy_of(2 * x - 1)[0]
    assert torch.allclose(errors.mean(1).float(), energy, atol=1e-6)


def watched(points=4):
    torch.manual_seed(0)
    model = WatchedAVAE((1, 16, 16), latent=4, width=4)
    model.points = points
    return model


def test_a_watched_training_is_that_of_the_avae():
    """The looks draw no random numbers of the training and change no weight."""
    x = (255 * torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(1)))
    ends = []
    for look in (lambda m: {}, lambda m: {"x": m.sample(4).sum().item()}):
        model = watched()
        model.look = look
        data = SimpleNamespace(name="noise", sha256="0", conditions=model.conditions,
                               table=lambda split: {"x": x.byte(),
                                                    "c": torch.zeros(64, 0)})
        fit(model, data, images=256, progress=False)
        ends.append(model.state_dict())
        assert [at for at, _ in model.seen] == [0, 0.25, 0.5, 0.75]
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))


class Real:
    """Test images whose features are the pixels."""

    def __init__(self, x):
        self.x, self.features = x, x.flatten(1)

    def features_of(self, x):
        return x.flatten(1)


def test_loss_numbers_follow_their_definitions():
    model = watched().eval()
    x = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    found = loss_numbers(model, Real(x), 0)
    real = loss_per_image(model, x).mean().item()
    kept = loss_per_image(model, model.reconstruct(x)).mean().item()
    samples = found["loss_ratio"] * real
    error = model.set_point * real - samples - model.alpha * kept
    assert found["convergence"] == pytest.approx(real + abs(error), rel=1e-5)
    assert found["mean_difference"] == pytest.approx(abs(real - samples), rel=1e-4)
    assert found["loss_distance"] >= found["mean_difference"] - 1e-9


def test_agreement_leaves_the_start_out():
    falling = [(at / 10, {"convergence": 10 - at, "frechet": 10 - at if at < 5 else at})
               for at in range(10)]
    rows = {r["at"]["part"]: r["value"] for r in agreement_rows(falling)}
    assert rows["second half"] == pytest.approx(-1)
    assert rows["second half"] < rows["after the warm-up"] < rows["all"]


@pytest.mark.parametrize("change", [{"frechet": float("nan")}, {"frechet": 500.0},
                                    {"pixel_spread": 0.4},
                                    {"pixel_spread": float("nan")}])
def test_a_training_fails_by_each_part_of_the_criterion(change):
    good = {"frechet": 90.0, "pixel_spread": 0.9}
    assert not training_failed(good, 400.0)
    assert training_failed({**good, **change}, 400.0) and training_failed({}, 400.0)


def test_all_models_of_the_grid_have_the_same_learning_rates():
    assert list(RATES) == sorted(RATES) and max(RATES) / min(RATES) >= 10
    assert all("lr" not in choice for _, choices in GRID.values() for choice in choices)
    assert GRID["AVAE"][1][-1] == {"set_point": 1.1}  # whose sensitivity is compared


def test_what_a_code_holds_is_read_in_any_basis(rng):
    z = torch.randn(600, 5, generator=rng)
    wanted = torch.stack([z[:, 1] + 3, torch.randn(600, generator=rng)], 1)
    found = []
    for code in (z, z @ torch.randn(5, 5, generator=rng) - 2):
        fit_ = linear_fit(code[:300], wanted[:300], 1e-9)
        found.append(r_squared(code[300:], wanted[300:], fit_))
    assert torch.allclose(found[0], found[1], atol=1e-4)
    assert found[0][0] > 0.999 and found[0][1] < 0.05


def test_r_squared_of_the_mean_is_zero():
    targets, mean = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[0], [0], [3.0]])
    codes = torch.rand(3, 2)
    assert abs(r_squared(codes, targets, mean).item()) < 1e-9
    assert r_squared(codes, targets, mean + torch.tensor([[0], [0], [1.0]])) < 0


def test_principal_codes_keep_the_largest_variance(rng):
    scale = torch.arange(1.0, 10).view(1, 1, 3, 3)
    x = torch.randn(500, 1, 3, 3, generator=rng) * scale
    kept = principal_codes(x, 2)(x).var(0).sum()
    assert kept > 0.95 * x.flatten(1).double().var(0).topk(2).values.sum()
    whole = pair_distances(principal_codes(x, 9)(x))
    assert torch.allclose(whole, pair_distances(x.flatten(1)), atol=1e-3)


def test_marginals_count_bins_and_presence():
    edges = torch.tensor(BINS["yaw"]).float()
    middles = (edges[1:] + edges[:-1]) / 2
    assert torch.allclose(marginal("yaw", middles), torch.full((5,), 0.2).double())
    outside = torch.tensor([-90.0, 90.0])  # a regression is not bounded
    assert marginal("yaw", outside).tolist() == [0.5, 0, 0, 0, 0.5]
    assert marginal("hat", torch.tensor([True, False, False, False])).tolist() == [
        0.75, 0.25]


def test_lost_groups_are_found():
    yaw = torch.linspace(-35, 35, 1000)
    real = {"yaw": yaw, "hat": torch.arange(1000) % 5 == 0}
    assert all(pair == (0, 1) for pair in compare_marginals(real, real).values())
    found = compare_marginals({"yaw": yaw / 10, "hat": torch.zeros(1000).bool()}, real)
    assert found["yaw"][1] == 0 and found["yaw"][0] == pytest.approx(0.8, abs=0.01)
    assert found["hat"] == (pytest.approx(0.2), 0)


def test_rare_groups_have_no_ratio():
    real = {"hat": torch.arange(1000) < 20}
    found = compare_marginals({"hat": torch.zeros(1000).bool()}, real)
    assert found["hat"] == (pytest.approx(0.02), pytest.approx(1 / 0.98))


def test_blurring_reaches_the_wanted_detail(rng):
    x = torch.rand(6, 3, 16, 16, generator=rng)
    made = blurred_as(x, 0.5 * detail(x))
    assert 0.3 * detail(x) < detail(made) <= 0.5 * detail(x)


def test_a_reader_gives_numbers_and_truth_by_name():
    data = blurred_faces("tiny")

    class Knows(nn.Module):
        conditions = data.conditions

        def logits(self, x):
            return torch.where(torch.tensor([c.name in BINS for c in self.conditions]),
                               data.labels[:4], 9 * (data.labels[:4] - 0.5))

    read = read_factors(Knows(), lambda x: x.mean((1, 2, 3)),
                        data.images[:4].float() / 255)
    known = data.conditions.unpack(data.labels[:4])
    assert torch.allclose(read["age"].float(), known["age"], atol=1e-4)
    assert torch.equal(read["masculine"], known["masculine"] > 0.5)
    assert torch.allclose(255 * read["yaw"].float(),
                          data.images[:4].float().mean((1, 2, 3)), atol=1e-3)
    assert not {"smile", "laugh"} & read.keys()


def test_the_yaw_of_drawings_is_read_from_pixels():
    data, factors = portraits_with_factors("tiny")
    index = data.indices("train")[:200]
    read = yaw_regression("tiny")(data.images[index].float() / 255)
    assert rank_correlation(read, FACTORS.unpack(factors[index])["yaw"]) > 0.8


class AnyImage:
    """A generator of all images of 2×2 pixels."""

    latent_size, training = 4, True

    def generate(self, c, z):
        return z.view(-1, 1, 2, 2).sigmoid()

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode


def test_the_nearest_image_of_a_generator_is_found(rng):
    x, model = 0.1 + 0.8 * torch.rand(4, 1, 2, 2, generator=rng), AnyImage()
    assert (fit_codes(model, x, 80) - x).abs().mean() < 0.02
    assert torch.allclose(fit_codes(model, x, 0), torch.full_like(x, 0.5))
    assert model.training


def test_the_ratio_of_poses_is_that_of_mean_errors():
    x, side = torch.zeros(4, 1, 2, 2), torch.tensor([False, False, True, True])
    made = x + torch.tensor([0.1, 0.3, 0.2, 0.4]).view(4, 1, 1, 1)
    rows = {(r["metric"], r["at"].get("pose")): r["value"]
            for r in pose_rows("M", made, x, side)}
    assert rows["mae", "frontal"] == pytest.approx(0.2)
    assert rows["mae", "side"] == pytest.approx(0.3)
    assert rows["side_ratio", None] == pytest.approx(1.5)


def test_noise_is_the_same_at_each_look():
    """A look's samples depend on the seed only, not on when it is."""
    model = watched().eval()
    real = Real(torch.rand(8, 1, 16, 16))
    torch.rand(3)
    first = loss_numbers(model, real, 0)
    torch.rand(5)
    assert first == loss_numbers(model, real, 0)
    assert first != loss_numbers(model, real, 1)
