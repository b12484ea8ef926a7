"""Laws of condgen.bijections: ladj against autograd, round trips, densities that
integrate to one, grey levels.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from condgen import bijections as bj

F64, F32 = torch.float64, torch.float32


def mlp(inputs: int, outputs: int) -> nn.Module:
    """A network for vectors, zero where it starts, as in a flow."""
    net = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return net


def conv(inputs: int, outputs: int) -> nn.Module:
    """A network for images, zero where it starts."""
    net = nn.Sequential(nn.Conv2d(inputs, 6, 3, padding=1), nn.Tanh(),
                        nn.Conv2d(6, outputs, 3, padding=1))
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return net


def net(shape: tuple[int, ...], parts: int) -> nn.Module:
    """A coupling's network for inputs of a shape (c, …)."""
    c = shape[0]
    return (conv if len(shape) == 3 else mlp)(c // 2, parts * (c - c // 2))


def step(c: int, lu: bool = True, floor: float = 0.1,
         top: bool = True) -> list[bj.Bijection]:
    """One Glow step on images of c channels, followed by the whitening of
    the half that leaves.
    """
    layers = [bj.ActNorm(c), bj.InvertibleConv(c, lu),
              bj.AffineCoupling(net((c, 1, 1), 2), floor)]
    return layers if top else [*layers, bj.ConditionalStandardize(net((c, 1, 1), 2))]


def multiscale(levels: int, shape: tuple[int, int, int]) -> bj.MultiScale:
    """A Glow of one step per level."""
    channels = [shape[0] * 2 ** (i + 2) for i in range(levels)]
    return bj.MultiScale((bj.Chain(bj.Squeeze(), *step(c, top=i == levels - 1))
                          for i, c in enumerate(channels)), shape)


LAYERS: dict[str, Callable[[tuple[int, ...]], bj.Bijection]] = {
    "actnorm": lambda s: bj.ActNorm(s[0]),
    "conv-lu": lambda s: bj.InvertibleConv(s[0]),
    "conv-plain": lambda s: bj.InvertibleConv(s[0], lu=False),
    "additive": lambda s: bj.AdditiveCoupling(net(s, 1)),
    "affine": lambda s: bj.AffineCoupling(net(s, 2)),
    "affine-no-floor": lambda s: bj.AffineCoupling(net(s, 2), floor=0.0),
    "whiten": lambda s: bj.ConditionalStandardize(net(s, 2)),
    "chain": lambda s: bj.Chain(bj.ActNorm(s[0]), bj.InvertibleConv(s[0]),
                                bj.AffineCoupling(net(s, 2)), bj.ActNorm(s[0]),
                                bj.InvertibleConv(s[0], lu=False),
                                bj.AdditiveCoupling(net(s, 1))),
}
# odd channels, vectors, sequences, images that are not square
SHAPES = [(2,), (5,), (3, 2), (2, 2, 2), (3, 2, 3)]
CASES = [
    pytest.param(lambda make=make, s=s: make(s), s,
                 id=f"{name}-{'x'.join(map(str, s))}") for name, make in LAYERS.items()
    for s in SHAPES if len(s) != 2 or name in ("actnorm", "conv-lu", "conv-plain")] + [
        pytest.param(lambda: bj.Squeeze(), (3, 2, 4), id="squeeze"),
        pytest.param(lambda: multiscale(1, (1, 4, 2)), (1, 4, 2), id="multiscale-1"),
        pytest.param(lambda: multiscale(2, (1, 4, 4)), (1, 4, 4), id="multiscale-2"),
        pytest.param(lambda: multiscale(2, (3, 4, 4)), (3, 4, 4),
                     id="multiscale-2-colour"),
        pytest.param(lambda: multiscale(3, (1, 8, 8)), (1, 8, 8), id="multiscale-3"),
    ]


@torch.no_grad()
def kick(module: nn.Module, size: float = 0.2) -> nn.Module:
    """Move every parameter away from its start, where zeros hide mistakes."""
    for p in module.parameters():
        p += size * torch.randn_like(p)
    return module


def autograd_ladj(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """log|det ∂f/∂x| of each item, from the full Jacobian."""
    jacobians = [torch.autograd.functional.jacobian(lambda v: f(v[None])[0], item)
                 for item in x]
    return torch.stack([torch.linalg.slogdet(j.reshape(x[0].numel(), -1))[1]
                        for j in jacobians])


def law_error(layer: nn.Module, x: Tensor) -> float:
    """Law 1: largest difference of ladj and autograd's, along the map
    and along its inverse.
    """
    y, ladj = layer(x)
    assert ladj.shape == (len(x),)
    forward = ladj - autograd_ladj(lambda v: layer(v)[0], x)
    inverse = ladj + autograd_ladj(layer.inverse, y)
    return max(forward.abs().max().item(), inverse.abs().max().item())


def log_prob(layer: bj.Bijection, x: Tensor) -> Tensor:
    """Log density of x if layer(x) is standard normal."""
    y, ladj = layer(x)
    return bj.standard_normal_log_prob(y) + ladj


# law 1: ladj is autograd's log-determinant --------------------------------------------

@pytest.mark.parametrize(("make", "shape"), CASES)
def test_ladj_equals_autograd_log_determinant(make, shape):
    torch.manual_seed(0)
    layer = kick(make()).to(F64)
    assert law_error(layer, torch.randn(2, *shape, dtype=F64)) < 1e-9


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_ladj_reaches_every_parameter(make, shape):
    """A parameter that moves the density gets a gradient."""
    torch.manual_seed(0)
    layer = kick(make()).to(F64)
    log_prob(layer,
             torch.randn(2, *shape, dtype=F64, requires_grad=True)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any()
               for p in layer.parameters() if p.numel())


class ForgetsPixels(bj.InvertibleConv):
    """A 1×1 convolution that counts one pixel only."""

    def forward(self, x):
        y, ladj = super().forward(x)
        return y, ladj / bj.n_positions(x)


class ForgetsScale(bj.AffineCoupling):
    """An affine coupling that ignores how it starts to stretch."""

    def forward(self, x):
        y, _ = super().forward(x)
        return y, x.new_full((len(x),), self.start * x[:, x.shape[1] // 2 :][0].numel())


class WrongSign(bj.ConditionalStandardize):
    """Whitening whose ladj has the wrong sign."""

    def forward(self, x):
        y, ladj = super().forward(x)
        return y, -ladj


def forgets_scale() -> bj.Bijection:
    layer = ForgetsScale(net((4, 2, 2), 2))
    layer.start = math.log(0.1 + 0.9 / (1 + math.exp(-2)))
    return layer


@pytest.mark.parametrize("make", [lambda: ForgetsPixels(4), forgets_scale,
                                  lambda: WrongSign(net((4, 2, 2), 2))])
def test_wrong_ladj_fails_law_1_and_passes_the_round_trip(make):
    torch.manual_seed(0)
    layer, x = kick(make()).to(F64), torch.randn(2, 4, 2, 2, dtype=F64)
    assert (layer.inverse(layer(x)[0]) - x).abs().max() < 1e-10
    assert law_error(layer, x) > 1e-2


@pytest.mark.parametrize("make", [forgets_scale, lambda: WrongSign(net((4, 2, 2), 2))])
def test_wrong_ladj_passes_at_initial_parameters(make):
    torch.manual_seed(0)
    # float32 weights, hence the tolerance
    assert law_error(make().to(F64), torch.randn(2, 4, 2, 2, dtype=F64)) < 1e-6


# law 2: the round trip ----------------------------------------------------------------

@pytest.mark.parametrize(("make", "shape"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-4)],
                         ids=["float64", "float32"])
def test_round_trip(make, shape, dtype, tolerance):
    torch.manual_seed(0)
    layer, x = kick(make()).to(dtype), torch.randn(16, *shape, dtype=dtype)
    with torch.no_grad():
        y, ladj = layer(x)
        assert (layer.inverse(y) - x).abs().max() <= tolerance
        assert (layer(layer.inverse(y))[0] - y).abs().max() <= tolerance
    assert y.dtype == dtype and ladj.dtype == dtype


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_round_trip_after_data_dependent_initialisation(dtype):
    torch.manual_seed(0)
    model, x = (multiscale(3, (1, 16, 16)).to(dtype),
                0.1 * torch.randn(32, 1, 16, 16, dtype=dtype))
    bj.initialize_from_data(model, x)
    with torch.no_grad():
        assert (model.inverse(model(x)[0]) - x).abs().max() <= (
            1e-10 if dtype == F64 else 1e-4)


@pytest.mark.parametrize("floor", [0.1, 0.5])
def test_scale_floor_bounds_error_growth_of_the_inverse(floor):
    weightless = nn.Linear(1, 2, dtype=F64)
    nn.init.zeros_(weightless.weight)
    y, error = torch.randn(8, 2, dtype=F64), torch.tensor([0.0, 1e-3], dtype=F64)
    for raw in (-50.0, -5.0, 0.0, 50.0):
        nn.init.constant_(weightless.bias, raw)
        layer = bj.AffineCoupling(weightless, floor)
        growth = (layer.inverse(y + error) - layer.inverse(y)).abs().max() / 1e-3
        assert 1 - 1e-9 <= growth <= 1 / floor + 1e-9


# law 3: densities and samples ---------------------------------------------------------

PLANE = [
    pytest.param(lambda: bj.Chain(*(LAYERS["chain"]((2,)) for _ in range(2))), (2,),
                 id="chain"),
    pytest.param(lambda: bj.ConditionalStandardize(mlp(1, 2)), (2,), id="whiten"),
    pytest.param(lambda: bj.ActNorm(1), (1, 1, 2), id="actnorm-image"),
    pytest.param(lambda: bj.InvertibleConv(1, lu=False), (1, 1, 2), id="conv-image"),
]


@pytest.mark.parametrize(("make", "shape"), PLANE)
def test_density_integrates_to_one_and_samples_follow_it(make, shape):
    torch.manual_seed(0)
    layer, reach, bins, fine, n = kick(make(), 0.3).to(F64), 16.0, 64, 8, 50_000
    t = ((torch.arange(bins * fine, dtype=F64) + 0.5) / (bins * fine) * 2 - 1) * reach
    with torch.no_grad():
        density = log_prob(layer, torch.cartesian_prod(t, t).view(-1, *shape)).exp()
        mass = density.view(bins, fine, bins,
                            fine).sum((1, 3)) * (2 * reach / (bins * fine)) ** 2
        x = layer.inverse(torch.randn(n, *shape, dtype=F64)).view(n, 2)
    assert abs(mass.sum() - 1) < 1e-3
    counts = torch.histogramdd(x, [bins, bins], range=[-reach, reach] * 2).hist
    many = mass * n > 10
    chi = ((counts - mass * n) ** 2 / (mass * n))[many]
    # five standard deviations of a mean of χ²₁
    assert abs(chi.mean() - 1) < 5 * math.sqrt(2 / many.sum())


def test_a_wrong_ladj_does_not_integrate_to_one():
    layer = ForgetsPixels(1, lu=False).to(F64)
    nn.init.constant_(layer.weight, 0.5)
    t = torch.linspace(-16, 16, 401, dtype=F64)
    with torch.no_grad():
        total = (log_prob(layer, torch.cartesian_prod(t, t).view(-1, 1, 1, 2)).exp()
                 .sum() * 0.08**2)
    assert abs(total - 2) < 1e-6


def test_standard_normal():
    z = torch.randn(4, 3, 2, dtype=F64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2))
    assert torch.allclose(bj.standard_normal_log_prob(z), expected)
    assert bj.standard_normal_log_prob(z[:0]).shape == (0,)


# the layers, one by one ---------------------------------------------------------------

@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 4)])
def test_initialisation_from_data_standardises(shape):
    torch.manual_seed(0)
    model = bj.Chain(bj.ActNorm(3), bj.InvertibleConv(3), bj.ActNorm(3)).to(F64)
    scale = torch.tensor([30.0, 0.1, 1.0], dtype=F64).view(3, *[1] * (len(shape) - 1))
    x = scale * (torch.randn(400, *shape, dtype=F64) + 5)
    bj.initialize_from_data(model, x)
    y = model(x)[0]
    dims = [0, *range(2, y.dim())]
    assert y.mean(dims).abs().max() < 1e-9
    assert (y.var(dims, unbiased=False) - 1).abs().max() < 1e-3
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_initialisation_with_constant_channel_and_after_error():
    layer = bj.ActNorm(2)
    bj.initialize_from_data(layer, torch.ones(8, 2))
    assert (layer.log_scale.exp().max() <= 1001
            and torch.equal(layer(torch.ones(8, 2))[0], torch.zeros(8, 2)))
    broken = bj.Chain(bj.ActNorm(2), bj.Bijection())
    with pytest.raises(TypeError, match="no forward"):
        bj.initialize_from_data(broken, torch.ones(8, 2))
    assert not any(m._forward_pre_hooks for m in broken.modules())


