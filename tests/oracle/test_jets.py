# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`jet`, `laplacian` and `hessian` of many networks, compared with nested autograd."""

import copy
import math
import warnings

import pytest
import torch
from foreign import Hard, make_foreign
from helpers import adapt, base, refused, refuses
from jet_helpers import assert_same, nested, network, points
from stand_ins import LAYER_KINDS
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.testing import assert_close

from peft_lotra.derivatives import api
from peft_lotra.derivatives.stages import stages_of
from peft_lotra.derivatives.torch_fallback import ExactNorms
from peft_lotra.kan import (
    KAN,
    SlimKAN,
    hessian,
    jet,
    laplacian,
)
from peft_lotra.kan.input_map import InputMap
from peft_lotra.least_squares.jacobian import row_gradients
from peft_lotra.pde import HardConstraint
from peft_lotra.pde.features import BoxFeatures


pytestmark = pytest.mark.filterwarnings("ignore:Adapters have more", "ignore:Splines of degree", "ignore:Ranks are")


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(2 * x)


def chain(kind):
    return nn.Sequential(LAYER_KINDS[kind](3, 4), LAYER_KINDS[kind](4, 2)).double()


def mlp(activation):
    layers = nn.Linear(3, 6), activation, nn.Linear(6, 5, bias=False), activation, nn.Linear(5, 2)
    return nn.Sequential(*layers).double()


class Waves(InputMap):
    """A map to the sine and the cosine of the first input, and the sine of the second."""

    def __init__(self):
        super().__init__(3, [0, 0, 1])

    def evaluate(self, z, highest):
        angle = z + torch.tensor([0.0, 1.5, 0.0], dtype=z.dtype)
        return [torch.sin(angle + d * math.pi / 2) for d in range(highest + 1)]


def with_batch_norm():
    model = network(norm="batch")
    model(torch.randn(100, 3, dtype=torch.float64))  # moves the running statistics
    return model.eval()


def constrained(inner=None):
    features = BoxFeatures([-2] * 3, [2] * 3, periodic=[0])
    model = nn.Sequential(features, inner or network(4, 5, 2)).double()
    return HardConstraint(model, lambda x: x[..., :1] * torch.exp(x[..., 1:2]), lambda x: torch.sin(x[..., :1]))


ACTIVATIONS = [nn.Tanh(), nn.SiLU(), nn.Sigmoid(), nn.Softplus(2.0, 1.0), nn.GELU(), nn.GELU("tanh"), Sine()]
KINDS = ["efficient-kan", "efficient-kan-no-scaler", "efficient-kan-old", "fast-kan", "faster-kan"]
KINDS += ["cheby-kan", "fourier-kan", "physicsnemo", "pina"]
ADAPTED = {
    "splines of degree 5": lambda: network(spline_order=5),
    "sequence": lambda: nn.Sequential(*network().layers),
    "layer normalization": lambda: network(norm="layer"),
    "batch normalization": with_batch_norm,
    "tanh between": lambda: network(norm="tanh"),
    **{kind: lambda kind=kind: chain(kind) for kind in KINDS},
}
MODELS = {
    **ADAPTED,
    "slim": lambda: SlimKAN((3, 7, 6, 2), (4, 3, 3), spline_order=5, dtype=torch.float64),
    "slim, layer normalization": lambda: SlimKAN((3, 7, 2), (4, 3, 3), norm="layer", dtype=torch.float64),
    "slim but for a layer": lambda: SlimKAN([3, 5, 4, 2], [(3, 3, 4), None, (2, 3, 4)], dtype=torch.float64),
    **{repr(activation): lambda activation=activation: mlp(activation) for activation in ACTIVATIONS},
    **{f"{name}, adapted": lambda name=name: adapt(ADAPTED[name]()) for name in ADAPTED},
    "layer": lambda: network().layers[0],
    "normalized inputs": lambda: nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), network()).double(),
    "registered maps": lambda: nn.Sequential(Waves(), network(3, 4, 3), Waves(), network(3, 4, 2)),
    "KAN and MLP": lambda: nn.Sequential(KAN([3, 4]), nn.Tanh(), nn.Linear(4, 2)).double(),
    "parts of libraries": lambda: nn.Sequential(
        KAN([3, 3]), nn.LayerNorm(3), LAYER_KINDS["faster-kan"](3, 2)
    ).double(),
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


