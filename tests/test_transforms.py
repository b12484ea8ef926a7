"""Flows in loops that are not ours: `torch.func`, `functional_call`, checkpoints,
forward-mode differentiation, hooks and replaced layers. What is right is said by
`plainly`, which runs a flow layer by layer, under plain automatic differentiation.
"""

import copy

import pytest
import torch
from test_reversible import (
    KINDS, alike, decide, flow_of, gradients, kick, loss_of, plainly, plainly_back,
    randn)
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import (
    functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state,
    vjp, vmap)
from torch.utils.checkpoint import checkpoint

from condgen import reversible
from condgen.bijections import (
    ActNorm, AffineCoupling, Chain, InvertibleConv, initialize_from_data)
from condgen.models.coupling import CouplingNet, GlowStep, NormConv, ZeroConv
from condgen.models.glow import Glow
from condgen.reversible import ReversibleChain, backward_from_output


def step_of(coupling="affine"):
    torch.manual_seed(0)
    return kick(GlowStep(4, 6, coupling), 0.2)


MODULES = {
    "affine step": lambda: (step_of(), (4, 2, 4)),
    "additive step": lambda: (step_of("additive"), (4, 2, 4)),
    "recomputed flow": lambda: (flow_of((1, 4, 4), reversible=True), (1, 4, 4)),
    "kept flow": lambda: (flow_of((1, 4, 4), reversible=False), (1, 4, 4)),
}


def made(name):
    """The module, its definition as a function, and a batch of two."""
    module, shape = MODULES[name]()
    return module, lambda v: plainly(module, v), randn(2, *shape)


def outputs(f):
    """Both outputs of `f` in one tensor, `(n, D + 1)`."""
    def whole(v):
        y, ladj = f(v)
        return torch.cat([y.flatten(1), ladj[:, None]], 1)
    return whole


def total(f):
    """A number that depends on both outputs, and not linearly."""
    return lambda v: outputs(f)(v).pow(3).sum()


def item(f):
    return lambda v: total(f)(v[None])


