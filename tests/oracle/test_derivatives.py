# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Jets of adapted networks and steps of least squares, compared with nested autograd and dense linear algebra."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import ALPHA, FORMS, dense, dense_base, dense_parameters, near
from helpers import KINDS, adapt, inputs, lotra_layers
from torch import Tensor, nn

from peft_lotra.kan import KAN, KnotMap, SlimKAN, curl, divergence, hessian, jet, laplacian
from peft_lotra.optim import LevenbergMarquardt


pytestmark = pytest.mark.filterwarnings("ignore")


class Normed(nn.Module):
    """A normalization of the dense reference, whose derivatives of each order are right."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return centered * (centered.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias


def exact(model: nn.Module) -> nn.Module:
    """Return a copy without torch's layer normalization, whose third derivative is wrong."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.LayerNorm:
                setattr(module, name, Normed(child))
    return model


def chain(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules).double()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "splines of order 5": lambda: KAN([3, 4, 3], spline_order=5, norm="layer", dtype=torch.float64),
    "tanh": lambda: KAN([3, 5, 3], spline_order=4, norm="tanh", dtype=torch.float64),
    "batch norm": lambda: KAN([3, 5, 3], norm="batch", dtype=torch.float64),
    "slim": lambda: SlimKAN([3, 5, 3], ranks=(2, "full", 3), spline_order=5, dtype=torch.float64),
    "knots": lambda: chain(KnotMap(-torch.ones(3), torch.ones(3), 1 + torch.rand(3, 4)), KAN([3, 4, 3])),
    "linear": lambda: chain(nn.Linear(3, 4), nn.SiLU(), KAN([4, 3, 3]), nn.Sigmoid(), nn.Linear(3, 3), nn.GELU()),
    "others": lambda: chain(KINDS["cheby-kan"]().kan, nn.Tanh(), KAN([4, 3])),
    "fast-kan": lambda: chain(KINDS["fast-kan"]().kan, KAN([4, 3])),
    "wide": lambda: KAN([3, 300, 3], dtype=torch.float64),
}
# the kinds whose fourth derivatives are compared
HIGH = ["splines of order 5", "fast-kan"]