def gradients(outputs, inputs):
    total = sum(output.square().sum() for output in outputs)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(total, inputs, **options)


def assert_same_gradients(actual, expected, inputs, tolerance=1e-10):
    """Compare gradients; the tolerance is a share of the largest entry of all."""
    expected_gradients = gradients(expected, inputs)
    largest = max(gradient.abs().max().item() for gradient in expected_gradients)
    assert_close(gradients(actual, inputs), expected_gradients, rtol=0, atol=tolerance * largest)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("name", [*MODELS, *COMPOSED, *OTHERS])
def test_agrees_with_nested_autograd(name):
    model, x = {**MODELS, **COMPOSED, **OTHERS}[name](), points(30) * 0.8
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert bool(stages_of(model)) == (name in MODELS)

    with ExactNorms(), warnings.catch_warnings():
        warnings.filterwarnings("ignore" if name in OTHERS else "error", "`jet` knows no closed form")
        expected = nested(model, x, order=4)
        assert_same_gradients(jet(model, x), expected[:3], parameters, 1e-9)
        assert_same(jet(model, x, order=1), expected[:2])
        for order in (2, 3, 4):
            assert_same(jet(model, x, order=order), expected[: order + 1])
            collapsed = torch.tensordot(WEIGHTS, expected[order], 1)
            assert_same(jet(model, x, order=order, collapse=WEIGHTS), (*expected[:order], collapsed))


@pytest.mark.parametrize("degree", range(1, 6))
@pytest.mark.parametrize("count", [1, 4])
def test_derivatives_along_directions(degree, count):
    model, x = network(spline_order=degree, grid_size=4), points()
    directions = torch.randn(count, 3, dtype=torch.float64)

    assert_same(jet(model, x, directions), nested(model, x, directions))


@pytest.mark.parametrize("rows", [4, 100])  # by plain operations, by a written backward pass
@pytest.mark.parametrize(("order", "degree"), [(1, 2), (2, 3), (2, 4), (3, 5), (4, 5)])
def test_gradients_of_each_derivative_alone(order, degree, rows):
    """The other derivatives have no gradients, and each layer has its own grid."""
    model, x = network(3, 5, 4, spline_order=degree), points(rows)
    model.layers[1].grid_bounds.copy_(torch.tensor([-0.7, 0.9]).expand(5, 2))
    derivatives, expected = list(jet(model, x, order=order)), list(nested(model, x, order=order))
    if order > 1:
        derivatives.append(jet(model, x, order=order, collapse=WEIGHTS)[-1])
        expected.append(torch.tensordot(WEIGHTS, expected[-1], 1))

    for pair in zip(derivatives, expected, strict=True):
        assert_same_gradients(pair[:1], pair[1:], list(model.parameters()))


