"""The engine of the flows: backpropagation by recomputing, convolutions by rows, and
the switches of `Glow`.

What a layer computes is said by its definition (`Chain.forward`, `Coupling.forward`,
`nn.Sequential.forward`), see `plainly`; everything else is a faster or smaller way to
the same numbers.
"""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_glow import Bars
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from condgen import reversible
from condgen.bijections import (
    ActNorm, AdditiveCoupling, AffineCoupling, Bijection, Chain, Coupling,
    InvertibleConv, MultiScale, Squeeze, ConditionalStandardize, split_channels,
    standard_normal_log_prob)
from condgen.conditions import Classes
from condgen.contracts import Batch, Noise
from condgen.models import glow as glow_module
from condgen.models.cglow import CGlow
from condgen.models.coupling import CouplingNet, GlowStep, ZeroConv
from condgen.models.glow import Glow, SplitPrior, glow_flow
from condgen.reversible import (
    RecomputeFunction, ReversibleChain, coupling_net_backward, bf16_is_faster,
    coupling_net_forward, neighbour_indices, network_dtype, fold_patches,
    extract_patches, row_chunks, apply_coupling_net, backward_from_output)
from condgen.files import digest
from condgen.runs import load
from condgen.training import fit

CPU = torch.device("cpu")
KINDS = ["affine", "additive"]
# reversible, bf16
SWITCHES = list(itertools.product([None, True, False], [None, True, False]))
SETTLED = list(itertools.product([True, False], [True, False]))
calmly = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def kick(module, size=0.1, dtype=torch.float64, seed=0):
    """Parameters away from their start, where zeros would hide mistakes."""
    module, generator = module.to(dtype), seeded(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn(p.shape, generator=generator,
                                    dtype=torch.float64).to(dtype)
    return module


def build(cls=Glow, shape=(1, 8, 8), levels=2, depth=2, width=8, **options):
    torch.manual_seed(0)
    conditions = {"conditions": [Classes("digit", 3)]} if cls is CGlow else {}
    return cls(shape, **conditions, levels=levels, depth=depth, width=width, **options)


def flow_of(shape=(1, 8, 8), levels=2, depth=2, width=8, coupling="affine",
            reversible=True, **kicked):
    torch.manual_seed(0)
    return kick(glow_flow(shape, levels, depth, width, coupling, reversible), **kicked)


def decide(flow, reversible):
    """The same flow, recomputing or not."""
    for level in flow.levels:
        level.reversible = reversible
    return flow


# the definitions ------------------------------------------------------------


def plainly(layer, x):
    """`layer(x)` as it is defined: layer by layer, with convolutions, nothing fused
    and nothing recomputed.
    """
    if isinstance(layer, MultiScale):
        total, emitted = 0, []
        for i, level in enumerate(layer.levels):
            x, ladj = plainly(level, x)
            total = total + ladj
            if i < len(layer.levels) - 1:
                x, out = split_channels(x)
                emitted.insert(0, out.flatten(1))
        return torch.cat([x.flatten(1), *emitted], 1), total
    if isinstance(layer, Chain):
        total = 0
        for part in layer.layers:
            x, ladj = plainly(part, x)
            total = total + ladj
        return x, total
    if isinstance(layer, Coupling):
        a, b = split_channels(x)
        answer = (nn.Sequential.forward(layer.net, a)
                  if isinstance(layer.net, CouplingNet) else layer.net(a))
        y, log_scale = layer.transform(b, answer)
        return torch.cat([a, y], 1), log_scale.flatten(1).sum(1)
    return layer(x)


def plainly_back(layer, y):
    """`layer.inverse(y)` as it is defined."""
    if isinstance(layer, Chain):
        for part in reversed(layer.layers):
            y = plainly_back(part, y)
        return y
    if isinstance(layer, Coupling) and isinstance(layer.net, CouplingNet):
        a, b = split_channels(y)
        return torch.cat([a, layer.restore(b, nn.Sequential.forward(layer.net, a))], 1)
    return layer.inverse(y)


def loss_of(y, ladj):
    """A number in which every element of both has its own weight."""
    mix = randn(*y.shape, seed=5, dtype=y.dtype)
    return ((mix * y).sum() + 0.1 * y.square().sum()
            + (ladj * randn(len(ladj), seed=6, dtype=ladj.dtype)).sum())


def gradients(run, module, x, loss=loss_of):
    """Of the loss of `run(x)`, with respect to `x` and all parameters; zeros
    where there is none.
    """
    x = x.detach().clone().requires_grad_()
    ends = [x, *module.parameters()]
    found = torch.autograd.grad(loss(*run(x)), ends, allow_unused=True)
    return [torch.zeros_like(e) if g is None else g for e, g in zip(ends, found)]


def distance(have, want):
    """Relative error of a whole gradient."""
    a, b = (torch.cat([t.double().flatten() for t in ts]) for ts in (have, want))
    return ((a - b).norm() / b.norm()).item()


def alike(have, want, close=1e-9):
    """Relative error of each part below `close`; parts that all but vanish are
    measured by the whole.
    """
    whole = math.sqrt(sum(float(w.square().sum()) for w in want))
    return all(h.shape == w.shape and float((h - w).norm())
                   <= close * max(float(w.norm()), 1e-3 * whole)
               for h, w in zip(have, want, strict=True))


@contextmanager
def rows_per_piece(rows):
    with mock.patch.object(reversible, "ROWS_PER_CHUNK", rows):
        yield


def ambient(on):
    """Autocast of the caller."""
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


# convolution by rows ------------------------------------------------------------

sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


def test_neighbours_are_counted_from_one_in_reading_order():
    table = neighbour_indices((2, 2, 3), CPU)
    assert table.shape == (12, 9)
    assert table[0].tolist() == [0, 0, 0, 0, 1, 2, 0, 4, 5]
    assert table[4].tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 0]
    # of the second image: nothing of the first
    assert table[7].tolist() == [0, 0, 0, 7, 8, 9, 10, 11, 12]