def make(kind: str, form: str = "factors", rows: int = 12) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a base, the base with an adapter, and inputs."""
    torch.manual_seed(0)
    base = NETWORKS[kind]().eval()
    return base, adapt(copy.deepcopy(base), alpha=ALPHA, **FORMS[form]), inputs(rows, torch.float64) * 1.2


@pytest.mark.parametrize(("rows", "collapse"), [(2, False), (12, False), (12, True), (12, (0.5, -2.0))], ids=str)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_jet_and_its_gradients(kind: str, rows: int, collapse: Any) -> None:
    """Of order 2 to 4, by plain operations and by the backward pass of layers."""
    base, model, x = make(kind, rows=rows)
    x.requires_grad_()
    directions = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    variables = [x, directions, *(p for p in model.parameters() if p.requires_grad)]
    reference = dense_base(base)
    parameters = dense_parameters(reference, (model, "default", ALPHA))
    reference = exact(reference)
    run = lambda z: torch.func.functional_call(reference, parameters, (z,))  # noqa: E731
    order = 2 if kind == "wide" or collapse is True else 3
    if kind in HIGH and collapse is False:
        order += 1

    actual = jet(model, x, directions, order=order, collapse=collapse)
    expected = jet_by_autograd(run, x, directions, order, collapse)

    near(list(actual), expected, 1e-6)
    losses = [sum((part / part.detach().abs().max()).cos().sum() for part in parts) for parts in (actual, expected)]
    gradients = [torch.autograd.grad(loss, variables, allow_unused=True) for loss in losses]
    near(*gradients, 1e-6)


def jet_by_autograd(run: Callable, x: Tensor, directions: Tensor, order: int, collapse: Any) -> list[Tensor]:
    """Return the jet along each direction by differentiating with respect to t, differentiable in all."""
    jets = []
    for direction in directions:
        t = torch.zeros(len(x), 1, dtype=x.dtype, requires_grad=True)
        columns = [run(x + t * direction)]
        for _ in range(order):
            slopes = [
                torch.autograd.grad(column.sum(), t, create_graph=True, materialize_grads=True)[0]
                for column in columns[-1].unbind(-1)
            ]
            columns.append(torch.cat(slopes, -1))
        jets.append(columns)
    value, *lower = [torch.stack(parts) for parts in zip(*jets, strict=True)]
    if collapse is not False:
        weights = torch.ones(2) if collapse is True else torch.tensor(collapse)
        lower[-1] = torch.tensordot(weights.double(), lower[-1], 1)
    return [value[0], *lower]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["tanh", "slim", "others"])
def test_operators_and_transforms(kind: str, form: str) -> None:
    base, model, x = make(kind, form)
    reference = dense(base, model)
    of_row = lambda row: reference(row.unsqueeze(0))[0]  # noqa: E731
    slopes = torch.func.vmap(torch.func.jacfwd(of_row))(x)  # (rows, out, in)
    curvature = torch.func.vmap(torch.func.hessian(of_row))(x)

    near(hessian(model, x)[2], curvature.permute(2, 3, 0, 1), 1e-7)
    near(laplacian(model, x), curvature.diagonal(dim1=2, dim2=3).sum(-1), 1e-7)
    near(divergence(model, x), slopes.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True), 1e-7)
    rotation = [slopes[:, j, i] - slopes[:, i, j] for i, j in ((1, 2), (2, 0), (0, 1))]
    near(curl(model, x), torch.stack(rotation, -1), 1e-7)
    near(curl(model, x, dims=2), rotation[2].unsqueeze(-1), 1e-7)
    by_row = torch.func.vmap(lambda row: jet(model, row.unsqueeze(0))[2][:, 0])(x)
    near(by_row, curvature.diagonal(dim1=2, dim2=3).permute(0, 2, 1), 1e-7)


@pytest.mark.parametrize("kind", ["wide", "others"])
def test_a_jet_in_several_blocks(kind: str) -> None:
    base, model, x = make(kind, rows=600)
    reference = dense(base, model)
    directions = torch.randn(2, 3, dtype=torch.float64)
    x.requires_grad_()

    actual = jet(model, x, directions)
    expected = jet_by_autograd(reference, x, directions, 2, False)

    near(list(actual), expected, 1e-8)
    near(*[torch.autograd.grad(parts[2].square().mean(), x)[0] for parts in (actual, expected)], 1e-8)


# --- least squares ---


def fit(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x)[:, :2] - y


def equation(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    u, _, laplacian = jet(model, x, collapse=True)
    return (laplacian + u**3)[:, 0] - y[:, 0]


def shifted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Depends on a parameter of no dimension too."""
    return model(x)[:, 0] - model.shift * y[:, 0]


