# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Jets of modules without a closed form."""

from __future__ import annotations

import pytest
import torch
from foreign import FOREIGN, Hard, make_foreign, pykan
from helpers import adapt
from jet_helpers import assert_same, nested, network
from torch import Tensor, nn

from peft_lotra.kan import KAN, hessian, jet, laplacian


pytestmark = pytest.mark.filterwarnings("ignore:`jet` knows no closed form", "ignore:std")


def inside(rows: int = 6) -> Tensor:
    return torch.rand(rows, 2, dtype=torch.float64) * 0.9 + 0.05


class Compiled(nn.Module):
    """A module that compiles a part of itself, as flashkan does."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KAN([2, 3, 2], dtype=torch.float64)
        self.function = torch.compile(lambda x: torch.tanh(x).square(), backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.kan(x))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_module_that_compiles_a_part(adapted):
    model, x = adapt(Compiled(), r=2) if adapted else Compiled(), inside()
    found = jet(model, x)
    found[2].square().sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    with torch.compiler.set_stance("force_eager"):
        assert_same(found, nested(model, x))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_any_module_in_any_mode(name, adapted):
    model, x = make_foreign(name), inside()
    if adapted and name != "mlp":
        model = adapt(model)
    expected = nested(model, x)
    assert_same(jet(model, x), expected)
    assert_same(hessian(model, x)[1:2], expected[1:2])
    assert_same((laplacian(model, x),), (expected[2].sum(0),))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = jet(model, x.clone())
        assert_same(found, expected)
        assert not any(part.requires_grad for part in found)
    by_rows = torch.func.vmap(lambda row: jet(model, row[None]), out_dims=(0, 1, 1))(x)
    assert_same([part.squeeze(-2) for part in by_rows], expected)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_numbers_of_outputs_and_directions(count):
    model, x = Hard(KAN([3, 4, count]).double()), torch.rand(5, 3, dtype=torch.float64)
    directions = torch.randn(2, 3, dtype=torch.float64)
    assert_same(jet(model, x, directions), nested(model, x, directions))
    found = jet(model, x, collapse=(1.0, 0.0, -2.0))[2]
    of_each = nested(model, x)[2]
    assert_same((found,), (of_each[0] - 2 * of_each[2],))
    assert jet(model, x.view(5, 1, 3))[1].shape == (3, 5, 1, count)


def test_layer_normalization_has_right_derivatives():
    """The gradients too, which are third derivatives."""
    model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Flatten(), nn.Tanh(), nn.Linear(4, 1)).double()
    x, move, step = inside(), torch.randn(6, 2, dtype=torch.float64), 1e-5
    x.requires_grad_()
    bend = laplacian(model, x)
    ahead, behind = (model(x + s * 10 * v) for s in (step, -step) for v in [torch.eye(2, dtype=torch.float64)[0]])
    assert torch.allclose(
        jet(model, x)[2][0], (ahead - 2 * model(x) + behind) / (10 * step) ** 2, 1e-4, 1e-4 * bend.abs().max().item()
    )
    (gradient,) = torch.autograd.grad(bend.square().sum(), x)
    ahead, behind = (laplacian(model, x + s * move).square().sum() for s in (step, -step))
    assert torch.allclose((gradient * move).sum(), (ahead - behind) / (2 * step), 1e-5)


def test_modules_keep_no_tensors_of_a_transform():
    model, x = pykan(symbolic_enabled=False), inside().float()
    expected = model(x)
    torch.func.vmap(lambda row: jet(model, row[None]))(x)
    assert torch.equal(model.acts[-1], expected)
    assert torch.equal(model(x), expected)


def test_custom_functions():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, gradient):
            return 3 * ctx.saved_tensors[0] ** 2 * gradient

    class Cubed(Hard):
        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(self.kan(x))

    model, x = Cubed(network(2, 3, 1)), inside()
    assert_same(jet(model, x), nested(lambda x: model.kan(x) ** 3, x))


def test_what_does_not_depend_on_the_inputs():
    class Constant(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight[:, :1].T.expand(len(x), -1)

    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            u, du, d2u = jet(Constant(2, 3), inside().float())
        assert u.shape == (6, 3) and not du.any() and not d2u.any()


@pytest.mark.filterwarnings("ignore")
def test_compiles():
    model, x = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Tanh(), nn.Linear(2, 1)).double(), inside()
    compiled = torch.compile(lambda x: jet(model, x), backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), jet(model, x))
    with torch.no_grad():
        assert_same(compiled(x), jet(model, x))


class Changed(Hard):
    def __init__(self, kan: nn.Module, change) -> None:
        super().__init__(kan)
        self.change = change

    def forward(self, x: Tensor):
        return self.change(super().forward(x))


def test_outputs_of_other_shapes():
    model, x = Hard(network(2, 3, 4)), inside()
    expected = jet(model, x)
    found = jet(Changed(model.kan, lambda y: y.unflatten(-1, (2, 2))), x)
    assert_same(found, [part.unflatten(-1, (2, 2)) for part in expected])
    found = jet(Changed(model.kan, lambda y: y[..., 1]), x)
    assert_same(found, [part[..., 1] for part in expected])
    assert_same(jet(Changed(model.kan, lambda y: (y, x)), x), expected)
    for change, given in ((lambda y: y.sum(0), r"shape \(4,\)"), (lambda y: [y], "list")):
        with pytest.raises(ValueError, match=rf"returns {given} for `x` of shape \(6, 2\), but must return"):
            jet(Changed(model.kan, change), x)