def test_gradients_of_gradients():
    model, x = network(3, 5, 4, spline_order=5), points(100)
    parameters = list(model.parameters())

    def second_gradient(derivatives):
        total = sum(derivative.square().sum() for derivative in derivatives)
        (gradient, *_) = torch.autograd.grad(total, parameters, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), parameters[-1])[0]

    gradient = second_gradient(jet(model, x, order=3))

    assert_close(gradient, second_gradient(nested(model, x, order=3)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [5, 200])
def test_weights_of_directions_have_gradients(rows):
    """They may be unknown coefficients of an equation."""
    model, x, weights = network(), points(rows), WEIGHTS.clone().requires_grad_()

    (gradient,) = torch.autograd.grad(jet(model, x, collapse=weights)[2].sum(), weights)

    assert_close(gradient, jet(model, x)[2].sum((1, 2)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, 3, 4])
@pytest.mark.parametrize("name", ["splines of degree 5", "Tanh()"])
def test_gradients_of_rows(name, order):
    """Levenberg-Marquardt takes them."""
    model, x = MODELS[name](), points(80)
    parameters = list(model.parameters())

    def residuals():
        _, *derivatives = jet(model, x, order=order)
        return sum(0.1**n * part.square().sum((0, -1)).unsqueeze(1) for n, part in enumerate(derivatives))

    rows = row_gradients(residuals, parameters, len(x))

    for residual, row in zip(residuals()[:3], rows, strict=False):
        expected = torch.autograd.grad(residual.sum(), parameters, retain_graph=True, materialize_grads=True)
        assert_close(row, torch.cat([part.flatten() for part in expected]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["splines of degree 5", "Tanh()"])
def test_float32_agrees_with_float64(name):
    model, x = MODELS[name]().float(), points().float()

    derivatives = jet(model, x)

    assert all(derivative.dtype == torch.float32 for derivative in derivatives)
    assert_same(derivatives, jet(copy.deepcopy(model).double(), x.double()), 1e-5)


def test_a_layer_that_returns_a_tuple_has_the_jet_of_its_outputs():
    model, x = base("pykan", torch.float64), points()

    assert_same(jet(model.kan, x), nested(model, x))


def test_a_compiled_model_has_the_jet_of_its_module():
    model, x = network(), points()

    assert_same(jet(torch.compile(model), x), jet(model, x), 1e-14)


# Other operators


def test_hessian_and_laplacian():
    model, x = network(2, 5, 1, spline_order=5), points(40, 2)
    v, w = torch.randn(2, 2, dtype=torch.float64)
    expected = torch.func.vmap(torch.func.hessian(model))(x)  # (N, O, I, I)

    assert_same(hessian(model, x), (*jet(model, x)[:2], expected.permute(2, 3, 0, 1)))
    assert_same([laplacian(model, x)], [torch.einsum("noii->no", expected)])
    mixed = hessian(model, x, torch.stack([v, w]))[2][0, 1]
    assert_close(mixed, torch.einsum("noij,i,j->no", expected, v, w))


def test_four_directions_make_the_biharmonic_operator():
    model, x = network(2, 5, 1, spline_order=5), points(40, 2)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])

    biharmonic = jet(model, x, directions, order=4, collapse=(2 / 3, 2 / 3, 1 / 6, 1 / 6))[-1]

    fourth = torch.func.vmap(torch.func.hessian(torch.func.hessian(lambda point: model(point)[0])))(x)
    assert_close(biharmonic[:, 0], torch.einsum("niijj->n", fourth), rtol=1e-9, atol=1e-9)


# Shapes and transforms


@pytest.mark.filterwarnings("ignore:`jet` knows no closed form")
@pytest.mark.parametrize("name", ["splines of degree 5, adapted", "GELU(approximate='none')", "slim", "own module"])
def test_rows_by_vmap_and_leading_dimensions(name):
    model, x = {**MODELS, **OTHERS}[name](), points(6)
    expected = jet(model, x, order=4)

    by_rows = torch.func.vmap(lambda row: jet(model, row, order=4), out_dims=(0, 1, 1, 1, 1))(x)
    stacked = jet(model, x.view(2, 3, 3), order=4)
    slopes = torch.func.vmap(torch.func.jacfwd(lambda row: jet(model, row)[0]))(x)

    assert_same(by_rows, expected)
    assert_same([derivative.flatten(-3, -2) for derivative in stacked], expected)
    assert_same(jet(model, x[0]), (expected[0][0], expected[1][:, 0], expected[2][:, 0]))
    assert_close(slopes, expected[1].permute(1, 2, 0))
    assert jet(model, x[:0])[2].shape == (3, 0, 2)