@calmly
@given(sizes, st.integers(1, 4))
def test_overlap_is_the_transposed_map_of_patches(size, c):
    rows = math.prod(size)
    x, u = randn(rows, c), randn(rows, 9 * c, seed=1)
    assert (extract_patches(x, size).shape == (rows, 9 * c)
            and fold_patches(u, size).shape == (rows, c))
    assert torch.isclose((extract_patches(x, size) * u).sum(),
                         (x * fold_patches(u, size)).sum(), atol=1e-10)


def images_of(rows, size):
    return rows.view(*size, -1).permute(0, 3, 1, 2)


def rows_of(x):
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def convolutions(a, size, weights):
    """What `coupling_net_forward` computes, by `conv2d`."""
    w1, b1, w2, b2, w3 = weights
    c_in, width, c_out = len(w1) // 9, len(w2), w3.shape[1] // 9
    k1 = w1.view(3, 3, c_in, width).permute(3, 2, 0, 1).contiguous()
    k3 = w3.view(width, 3, 3, c_out).permute(3, 0, 1, 2).flip(2, 3).contiguous()
    h = F.conv2d(images_of(a, size), k1, b1, padding=1).relu()
    h = F.conv2d(h, w2.T[:, :, None, None].contiguous(), b2).relu()
    return rows_of(F.conv2d(h, k3, padding=1))


def net_of(size, c_in, width, c_out, dtype=torch.float64):
    shapes = [(9 * c_in, width), (width,), (width, width), (width,), (width, 9 * c_out)]
    weights = tuple(randn(*s, seed=10 + i, dtype=dtype) / s[0] ** 0.5
                    for i, s in enumerate(shapes))
    return randn(math.prod(size), c_in, seed=9, dtype=dtype), weights


@calmly
@given(sizes, st.integers(1, 3), st.integers(1, 6), st.integers(1, 4),
       st.sampled_from([1, 7, 20, 2048]))
def test_run_net_equals_three_convolutions_and_their_gradient(size, c_in, width, c_out,
                                                              rows):
    a, weights = net_of(size, c_in, width, c_out)
    ends = [t.requires_grad_() for t in (a, *weights)]
    want = convolutions(a, size, weights)
    grad = randn(*want.shape, seed=3)
    grads = torch.autograd.grad(want, ends, grad)
    with rows_per_piece(rows):
        have = apply_coupling_net(a, size, weights, a.dtype)
        found = torch.autograd.grad(have, ends, grad)
        with torch.no_grad():
            assert torch.allclose(apply_coupling_net(a, size, weights, a.dtype), want,
                                  atol=1e-12)
    assert torch.allclose(have, want, atol=1e-12) and alike(found, grads, 1e-11)
    with torch.no_grad():
        once, kept = coupling_net_forward(a, size, weights)
        assert torch.allclose(once, want, atol=1e-12)
        assert alike(coupling_net_backward(grad, size, weights, kept), grads, 1e-11)


