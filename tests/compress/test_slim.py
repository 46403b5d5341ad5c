# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import warnings

import pytest
import torch
from helpers import assert_equal, assert_near, assert_same, inputs, refused, relative, snapshot, state, train
from peft import get_peft_model
from stand_ins import LAYER_KINDS, as_model
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRAConfig, slim, to_dense, update_spectrum
from peft_lotra.kan import KAN, KANLinear, SlimKANLinear
from peft_lotra.layers.slim import SlimLayer


RANKS = (5, 6, 3)
X = torch.rand(60, 6, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


every_kind = pytest.mark.parametrize("kind", LAYER_KINDS)


def base(kind):
    return as_model(LAYER_KINDS[kind](12, 10)).eval()


def points(rows=6):
    return inputs(rows, in_features=12)


def norm(model):
    """The norm of the coefficients, times the scales of the edges, of the layer `kan`."""
    zero = copy.deepcopy(model)
    for parameter in zero.parameters():
        parameter.data *= not parameter.requires_grad
    return update_spectrum(zero, model).layers["kan"].norm


def output_error(y, approximation):
    return ((y - approximation).norm() / (y - y.mean(0)).norm()).item()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@every_kind
def test_every_kind_of_layer_is_compressed(kind):
    model = base(kind)
    before = snapshot(model)

    small = slim(model, RANKS)

    assert isinstance(small.kan, SlimKANLinear if kind == "own" else SlimLayer)
    assert small.kan.ranks == RANKS
    assert count(small) < 0.5 * count(model)
    assert not any(name.endswith(("coef", "spline_weight", "coeffs", "scaler")) for name in small.state_dict())
    assert_same(model, before)


@every_kind
def test_every_kind_of_layer_is_expanded_again(kind):
    model, x = base(kind), points()
    small = slim(model, RANKS)

    dense = small.to_dense()

    assert type(dense.kan) is type(model.kan)
    assert dense.state_dict().keys() == model.state_dict().keys()
    assert [p.requires_grad for p in dense.parameters()] == [p.requires_grad for p in model.parameters()]
    assert_near(dense(x), small(x))
    error = update_spectrum(model, dense).layers["kan"].norm / norm(model)
    assert small.slim_report.errors["kan"] == pytest.approx(error, rel=1e-4)


@every_kind
def test_every_kind_of_compressed_layer_trains_on(kind):
    model, x = base(kind), points()
    y, small = model(x).detach(), slim(model, RANKS)
    first = (small(x) - y).square().mean().item()

    train(small, x, y, 40, lr=5e-3)

    assert (small(x) - y).square().mean() < 0.9 * first
    assert_near(small.to_dense()(x), small(x))


@pytest.mark.parametrize("kind", ["own", "pykan", "fast-kan", "efficient-kan", "inkan", "fourier-kan"])
def test_with_inputs_the_outputs_are_met_better(kind):
    model, x = base(kind), points(200)
    x[:, 3:] = x[:, :3].repeat(1, 3)  # less to keep than the coefficients have
    small = slim(model, energy=0.99, inputs=x)

    assert small.slim_report.output_errors["kan"] <= 0.1 + 1e-3
    assert_near(small(x), model(x), relative(slim(model, small.slim_report.ranks)(x), model(x)))
    assert slim(model, budget=150, inputs=x).slim_report.parameters[1] <= 150


@torch.no_grad()
def test_reported_errors_are_those_of_the_outputs():
    model, x = KAN([12, 10, 6]), points(300)

    small = slim(model, energy=0.95, inputs=x)

    report = small.slim_report
    y = x
    for name, layer, small_layer in zip(("layers.0", "layers.1"), model.layers, small.layers, strict=True):
        expected = layer(y)
        error = output_error(expected, small_layer(y))
        assert report.output_errors[name] == pytest.approx(error, rel=1e-4)
        y = expected
    error = output_error(y, small(x))
    assert error**2 <= 0.05
    assert report.model_error == pytest.approx(error, rel=1e-4)
    assert f"error of the model's outputs: {error:.2%}" in str(report)
    assert f"{report.output_errors['layers.0']:.2%}" in str(report)


def test_outputs_that_later_layers_do_not_use_are_not_kept():
    model, x = KAN([12, 10, 6]).requires_grad_(False), points(300)
    model.layers[1].spline_weight[:, 3:] = 0
    model.layers[1].base_weight[:, 3:] = 0
    report = slim(model, {"layers.0": (3, 12, 9)}, inputs=x).slim_report

    assert report.output_errors["layers.0"] > 0.3
    assert report.model_error < 0.1
    assert not any(p.requires_grad for p in model.parameters())


def test_inputs_reach_each_layer_in_evaluation_mode():
    model = KAN([20, 16, 8], norm="batch")
    before = state(model)
    small = slim(model, (4, 4, 3), inputs=torch.randn(5, 7, 20))

    assert list(small.slim_report.output_errors) == ["layers.0", "layers.2"]
    assert small.training
    for name, tensor in small.state_dict().items():
        assert name not in before or torch.equal(tensor, before[name]), name

    model.unused = KAN([3, 2])

    with refused(r"None of `inputs` reaches `unused\.layers\.0`"):
        slim(model, (2, 2, 2), inputs=torch.randn(5, 20))


class SpaceTime(nn.Module):
    """A network of two inputs that calls `layer.forward`, as Convolutional-KANs does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = KAN([6, 8]).layers[0], KAN([8, 4]).layers[0]

    def forward(self, x, t):
        return self.second.forward(x=self.first.forward(torch.cat([x, t], 1)))


@pytest.mark.parametrize(
    "data",
    [
        [X[:, :4], X[:, 4:]],
        {"x": X[:, :4], "t": X[:, 4:]},
        lambda model: model(X[:, :4], X[:, 4:]),
        lambda model: {"logits": (model(X[:, :4], X[:, 4:]), None)},
        lambda model: torch.cat([model(x[:, :4], x[:, 4:]) for x in X.split(25)]),
    ],
)
def test_inputs_are_tensors_mappings_or_functions(data):
    model = SpaceTime()
    report, expected = (slim(model, 3, inputs=i).slim_report for i in (data, (X[:, :4], X[:, 4:])))

    assert report.model_error == pytest.approx(expected.model_error, rel=1e-4)
    assert 0 < report.model_error < 1
    assert report.output_errors == pytest.approx(expected.output_errors, rel=1e-4)
    assert "forward" not in vars(model.first)


@pytest.mark.parametrize(
    "data, message",
    [
        (torch.ones(3, 6), "pass samples that differ"),
        ({"x": X / 0}, "NaN or infinite"),
        (X[:0], "pass samples that differ"),
        (X[:1], "pass samples that differ"),
        (X[0], "`layers.0` as one sample"),
        (lambda: X, "takes 0 positional arguments but 1 was given"),
        (lambda model: 3, "must return a floating point tensor.* it returned int"),
        (lambda model: model(X).long(), "must return a floating point tensor"),
    ],
)
def test_wrong_inputs_are_refused_and_change_nothing(data, message):
    model = KAN([6, 8, 4])

    with refused(message, model, error=(ValueError, TypeError)):
        slim(model, energy=0.9, inputs=data, inplace=True)


def test_inputs_far_outside_of_a_grid_warn():
    model = KAN([6, 8, 4])

    with pytest.warns(UserWarning, match="Most inputs of `layers.0` lie far outside of its grid, from -1 to 1"):
        slim(model, 2, inputs=100 * X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slim(model, 2, inputs=X)


def test_ranks_come_from_an_energy_a_budget_or_by_layer():
    model = KAN([20, 16, 8])

    assert all(error <= 0.5**0.5 + 1e-5 for error in slim(model, energy=0.5).slim_report.errors.values())

    small = slim(model, budget=900)
    before, after = small.slim_report.parameters

    assert (before, after) == (count(model), count(small))
    assert after <= 900
    assert f"{before:,} before, {after:,} now" in str(small.slim_report)

    small = slim(model, {"layers.0": (4, 4, 3)})

    assert [type(layer) for layer in small.layers] == [SlimKANLinear, KANLinear]
    assert small.slim_report.dense == ["layers.1"]
    assert "layers.1 stays dense" in str(small.slim_report)


def test_a_layer_that_stays_dense_is_a_warning():
    with pytest.warns(UserWarning, match=r"Left dense, .*: layers\.1\."):
        small = slim(KAN([20, 16, 1]), [8, 8, 8])
    assert small.slim_report.dense == ["layers.1"]
    assert list(small.slim_report.errors) == ["layers.0"]
    with pytest.warns(UserWarning, match="Left dense, .* Pass `inputs`"):
        assert slim(KAN([20, 16, 8]), energy=0.99).slim_report.parameters == (4032, 4032)
    assert slim(KAN([20, 16]), (3, 4, 50)).slim_report.ranks == {"layers.0": (3, 4, 9)}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["own", "cheby-kan"])
def test_a_layer_by_itself_is_compressed(kind, inplace):
    layer, x = LAYER_KINDS[kind](12, 10), points(100)
    small = slim(layer, RANKS, inputs=x, inplace=inplace)

    assert isinstance(small, SlimKANLinear if kind == "own" else SlimLayer)
    assert small.slim_report.ranks == {"": RANKS}
    assert_near(to_dense(small)(x), small(x))
    assert type(to_dense(small)) is type(layer)


class Clamped(KANLinear):
    def forward(self, x):
        return super().forward(x.clamp(-1, 1)) + 3


class Shifted(KANLinear):
    @property
    def formula(self):
        return super().formula._replace(bias=torch.full((8,), 3.0))


@pytest.mark.parametrize("cls", [Clamped, Shifted])
def test_a_subclass_with_a_forward_or_a_formula_of_its_own_keeps_it(cls):
    model, x = nn.Sequential(cls(8, 8)), torch.rand(4, 8) * 3

    small = slim(model, (6, 6, 4))

    assert isinstance(small[0], SlimLayer)
    assert_close(small(x), model(x), rtol=0.0, atol=1.5)
    assert type(small.to_dense()[0]) is cls


@pytest.mark.parametrize("data", [None, points()])
def test_a_network_of_pykan_is_compressed(data):
    from kan import MultKAN

    model, x = MultKAN(width=[12, 10, 3], device="cpu", auto_save=False, symbolic_enabled=False), points()
    model(x)  # leaves activations behind, which deepcopy refuses
    small = slim(model, RANKS[::-1], inputs=data)
    copied = copy.deepcopy(small)
    y = small(x)
    assert_equal(copied(x), y)
    assert_near(small.to_dense()(x), y)
    assert small.act_fun[0].coef.shape == model.act_fun[0].coef.shape
    with pytest.raises(RuntimeError, match="`update_grid_from_samples` refits the coefficients"):
        small.act_fun[0].update_grid_from_samples(x)


@pytest.mark.parametrize("kind", ["own", "efficient-kan"])
def test_hooks_run_once(kind):
    model, calls = nn.Sequential(LAYER_KINDS[kind](12, 10), LAYER_KINDS[kind](10, 10)), []
    model[0].register_forward_hook(lambda *_, **__: calls.append(0), with_kwargs=True)
    model[0].register_full_backward_hook(lambda _, of_inputs, __: calls.append(len(of_inputs)))
    for made in (small := slim(model, RANKS), to_dense(small)):
        calls.clear()
        made(points().requires_grad_()).sum().backward()
        assert calls == [0, 1]


class Block(nn.Module):
    """A block whose `mlpf` is a method, or holds the layers in a function, as minGPT's does."""

    def __init__(self, how, kind="own"):
        super().__init__()
        self.mlp = nn.ModuleDict({"c_fc": LAYER_KINDS[kind](6, 12), "c_proj": LAYER_KINDS[kind](12, 6)})
        m, first = self.mlp, self.mlp["c_fc"]
        functions = {"closure": lambda x: m["c_proj"](m["c_fc"](x)), "layer": lambda x: m["c_proj"](first(x))}
        self.mlpf = functions.get(how, self.run)

    def run(self, x):
        return self.mlp["c_proj"](self.mlp["c_fc"](x))

    def forward(self, x):
        return x + self.mlpf(x)


@pytest.mark.parametrize("data", [None, X])
@pytest.mark.parametrize("how", ["closure", "layer"])
def test_a_model_whose_copy_would_call_the_original_is_refused(how, data):
    model = Block(how)

    with refused("keeps a function that holds KAN layers.*inplace=True", model):
        slim(model, (2, 2, 2), inputs=data)


@pytest.mark.parametrize("options", [{"ranks": (4, 4, 3)}, {"energy": 0.9}, {"budget": 300}])
@pytest.mark.parametrize("how", ["closure", "method"])
@pytest.mark.parametrize("kind", ["own", "efficient-kan"])
def test_a_model_is_compressed_and_expanded_in_place(kind, how, options):
    model = Block(how, kind)
    y, names = model(X).detach(), model.state_dict().keys()

    small = slim(model, inputs=X, inplace=True, **options)
    report = small.slim_report
    small_error = output_error(y, small(X))
    dense = small.to_dense(inplace=True)

    assert small is dense is model
    assert report.errors
    assert report.model_error == pytest.approx(small_error, rel=1e-3)
    assert dense.state_dict().keys() == names
    assert not hasattr(dense, "slim_report")
    assert output_error(y, dense(X)) == pytest.approx(report.model_error, rel=1e-3)


def test_a_model_in_a_wrapper_is_its_network():
    model = nn.DataParallel(KAN([12, 10, 6]))
    small = slim(model, 2)

    assert type(small) is KAN
    assert type(small.layers[0]) is SlimKANLinear
    assert type(model.module.layers[0]) is KANLinear


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "Pass one of ranks, energy, budget"),
        ({"ranks": 2, "energy": 0.5}, "Pass one of"),
        ({"energy": 1.1}, r"`energy` is 1.1, but must be a number in \(0, 1\]"),
        ({"ranks": 0}, "`ranks` should be a positive integer"),
        ({"ranks": {"elsewhere": 2}}, "`ranks` names none of the KAN layers"),
        ({"ranks": 2, "model": nn.Linear(2, 2)}, "No KAN layer that could be compressed"),
    ],
)
def test_contradictory_arguments_are_refused(arguments, message):
    with refused(message):
        slim(**{"model": KAN([20, 16, 8]), **arguments})


@pytest.mark.parametrize("call", [lambda model: slim(model, 2), to_dense])
@pytest.mark.parametrize("inner", ["", "base_model", "base_model.model"])
def test_a_model_with_adapters_is_refused(call, inner):
    model = get_peft_model(KAN([20, 16, 8]), LoTRAConfig(r=2))

    with refused("has adapters: merge them first"):
        call(model.get_submodule(inner))
