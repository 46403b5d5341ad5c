# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`jet`, `laplacian`, `hessian`, `divergence` and `curl` of all kinds of networks, beside nested autograd."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from foreign import Hard, make_foreign
from helpers import adapt
from jet_helpers import assert_same, nested, network, points
from stand_ins import FAMILIES
from torch import Tensor, nn

from peft_lotra.derivatives import api
from peft_lotra.derivatives.stages import stages_of
from peft_lotra.derivatives.torch_fallback import ExactNorms
from peft_lotra.kan import (
    KAN,
    KANConfig,
    KANModel,
    KnotMap,
    SlimKAN,
    curl,
    divergence,
    hessian,
    jet,
    laplacian,
)
from peft_lotra.kan.input_map import InputMap
from peft_lotra.least_squares.jacobian import row_gradients
from peft_lotra.pde import BoxFeatures, HardConstraint


pytestmark = pytest.mark.filterwarnings("ignore:Adapters have more", "ignore:Splines of degree", "ignore:Ranks are")


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(2 * x)


def chain(kind: str) -> nn.Module:
    return nn.Sequential(FAMILIES[kind](3, 4), FAMILIES[kind](4, 2)).double()


def mlp(activation: nn.Module) -> nn.Module:
    layers = nn.Linear(3, 6), activation, nn.Linear(6, 5, bias=False), activation, nn.Linear(5, 2)
    return nn.Sequential(*layers).double()


def with_knots() -> nn.Module:
    ends = torch.tensor([-0.6, 0.6], dtype=torch.float64).repeat(3, 1).T
    return nn.Sequential(KnotMap(*ends, torch.rand(3, 7) + 0.5), network(3, 4, 2, spline_order=5))


class Waves(InputMap):
    """sin and cos of the first input, sin of the second."""

    def __init__(self) -> None:
        super().__init__(3, [0, 0, 1])

    def evaluate(self, z: Tensor, highest: int) -> list[Tensor]:
        angle = z + torch.tensor([0.0, 1.5, 0.0], dtype=z.dtype)
        return [torch.sin(angle + d * math.pi / 2) for d in range(highest + 1)]


def with_batch_norm() -> nn.Module:
    model = network(norm="batch")
    model(torch.randn(100, 3, dtype=torch.float64))  # moves the running statistics
    return model.eval()


def kan_model(**config) -> nn.Module:
    return KANModel(KANConfig(widths=[3, 5, 4, 2], **config)).double()


def constrained(inner: nn.Module | None = None) -> nn.Module:
    features = BoxFeatures([-2] * 3, [2] * 3, periodic=[0], neumann=[1])
    model = nn.Sequential(features, inner or network(4, 5, 2)).double()
    return HardConstraint(model, lambda x: x[..., :1] * torch.exp(x[..., 1:2]), lambda x: torch.sin(x[..., :1]))


