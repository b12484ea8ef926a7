"""Laws of the shared blocks: sizes, coverage, doubling, variance, Lipschitz bounds,
equal relative steps.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condgen.blocks import (UpsampleConv, downsampling_network, upsampling_kernel,
                            n_doublings, equalize_learning_rate, he_std, layer,
                            upsampling_network)


@pytest.fixture(autouse=True)
def double_precision():
    """Numeric laws hold in float64; each test starts from the same seed."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("side", [8, 16, 32, 64])
@pytest.mark.parametrize("norm", ["none", "batch", "spectral"])
def test_networks_have_the_documented_sizes(side, norm):
    shape = (3, side, side)
    assert n_doublings(shape) == int(math.log2(side // 4))
    net, features = downsampling_network(shape, 4, norm)
    assert (net(torch.rand(2, *shape)).shape == (2, features)
            and features == 16 * 4 * 2 ** (n_doublings(shape) - 1))
    assert net[:-1](torch.rand(2, *shape)).shape[2:] == (4, 4)
    assert upsampling_network(7, shape, 4, norm)(torch.randn(2, 7)).shape == (2, *shape)


def test_width_stops_growing():
    widths = [m.out_channels
              for m in convolutions(downsampling_network((1, 128, 128), 2)[0])]
    assert widths == [2, 4, 8, 16, 16]
    widths = [m.out_channels
              for m in convolutions(upsampling_network(3, (1, 128, 128), 2))
              if isinstance(m, nn.Conv2d)]
    assert widths == [16, 16, 8, 4, 2, 1]
    for side in (64, 128, 256):
        first, places = upsampling_network(3, (1, side, side), 2)[0], 16
        assert first.out_features == places * 2 * min(8, side // 4)


@pytest.mark.parametrize("shape",
                         [(1, 28, 28), (1, 4, 4), (1, 16, 32), (1, 0, 0), (3, 24, 24)])
def test_other_sides_are_refused(shape):
    for call in (lambda: downsampling_network(shape, 4),
                 lambda: upsampling_network(3, shape, 4)):
        with pytest.raises(ValueError, match=f"{shape[1]}×{shape[2]} pixels; accepted: "
                               "squares with sides 8, 16"):
            call()


@pytest.mark.parametrize("norm", ["none", "batch", "spectral"])
def test_negative_slope_is_0_2_in_downsampling_0_in_upsampling(norm):
    below = torch.tensor(-1.0)
    for net, passes in ((downsampling_network((1, 32, 32), 2, norm)[0], -0.2),
                        (upsampling_network(3, (1, 32, 32), 2, norm), 0.0)):
        found = [m(below).item() for m in net if isinstance(m, nn.LeakyReLU)]
        assert (len(found) >= 3
                and all(value == pytest.approx(passes) for value in found))


@pytest.mark.parametrize(("call", "says"), [
    (lambda: downsampling_network((1, 8), 4),
     r"shape \(1, 8\); accepted: integers \(channels, side, side\)"),
    (lambda: downsampling_network((1, 8.0, 8.0), 4), "accepted: integers"),
    (lambda: upsampling_network(3, "abc", 4), "shape 'abc'; accepted: integers"),
    (lambda: downsampling_network((0, 8, 8), 4),
     "channels=0; accepted: an integer, 1 or more"),
    (lambda: downsampling_network((1, 8, 8), 0),
     "width=0; accepted: an integer, 1 or more"),
    (lambda: upsampling_network(3, (1, 8, 8), -1), "width=-1; accepted"),
    (lambda: downsampling_network((1, 8, 8), 4.5), "width=4.5; accepted"),
    (lambda: upsampling_network(0, (1, 8, 8), 4), "dims=0; accepted"),
    (lambda: upsampling_network(-1, (1, 8, 8), 4), "dims=-1; accepted")])
def test_other_sizes_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_unknown_normalisation_is_refused():
    with pytest.raises(ValueError,
                       match="norm='spectrum'; accepted: none, batch, spectral"):
        downsampling_network((1, 8, 8), 4, "spectrum")


@pytest.mark.parametrize(("channels", "out", "size"), [(1, 1, 4), (3, 5, 6), (4, 2, 1)])
def test_doubling_is_nearest_upsampling_and_a_convolution(channels, out, size):
    """Values and gradients, up to the border."""
    double, x = (UpsampleConv(channels, out),
                 torch.randn(2, channels, size, size, requires_grad=True))
    slow = F.conv2d(F.interpolate(x, scale_factor=2), double.weight, double.bias,
                    padding=1)
    assert (double(x).shape == (2, out, 2 * size, 2 * size)
            and torch.allclose(double(x), slow))
    mix = torch.randn_like(slow)
    for a, b in zip(*(torch.autograd.grad((y * mix).sum(), [x, *double.parameters()])
                      for y in (double(x), slow))):
        assert torch.allclose(a, b)


def test_doubling_kernel_has_tied_phases():
    weight = torch.randn(5, 3, 3, 3)
    kernel = upsampling_kernel(weight)
    assert kernel.shape == (3, 5, 4, 4)
    for i in (0, 1):
        for j in (0, 1):
            assert torch.allclose(kernel[:, :, i::2, j::2].sum((2, 3)),
                                  weight.sum((2, 3)).T)


def test_upsampling_maps_constants_to_constants():
    """No checkerboard at the start, whatever the weights: away from the border a
    flat map stays flat.
    """
    body = upsampling_network(3, (1, 64, 64), 4)
    cells = torch.rand(1, body[2].unflattened_size[0], 1, 1).expand(-1, -1, 12, 12)
    x = body[3:](cells)
    assert x[:, :, 40:-40, 40:-40].std() < 1e-12 < 1e-3 < x.std()


def test_downsampling_covers_inner_pixels_equally():
    net, _ = downsampling_network((1, 16, 16), 2)
    conv = copy.deepcopy(convolutions(net)[0])
    nn.init.ones_(conv.weight)
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    slope, = torch.autograd.grad(conv(x).sum(), x)
    assert slope[..., 1:-1, 1:-1].std() == 0


@pytest.mark.parametrize("side", [16, 32])
def test_receptive_fields(side):
    net, _ = downsampling_network((1, side, side), 4)
    x = torch.randn(1, 1, side, side, requires_grad=True)
    net[:-1](x)[0, :, 1, 1].sum().backward()
    assert (x.grad[0, 0] != 0).any(0).sum() == 3 * side // 4 - 2


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("kind", [nn.Linear(300, 200), nn.Conv2d(30, 200, 3)],
                         ids=["linear", "convolution"])
def test_variance_is_preserved(kind, slope):
    """White noise through a leaky ReLU and a layer keeps its variance."""
    u = (torch.randn(50, 300) if isinstance(kind, nn.Linear)
         else torch.randn(20, 30, 8, 8))
    fan = 300 if isinstance(kind, nn.Linear) else 270
    assert math.isclose(he_std(kind.weight, slope) ** 2, 2 / ((1 + slope**2) * fan))
    made = layer(copy.deepcopy(kind).double(), "none", slope)
    assert made[1].negative_slope == slope and not made[0].bias.any()
    out = made[0](F.leaky_relu(u, slope))
    assert abs(out.square().mean().item() - 1) < 0.1


def test_no_batch_normalisation_next_to_the_image():
    net, _ = downsampling_network((1, 32, 32), 4, "batch")
    kinds = [type(m).__name__ for m in net]
    assert kinds == ["Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2,
                     "Flatten"]
    body = [type(m).__name__ for m in upsampling_network(3, (1, 8, 8), 4, "batch")]
    first = ["Linear", "BatchNorm1d", "LeakyReLU", "Unflatten"]
    assert body == [*first, "UpsampleConv", "BatchNorm2d", "LeakyReLU", "Conv2d"]


def test_spectral_normalisation_bounds_the_lipschitz_constant():
    """Each 4×4 convolution of stride 2 is at most 2-Lipschitz, however large
    its weights were made.
    """
    side = 16
    net, _ = downsampling_network((1, side, side), 8, "spectral")
    with torch.no_grad():
        for p in net.parameters():
            p *= 30
        for _ in range(100):
            net(torch.rand(2, 1, side, side))
    for m in convolutions(net.eval()):
        assert abs(torch.linalg.svdvals(m.weight.detach().flatten(1))[0] - 1) < 1e-3
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x)[0],
                                                  torch.rand(1, 1, side, side))
    assert torch.linalg.svdvals(jacobian.reshape(-1, side * side))[0] <= 4


def test_equalized_keeps_the_function_and_rescales_parameters():
    net = upsampling_network(20, (1, 16, 16), 16)
    x = torch.randn(4, 20)
    before = net(x)
    weights = [m.weight.detach().clone() for m in convolutions(net)]
    assert equalize_learning_rate(net) is net and torch.allclose(net(x), before)
    for m, w in zip(convolutions(net), weights):
        raw = m.parametrizations.weight.original
        assert torch.allclose(raw * he_std(w), w)
    for m in convolutions(net)[:-1]:
        assert abs(m.parametrizations.weight.original.std() - 1) < 0.1
    names = [name for name, _ in net.named_parameters()]
    # a second time changes nothing
    assert [name for name, _ in equalize_learning_rate(net).named_parameters()] == names


def test_adams_relative_step_is_equal_over_layers():
    def steps(wrap, lr=1e-3):
        torch.manual_seed(1)
        net = wrap(upsampling_network(200, (1, 16, 16), 8))
        layers = convolutions(net)[:-1]
        old = [m.weight.detach().clone() for m in layers]
        optimizer = torch.optim.Adam(net.parameters(), lr, eps=1e-16)
        net(torch.randn(8, 200)).square().mean().backward()
        optimizer.step()
        moved = [((m.weight - w).norm() / w.norm()).item() for m, w in zip(layers, old)]
        return moved, [lr * math.sqrt(w[0].numel() / 2) for w in old]

    plain, formula = steps(lambda net: net)
    assert (all(abs(a / b - 1) < 0.1 for a, b in zip(plain, formula))
            and max(plain) > 1.2 * min(plain))
    assert all(abs(a / 1e-3 - 1) < 0.1 for a in steps(equalize_learning_rate)[0])


def test_equalised_survives_saving():
    net, again = (equalize_learning_rate(upsampling_network(5, (1, 8, 8), 4))
                  for _ in range(2))
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 5)
    assert torch.equal(net(x), again(x))