@pytest.mark.parametrize("c", [1, 3, 8])
def test_lu_and_plain_convolutions_agree(c):
    torch.manual_seed(c)
    lu = kick(bj.InvertibleConv(c), 0.5).to(F64)
    plain = bj.InvertibleConv(c, lu=False).to(F64)
    plain.weight.data = lu.matrix().detach()
    x = torch.randn(2, c, 3, 2, dtype=F64)
    for a, b in zip(lu(x), plain(x), strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(lu.inverse(x), plain.inverse(x))


@pytest.mark.parametrize("lu", [True, False])
def test_convolution_starts_as_a_rotation(lu):
    layer = bj.InvertibleConv(6, lu).to(F64)
    w = layer.matrix()
    assert torch.allclose(w @ w.T, torch.eye(6, dtype=F64), atol=1e-5)
    assert layer(torch.randn(2, 6, 2, 2, dtype=F64))[1].abs().max() < 1e-4


def test_lu_convolution_state_dict_is_complete():
    a, b = bj.InvertibleConv(5), bj.InvertibleConv(5)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.matrix(), b.matrix())


def test_couplings_keep_the_first_half_and_condition_on_it():
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    for make in (LAYERS["additive"], LAYERS["affine"], LAYERS["whiten"]):
        layer = kick(make((5,)), 0.5)
        y = layer(x)[0]
        assert (torch.equal(y[:, :2], x[:, :2])
                and not torch.allclose(y[:, 2:], x[:, 2:]))
    assert [h.shape[1] for h in bj.split_channels(x)] == [2, 3]