def test_run_net_in_bf16_keeps_the_input_dtype():
    a, weights = net_of((3, 4, 5), 2, 8, 3, torch.float32)
    ends = [t.requires_grad_() for t in (a, *weights)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        y = apply_coupling_net(a, (3, 4, 5), weights, dtype)
        assert y.dtype == torch.float32
        found.append(
            (y, torch.autograd.grad(y, ends, randn(*y.shape, seed=3, dtype=y.dtype))))
        assert all(g.dtype == torch.float32 for g in found[-1][1])
        with torch.no_grad():
            assert torch.equal(apply_coupling_net(a, (3, 4, 5), weights, dtype), y)
    (full, exact), (half, rough) = found
    assert (1e-4 < distance([half], [full]) < 2e-2
            and 1e-4 < distance(rough, exact) < 5e-2)


@calmly
@given(sizes, st.integers(1, 40))
def test_pieces_are_whole_images_and_complete(size, rows):
    n, h, w = size
    with rows_per_piece(rows):
        found = list(row_chunks(size, CPU))
        elsewhere = list(row_chunks(size, torch.device("meta")))
    covered = [i for piece, _ in found for i in range(n * h * w)[piece]]
    assert covered == list(range(n * h * w))
    assert all(part[1:] == (h, w) and piece.stop - piece.start == math.prod(part)
               for piece, part in found)
    assert all(part[0] == 1 or math.prod(part) <= rows for _, part in found)
    assert elsewhere[0][1][0] == min(n, max(1, 64 * rows // (h * w)))


@pytest.mark.parametrize("rows", [1, 50, 2048])
@pytest.mark.parametrize("n", [1, 5])
def test_a_coupling_network_is_the_sequence_of_its_layers(n, rows):
    net, x = kick(CouplingNet(2, 6, 7), 0.3), randn(n, 2, 3, 5)

    def whole(run):
        return gradients(lambda v: (run(v), v.new_zeros(n)), net, x)

    with rows_per_piece(rows):
        assert torch.allclose(net(x), nn.Sequential.forward(net, x), atol=1e-12)
        assert alike(whole(net), whole(lambda v: nn.Sequential.forward(net, v)))


def test_tables_made_in_inference_mode_serve_training_too():
    """The tables of neighbours are remembered; who asked first must not matter."""
    size, a = (2, 3, 4), randn(24, 2).requires_grad_()
    for table in (reversible.neighbour_indices, reversible.fold_indices):
        table.cache_clear()
    with torch.inference_mode():
        fold_patches(extract_patches(randn(24, 2), size), size)
    grad, = torch.autograd.grad(fold_patches(extract_patches(a, size), size).sum(), a)
    assert grad.shape == a.shape


# a step of flow ------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 24, 2048])
@pytest.mark.parametrize("coupling", KINDS)
@pytest.mark.parametrize("channels", [4, 5])
def test_step_equals_the_chain_of_its_layers(channels, coupling, rows):
    torch.manual_seed(0)
    step, x = kick(GlowStep(channels, 6, coupling), 0.2), randn(3, channels, 2, 6)

    def back(run):
        return lambda y: (run(y), y.new_zeros(len(y)))

    with rows_per_piece(rows):
        (y, ladj), (want, want_ladj) = step(x), plainly(step, x)
        assert (torch.allclose(y, want, atol=1e-12)
                and torch.allclose(ladj, want_ladj, atol=1e-11))
        assert (step.inverse(y) - x).abs().max() < 1e-11
        with torch.no_grad():
            assert (step.inverse(y) - plainly_back(step, y)).abs().max() < 1e-11
        assert alike(gradients(step, step, x),
                     gradients(lambda v: plainly(step, v), step, x))
        assert alike(gradients(back(step.inverse), step, x),
                     gradients(back(lambda v: plainly_back(step, v)), step, x))


@pytest.mark.parametrize("rows", [1, 24, 2048])
@pytest.mark.parametrize("coupling", KINDS)
def test_undo_of_a_step_equals_undo_of_its_chain(coupling, rows):
    torch.manual_seed(0)
    step, x = kick(GlowStep(6, 5, coupling), 0.2), randn(5, 6, 4, 3)
    y, _ = step(x)
    grads = randn(*y.shape, seed=1), randn(len(y), seed=2)
    with rows_per_piece(rows):
        (back, grad, found), (want_x, want, wanted) = (
            backward_from_output(layer, y.detach(), *grads)
            for layer in (step, Chain(step)))
    assert (back - x).abs().max() < 1e-11 and (want_x - x).abs().max() < 1e-11
    assert alike([grad, *found], [want, *wanted])
    grad_x, *params = torch.autograd.grad(plainly(step, x.requires_grad_()),
                                          [x, *step.parameters()], grads)
    assert alike([grad, *found], [grad_x, *params])


@pytest.mark.parametrize("layer", [lambda: GlowStep(4, 8),
                                   lambda: Chain(GlowStep(4, 8)), lambda: ActNorm(4)],
                         ids=["step", "chain", "actnorm"])
def test_undo_accepts_an_output_attached_to_its_graph(layer):
    torch.manual_seed(0)
    layer, x = kick(layer(), 0.2), randn(2, 4, 4, 4)
    y, ladj = layer(x)
    before = y.detach().clone()
    grads = torch.ones_like(y), torch.ones_like(ladj)
    apart, hanging = (backward_from_output(layer, y.detach(), *grads),
                      backward_from_output(layer, y, *grads))
    assert (torch.equal(y, before)
            and all(torch.equal(g, torch.ones_like(g)) for g in grads))
    assert not hanging[0].requires_grad and not hanging[1].requires_grad
    assert alike([*hanging[:2], *hanging[2]], [*apart[:2], *apart[2]], 1e-14)


# gradients by recomputing ------------------------------------------------------------


@calmly
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
       st.integers(1, 5), st.integers(1, 3),
       st.integers(1, 9), st.sampled_from(KINDS), st.sampled_from([1, 10, 40, 2048]))
def test_recomputed_gradients_are_those_of_the_layers(levels, c, h, w, n, depth, width,
                                                      coupling, rows):
    """Law: recomputing = keeping = the definition, whatever the shape and
    however the batch is cut.
    """
    shape = c, h * 2**levels, w * 2**levels
    flow, x = flow_of(shape, levels, depth, width, coupling), randn(n, *shape)
    want = gradients(lambda v: plainly(flow, v), flow, x)
    with rows_per_piece(rows):
        for reversible_ in (True, False):
            assert alike(gradients(decide(flow, reversible_), flow, x), want)


@pytest.mark.parametrize("coupling", KINDS)
def test_32_steps_in_single_precision(coupling):
    """Errors of recomputing do not pile up: 1e-4 of the gradient in double
    precision, after 32 steps.
    """
    flow, x = flow_of(levels=1, depth=32, coupling=coupling), randn(5, 1, 8, 8)
    want = gradients(lambda v: plainly(flow, v), flow, x)
    single, short = copy.deepcopy(flow).float(), x.float()
    assert distance(gradients(single, single, short), want) < 1e-4
    assert distance(gradients(decide(single, False), single, short), want) < 1e-4


class Scaled(Bijection):
    """y = x·exp(p), or x with a parameter that plays no part."""

    def __init__(self, p, used=True):
        super().__init__()
        self.p, self.used = p, used

    def forward(self, x):
        p = self.p if self.used else torch.zeros_like(self.p)
        return x * p.exp(), (p.sum() * x[0].numel() / len(p)).expand(len(x))

    def inverse(self, y):
        return y * (-self.p).exp() if self.used else y


def small_network(c_in, c_out):
    return nn.Sequential(nn.Linear(c_in, 8), nn.Tanh(), nn.Linear(8, c_out))


def test_any_bijection_can_be_undone():
    torch.manual_seed(0)
    step = GlowStep(4, 6)
    chains = [
        ([ActNorm(4), InvertibleConv(4, lu=False), AffineCoupling(small_network(2, 4)),
          InvertibleConv(4), AdditiveCoupling(small_network(2, 2)),
          ConditionalStandardize(small_network(2, 4))], (5, 4)),
        ([Squeeze(), Chain(ActNorm(4), step), ConditionalStandardize(ZeroConv(2, 4)),
          InvertibleConv(4), step], (3, 1, 4, 6)),
        ([Squeeze(), ReversibleChain(step, GlowStep(4, 3), reversible=True), Squeeze()],
         (2, 1, 4, 8)),
    ]
    for layers, shape in chains:
        chain, x = kick(ReversibleChain(*layers, reversible=True), 0.2), randn(*shape)
        assert alike(gradients(chain, chain, x),
                     gradients(lambda v, c=chain: plainly(c, v), chain, x))
        assert (chain.inverse(chain(x)[0]) - x).abs().max() < 1e-10


@pytest.mark.parametrize("used", [*itertools.product([True, False], repeat=3)])
def test_a_parameter_of_several_layers_gets_the_sum(used):
    p = nn.Parameter(randn(3))
    chain, x = (ReversibleChain(*(Scaled(p, u) for u in used), reversible=True),
                randn(4, 3))
    loss_of(*chain(x)).backward()
    if not any(used):
        assert p.grad is None or not p.grad.any()
    else:
        have, p.grad = p.grad, None
        loss_of(*Chain.forward(chain, x)).backward()
        assert alike([have], [p.grad])


def test_gradient_of_a_layer_used_twice():
    torch.manual_seed(0)
    step = GlowStep(4, 6)
    chain, x = kick(ReversibleChain(step, InvertibleConv(4), step, reversible=True),
                    0.2), randn(3, 4, 4, 4)
    assert alike(gradients(chain, chain, x),
                 gradients(lambda v: plainly(chain, v), chain, x))


LOSSES = {"y": lambda y, ladj: (y * randn(*y.shape, seed=5)).sum(),
          "ladj": lambda y, ladj: ladj.square().sum(),
          "one item": lambda y, ladj: y[1].square().sum() + ladj[0]}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("coupling", KINDS)
def test_gradient_of_a_loss_of_one_output(coupling, loss):
    flow, x = flow_of(coupling=coupling), randn(3, 1, 8, 8)
    want = gradients(lambda v: plainly(flow, v), flow, x, LOSSES[loss])
    for reversible_ in (True, False):
        assert alike(gradients(decide(flow, reversible_), flow, x, LOSSES[loss]), want)


FROZEN = {"no couplings": lambda name: ".net." not in name,
          "couplings": lambda name: ".net." in name,
          "first level": lambda name: name.startswith("levels.0"),
          "one bias": lambda name: name != "levels.0.layers.2.layers.2.net.0.bias",
          "actnorms": lambda name: (".layers.0.shift" in name
                                    or ".layers.0.log_scale" in name),
          "all": lambda name: True}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("reversible_", [True, False])
def test_frozen_parameters(frozen, reversible_):
    """The others get their gradient; the frozen get none, and do not move by a bit."""
    flow, x = decide(flow_of(), reversible_), randn(3, 1, 8, 8).requires_grad_()
    for name, p in flow.named_parameters():
        p.requires_grad_(not FROZEN[frozen](name))
    free = [p for p in flow.parameters() if p.requires_grad]
    grad_x, *want = torch.autograd.grad(loss_of(*plainly(flow, x)), [x, *free])
    before = [p.detach().clone() for p in flow.parameters()]
    optimizer = torch.optim.Adam(flow.parameters(), 0.1)
    loss_of(*flow(x)).backward()
    assert alike([x.grad, *(p.grad for p in free)], [grad_x, *want])
    optimizer.step()
    for p, old in zip(flow.parameters(), before):
        assert p.requires_grad or (p.grad is None and torch.equal(p, old))
        assert not p.requires_grad or not torch.equal(p, old)


def test_output_requires_no_gradient_when_nothing_does():
    flow, x = flow_of(), randn(2, 1, 8, 8)
    for p in flow.parameters():
        p.requires_grad_(False)
    assert not any(t.requires_grad for t in flow(x))
    with torch.no_grad():
        assert not any(t.requires_grad for t in flow(x.requires_grad_()))


def test_gradients_add_up_over_two_backward_passes():
    flow, x, more = flow_of(), randn(3, 1, 8, 8), randn(2, 1, 8, 8, seed=1)
    want = [a + b for a, b in zip(*(gradients(lambda v: plainly(flow, v), flow, t)[1:]
                                    for t in (x, more)))]
    for t in (x, more):
        loss_of(*flow(t)).backward()
    assert alike([p.grad for p in flow.parameters()], want)


def test_two_backward_passes_over_one_graph():
    flow, x = flow_of(), randn(3, 1, 8, 8).requires_grad_()
    y, ladj = flow(x)
    loss, ends = loss_of(y, ladj), [x, *flow.parameters()]
    first = torch.autograd.grad(loss, ends, retain_graph=True)
    one, = torch.autograd.grad(loss, [ends[4]], retain_graph=True)
    second = torch.autograd.grad(loss, ends)
    assert (all(torch.equal(a, b) for a, b in zip(first, second))
            and torch.equal(one, first[4]))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, ends)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("reversible_", [True, False])
@pytest.mark.parametrize("coupling", KINDS)
def test_a_gradient_of_a_gradient_is_refused(coupling, reversible_, linear):
    """Also where the loss is linear in the output, so that autograd itself would
    take the gradient for a constant.
    """
    flow, x = (flow_of(coupling=coupling, reversible=reversible_),
               randn(2, 1, 8, 8).requires_grad_())
    y, ladj = flow(x)
    loss = y.sum() if linear else standard_normal_log_prob(y).sum() + ladj.sum()
    with pytest.raises(RuntimeError):
        grad, = torch.autograd.grad(loss, x, create_graph=True)
        (grad.square().sum() + x.sum()).backward()


@pytest.mark.parametrize(
    "name",
    ["levels.0.layers.1.layers.0.log_scale", "levels.0.layers.2.layers.2.net.0.weight",
     "levels.1.layers.1.layers.2.net.4.conv.bias", "levels.1.layers.2.layers.1.upper"])
@pytest.mark.parametrize("reversible_", [True, False])
def test_parameters_that_change_before_the_backward_pass(reversible_, name):
    """As everywhere in PyTorch: the gradient is that of the forward pass, or
    refused, but never silently wrong.
    """
    flow, x = flow_of(reversible=reversible_), randn(2, 1, 8, 8)
    want = gradients(lambda v: plainly(flow, v), flow, x)[1:]
    loss = loss_of(*flow(x))
    with torch.no_grad():
        dict(flow.named_parameters())[name].add_(0.1)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert alike([p.grad for p in flow.parameters()], want)


def test_a_layers_own_backward_is_used(monkeypatch):
    """Each step of Glow goes back by its own method, which evaluates the
    coupling network once.
    """
    called, own = [], GlowStep.backward_from_output
    monkeypatch.setattr(GlowStep, "backward_from_output",
                        lambda self, *a: called.append(self) or own(self, *a))
    flow = flow_of(levels=2, depth=3)
    gradients(flow, flow, randn(2, 1, 8, 8))
    assert len(called) == 2 * 3


# autocast ------------------------------------------------------------


@pytest.mark.parametrize("coupling", KINDS)
def test_recomputing_uses_the_autocast_of_the_forward_pass(coupling):
    """Forward under bf16 and backward outside of it: near what keeping gives, and
    far nearer than single precision.
    """
    flow, x = (flow_of(depth=4, width=16, coupling=coupling, dtype=torch.float32),
               randn(8, 1, 8, 8, dtype=torch.float32))

    def run(v):
        with ambient(True):
            y, ladj = flow(v)
        assert y.dtype == ladj.dtype == torch.float32
        return y, ladj

    full, found = gradients(decide(flow, False), flow, x), {}
    for reversible_ in (True, False):
        decide(flow, reversible_)
        found[reversible_] = gradients(run, flow, x)
        assert not torch.is_autocast_enabled("cpu")
        assert all(g.dtype == torch.float32 for g in found[reversible_])
    rounding = distance(found[False], full)
    assert 1e-3 < rounding < 0.1
    assert distance(found[True], found[False]) < 0.3 * rounding


@pytest.mark.parametrize("reversible_", [True, False])
def test_backward_inside_autocast_uses_the_forward_precision(reversible_):
    flow, x = (flow_of(dtype=torch.float32, reversible=reversible_),
               randn(4, 1, 8, 8, dtype=torch.float32))
    want, x = gradients(flow, flow, x), x.requires_grad_()
    loss = loss_of(*flow(x))
    with ambient(True):
        have = torch.autograd.grad(loss, [x, *flow.parameters()])
        assert torch.is_autocast_enabled("cpu")
    # what PyTorch's own operations do when kept
    assert distance(have, want) < (1e-5 if reversible_ else 0.02)


@pytest.mark.parametrize("reversible_", [True, False])
def test_autocast_does_not_change_double_precision(reversible_):
    flow, x = flow_of(reversible=reversible_), randn(2, 1, 8, 8)
    want = [*flow(x), *gradients(flow, flow, x)]
    with ambient(True):
        assert (network_dtype(x) == torch.float64
                and network_dtype(x.float()) == torch.bfloat16)
        assert all(torch.equal(a, b)
                   for a, b in zip([*flow(x), *gradients(flow, flow, x)], want))
    assert network_dtype(x.float()) == torch.float32


def test_nothing_but_the_couplings_networks_is_rounded():
    """The rest is computed in full precision under autocast: the same bits, at the
    start, where networks answer 0.
    """
    torch.manual_seed(0)
    x = randn(3, 4, 6, 4, dtype=torch.float32)
    step, split, model = GlowStep(4, 8), kick(SplitPrior(ZeroConv(2, 4)), 0.3,
                                              torch.float32), kick(build()).float()
    kick(step.layers[:2], 0.3, torch.float32)

    def numbers():
        y, ladj = step(x)
        grads = [p.grad for p in undone(step, y, ladj)]
        return [y, ladj, step.inverse(x), *grads, *split(x), split.inverse(x),
                *model.prior(torch.zeros(1, 0))]

    def undone(step, y, ladj):
        step.zero_grad()
        x, grad, found = backward_from_output(step, y.detach(), y.detach(),
                                              ladj.detach())
        for p, g in zip(step.layers[:2].parameters(), found):
            p.grad = g
        return step.layers[:2].parameters()

    want = numbers()
    with ambient(True):
        have = numbers()
    assert all(torch.equal(a, b) for a, b in zip(have, want))


def test_any_layer_can_be_recomputed_under_autocast():
    torch.manual_seed(0)
    layers = (ActNorm(4), AffineCoupling(small_network(2, 4)), InvertibleConv(4),
              AdditiveCoupling(small_network(2, 2)))
    chain = kick(ReversibleChain(*layers), 0.2, torch.float32)
    x, found = randn(6, 4, dtype=torch.float32), []
    for chain.reversible in (True, False):
        with ambient(True):
            loss = loss_of(*(t.float() for t in chain(x)))
        chain.zero_grad()
        loss.backward()
        found.append([p.grad for p in chain.parameters()])
    assert distance(*found) < 0.02


# memory ------------------------------------------------------------


def kept(module, run):
    """Bytes that autograd keeps of `run()`, without the parameters."""
    known, found = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(found.values())


@pytest.mark.parametrize("on", [False, True])
def test_saved_memory_does_not_grow_with_depth(on):
    def bytes_of(depth, reversible_):
        flow = flow_of(depth=depth, width=16, reversible=reversible_,
                       dtype=torch.float32)
        x = randn(16, 1, 8, 8, dtype=torch.float32)
        with ambient(on):
            return kept(flow, lambda: loss_of(*flow(x)))

    assert bytes_of(8, True) == bytes_of(1, True) < 16 * 64 * 4 * 8
    assert bytes_of(8, False) > 5 * bytes_of(1, False)
    assert bytes_of(8, False) > 20 * bytes_of(8, True)


@pytest.mark.parametrize("shape, levels, width", [
    ((1, 16, 16), 2, 32), ((3, 8, 8), 1, 16), ((1, 8, 16), 3, 64)])
def test_estimate_of_saved_activation_memory(shape, levels, width):
    flow = flow_of(shape, levels, 4, width, reversible=False, dtype=torch.float32)
    n, estimates = 32, {level.kept for level in flow.levels}
    assert len(estimates) == 1
    real = kept(flow, lambda: flow(randn(n, *shape, dtype=torch.float32)))
    assert 0.75 < n * estimates.pop() * 4 / real < 1.33


def test_recomputing_is_chosen_by_estimated_memory():
    flow, x = (flow_of(reversible=None, dtype=torch.float32),
               randn(6, 1, 8, 8, dtype=torch.float32))
    size = flow.levels[0].kept * 6

    def recomputing(v):
        y, ladj = flow(v)
        assert torch.equal(y, Chain.forward(MultiScaleAsChain(flow), v)[0])
        return ({level.recomputes(v) for level in flow.levels},
                kept(flow, lambda: flow(v)) < size)

    for on, dtype, itemsize in ((False, x.dtype, 4), (True, x.dtype, 2),
                                (True, torch.float64, 8)):
        flow, v = flow.to(dtype), x.to(dtype)
        for keep, decision in ((size * itemsize, False), (size * itemsize - 1, True)):
            with mock.patch.object(reversible, "MAX_ACTIVATION_BYTES",
                                   keep), ambient(on):
                assert recomputing(v) == ({decision}, decision)
    for fixed in (True, False):
        for keep in (0, 2**60):
            with mock.patch.object(reversible, "MAX_ACTIVATION_BYTES", keep):
                assert ({level.recomputes(x) for level in decide(flow, fixed).levels}
                        == {fixed})
    assert (not ReversibleChain(ActNorm(3)).recomputes(x)
            and reversible.MAX_ACTIVATION_BYTES == 2**28)


class MultiScaleAsChain(Chain):
    """A flow as one layer."""

    def __init__(self, flow):
        super().__init__(flow)


def test_small_models_store_and_large_models_recompute():
    small, large = (Glow((1, 8, 8), levels=1, depth=d, width=w).flow.levels[0]
                    for d, w in ((2, 8), (32, 256)))
    assert (not small.recomputes(torch.zeros(64, 1, 8, 8))
            and large.recomputes(torch.zeros(1000, 1, 8, 8)))


@pytest.mark.parametrize("reversible_", [True, False, None])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode, reversible_):
    flow, x = flow_of(reversible=reversible_), randn(3, 1, 8, 8)
    with mock.patch.object(RecomputeFunction, "apply",
                           side_effect=AssertionError), mode():
        assert (kept(flow, lambda: flow(x))
                == kept(flow, lambda: flow.inverse(x.flatten(1))) == 0)
        assert flow(x)[0].grad_fn is None


