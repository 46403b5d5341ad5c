# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Operations on networks and large batches, compared with the base to which dense updates were added."""

import copy

import numpy as np
import pytest
import torch
from dense import ALPHA, FORMS, dense, dense_parameters, near
from helpers import KINDS, Net, adapt, components, inputs, lotra_layers
from scipy.interpolate import RBFInterpolator
from torch import nn

from peft_lotra import AdapterBank, ParametricAdapter, extract_lotra
from peft_lotra.kan import KAN, bspline_basis, refine_grid
from peft_lotra.kan.basis import moments


pytestmark = pytest.mark.filterwarnings("ignore")

NETWORKS = {
    "layer norm": lambda: KAN([3, 6, 4], norm="layer", dtype=torch.float64),
    "batch norm": lambda: KAN([3, 6, 4], norm="batch", dtype=torch.float64),
    "tanh, order 4": lambda: KAN([3, 6, 4], grid_size=3, spline_order=4, norm="tanh", dtype=torch.float64),
    "one input": lambda: KAN([1, 5, 1], spline_order=1, dtype=torch.float64),
    "wide": lambda: KAN([3, 200, 4], spline_order=2, dtype=torch.float64),
    "head": lambda: Net().double(),
}


def make(kind):
    torch.manual_seed(0)
    base = NETWORKS[kind]().eval()
    for name, buffer in base.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    width = 1 if kind == "one input" else 3
    return base, inputs(24, torch.float64, width)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_and_its_gradients(kind, form):
    """Outputs, gradients of inputs and components, and gradients of the slope."""
    base, x = make(kind)
    model = adapt(copy.deepcopy(base), alpha=ALPHA, **FORMS[form])
    variables = [x.requires_grad_(), *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    parameters = dense_parameters(base, (model, "default", ALPHA))
    results = []
    for y in (model(x), torch.func.functional_call(base, parameters, (x,))):
        gradients = torch.autograd.grad(y.sin().sum(), variables, create_graph=True)
        results.append([y, *gradients, *torch.autograd.grad(gradients[0].sin().sum(), variables, allow_unused=True)])

    near(*results, 1e-7)


def adapters_of(base, count):
    """Return models with adapters of all forms, in turn."""
    forms = list(FORMS.values())
    return {f"a{n}": adapt(copy.deepcopy(base), alpha=ALPHA, **forms[n % len(forms)]) for n in range(count)}


def served_by_peft(base, models):
    """Return one model with the adapters of all."""
    model = None
    for name, source in models.items():
        config = copy.deepcopy(source.peft_config["default"])
        if model is None:
            model = adapt(copy.deepcopy(base), adapter_name=name, **FORMS["factors"])
            model.delete_adapter(name)
        model.add_adapter(name, config)
        for layer, of_source in zip(lotra_layers(model).values(), lotra_layers(source).values(), strict=True):
            layer.set_components(name, of_source.get_components("default"))
    return model.eval()


def served_by_bank(base, models):
    bank = AdapterBank(copy.deepcopy(base))
    for name, model in models.items():
        bank.add(name, model)
    return bank.attach().eval()


@pytest.mark.parametrize("serve", [served_by_peft, served_by_bank])
@pytest.mark.parametrize("rows", [1, 20, 2000])  # 2,000 are multiplied in groups
@pytest.mark.parametrize("kind", ["tanh, order 4", "head", "large grid", "fast-kan", "efficient-kan-old"])
def test_17_adapters_in_a_batch(kind, rows, serve):
    torch.manual_seed(0)
    if kind == "large grid":
        base = KAN([3, 40, 4], grid_size=30, dtype=torch.float64)
    else:
        base = (NETWORKS[kind]() if kind in NETWORKS else KINDS[kind]().double()).eval()
    models = adapters_of(base, 17)
    references = {"__base__": dense(base), **{name: dense(base, model) for name, model in models.items()}}
    choices = list(references)
    names = [choices[index] for index in torch.randint(len(choices), (rows,))]
    x = inputs(rows, torch.float64).requires_grad_()
    outputs = {name: reference(x) for name, reference in references.items()}
    expected = torch.stack([outputs[name][row] for row, name in enumerate(names)])

    y = serve(base, models)(x, adapter_names=names)

    near(y, expected)
    slopes = [torch.autograd.grad(output.sin().sum(), x, create_graph=True)[0] for output in (y, expected)]
    near(*slopes)
    near(*[torch.autograd.grad(slope.sin().sum(), x) for slope in slopes], 1e-7)


@pytest.mark.parametrize("kind", ["tanh, order 4", "fast-kan", "efficient-kan-old"])
def test_all_adapters_of_a_batch_are_trained(kind):
    """Each gets the gradient of its rows."""
    base = (NETWORKS[kind]() if kind in NETWORKS else KINDS[kind]().double()).eval()
    models = adapters_of(base, 4)
    model = served_by_peft(base, models)
    x = inputs(800, torch.float64)
    index = torch.randint(len(models), (len(x),))

    names = [list(models)[number] for number in index]

    for number, (name, alone) in enumerate(models.items()):
        parameters = [
            model.get_parameter(key.replace("default", name)).requires_grad_() for key, _ in components(alone)
        ]
        loss = model(x, adapter_names=names).sin().sum()
        expected = alone(x[index == number]).sin().sum()
        of_alone = [parameter for _, parameter in components(alone)]
        near(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, of_alone), 1e-7)