def of_weights(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Depends on parameters outside of layers, so that `vmap` differentiates it."""
    core = next(iter(lotra_layers(model).values())).lotra_core["default"]
    penalty = core.square().sum()
    return model(x)[:, 0] - penalty * y[:, 0]


def written(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Writes into a tensor, so that it is differentiated row by row."""
    values = torch.zeros(len(x), 2, dtype=x.dtype)
    values[:, 0] = model(x)[:, 0] - y[:, 0]
    return values[:, :1] + of_weights(model, x, y).unsqueeze(1)


TERMS = {"fit": [fit], "equation": [equation, fit], "shifted": [shifted], "vmap": [of_weights], "rows": [written]}


def residuals_and_jacobian(model: nn.Module, terms: list[tuple]) -> tuple[Tensor, Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = []
    for function, rows, weight in terms:
        values = function(model, *rows).flatten()
        parts.append(values * math.sqrt(weight / len(rows[0])))
    residuals = torch.cat(parts)
    units = torch.eye(len(residuals), dtype=residuals.dtype)
    gradients = torch.autograd.grad(residuals, parameters, units, is_grads_batched=True, materialize_grads=True)
    return residuals.detach(), torch.cat([gradient.reshape(len(units), -1) for gradient in gradients], 1)


def trained(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def terms_at(names: str, rows: int) -> list[tuple]:
    weights = (3.0, 0.5)
    terms = []
    for function, weight in zip(TERMS[names], weights, strict=False):
        rows_of_term = (inputs(rows, torch.float64), torch.randn(rows, 2, dtype=torch.float64))
        terms.append((function, rows_of_term, weight))
    return terms


MODELS = {
    **{form: lambda form=form: make("tanh", form)[1] for form in FORMS},
    "slim": lambda: make("slim", "factors")[1],
    "others": lambda: make("others", "factors")[1],
    "linear": lambda: make("linear", "shape")[1],
    "network": lambda: make("knots")[0],
    "slim network": lambda: make("slim")[0],
    "linear network": lambda: make("linear")[0],
}
STEPS = [(model, names, rows, 2**30) for model in MODELS for names, rows in (("fit", 6), ("equation", 50))]
STEPS += [("factors", names, rows, 2**30) for names in ("shifted", "vmap", "rows") for rows in (6, 50)]
STEPS += [(model, "fit", rows, 2**18) for model in ("shape", "slim") for rows in (6, 500)]


@pytest.mark.parametrize(("name", "names", "rows", "memory"), STEPS)
def test_a_step_is_a_damped_gauss_newton_step(name: str, names: str, rows: int, memory: int) -> None:
    """With fewer residuals than parameters, and with more; with the whole Jacobian in memory, and in chunks."""
    model = MODELS[name]()
    if names == "shifted":
        model.shift = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    terms = terms_at(names, rows)
    before = trained(model)
    damping, floor = 3.0, 0.1
    residuals, jacobian = residuals_and_jacobian(model, terms)
    matrix, gradient = jacobian.T @ jacobian, jacobian.T @ residuals
    scaling = matrix.diagonal().clamp(min=floor * matrix.diagonal().max().item())

    record = LevenbergMarquardt(model, damping, floor=floor, memory=memory).step(terms)

    damping *= 2 ** (record.attempts * (record.attempts - 1) // 2)
    expected = -torch.linalg.solve(matrix + damping * scaling.diag(), gradient)
    step = trained(model) - before
    near(step / expected.norm(), expected / expected.norm(), 1e-7)
    new_residuals, _ = residuals_and_jacobian(model, terms)
    loss, new_loss = residuals.square().sum(), new_residuals.square().sum()
    assert record.loss == pytest.approx(new_loss.item())
    assert record.decrease == pytest.approx((1 - new_loss / loss).item())
    linear = residuals.square().sum() - (residuals + jacobian @ expected).square().sum()
    agreement = (loss - new_loss) / linear
    factor = (0.5 if record.attempts > 1 else 0.1) if agreement > 0.75 else 0.5 if agreement > 0.25 else 2.0
    assert record.damping == pytest.approx(damping * factor)


def test_former_residuals_count_less_after_each_step() -> None:
    """The second step minimizes the sum of the present linear model and the discounted former one."""
    model = MODELS["factors"]()
    optimizer = LevenbergMarquardt(model, 3.0, floor=0.1, forgetting=0.6)
    past_gradient = torch.zeros_like(trained(model))
    total = torch.zeros(len(past_gradient), len(past_gradient), dtype=torch.float64)
    for _ in range(3):
        terms = terms_at("fit", 90)
        before, damping = trained(model), optimizer.damping
        residuals, jacobian = residuals_and_jacobian(model, terms)
        matrix = jacobian.T @ jacobian + 0.6 * total
        gradient = jacobian.T @ residuals + 0.6 * past_gradient
        scaling = matrix.diagonal().clamp(min=0.1 * matrix.diagonal().max().item())

        record = optimizer.step(terms)

        assert record.attempts == 1
        step = trained(model) - before
        near(step, -torch.linalg.solve(matrix + damping * scaling.diag(), gradient), 1e-8)
        new_residuals, _ = residuals_and_jacobian(model, terms)
        past_gradient = jacobian.T @ new_residuals + 0.6 * past_gradient + 0.6 * total @ step
        total = matrix