# the remembered inverse ------------------------------------------------------------


def by_a_step(model):
    optimizer = torch.optim.Adam(model.parameters(), 0.05, fused=True)
    model.loss(Batch({"x": torch.rand(4, *model.shape, generator=seeded())},
                     Noise(("k",), slice(None), 4)))["bpd"][1].backward()
    optimizer.step()
    return model


def by_assigning(model):
    for p in model.parameters():
        p.data = p.data + 0.1 * randn(*p.shape, dtype=p.dtype)
    return model


def by_copying(model):
    for p in model.parameters():
        p.data.copy_(p.data + 0.1 * randn(*p.shape, dtype=p.dtype))
    return model


def by_loading(model):
    torch.manual_seed(1)
    model.load_state_dict(kick(Glow(**model.arguments), dtype=model.prior_bias.dtype,
                               seed=1).state_dict())
    return model


CHANGES = {"step": by_a_step, "assign": by_assigning, "copy": by_copying,
           "load": by_loading,
           "kick": lambda m: kick(m, seed=2), "double": lambda m: m.double(),
           "double, kicked": lambda m: kick(m.double(), 0.01),
           "float and back": lambda m: m.float().double(), "deepcopy": copy.deepcopy,
           "deepcopy, kicked": lambda m: kick(copy.deepcopy(m), seed=3),
           "state": lambda m: copy.deepcopy(m.eval().requires_grad_(False))}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_cached_inverse_is_updated_after_every_change(mode, change):
    model = kick(build(),
                 dtype=torch.float32 if change.startswith("double") else torch.float64)
    x = torch.rand(3, 1, 8, 8, generator=seeded(1), dtype=torch.float64)
    with mode():
        model.decode(randn(2, 64))
    for m in (CHANGES[change](model), model):
        for now in (mode, torch.no_grad, torch.enable_grad):
            with now():
                assert (m.decode(m.encode(x)) - x).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["0.shift", "0.log_scale", "1.lower", "1.upper",
                                  "1.log_s", "1.permutation", "1.sign"])