def test_a_jet_is_compiled_in_one_graph():
    model = nn.Sequential(adapt(network(3, 2)), nn.LayerNorm(2), nn.Tanh(), nn.Linear(2, 2)).double()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x = points()

    def jet_of_products(x):
        return jet(model, x[:, :1] * x, order=3)

    compiled = torch.compile(jet_of_products, fullgraph=True, backend="aot_eager")
    derivatives = compiled(x)

    assert_same(derivatives, jet_of_products(x))
    assert_same_gradients(derivatives, jet_of_products(x), parameters)
    with torch.no_grad():
        assert_same(compiled(x), derivatives)


def test_the_graph_of_a_compiled_jet_copies_no_functions():
    """Products take the basis functions, and backward passes their gradients, in the order in which they lie."""
    copies = []

    def record(graph, _):
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.clone.default:
                copies.append(node.meta["val"].numel())
        return make_boxed_func(graph.forward)

    model = KAN([2, 4, 1], grid_size=20)
    x = torch.rand(100, 2)
    compiled = torch.compile(laplacian, backend=aot_autograd(fw_compiler=record))

    compiled(model, x).sum().backward()

    functions = 24 * 4 * len(x)
    assert max(copies, default=0) < functions


# Warnings and errors


@pytest.fixture
def warn_again(monkeypatch):
    monkeypatch.setattr(api, "_warned", set())


def with_hook():
    model = network()
    model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


@pytest.mark.parametrize("make", [with_hook, lambda: Hard(network())])
def test_a_model_without_a_closed_form_warns_once_and_runs_its_hooks(warn_again, make):
    model, x = make(), points()

    with pytest.warns(UserWarning, match="knows no closed form") as records:
        assert_same(jet(model, x), nested(model, x))
        jet(model, x)

    assert sum("closed form" in str(record.message) for record in records) == 1


def test_derivatives_that_splines_do_not_have_warn_once(warn_again):
    model, x = network(), points()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jet(model, x, order=3)
    with pytest.warns(UserWarning, match="degree 3 have no derivative of order 4.* `spline_order=5`") as records:
        jet(model, x, order=4)
        jet(model, x, order=4)

    assert len(records) == 1
    with pytest.warns(UserWarning, match="degree 1 have no derivative of order 2"):
        laplacian(Hard(KAN([3, 2], spline_order=1).double()), x)


@pytest.mark.parametrize("function", [jet, hessian])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0, 3), (1, 2, 3)])
def test_directions_of_a_wrong_shape_are_refused(shape, function):
    with refused(r"`directions` has shape .*must be \(D, 3\)"):
        function(network(), points(), torch.zeros(shape, dtype=torch.float64).tolist())


WRONG = {
    r"shape \(40, 2\), but its last dimension must be 3": lambda: jet(network(), points(40, 2)),
    "last dimension must be 3": lambda: jet(MODELS["normalized inputs"](), points(40, 2)),
    r"shape \(40, 3\), but its last dimension must be 1": lambda: jet(
        nn.Sequential(nn.LayerNorm(1), network()), points()
    ),
    "must be floating point": lambda: jet(network(), torch.zeros(2, 3, dtype=torch.int64)),
    "has 2 weights for 3 directions": lambda: jet(network(), points(), collapse=(1.0, 0.0)),
    "for 3 directions and order 1": lambda: jet(network(), points(), order=1, collapse=True),
    r"`layers.1` is a BatchNorm .*model.eval\(\)": lambda: jet(network(norm="batch"), points()),
    "to have the same dtype": lambda: jet(network().float(), points()),
}


test_wrong_arguments_are_named = refuses(WRONG)


@pytest.mark.parametrize("order", [0, 5, "3", 2.0, True, None, (3, 1)])
def test_wrong_orders_are_refused(order):
    with refused("`order` is .*, but must be"):
        jet(network(), points(), order=order)
