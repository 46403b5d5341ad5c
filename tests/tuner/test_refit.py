# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters are carried over to grids that moved."""

from __future__ import annotations

import pytest
import torch
from helpers import adapt, assert_same, base, inputs, lotra_layers, nested, snapshot

from peft_lotra import LoTRAConfig, refit_adapters
from peft_lotra.kan import KAN


MOVES = {
    "own": lambda layer, x: layer.update_grid(x),
    "efficient-kan": lambda layer, x: layer.update_grid(x),
    "pykan": lambda layer, x: layer.update_grid_from_samples(x),
    "pina": lambda layer, x: layer.spline._knots.mul_(1.1),
}
X = torch.linspace(-1.1, 0.7, 18).view(6, 3)
METHODS = {"own": "update_grid", "efficient-kan": "update_grid", "pykan": "update_grid_from_samples"}


def update_of(model, x):
    """What the active adapter adds to the output."""
    with torch.no_grad():
        y = model(x)
        with model.disable_adapter():
            return y - model(x)


def error(after, before):
    return ((after - before).norm() / before.norm()).item()


@pytest.mark.parametrize("family", MOVES)
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
    with pytest.raises(RuntimeError, match="The grid of `kan` .* was moved"):
        model(x)
    report = refit_adapters(model, x)
    assert layer.lotra_core["default"].shape == ranks
    assert error(update_of(model, x), before) < bound
    assert set(report.errors) == {("kan", "default")} and "kan  default  error" in str(report)
    assert 0 < report.projection_errors["kan", "default"] <= report.errors["kan", "default"] + 0.01 < bound
    if family == "own":  # no scales of edges
        assert report.errors["kan", "default"] == pytest.approx(error(update_of(model, x), before), rel=1e-6)
    assert refit_adapters(model, x).errors == {}


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

    unchanged(model, "half-way", x, move=fail, kind=KeyError)
    unchanged(model, "rows, 3", inputs(in_features=5), move=move)
    for odd in (x[:0], x * float("nan"), None, "text"):
        unchanged(model, "must be finite floating numbers", odd, move=move)
    model.merge_adapter()
    unchanged(model, "merged or disabled", x, move=move)
    model.unmerge_adapter()
    with model.disable_adapter():
        unchanged(model, "merged or disabled", x, move=move)


def test_a_layer_that_the_inputs_do_not_reach():
    model = nested()
    model["side"] = KAN([3, 2])
    unchanged(
        adapt(model), "side.layers.0.* do not reach", inputs(), move=lambda m: m["side"].layers[0].update_grid(X)
    )


def test_a_kind_without_a_basis():
    model = adapt(base("kanx"))
    unchanged(model, "no `basis`", inputs(), move=lambda m: m.kan.grid.data.mul_(1.1))


def test_a_moved_grid_is_an_error_of_unmerging():
    model = adapt(base("own"))
    (layer,) = lotra_layers(model).values()
    x = inputs(50)
    model.merge_adapter()
    layer.update_grid(x * 0.5)
    model(x)
    with pytest.raises(RuntimeError, match="was moved"):
        model.unmerge_adapter()
    model.merge_and_unload()(x)