def test_cached_inverse_depends_on_every_parameter(name):
    torch.manual_seed(0)
    step, x = kick(GlowStep(4, 6), 0.2), randn(2, 4, 3, 3)
    with torch.no_grad():
        step.inverse(x)
        first = step.unmixing()[0]
        assert step.unmixing()[0] is first  # it is remembered
        part = step.state_dict()["layers." + name]
        part.data.copy_(part.roll(1, 0) if name == "1.permutation"
                        else -part + 0.3 * (name != "1.sign"))
        assert (step.inverse(step(x)[0]) - x).abs().max() < 1e-11
        again = step.unmixing()[0]
        assert again is step.unmixing()[0] and again is not first
    assert step.unmixing()[0].requires_grad


# switches ------------------------------------------------------------


@pytest.mark.parametrize("cls", [Glow, CGlow])
def test_exact_methods_do_not_depend_on_switches(cls):
    """`encode`, `decode`, `log_prob`, `interpolate`: bit for bit, whatever the
    switches and the caller's autocast.
    """
    x, found = torch.rand(5, 1, 8, 8, generator=seeded()), []
    for (reversible_, bf16), on in itertools.product([*SETTLED, (None, None)],
                                                     [False, True]):
        model = kick(build(cls, width=16, reversible=reversible_, bf16=bf16),
                     dtype=torch.float32)
        given_ = {name: torch.full((5,), 1) for name in model.conditions.names}
        one = dict.fromkeys(given_, 1)
        for mode in (torch.enable_grad, torch.no_grad):
            with ambient(on), mode():
                z = model.encode(x, **given_)
                found.append([z, model.decode(z, **given_),
                              model.log_prob(x, generator=seeded(1), **given_),
                              model.interpolate(x[0], x[1], 3, **one)])
    assert (all(t.dtype == torch.float32 for t in found[0])
            and (found[0][1] - x).abs().max() < 1e-4)
    assert all(torch.equal(a, b) for others in found[1:]
               for a, b in zip(found[0], others))