def test_the_number_and_the_mean_error_of_the_adapters_of_a_bank() -> None:
    base = NETWORKS["tanh, order 4"]().eval()
    model = served_by_bank(base, adapters_of(base, 3))
    errors = torch.rand(20, dtype=torch.float64)
    index = torch.randint(3, (20,))
    ids = model.bank.ids(model.bank.names)[index]

    means = model.bank.mean_by_adapter(errors, ids)

    assert len(model.bank) == 3
    near(means[ids], torch.stack([errors[index == number].mean() for number in index]))


class Folded(nn.Module):
    """Folds the steps of (batch, 3, steps) into the batch."""

    def __init__(self):
        super().__init__()
        self.kan = KAN([3, 5, 2], dtype=torch.float64)

    def forward(self, x):
        rows = x.permute(0, 2, 1)
        return self.kan(rows.reshape(-1, 3)).unflatten(0, rows.shape[:2])


@pytest.mark.parametrize("serve", [served_by_peft, served_by_bank])
@pytest.mark.parametrize("make", [Folded, lambda: nn.Sequential(KAN([6, 5, 2], dtype=torch.float64))])
def test_several_rows_of_a_sample(make, serve):
    base = make().eval()
    models = adapters_of(base, 3)
    x = torch.rand(8, 3, 6, dtype=torch.float64)
    outputs = {name: dense(base, model)(x) for name, model in models.items()}
    names = ["a0", "a2", "a1", "a1", "a0", "a2", "a2", "a0"]

    y = serve(base, models)(x, adapter_names=names)

    near(y, torch.stack([outputs[name][row] for row, name in enumerate(names)]))


@pytest.mark.parametrize("kind", ["own", "fast-kan", "efficient-kan-old"])
def test_compiled(kind):
    """As a graph: an adapted model, and a bank."""
    torch._dynamo.reset()
    base = (NETWORKS[kind]() if kind in NETWORKS else KINDS[kind]().double()).eval()
    models = adapters_of(base, 3)
    x = inputs(12, torch.float64)
    names = ["a0", "a1", "a2"] * 4
    bank = AdapterBank(copy.deepcopy(base))
    for name, model in models.items():
        bank.add(name, model)
    with torch.no_grad():
        expected = {name: dense(base, model)(x) for name, model in models.items()}
        y = torch.compile(bank.attach().eval(), backend="eager", fullgraph=True)(x, ids=bank.ids(names))

    near(y, torch.stack([expected[name][row] for row, name in enumerate(names)]))
    near(torch.compile(models["a0"], backend="aot_eager", fullgraph=True)(x), expected["a0"])


@pytest.mark.parametrize("with_inputs", [False, True])
def test_extraction(with_inputs):
    """From the coefficients, and from the outputs at inputs."""
    base, x = make("layer norm")
    tuned = dense(base, adapt(copy.deepcopy(base), alpha=ALPHA))

    extracted = extract_lotra(copy.deepcopy(base), tuned, r=(2, 3, 4), inputs=x if with_inputs else None)

    near(extracted.eval()(x), tuned(x), 1e-6)


REFINED = [("tanh, order 4", False), ("tanh, order 4", True), ("one input", True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "samples"), REFINED)
def test_a_refined_grid(kind, samples, form):
    """The adapters are refined with the grid, which keeps the function of the dense network too."""
    base, x = make(kind)
    model = adapt(copy.deepcopy(base), alpha=ALPHA, **FORMS[form])
    expected = dense(base, model)(x)

    refine_grid(model, 2 * base.layers[0].grid_size, samples=x if samples else None)

    near(model(x), expected, 1e-7)
    total = dense(copy.deepcopy(model).unload(), model)
    near(total(x), expected, 1e-7)


def test_a_grid_of_another_size():
    """By least squares."""
    base = KAN([1, 3, 1], grid_size=8, norm="tanh", dtype=torch.float64)
    x = inputs(50, torch.float64, 1)
    expected = base(x)

    refine_grid(base, 120)

    near(base(x), expected, 1e-4)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_family(count):
    """Its prediction is the base with the interpolated cores, and so with interpolated dense updates."""
    base, x = make("tanh, order 4")

    @torch.no_grad()
    def train(model, c):
        torch.manual_seed(int(10 * c))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))

    family = ParametricAdapter(base, ranks=2)
    parameters = np.linspace(1, 2, count)
    family.fit(parameters.tolist(), train=train, progress=False)
    kernel, degree = ("cubic", 1) if count == 2 else ("quintic", 2)
    (weights,) = RBFInterpolator(parameters[:, None], np.eye(count), kernel=kernel, degree=degree)([[1.3]])
    pairs = zip(parameters, weights, strict=True)
    adapters = [(family.as_adapter(parameter), "default", weight) for parameter, weight in pairs]

    near(family.predict(1.3)(x), dense(base, *adapters)(x), 1e-7)
    near(family.as_adapter(1.3)(x), dense(base, *adapters)(x), 1e-7)


def test_moments_of_the_uniform_law():
    """The scales of random starts come from them."""
    points = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    variance, products = moments((-1, 3), 4, 3)
    x = 1 + variance**0.5 * points
    functions = torch.cat([bspline_basis(x, -1, 3, 4, 3), torch.nn.functional.silu(x).unsqueeze(1)], 1)
    weights = torch.softmax(-points.square() / 2, 0).unsqueeze(1)

    near(torch.tensor(variance), torch.tensor(16 / 12))
    near(products, (weights * functions).T @ functions, 1e-5)
