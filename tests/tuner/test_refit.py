# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters are carried over to grids that moved."""

from __future__ import annotations

import pytest
import torch
from helpers import adapt, assert_same, base, inputs, lotra_layers, nested, snapshot
from torch import nn

from peft_lotra import LoTRAConfig, refit_adapters
from peft_lotra.kan import KAN


MOVES = {
    "own": lambda layer, x: layer.update_grid(x),
    "efficient-kan": lambda layer, x: layer.update_grid(x),
    "pykan": lambda layer, x: layer.update_grid_from_samples(x),
    "pina": lambda layer, x: layer.spline._knots.mul_(1.1),
}
every_move = pytest.mark.parametrize("family", MOVES)
METHODS = {"own": "update_grid", "efficient-kan": "update_grid", "pykan": "update_grid_from_samples"}


def update_of(model, x):
    """What the active adapter adds to the output."""
    with torch.no_grad():
        y = model(x)
        with model.disable_adapter():
            return y - model(x)


def error(after, before):
    return ((after - before).norm() / before.norm()).item()


@every_move
@pytest.mark.parametrize("r, bound", [((2, 2, 3), 0.15), ((4, 3, 9), 0.05)])
def test_the_update_is_kept(family, r, bound):
    model = adapt(base(family, torch.float64), r=r)
    (layer,) = lotra_layers(model).values()
    x = inputs(400, torch.float64) * 0.6 + 0.1
    before, ranks = update_of(model, x), layer.lotra_r["default"]
    if family in METHODS:
        with pytest.raises(RuntimeError, match="refit_adapters"):
            getattr(layer, METHODS[family])(x)
    MOVES[family](layer.base_layer, x)
    with pytest.raises(RuntimeError, match="grid of this .* was moved after the adapter 'default'"):
        model(x)
    report = refit_adapters(model, x)
    assert layer.lotra_core["default"].shape == ranks
    assert error(update_of(model, x), before) < bound
    assert set(report.errors) == {("kan", "default")}
    assert 0 < report.projection_errors["kan", "default"] <= report.errors["kan", "default"] + 0.01 < bound
    assert "kan  default  error" in str(report)
    assert refit_adapters(model, x).errors == {}


def test_the_error_that_is_reported_is_that_of_the_function():
    model = adapt(base("own", torch.float64), r=(2, 2, 3))
    (layer,) = lotra_layers(model).values()
    x = inputs(400, torch.float64) * 0.5
    before = update_of(model, x)
    layer.base_layer.update_grid(x * torch.tensor([1.0, 0.3, 1.9]))
    report = refit_adapters(model, x)
    assert report.errors["kan", "default"] == pytest.approx(error(update_of(model, x), before), rel=1e-6)


@every_move
def test_a_grid_that_moves_back(family):
    model = adapt(base(family, torch.float64))
    (layer,) = lotra_layers(model).values()
    x = inputs(50, torch.float64) * 0.5
    y = model(x)
    grid = {name: value.clone() for name, value in layer.read_grid().items() if isinstance(value, torch.Tensor)}
    MOVES[family](layer.base_layer, x)
    with pytest.raises(RuntimeError, match="was moved"):
        model(x)
    for name, value in grid.items():
        owner, _, leaf = name.rpartition(".")
        getattr(layer.base_layer.get_submodule(owner), leaf).data.copy_(value)
    model(x)
    assert refit_adapters(model, x).errors == {}
    assert y.shape == model(x).shape


def test_a_grid_that_does_not_move_is_exact():
    model = adapt(base("own", torch.float64))
    x = inputs(50, torch.float64)
    y = model(x)
    refit_adapters(model, x, move=lambda kan: None)
    assert torch.equal(model(x), y)


def test_several_layers_and_adapters():
    model = adapt(KAN([3, 5, 4, 2]).double(), r=3, alpha=0.2)
    model.add_adapter("other", LoTRAConfig(r=2, alpha=0.2, init_weights=False, adapt_residual=False))
    x = inputs(300, torch.float64)
    y = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        y[name] = model(x)
    model.train()

    def move(kan):
        for layer in kan.layers:
            layer.update_grid(torch.linspace(-1.2, 1.1, 200)[:, None].expand(-1, layer.in_features))

    report = refit_adapters(model, x, move)
    assert model.training
    assert set(report.errors) == {(f"layers.{i}", name) for i in range(3) for name in ("default", "other")}
    for name in ("default", "other"):
        model.set_adapter(name)
        assert error(model(x), y[name]) < 0.1


def test_a_network_of_pykan(tmp_path, monkeypatch):
    from kan import KAN as PyKAN

    monkeypatch.chdir(tmp_path)
    network = PyKAN([3, 5, 2], grid=4, k=3, device="cpu", auto_save=False, seed=1)
    model = adapt(network, r=(2, 2, 3), alpha=0.1)
    x = inputs(300) * 0.6
    with torch.no_grad():
        y = model(x)
    with pytest.raises(RuntimeError, match="update_grid_from_samples"):
        network.update_grid_from_samples(x)
    report = refit_adapters(model, x, move=lambda kan: kan.update_grid_from_samples(x))
    assert max(report.errors.values()) < 0.1 and len(report.errors) == 2
    assert error(model(x), y) < 0.05
    with pytest.raises(RuntimeError, match="update_grid_from_samples"):  # refused again
        network.update_grid_from_samples(x)


def unchanged(model, match, *args, kind=ValueError, **kwargs):
    before = snapshot(model)
    with pytest.raises(kind, match=match):
        refit_adapters(model, *args, **kwargs)
    assert_same(model, before)


def test_errors_change_nothing():
    x = inputs()
    model = adapt(KAN([3, 4, 2]))

    def move(kan):
        kan.layers[0].update_grid(x)

    def fail(kan):
        move(kan)
        raise KeyError("half-way")

    def exchange(kan):
        kan.layers[0] = nn.Identity()

    unchanged(model, "half-way", x, move=fail, kind=KeyError)
    unchanged(model, "were exchanged", x, move=exchange)
    unchanged(model, "last dimension", inputs(in_features=5), move=move)
    for odd in (x[:0], x * float("nan"), None, "text"):
        unchanged(model, "must be finite floating numbers", odd, move=move)
    model(x)
    model.merge_adapter()
    unchanged(model, "merged or disabled", x, move=move)
    model.unmerge_adapter()
    with model.disable_adapter():
        unchanged(model, "merged or disabled", x, move=move)


def test_a_layer_that_the_inputs_do_not_reach():
    model = nested()
    model["side"] = KAN([3, 2])
    adapted = adapt(model)
    unchanged(
        adapted, "side.layers.0.* do not reach", inputs(), move=lambda m: m["side"].layers[0].update_grid(inputs())
    )


def test_a_family_without_a_basis():
    model = adapt(base("kanx"))
    unchanged(model, "offers no basis", inputs(), move=lambda m: m.kan.grid.data.mul_(1.1))


def test_a_moved_grid_is_not_an_error_while_merged_or_disabled():
    model = adapt(base("own"))
    (layer,) = lotra_layers(model).values()
    x = inputs(50)
    model.merge_adapter()
    layer.update_grid(x * 0.5)
    model(x)
    with pytest.raises(RuntimeError, match="was moved after"):
        model.unmerge_adapter()
    model.merge_and_unload()(x)