def test_samples_in_bf16_are_nearly_those_in_single_precision():
    found = {}
    for reversible_, bf16 in SWITCHES:
        model = kick(build(width=16, reversible=reversible_, bf16=bf16),
                     dtype=torch.float32)
        for on in (False, True, False):
            with ambient(on):
                found.setdefault(bool(bf16),
                                 []).append(model.sample(32, generator=seeded(1)))
    # reproducible, and independent of the caller's autocast and of `reversible`
    for images in found.values():
        assert all(torch.equal(images[0], x) for x in images)
    full, half = found[False][0], found[True][0]
    assert (half.isfinite().all() and half.dtype == torch.float32 and half.min() >= 0
            and half.max() <= 1)
    assert 1e-5 < (full - half).abs().mean() < 1e-2
    model = kick(build(width=16, bf16=True))
    assert torch.equal(model.sample(4, generator=seeded()),
                       kick(build(width=16)).sample(4, generator=seeded()))


def test_unset_bf16_is_decided_by_measurement(monkeypatch):
    asked = []
    monkeypatch.setattr(
        glow_module, "bf16_is_faster",
        lambda device, width: asked.append((device.type, width)) or True)
    open_, never, always = (kick(build(bf16=b), dtype=torch.float32)
                            for b in (None, False, True))
    assert ([m.uses_bf16(CPU) for m in (open_, never, always)] == [True, False, True]
            and asked == [("cpu", 8)])
    a, b, c = (m.sample(2, generator=seeded()) for m in (open_, never, always))
    assert torch.equal(a, c) and not torch.equal(a, b)
    assert [m.stages()[0].bf16(CPU) for m in (open_, never, always)] == [
        True, False, True]


