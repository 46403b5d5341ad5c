# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Jets of modules without a closed form."""

import pytest
import torch
from foreign import FOREIGN, Hard, make_foreign, pykan
from helpers import adapt
from jet_helpers import assert_same, nested, network
from torch import nn
from torch.testing import assert_close

from peft_lotra.kan import KAN, hessian, jet, laplacian


pytestmark = pytest.mark.filterwarnings("ignore:`jet` knows no closed form", "ignore:std")


def inside(rows=6):
    return torch.rand(rows, 2, dtype=torch.float64) * 0.9 + 0.05


class Compiled(nn.Module):
    """A module that compiles a part of itself, as flashkan does."""

    def __init__(self):
        super().__init__()
        self.kan = KAN([2, 3, 2], dtype=torch.float64)
        self.function = torch.compile(lambda x: torch.tanh(x).square(), backend="aot_eager")

    def forward(self, x):
        return self.function(self.kan(x))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_module_that_compiles_a_part(adapted):
    model, x = adapt(Compiled(), r=2) if adapted else Compiled(), inside()

    derivatives = jet(model, x)
    derivatives[2].square().sum().backward()

    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    with torch.compiler.set_stance("force_eager"):
        assert_same(derivatives, nested(model, x))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_any_module_in_any_mode(name, adapted):
    model, x = make_foreign(name), inside()
    if adapted and name != "mlp":
        model = adapt(model)
    expected = nested(model, x)

    assert_same(jet(model, x), expected)
    assert_same(hessian(model, x)[1:2], expected[1:2])
    assert_same([laplacian(model, x)], [expected[2].sum(0)])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            derivatives = jet(model, x.clone())
        assert_same(derivatives, expected)
        assert not any(derivative.requires_grad for derivative in derivatives)
    by_rows = torch.func.vmap(lambda row: jet(model, row[None]), out_dims=(0, 1, 1))(x)
    assert_same([derivative.squeeze(-2) for derivative in by_rows], expected)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_outputs_and_directions(count):
    model, x = Hard(KAN([3, 4, count]).double()), torch.rand(5, 3, dtype=torch.float64)
    directions = torch.randn(2, 3, dtype=torch.float64)
    second = nested(model, x)[2]

    assert_same(jet(model, x, directions), nested(model, x, directions))
    assert_same([jet(model, x, collapse=(1.0, 0.0, -2.0))[2]], [second[0] - 2 * second[2]])
    assert jet(model, x.view(5, 1, 3))[1].shape == (3, 5, 1, count)


def test_layer_normalization_has_right_derivatives():
    """Compare with finite differences; the gradients are third derivatives."""
    model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Flatten(), nn.Tanh(), nn.Linear(4, 1)).double()
    x = inside().requires_grad_()
    move = torch.randn(6, 2, dtype=torch.float64)

    def loss(x):
        return laplacian(model, x).square().sum()

    second = jet(model, x)[2][0]
    (gradient,) = torch.autograd.grad(loss(x), x)

    step = torch.tensor([1e-4, 0.0], dtype=torch.float64)
    difference = (model(x + step) - 2 * model(x) + model(x - step)) / 1e-4**2
    largest = laplacian(model, x).abs().max().item()
    assert_close(second, difference, rtol=1e-4, atol=1e-4 * largest)
    slope = (loss(x + 1e-5 * move) - loss(x - 1e-5 * move)) / 2e-5
    assert_close((gradient * move).sum(), slope, rtol=1e-5, atol=1e-8)


def test_modules_keep_no_tensors_of_a_transform():
    model, x = pykan(symbolic_enabled=False), inside().float()
    expected = model(x)

    torch.func.vmap(lambda row: jet(model, row[None]))(x)

    assert torch.equal(model.acts[-1], expected)
    assert torch.equal(model(x), expected)


def test_a_custom_function_of_autograd_is_differentiated():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, gradient):
            return 3 * ctx.saved_tensors[0] ** 2 * gradient

    class Cubed(Hard):
        def forward(self, x):
            return Cube.apply(self.kan(x))

    model, x = Cubed(network(2, 3, 1)), inside()
    assert_same(jet(model, x), nested(lambda x: model.kan(x) ** 3, x))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_outputs_that_do_not_depend_on_the_inputs_have_zero_derivatives(mode):
    class Constant(nn.Linear):
        def forward(self, x):
            return self.weight[:, :1].T.expand(len(x), -1)

    with mode():
        u, du, d2u = jet(Constant(2, 3), inside().float())

    assert u.shape == (6, 3)
    assert not du.any()
    assert not d2u.any()


class Changed(Hard):
    def __init__(self, kan, change):
        super().__init__(kan)
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


CHANGES = {
    "several dimensions": (lambda y: y.unflatten(-1, (2, 2)), lambda part: part.unflatten(-1, (2, 2))),
    "no dimension": (lambda y: y[..., 1], lambda part: part[..., 1]),
    "a tuple": (lambda y: (y, -y), lambda part: part),
}


@pytest.mark.parametrize("name", CHANGES)
def test_outputs_of_any_shape_are_differentiated(name):
    model, x = Hard(network(2, 3, 4)), inside()
    change, expected_change = CHANGES[name]

    derivatives = jet(Changed(model.kan, change), x)

    assert_same(derivatives, [expected_change(derivative) for derivative in jet(model, x)])


@pytest.mark.parametrize("change, output", [(lambda y: y.sum(0), r"shape \(4,\)"), (lambda y: [y], "list")])
def test_outputs_without_rows_are_refused(change, output):
    with pytest.raises(ValueError, match=rf"returns {output} for `x` of shape \(6, 2\), but must return"):
        jet(Changed(network(2, 3, 4), change), inside())
