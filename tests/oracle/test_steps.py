# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Steps of least squares, compared with dense Gauss-Newton steps."""

import math

import pytest
import torch
from dense import ALPHA, FORMS, near
from helpers import KINDS, adapt, inputs, lotra_layers
from torch import nn

from peft_lotra.kan import KAN, SlimKAN, TanhBound, jet
from peft_lotra.least_squares import LevenbergMarquardt


pytestmark = pytest.mark.filterwarnings("ignore")


def fit(model, x, y):
    return model(x)[:, :2] - y


def equation(model, x, y):
    u, _, laplacian = jet(model, x, collapse=True)
    return (laplacian + u**3)[:, 0] - y[:, 0]


def shifted(model, x, y):
    """Depends on a parameter of no dimension too."""
    return model(x)[:, 0] - model.shift * y[:, 0]


def of_weights(model, x, y):
    """Depends on parameters outside of layers, so that `vmap` differentiates it."""
    core = next(iter(lotra_layers(model).values())).lotra_core["default"]
    penalty = core.square().sum()
    return model(x)[:, 0] - penalty * y[:, 0]


def written(model, x, y):
    """Writes into a tensor, so that it is differentiated row by row."""
    values = torch.zeros(len(x), 2, dtype=x.dtype)
    values[:, 0] = model(x)[:, 0] - y[:, 0]
    return values[:, :1] + of_weights(model, x, y).unsqueeze(1)


TERMS = {"fit": [fit], "equation": [equation, fit], "shifted": [shifted], "vmap": [of_weights], "rows": [written]}


def residuals_and_jacobian(model, terms):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = []
    for function, rows, weight in terms:
        values = function(model, *rows).flatten()
        parts.append(values * math.sqrt(weight / len(rows[0])))
    residuals = torch.cat(parts)
    units = torch.eye(len(residuals), dtype=residuals.dtype)
    gradients = torch.autograd.grad(residuals, parameters, units, is_grads_batched=True, materialize_grads=True)
    return residuals.detach(), torch.cat([gradient.reshape(len(units), -1) for gradient in gradients], 1)


def trained(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def terms_at(names, rows):
    weights = (3.0, 0.5)
    terms = []
    for function, weight in zip(TERMS[names], weights, strict=False):
        rows_of_term = (inputs(rows, torch.float64), torch.randn(rows, 2, dtype=torch.float64))
        terms.append((function, rows_of_term, weight))
    return terms


def chain(*modules):
    return nn.Sequential(*modules).double()


BASES = {
    "tanh": lambda: KAN([3, 5, 3], spline_order=4, norm="tanh", dtype=torch.float64),
    "slim": lambda: SlimKAN([3, 5, 3], ranks=(2, "full", 3), spline_order=5, dtype=torch.float64),
    "bound": lambda: chain(TanhBound(3), KAN([3, 4, 3])),
    "linear": lambda: chain(nn.Linear(3, 4), nn.SiLU(), KAN([4, 3, 3]), nn.Sigmoid(), nn.Linear(3, 3), nn.GELU()),
    "others": lambda: chain(KINDS["cheby-kan"]().kan, nn.Tanh(), KAN([4, 3])),
}


def adapted(kind, form="factors"):
    return adapt(BASES[kind]().eval(), alpha=ALPHA, **FORMS[form])


MODELS = {
    **{form: lambda form=form: adapted("tanh", form) for form in FORMS},
    "others": lambda: adapted("others"),
    "linear": lambda: adapted("linear", "shape"),
    "network": BASES["bound"],
    "slim network": BASES["slim"],
    "linear network": BASES["linear"],
}
STEPS = [(model, names, rows, 2**30) for model in MODELS for names, rows in (("fit", 6), ("equation", 50))]
STEPS += [("factors", names, rows, 2**30) for names in ("shifted", "vmap", "rows") for rows in (6, 50)]
STEPS += [("shape", "fit", *sizes) for sizes in ((6, 2**18), (500, 2**18), (20, 50_000))]


@pytest.mark.parametrize(("name", "names", "rows", "memory"), STEPS)
def test_a_step_is_a_damped_gauss_newton_step(name, names, rows, memory):
    """With fewer residuals than parameters, in their space or that of parameters, and with more, also in chunks."""
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


def test_former_residuals_count_less_after_each_step():
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