@pytest.mark.parametrize("reversible_, bf16", SWITCHES)
@pytest.mark.parametrize("coupling", KINDS)
def test_laws_1_and_2_for_every_switch(coupling, reversible_, bf16):
    """The log-determinant is autograd's, and the way back is exact."""
    model = kick(build(shape=(1, 4, 4), coupling=coupling, reversible=reversible_,
                       bf16=bf16))
    v, c = (torch.rand(2, 1, 4, 4, generator=seeded(), dtype=torch.float64) - 0.5,
            torch.zeros(1, 0))
    with model.sampling_precision():
        z, ladj, _ = model.whiten(v, c)
        for i in range(2):
            there = torch.autograd.functional.jacobian(
                lambda a: model.whiten(a[None], c)[0][0], v[i])
            assert abs(torch.linalg.slogdet(there.view(16, 16))[1] - ladj[i]) < 1e-9
    x = v + 0.5
    assert (model.decode(model.encode(x)) - x).abs().max() < 1e-10


def test_bf16_networks_leave_the_flow_invertible():
    """Only the networks are rounded: way back and density hold as in single
    precision, at one step exactly.
    """
    model = kick(build(levels=1, depth=1, bf16=True), dtype=torch.float32)
    v = torch.rand(4, 1, 8, 8, generator=seeded()) - 0.5

    def run(x):
        with model.sampling_precision():
            return model.flow(x)

    y, ladj = run(v)
    with model.sampling_precision():
        assert (model.flow.inverse(y) - v).abs().max() < 1e-5
    for item, found in zip(v, ladj):
        there = torch.autograd.functional.jacobian(lambda a: run(a[None])[0][0],
                                                   item).view(64, 64)
        assert abs(torch.linalg.slogdet(there.double())[1] - found) < 1e-4
    assert not torch.equal(model.flow(v)[0], y)


@pytest.mark.parametrize("bf16", [True, False])
def test_recomputing_changes_no_bit_of_the_loss(bf16):
    batch, found = Batch(Bars().table("val"), Noise(("k",), slice(None), 64)), []
    for reversible_ in (None, True, False):
        model = kick(build(reversible=reversible_), dtype=torch.float32)
        with ambient(bf16):
            found.append(model.loss(batch)["bpd"][1])
        with torch.no_grad(), ambient(bf16):
            found.append(model.loss(batch)["bpd"][1])
    assert all(torch.equal(found[0], other) for other in found)


# does bf16 pay? ------------------------------------------------------------


@pytest.fixture
def unmeasured():
    bf16_is_faster.cache_clear()
    yield
    bf16_is_faster.cache_clear()


@pytest.mark.parametrize("ratio, pays",
                         [(3.0, True), (1.6, True), (1.4, False), (0.5, False)])
def test_bf16_is_chosen_from_a_speedup_of_1_5(unmeasured, monkeypatch, ratio, pays):
    """The clock is ours; the first two turns of each type are for warming up, and
    one slow turn decides nothing.
    """
    now, calls = [0.0], []

    def clock():
        turn, short, end = len(calls) // 4, len(calls) // 2 % 2, len(calls) % 2
        calls.append(1)
        if end:
            seconds = 1.0 if short else ratio
            now[0] += 1e-6 if turn < 2 else 50.0 if turn == 4 else seconds
        return now[0]

    monkeypatch.setattr(reversible.time, "perf_counter", clock)
    assert bf16_is_faster(CPU, 128) is pays
    used = len(calls)
    assert bf16_is_faster(CPU, 128) is pays and len(calls) == used  # measured once
    assert bf16_is_faster(CPU, 127) is False and len(calls) == used


@pytest.mark.parametrize("on", [False, True])
def test_bf16_measurement_ignores_the_callers_autocast(unmeasured, on):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with ambient(on), Watch():
        bf16_is_faster(CPU, 128)
    assert seen.count(torch.float32) == seen.count(torch.bfloat16) > 3


# training ------------------------------------------------------------


def fresh(**options):
    return build(lr=1e-2, **options)


def train(model, out=None, rounds=20, **options):
    return fit(model, Bars(), out, images=32 * rounds, batch=32, progress=False,
               **options)


def in_turns(make, out, rounds=3):
    """As `train`, stopped after every round; a new model each time."""
    while not (run := train(make(), out, rounds, budget=0)).finished:
        pass
    return run


def bits(model):
    return digest(model.state_dict())