def test_start_of_an_affine_coupling():
    a = torch.zeros(1, 2)
    for floor, scale in ((0.0, 0.8808), (0.1, 0.8927)):
        assert abs(bj.AffineCoupling(mlp(2, 4), floor)
                   .shift_scale(mlp(2, 4)(a))[1].mean() - scale) < 1e-4


def test_whiten_is_a_split_prior():
    torch.manual_seed(0)
    layer, x = (kick(bj.ConditionalStandardize(conv(2, 4)), 0.5).to(F64),
                torch.randn(3, 4, 2, 2, dtype=F64))
    a, b = bj.split_channels(x)
    mean, log_std = layer.mean_logstd(layer.net(a))
    prior = torch.distributions.Normal(mean, log_std.exp()).log_prob(b).sum((1, 2, 3))
    y, ladj = layer(x)
    assert torch.allclose(prior,
                          bj.standard_normal_log_prob(bj.split_channels(y)[1]) + ladj)
    nn.init.constant_(layer.net[-1].bias, 1e6)
    assert layer.mean_logstd(layer.net(a))[1].abs().max() <= layer.bound


def test_squeeze_orders_pixels_and_refuses_odd_sides():
    y = bj.Squeeze()(torch.arange(16.0).view(1, 1, 4, 4))[0]
    assert y.shape == (1, 4, 2, 2) and y[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    with pytest.raises(ValueError, match="even; given 3×4"):
        bj.Squeeze()(torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize(
    ("shape", "shapes"),
    [
        ((1, 16, 16), [(2, 8, 8), (4, 4, 4), (16, 2, 2)]),
        ((1, 32, 32), [(2, 16, 16), (4, 8, 8), (16, 4, 4)]),
        ((3, 64, 64), [(6, 32, 32), (12, 16, 16), (48, 8, 8)]),
    ],
)
def test_multiscale_shapes(shape, shapes):
    model = bj.MultiScale([bj.Squeeze()] * 3, shape)
    assert model.shapes == shapes
    z = model(torch.randn(2, *shape))[0]
    assert z.shape == (2, math.prod(shape))
    assert [tuple(part.shape) for part in model.split(z)] == [(2, *s) for s in shapes]


def test_multiscale_orders_latents_from_coarse_to_fine():
    model = bj.MultiScale([bj.Squeeze()] * 2, (1, 4, 4))
    x = torch.arange(16.0).view(1, 1, 4, 4)
    first = bj.Squeeze()(x)[0]
    fine, coarse = model.split(model(x)[0])
    assert (torch.equal(fine, first[:, 2:])
            and torch.equal(coarse, bj.Squeeze()(first[:, :2])[0]))
    assert torch.equal(model(x)[0][:, :8], coarse.flatten(1))


@pytest.mark.parametrize(("size", "levels", "nearest"), [
    ((28, 28), 3, "32×32"), ((8, 6), 2, "8×8"), ((5, 4), 1, "6×4")])
def test_multiscale_refuses_indivisible_sizes(size, levels, nearest):
    with pytest.raises(ValueError, match=f"given {size[0]}×{size[1]}.*{nearest}"):
        bj.MultiScale([bj.Squeeze()] * levels, (1, *size))


def test_pixels_and_channels():
    assert [bj.n_positions(torch.zeros(2, 3, *s)) for s in ((), (5,), (4, 5))] == [
        1, 5, 20]
    assert bj.per_channel(torch.zeros(3), torch.zeros(2, 3, 4, 5)).shape == (1, 3, 1, 1)


# grey levels and bits -----------------------------------------------------------------

@pytest.mark.parametrize("bins", [2, 32, 256])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_quantize_inverts_dequantize(bins, dtype):
    """Each level, under noise from 0 to just below 1, comes back by rounding;
    at the middle exactly.
    """
    levels = torch.arange(bins, dtype=dtype)
    x = levels / (bins - 1)
    for noise in (0.01, 0.25, 0.5, 0.75, 0.99):
        v = bj.dequantize(x, torch.full_like(x, noise), bins)
        assert v.dtype == dtype and v.min() >= -0.5 and v.max() < 0.5
        assert torch.equal(((v + 0.5) * bins).floor(), levels)
        assert torch.equal((bj.quantize(v, bins) * (bins - 1)).round(), levels)
    middle = bj.dequantize(x, torch.full_like(x, 0.5), bins)
    assert torch.allclose(bj.quantize(middle, bins), x, atol=1e-6)
    assert torch.allclose(middle.diff(), torch.tensor(1 / bins, dtype=dtype), atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("bins", [2, 256, 65_536])
def test_dequantize_never_reaches_its_upper_end(bins, dtype):
    """The largest noise below 1 would be rounded up; nothing else changes."""
    noise = torch.tensor([0.5, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    v = bj.dequantize(torch.ones(2, dtype=dtype), noise, bins)
    assert v.max() < 0.5 and v.dtype == dtype
    grey = (torch.arange(256) / 255).to(dtype)
    assert torch.equal(bj.dequantize(grey, noise[0]), (grey * 255 + 0.5) / 256 - 0.5)


@pytest.mark.parametrize(("verb", "shape", "message"), [
    ("forward", (4, 2, 2), r"shape \(4, 2, 2\); accepted: images \(n, c, h, w\)"),
    ("inverse", (4, 2, 2), r"accepted: images \(n, c, h, w\)"),
    ("forward", (1, 2, 1, 2, 2), "accepted: images"), ("forward", (2, 4), "accepted"),
    ("inverse", (1, 6, 2, 2), "6 channels; accepted: a multiple of 4")])
def test_squeeze_takes_batches_of_images_only(verb, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(bj.Squeeze(), verb)(torch.zeros(shape))


def test_quantize_clamps():
    assert bj.quantize(torch.tensor([-3.0, -0.5, 0.5, 3.0])).tolist() == [0, 0, 1, 1]


def test_bits_per_dim():
    # density 1 on the unit cube, minus dims·log(bins)
    uniform = torch.tensor(-784 * math.log(256), dtype=F64)
    assert math.isclose(bj.bits_per_dim(uniform, 784), 8, rel_tol=1e-12)
    assert math.isclose(bj.bits_per_dim(torch.tensor(-math.log(2), dtype=F64), 1), 1,
                        rel_tol=1e-12)
    assert bj.bits_per_dim(torch.zeros(3, 2), 5).shape == (3, 2)


def test_dequantised_density_bounds_the_discrete_likelihood():
    """Two levels, one dimension: the mass of each bin by quadrature is at least the
    exponential of the mean.
    """
    noise = (torch.arange(4000, dtype=F64) + 0.5) / 4000
    normal = torch.distributions.Normal(torch.tensor(0.1, dtype=F64), 0.3)
    for x in (0.0, 1.0):
        v = bj.dequantize(torch.tensor(x, dtype=F64), noise, 2)
        exact = (normal.cdf(torch.tensor(x / 2, dtype=F64))
                 - normal.cdf(torch.tensor(x / 2 - 0.5, dtype=F64))).log()
        bound = normal.log_prob(v).mean() - math.log(2)
        assert abs((normal.log_prob(v).exp().mean() / 2).log() - exact) < 1e-6
        assert exact - 1 < bound < exact - 1e-3


def test_unimplemented_bijection_methods_raise_type_error():
    with pytest.raises(TypeError, match="Bijection has no forward"):
        bj.Bijection()(torch.zeros(1, 2))
    with pytest.raises(TypeError, match="Bijection has no inverse"):
        bj.Bijection().inverse(torch.zeros(1, 2))