ACTIVATIONS = [nn.Tanh(), nn.SiLU(), nn.Sigmoid(), nn.Softplus(2.0, 1.0), nn.GELU(), nn.GELU("tanh"), Sine()]
KINDS = ["efficient-kan", "fast-kan", "faster-kan", "cheby-kan", "fourier-kan", "pina"]
ADAPTED = {
    "splines of degree 5": lambda: network(spline_order=5),
    "sequence": lambda: nn.Sequential(*network().layers),
    "slim": lambda: SlimKAN((3, 7, 6, 2), (4, 3, 3), spline_order=5, dtype=torch.float64),
    "slim, layer normalization": lambda: SlimKAN((3, 7, 2), (4, 3, 3), norm="layer", dtype=torch.float64),
    "KANModel": kan_model,
    "KANModel, slim but for a layer": lambda: kan_model(ranks=[(3, 3, 4), None, (2, 3, 4)]),
    "layer normalization": lambda: network(norm="layer"),
    "batch normalization": with_batch_norm,
    "tanh between": lambda: network(norm="tanh"),
    "knots": with_knots,
    **{kind: lambda kind=kind: chain(kind) for kind in KINDS},
}
MODELS = {
    **ADAPTED,
    **{repr(activation): lambda activation=activation: mlp(activation) for activation in ACTIVATIONS},
    **{f"{name}, adapted": lambda name=name: adapt(ADAPTED[name]()) for name in ADAPTED},
    "layer": lambda: network().layers[0],
    "normalized inputs": lambda: nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), network()).double(),
    "maps of one's own": lambda: nn.Sequential(Waves(), network(3, 4, 3), Waves(), network(3, 4, 2)),
    "KAN and MLP": lambda: nn.Sequential(KAN([3, 4]), nn.Tanh(), nn.Linear(4, 2)).double(),
}
COMPOSED = {
    "constrained": constrained,
    "constrained MLP": lambda: constrained(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))),
    "constrained, adapted": lambda: adapt(constrained()),
}
OTHERS = {
    "pykan": lambda: nn.Sequential(nn.Linear(3, 2), make_foreign("pykan")).double(),
    "own module": lambda: Hard(network()),
    "own module of three outputs, adapted": lambda: adapt(Hard(network(3, 4, 3))),
}
WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def gradients(parts, inputs) -> tuple[Tensor, ...]:
    total = sum(part.square().sum() for part in parts)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(total, inputs, **options)


def same_gradients(parts, expected, inputs, tolerance: float = 1e-10) -> None:
    pairs = list(zip(gradients(parts, inputs), gradients(expected, inputs), strict=True))
    largest = max(e.abs().max() for _, e in pairs)
    for a, e in pairs:
        assert (a - e).abs().max() <= tolerance * largest


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("name", [*MODELS, *COMPOSED, *OTHERS])
def test_agrees_with_nested_autograd(name):
    torch.manual_seed(0)
    model, x = {**MODELS, **COMPOSED, **OTHERS}[name](), points(30) * 0.8
    assert bool(stages_of(model)) == (name in MODELS)
    with ExactNorms():
        expected = nested(model, x, order=4)
        parameters = [p for p in model.parameters() if p.requires_grad]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore" if name in OTHERS else "error", "`jet` knows no closed form")
            same_gradients(jet(model, x), expected[:3], parameters, 1e-9)
            for order in range(1, 5):
                assert_same(jet(model, x, order=order), expected[: order + 1])
                if order > 1:
                    collapsed = torch.tensordot(WEIGHTS, expected[order], 1)
                    assert_same(jet(model, x, order=order, collapse=WEIGHTS), (*expected[:order], collapsed))


@pytest.mark.parametrize("degree", range(1, 6))
@pytest.mark.parametrize("count", [1, 4])
def test_directions(degree, count):
    model, x, directions = network(spline_order=degree, grid_size=4), points(), torch.randn(count, 3).double()
    assert_same(jet(model, x, directions), nested(model, x, directions))


@pytest.mark.parametrize("rows", [4, 100])  # by plain operations, by hand
@pytest.mark.parametrize(("order", "degree"), [(1, 2), (2, 3), (2, 4), (3, 5), (4, 5)])
def test_gradients(order, degree, rows):
    """Of each derivative alone, so that others have none; on grids of their own."""
    model, x = network(3, 5, 4, spline_order=degree), points(rows)
    model.layers[1].grid_bounds.copy_(torch.tensor([-0.7, 0.9]).expand(5, 2))
    found, expected = list(jet(model, x, order=order)), list(nested(model, x, order=order))
    if order > 1:
        found.append(jet(model, x, order=order, collapse=WEIGHTS)[-1])
        expected.append(torch.tensordot(WEIGHTS, expected[-1], 1))
    for one, other in zip(found, expected, strict=True):
        same_gradients([one], [other], list(model.parameters()))