def backward(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(total(f)(x), x)[0]


TRANSFORMS = {
    "grad": (lambda f, x: grad(total(f))(x), backward),
    "grad of items": (lambda f, x: vmap(grad(item(f)))(x), backward),
    "vjp": (lambda f, x: vjp(total(f), x)[1](torch.ones(()).double())[0], backward),
    "jacrev": (lambda f, x: jacrev(outputs(f))(x),
               lambda f, x: jacobian(outputs(f), x)),
    "jacfwd": (lambda f, x: jacfwd(outputs(f))(x),
               lambda f, x: jacobian(outputs(f), x)),
    "forward mode": (lambda f, x: jacobian(outputs(f), x, vectorize=True,
                                           strategy="forward-mode"),
                     lambda f, x: jacobian(outputs(f), x)),
    "jvp": (lambda f, x: jvp(total(f), (x,), (x,))[1],
            lambda f, x: (backward(f, x) * x).sum()),
    "hessian": (lambda f, x: hessian(item(f))(x[0]),
                lambda f, x: torch.autograd.functional.hessian(item(f), x[0])),
    "vmap": (lambda f, x: vmap(item(f))(x),
             lambda f, x: torch.stack([item(f)(v) for v in x])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MODULES)
def test_transforms_give_the_plain_derivatives(name, transform):
    module, plain, x = made(name)
    have, want = TRANSFORMS[transform]
    want = want(plain, x)
    assert alike([have(module, x)], [want])
    with torch.no_grad():
        assert alike([have(module, x)], [want])


@pytest.mark.filterwarnings("ignore:Attempted to insert:UserWarning")
def test_linearisation_gives_the_plain_derivative():
    module, plain, x = made("affine step")
    assert alike([linearize(total(module), x)[1](x)],
                 [(backward(plain, x) * x).sum()])


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp", "vmap"])
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_the_inverse(kind, transform):
    step, y = step_of(kind), randn(2, 4, 2, 4)
    inverse, plain = ((lambda v, f=f: (f(v), v.new_zeros(len(v))))
                      for f in (step.inverse, lambda v: plainly_back(step, v)))
    have, want = TRANSFORMS[transform]
    want = want(plain, y)
    with torch.no_grad():  # where a step remembers its inverse
        step.inverse(y)
        assert alike([have(inverse, y)], [want])
    assert all(torch._C._functorch.is_functorch_wrapped_tensor(t) is False
               for t in step.known[0])


@pytest.mark.parametrize("name", MODULES)
def test_transforms_of_parameters(name):
    """Derivatives by the parameters, for one model and for several at once."""
    module, plain, x = made(name)
    others = [module, kick(copy.deepcopy(module), 0.1, seed=9)]
    want = [torch.autograd.grad(total(lambda v, m=m: plainly(m, v))(x), [*m.parameters()])
            for m in others]
    by_params = grad(lambda p, b: total(lambda v: functional_call(
        module, (p, b), (v,)))(x))
    have = by_params(dict(module.named_parameters()), dict(module.named_buffers()))
    assert alike([*have.values()], want[0])
    have = vmap(by_params)(*stack_module_state(others))
    assert alike([*have.values()], [torch.stack(pair) for pair in zip(*want)])


def test_forward_mode_by_parameters_without_gradients():
    """A remembered inverse has no tangent: it must not be used."""
    step, y = step_of(), randn(2, 4, 2, 4)
    params = {name: p.detach() for name, p in step.named_parameters()}
    moves = {name: randn(*p.shape, seed=i)
             for i, (name, p) in enumerate(params.items())}
    torch.no_grad()(step.inverse)(y)

    class Back(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = step

        def forward(self, run):
            return run(step, y)

    def moved(run):
        with torch.no_grad(), forward_ad.dual_level():
            given = {f"step.{name}": forward_ad.make_dual(p, moves[name])
                     for name, p in params.items()}
            return forward_ad.unpack_dual(functional_call(Back(), given, (run,)))[1]

    assert alike([moved(GlowStep.inverse)], [moved(plainly_back)])


def test_tables_of_a_transform_are_not_kept():
    """A tensor that is made inside a transform must not reach later calls."""
    for table in (reversible.neighbour_indices, reversible.fold_indices):
        table.cache_clear()
    module, plain, x = made("kept flow")
    grad(total(module))(x)
    vmap(item(module))(x)
    assert alike(gradients(module, module, x), gradients(plain, module, x))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(
        reversible.neighbour_indices((2, 2, 2), torch.device("cpu")))


@pytest.mark.parametrize("name", MODULES)
def test_several_gradients_of_one_pass_are_refused(name):
    module, _, x = made(name)
    with pytest.raises(RuntimeError, match="accepted: torch.func.jacrev"):
        jacobian(outputs(module), x, vectorize=True)


# functional_call and checkpoints -------------------------------------------------


def replaced(module, seed=1, buffers=True):
    """Other parameters and buffers for a module, and the module that has them."""
    other = kick(copy.deepcopy(module), 0.1, seed=seed)
    if buffers:
        for b in other.buffers():
            b.neg_()
    given = dict(other.named_parameters()) | dict(other.named_buffers())
    return other, {name: t.detach().clone().requires_grad_(name in dict(
        other.named_parameters())) for name, t in given.items()}


@pytest.mark.parametrize("name", MODULES)
def test_functional_call_uses_what_is_given(name):
    """Also in the backward pass, when the module has its own parameters again."""
    module, plain, x = made(name)
    other, given = replaced(module)
    before = gradients(plain, module, x)
    ends = [x.requires_grad_(), *(t for t in given.values() if t.requires_grad)]
    have = torch.autograd.grad(loss_of(*functional_call(module, given, (x,))), ends)
    assert alike(have, gradients(lambda v: plainly(other, v), other, x))
    assert alike(gradients(module, module, x), before)


def test_functional_call_with_computed_parameters():
    """The gradient goes on to what they were computed from, as in meta-learning."""
    module, _, x = made("recomputed flow")
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    moves = {name: randn(*p.shape, seed=2) for name, p in module.named_parameters()}
    found = []
    for recompute in (True, False):
        decide(module, recompute)
        given = {name: p + rate * moves[name] for name, p in module.named_parameters()}
        loss = loss_of(*functional_call(module, given, (x,)))
        found.append(torch.autograd.grad(loss, [rate, *module.parameters()]))
    assert alike(*found)


def test_functional_call_with_a_shared_layer():
    torch.manual_seed(0)
    step = GlowStep(4, 6)
    chain = kick(ReversibleChain(step, InvertibleConv(4), step, reversible=True), 0.2)
    x = randn(2, 4, 2, 4)
    other, given = replaced(chain)
    have = torch.autograd.grad(loss_of(*functional_call(chain, given, (x,))),
                               [t for t in given.values() if t.requires_grad])
    assert alike(have, gradients(lambda v: plainly(other, v), other, x)[1:])


def test_buffers_with_a_gradient_get_it():
    module, _, x = made("recomputed flow")
    _, given = replaced(module)
    signs = [t.requires_grad_() for name, t in given.items() if name.endswith("sign")]
    found = []
    for recompute in (True, False):
        loss = loss_of(*functional_call(decide(module, recompute), given, (x,)))
        found.append(torch.autograd.grad(loss, signs))
    assert len(signs) == 4 and alike(*found)


def test_parameters_replaced_before_the_backward_pass():
    """The gradient is that of the forward pass, whatever the module has by now."""
    module, plain, x = made("recomputed flow")
    want, params = gradients(plain, module, x), list(module.parameters())
    loss = loss_of(*module(x.requires_grad_()))
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(p.detach() + 0.1))
    assert alike(torch.autograd.grad(loss, [x, *params]), want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_checkpoints(name, reentrant):
    module, plain, x = made(name)

    def run(v):
        return checkpoint(module, v, use_reentrant=reentrant)

    want, x = gradients(plain, module, x), x.requires_grad_()
    loss_of(*run(x)).backward()
    assert alike([x.grad, *(p.grad for p in module.parameters())], want)
    if not reentrant:
        assert alike(gradients(run, module, x), want)


@pytest.mark.parametrize("name", MODULES)
def test_saved_tensors_may_be_copies(name):
    module, plain, x = made(name)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        have = gradients(module, module, x)
    assert alike(have, gradients(plain, module, x))


# replaced layers and hooks ---------------------------------------------------------


class Shifted(AffineCoupling):
    """A coupling that does something else before."""

    def forward(self, x):
        return super().forward(x + 1)

    def inverse(self, y):
        return super().inverse(y) - 1


class Halved(ActNorm):
    """An actnorm whose output is half as large."""

    def forward(self, x):
        y, ladj = super().forward(x)
        return y / 2, ladj - y[0].numel() * torch.tensor(2.0).log().double()

    def inverse(self, y):
        return super().inverse(2 * y)


def put(path, make):
    """Replaces the part of a step at a path, such as `layers.2.net.1`."""
    def change(step):
        owner, _, name = path.rpartition(".")
        setattr(step.get_submodule(owner), name, make())
    return change


def edit_conv(**facts):
    def change(step):
        for name, value in facts.items():
            setattr(step.layers[2].net[4].conv, name, value)
    return change


def forward_of_its_own(step):
    relu = step.layers[2].net[1]
    relu.forward = lambda x: x.tanh()


CHANGES = {
    "activation": put("layers.2.net.1", lambda: nn.LeakyReLU(0.3)),
    "a bigger kernel": put("layers.2.net.0", lambda: NormConv(2, 6, 5)),
    "a bigger kernel inside": put("layers.2.net.2", lambda: NormConv(6, 6, 3)),
    "an ordinary convolution": put("layers.2.net.0",
                                   lambda: nn.Conv2d(2, 6, 3, padding=1)),
    "a convolution without bias": put(
        "layers.2.net.4.conv", lambda: nn.Conv2d(6, 4, 3, padding=1, bias=False)),
    "reflected edges": put("layers.2.net.4.conv", lambda: nn.Conv2d(
        6, 4, 3, padding=1, padding_mode="circular")),
    "dilation": edit_conv(dilation=(2, 2), padding=(2, 2)),
    "one more layer": lambda step: step.layers[2].net.append(nn.Tanh()),
    "another network": put("layers.2.net", lambda: nn.Conv2d(2, 4, 3, padding=1)),
    "another coupling": put("layers.2", lambda: Shifted(CouplingNet(2, 4, 6))),
    "another actnorm": put("layers.0", lambda: Halved(4)),
    "a plain matrix": put("layers.1", lambda: InvertibleConv(4, lu=False)),
    "no convolution": put("layers.1", lambda: Chain()),
    "a patched forward": forward_of_its_own,
    "weight normalisation": lambda step: nn.utils.parametrizations.weight_norm(
        step.layers[2].net[0]),
    "spectral normalisation by a hook": lambda step: nn.utils.spectral_norm(
        step.layers[2].net[2].eval(), n_power_iterations=3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_replaced_layers_are_used(change):
    """Forwards, backwards, in the inverse, from the output, and recomputed."""
    torch.manual_seed(0)
    step, x = GlowStep(4, 6), randn(2, 4, 4, 4)
    CHANGES[change](step)
    kick(step, 0.2).eval()
    chain = ReversibleChain(step, reversible=True)
    definition = Chain.forward if change == "another coupling" else plainly
    want = gradients(lambda v: definition(step, v), step, x)
    (y, ladj), (wanted, wanted_ladj) = step(x), definition(step, x)
    assert torch.allclose(y, wanted, atol=1e-12) and y.is_contiguous()
    assert torch.allclose(ladj, wanted_ladj, atol=1e-11)
    assert (step.inverse(y) - x).abs().max() < 1e-9
    assert step.inverse(y).is_contiguous()
    assert alike(gradients(step, step, x), want)
    assert alike(gradients(chain, step, x), want)
    grads = randn(*y.shape, seed=1), randn(len(y), seed=2)
    for found, other in zip(
            *(backward_from_output(layer, y.detach(), *grads)[:2]
              for layer in (step, Chain(*step.layers)))):
        assert torch.allclose(found, other, atol=1e-9)


def test_every_hook_of_a_step_fires():
    step, x, fired = step_of(), randn(2, 4, 4, 4), []
    want, parts = plainly(step, x)[0], dict(step.named_modules())
    del parts["layers"]  # a list, which nothing calls
    handles = [part.register_forward_hook(
        lambda m, args, y, name=name: fired.append(name)) for name, part in
        parts.items()]
    assert torch.allclose(step(x)[0], want, atol=1e-12)
    assert sorted(fired) == sorted(parts)
    for handle in handles:
        handle.remove()
    step(x)
    assert len(fired) == len(parts)


@pytest.mark.parametrize("path", ["layers.2.net.1", "layers.2.net.4.conv",
                                  "layers.2.net"])
def test_a_hook_that_changes_an_output_is_obeyed(path):
    step, x = step_of(), randn(2, 4, 4, 4)
    before = step(x)[0]
    step.get_submodule(path).register_forward_hook(lambda m, args, y: 2 * y)
    after = step(x)[0]
    assert not torch.allclose(before, after)
    assert torch.allclose(after, Chain.forward(step, x)[0], atol=1e-12)
    assert (step.inverse(after) - x).abs().max() < 1e-9


@pytest.mark.parametrize("register", [nn.Module.register_full_backward_hook,
                                      nn.Module.register_full_backward_pre_hook])
def test_backward_hooks_fire(register):
    step, x, fired = step_of(), randn(2, 4, 4, 4), []
    want = gradients(lambda v: plainly(step, v), step, x)
    register(step.layers[2].net[0], lambda *args: fired.append(1))
    assert alike(gradients(step, step, x), want) and len(fired) == 1


@pytest.mark.parametrize("net", [
    lambda: CouplingNet(2, 4, 6),
    lambda: nn.Sequential(NormConv(2, 6, 3), nn.Tanh(), ZeroConv(6, 4))])
def test_a_changed_step_starts_from_data(net):
    torch.manual_seed(0)
    step, x = GlowStep(4, 6), 3 + 2 * randn(32, 4, 4, 4, dtype=torch.float32)
    step.layers[2].net = net()
    initialize_from_data(step, x)
    a = step.layers[1](step.layers[0](x)[0])[0][:, :2]
    first = step.layers[2].net[0](a)
    assert first.mean((0, 2, 3)).abs().max() < 1e-4
    assert (first.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_start_from_data_is_that_of_the_layers():
    """A step starts its parts as a chain of them would be started."""
    torch.manual_seed(0)
    model = Glow((1, 8, 8), levels=1, depth=3, width=6)
    x, parts = torch.rand(32, 1, 8, 8) - 0.5, copy.deepcopy(model.flow.levels[0])
    initialize_from_data(model.flow, x)
    squeeze, *steps = parts.layers
    chain = Chain(squeeze, *(part for step in steps for part in step.layers))
    initialize_from_data(chain, x)
    for p, q in zip(model.flow.parameters(), chain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)