def validation(run):
    return [row["validation"] for row in run.log if "validation" in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {(r, b): train(fresh(reversible=r, bf16=b), folder / f"{r}-{b}")
            for r, b in SETTLED}


@pytest.mark.parametrize("switches", SETTLED)
def test_law_10_a_tiny_run_improves_with_every_switch(runs, switches):
    values = validation(runs[switches])
    assert values[-1] < values[0] - 0.5
    assert min(values) < 7.2


def test_switches_do_not_change_where_training_ends(runs):
    ends = {switches: min(validation(run)) for switches, run in runs.items()}
    for bf16 in (True, False):
        assert abs(ends[True, bf16] - ends[False, bf16]) < (0.05 if bf16 else 1e-3)
    assert max(ends.values()) - min(ends.values()) < 0.1
    assert bits(runs[True, True].model) != bits(runs[True, False].model)


def test_the_card_says_how_it_was_trained(runs):
    for (reversible_, bf16), run in runs.items():
        card = json.loads((run.folder / "card.json").read_text())
        assert card["training"]["stages"]["flow"]["bf16"] is bf16
        assert (card["arguments"]["bf16"] is bf16
                and card["arguments"]["reversible"] is reversible_)


def test_law_6_loaded_models_give_the_same_samples(runs):
    """Here, and in a fresh process."""
    code = ("import sys; from condgen.files import digest; from condgen.runs import "
            "load; import torch\nfor f in sys.argv[1:]:\n    print(digest({'x': "
            "load(f).sample(5, generator=torch.Generator().manual_seed(3))}))")
    want = []
    for run in runs.values():
        x = run.model.sample(5, generator=seeded(3))
        assert torch.equal(load(run.folder).sample(5, generator=seeded(3)), x)
        want.append(digest({"x": x}))
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(r.folder) for r in runs.values())],
        capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.stdout.split() == want, done.stderr
    assert len({*want}) > 1


@pytest.mark.parametrize("reversible_, bf16", SETTLED)
def test_law_5_resumed_run_equals_uninterrupted_run(tmp_path, reversible_, bf16):
    whole = train(fresh(reversible=reversible_, bf16=bf16), rounds=3)
    parts = in_turns(lambda: fresh(reversible=reversible_, bf16=bf16), tmp_path)
    assert (bits(whole.model) == bits(parts.model)
            and validation(whole) == validation(parts))


def card_says(folder):
    return json.loads(
        (folder / "card.json").read_text())["training"]["stages"]["flow"]["bf16"]


@pytest.mark.parametrize("begun, switch",
                         [("bf16", None), ("bf16", False), ("no", True)])
def test_resumed_run_keeps_its_precision(tmp_path, begun, switch):
    whole = train(fresh(bf16=switch), rounds=3, precision=begun)
    assert not train(fresh(bf16=switch), tmp_path, 3, precision=begun,
                     budget=0).finished
    parts = in_turns(lambda: fresh(bf16=switch), tmp_path, 3)
    assert (bits(whole.model) == bits(parts.model)
            and card_says(tmp_path) is (begun == "bf16"))
    # it is over: nothing is trained
    assert bits(train(fresh(bf16=switch), tmp_path, 3).model) == bits(whole.model)
    with pytest.raises(ValueError, match="bf16 is"):
        train(fresh(bf16=switch), tmp_path, 3,
              precision={"bf16": "no", "no": "bf16"}[begun])


@pytest.mark.parametrize("first", [True, False])
def test_resumed_run_keeps_its_measured_precision(tmp_path, monkeypatch, first):
    """A machine that is busier today must not change a run that began yesterday."""
    monkeypatch.setattr(glow_module, "bf16_is_faster", lambda device, width: first)
    whole = train(fresh(), rounds=3)
    assert not train(fresh(), tmp_path, 3, budget=0).finished
    monkeypatch.setattr(glow_module, "bf16_is_faster", lambda device, width: not first)
    assert (bits(in_turns(fresh, tmp_path, 3).model) == bits(whole.model)
            and card_says(tmp_path) is first)
    assert bits(train(fresh(), rounds=3).model) != bits(whole.model)


def test_run_of_an_older_version_is_refused(tmp_path):
    train(fresh(), tmp_path, 2, budget=0)
    card = json.loads((tmp_path / "card.json").read_text())
    del card["training"]["stages"]["flow"]["bf16"]
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="no field 'training.stages.flow.bf16'"):
        train(fresh(), tmp_path, 2)


# several processes ------------------------------------------------------------


class Density(nn.Module):
    """Mean negative log-density, as `DistributedDataParallel` wants it: a module
    whose forward is the loss.
    """

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        z, ladj = self.flow(x)
        return -(standard_normal_log_prob(z) + ladj).mean()


def share(folder, reversible_):
    """Two backward passes of this process's half of a batch under
    DistributedDataParallel; gradients go to a file.
    """
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    rank = torch.distributed.get_rank()
    net = nn.parallel.DistributedDataParallel(Density(flow_of(reversible=reversible_)))
    x = randn(6, 1, 8, 8)[3 * rank : 3 * rank + 3]
    for _ in range(2):
        net(x).backward()
    torch.save([p.grad for p in net.parameters()],
               Path(folder) / f"{reversible_}-{rank}.pt")


@pytest.mark.skipif(not (hasattr(os, "fork") and torch.distributed.is_available()
                         and torch.distributed.is_gloo_available()),
                    reason="needs gloo and fork")
def test_two_processes_compute_the_gradient_of_the_whole_batch(tmp_path):
    from accelerate import debug_launcher
    from accelerate.state import AcceleratorState

    flow = flow_of()
    z, ladj = plainly(flow, randn(6, 1, 8, 8))
    want = torch.autograd.grad(-2 * (standard_normal_log_prob(z) + ladj).mean(),
                               [*flow.parameters()])
    try:
        debug_launcher(share, (str(tmp_path), True), num_processes=2)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for rank in range(2):
        assert alike(torch.load(tmp_path / f"True-{rank}.pt"), want)