def test_gradients_of_gradients():
    model, x = network(3, 5, 4, spline_order=5), points(100)

    def twice(parts) -> Tensor:
        total, parameters = sum(part.square().sum() for part in parts), [*model.parameters()]
        (once, *_) = torch.autograd.grad(total, parameters, create_graph=True)
        return torch.autograd.grad(once.square().sum(), parameters[-1])[0]

    torch.testing.assert_close(twice(jet(model, x, order=3)), twice(nested(model, x, order=3)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [5, 200])
def test_weights_that_are_learned(rows):
    """As the coefficients of an equation that are to be found."""
    model, x, weights = network(), points(rows), WEIGHTS.clone().requires_grad_()
    (found,) = torch.autograd.grad(jet(model, x, collapse=weights)[2].sum(), weights)
    torch.testing.assert_close(found, jet(model, x)[2].sum((1, 2)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, 3, 4])
@pytest.mark.parametrize("name", ["splines of degree 5", "Tanh()", "slim"])
def test_gradients_of_rows(name, order):
    """Those of Levenberg-Marquardt."""
    model, x = MODELS[name](), points(80)
    parameters = list(model.parameters())

    def residuals() -> Tensor:
        return sum(
            (0.1**n * part.square()).sum((0, -1))[:, None] for n, part in enumerate(jet(model, x, order=order)[1:])
        )

    found = row_gradients(residuals, parameters, len(x))
    for row, gradient in zip(residuals()[:3], found, strict=False):
        expected = torch.autograd.grad(row.sum(), parameters, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(gradient, torch.cat([part.flatten() for part in expected]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["splines of degree 5", "Tanh()"])
def test_float32(name):
    model, x = MODELS[name]().float(), points().float()
    for a, e in zip(jet(model, x), jet(copy.deepcopy(model).double(), x.double()), strict=True):
        assert a.dtype == torch.float32
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


def test_wrappers_are_looked_through():
    model, x = network(), points()
    assert_same(jet(torch.compile(model), x), jet(model, x), 1e-14)


# Other operators


def test_laplacian_hessian_and_biharmonic_operator():
    model, x = network(2, 5, 1, spline_order=5), points(40, 2)
    expected = torch.func.vmap(torch.func.hessian(model))(x)  # (N, O, I, I)
    u, du, d2u = hessian(model, x)
    assert_same((u, du, d2u), (*jet(model, x)[:2], expected.permute(2, 3, 0, 1)))
    assert_same((laplacian(model, x),), (torch.einsum("noii->no", expected),))
    v, w = torch.randn(2, 2, dtype=torch.float64)
    mixed = hessian(model, x, torch.stack([v, w]))[2][0, 1]
    torch.testing.assert_close(mixed, torch.einsum("noij,i,j->no", expected, v, w))
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    found = jet(model, x, directions, order=4, collapse=(2 / 3, 2 / 3, 1 / 6, 1 / 6))[-1]
    expected = torch.func.vmap(torch.func.hessian(torch.func.hessian(lambda p: model(p)[0])))(x)
    torch.testing.assert_close(found[:, 0], torch.einsum("niijj->n", expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("inputs", "outputs", "dims"), [(3, 3, None), (2, 2, None), (3, 3, 2), (4, 5, 3), (3, 2, 2)])
def test_divergence_and_curl(inputs, outputs, dims):
    model, x = network(inputs, 5, outputs), points(12, inputs).view(3, 4, inputs)
    n = dims or inputs
    slopes = torch.func.vmap(torch.func.jacrev(model))(x.flatten(0, 1)).view(3, 4, outputs, inputs)  # d u_o / d x_i
    expected = sum(slopes[..., i, i] for i in range(n)).unsqueeze(-1)
    torch.testing.assert_close(divergence(model, x, dims), expected)
    pairs = [(0, 1)] if n == 2 else [(1, 2), (2, 0), (0, 1)]
    expected = torch.stack([slopes[..., j, i] - slopes[..., i, j] for i, j in pairs], -1)
    torch.testing.assert_close(curl(model, x, dims), expected)


# Shapes and transforms


@pytest.mark.filterwarnings("ignore:`jet` knows no closed form")
@pytest.mark.parametrize(
    "name", ["splines of degree 5, adapted", "GELU(approximate='none')", "slim, adapted", "own module"]
)
def test_rows_by_vmap_and_leading_dimensions(name):
    model, x = {**MODELS, **OTHERS}[name](), points(6)
    expected = jet(model, x, order=4)
    found = torch.func.vmap(lambda row: jet(model, row, order=4), out_dims=(0, 1, 1, 1, 1))(x)
    assert_same(found, expected)
    assert_same([part.flatten(-3, -2) for part in jet(model, x.view(2, 3, 3), order=4)], expected)
    assert_same(jet(model, x[0]), (expected[0][0], *(part[:, 0] for part in expected[1:3])))
    slopes = torch.func.vmap(torch.func.jacfwd(lambda p: jet(model, p)[0]))(x)
    torch.testing.assert_close(slopes, expected[1].permute(1, 2, 0))
    assert jet(model, x[:0])[2].shape == (3, 0, 2)


def test_compiles_in_one_graph():
    model, x = nn.Sequential(adapt(network(3, 2)), nn.LayerNorm(2), nn.Tanh(), nn.Linear(2, 2)).double(), points()
    parameters = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(lambda x: jet(model, x[:, :1] * x, order=3), fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), jet(model, x[:, :1] * x, order=3)
    assert_same(found, expected)
    same_gradients(found, expected, parameters)


# Warnings and errors


@pytest.fixture
def warn_again(monkeypatch):
    monkeypatch.setattr(api, "_warned", set())


def test_a_warning_of_transforms_and_hooks_that_are_not_passed_over(warn_again):
    model, x = network(), points()
    model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    for other in (Hard(network()), model):
        with pytest.warns(UserWarning, match="knows no closed form") as seen:
            assert_same(jet(other, x), nested(other, x))
            jet(other, x)
        assert sum("closed form" in str(warning.message) for warning in seen) == 1


def test_derivatives_that_splines_do_not_have(warn_again):
    model, x = network(), points()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jet(model, x, order=3)
    with pytest.warns(UserWarning, match="degree 3 have no derivative of order 4.* `spline_order=5`") as seen:
        for _ in range(2):
            jet(model, x, order=4)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="degree 1 have no derivative of order 2"):
        laplacian(Hard(KAN([3, 2], spline_order=1).double()), x)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (0, 3), (1, 2, 3)])
def test_directions_of_a_wrong_shape(shape):
    for function in (jet, hessian):
        with pytest.raises(ValueError, match=r"`directions` has shape .*must be \(D, 3\)"):
            function(network(), points(), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jet(network(), points(40, 2)), ValueError, r"shape \(40, 2\), but its last dimension must be 3"),
        (lambda: jet(MODELS["normalized inputs"](), points(40, 2)), ValueError, "last dimension must be 3"),
        (lambda: jet(network(), torch.zeros(2, 3, dtype=torch.int64)), TypeError, "torch.int64"),
        (lambda: jet(network(), points(), collapse=(1.0, 0.0)), ValueError, "has 2 weights for 3 directions"),
        (lambda: jet(network(), points(), order=1, collapse=True), ValueError, "for 3 directions and order 1"),
        (lambda: jet(network(norm="batch"), points()), ValueError, r"`layers.1` is a BatchNorm .*model.eval\(\)"),
        (lambda: jet(network().float(), points()), RuntimeError, "to have the same dtype"),
        (lambda: curl(network(3, 4, 3), points(), 1), ValueError, "curl needs 2 or 3 coordinates, but there are 1"),
        (lambda: divergence(network(), points(), 0), ValueError, "`directions` has shape .0, 3."),
        (lambda: divergence(network(), points()), ValueError, "has 2 components of 3 coordinates, and `dims` is None"),
        (lambda: curl(network(3, 4), points(), 4), ValueError, "has 4 components of 3 coordinates, and `dims` is 4"),
        *(
            (lambda order=order: jet(network(), points(), order=order), ValueError, "`order` is .*, but must be")
            for order in (0, 5, "3", 2.0, True, None, (3, 1))
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
