# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A grid that moves under an adapter is noticed, and `refit_adapters` carries the adapter over."""

import copy
import statistics

import pytest
import torch
from helpers import (
    X,
    adapt,
    add_adapter,
    assert_equal,
    assert_near,
    base,
    inputs,
    layer_of,
    lotra_layers,
    nested,
    refused,
)

from peft_lotra import refit_adapters
from peft_lotra.kan import KAN


MOVES = {
    "own": lambda layer, x: layer.update_grid(x),
    "efficient-kan": lambda layer, x: layer.update_grid(x),
    "pykan": lambda layer, x: layer.update_grid_from_samples(x),
    "pina": lambda layer, x: layer.spline._knots.mul_(1.1),
}


def update_of(model, x):
    """What the active adapter adds to the output."""
    with torch.no_grad():
        y = model(x)
        with model.disable_adapter():
            return y - model(x)


def error(actual, before):
    return ((actual - before).norm() / before.norm()).item()


@pytest.mark.parametrize("kind", MOVES)
@pytest.mark.parametrize("r, bound", [((2, 2, 3), 0.15), ((4, 3, 9), 0.05)])
def test_the_update_is_kept_when_the_grid_moves(kind, r, bound):
    model = adapt(base(kind, torch.float64), r=r)
    layer = layer_of(model)
    x = inputs(400, torch.float64) * 0.6 + 0.1
    before, ranks = update_of(model, x), layer.lotra_r["default"]
    if kind != "pina":
        with pytest.raises(RuntimeError, match="refit_adapters"):
            MOVES[kind](layer, x)
    MOVES[kind](layer.base_layer, x)

    with pytest.raises(RuntimeError, match="The grid of `kan` .* was moved"):
        model(x)

    report = refit_adapters(model, x)

    assert layer.lotra_core["default"].shape == ranks
    assert error(update_of(model, x), before) < bound
    assert set(report.errors) == {("kan", "default")}
    assert "kan  default  error" in str(report)
    assert 0 < report.errors["kan", "default"] < bound

    if kind == "own":  # no scales of edges
        assert report.errors["kan", "default"] == pytest.approx(error(update_of(model, x), before), rel=1e-5)

    assert refit_adapters(model, x).errors == {}


def test_several_layers_and_adapters_are_refitted():
    model = adapt(KAN([3, 5, 4, 2]).double(), r=3, alpha=0.2)
    add_adapter(model, "other", alpha=0.2, adapt_residual=False)
    x, y = inputs(300, torch.float64), {}
    for name in ("other", "default"):
        model.set_adapter(name)
        y[name] = model(x)
    with model.disable_adapter():
        bare = model(x)
    model.train()

    def move(kan):
        for layer in kan.layers:
            layer.update_grid(torch.linspace(-1.2, 1.1, 200)[:, None].expand(-1, layer.in_features))

    report = refit_adapters(model, x, move)
    assert model.training
    assert set(report.errors) == {(f"layers.{i}", name) for i in range(3) for name in ("default", "other")}
    assert statistics.median(report.errors.values()) < 0.3
    for name in ("default", "other"):
        model.set_adapter(name)
        assert error(model(x), y[name]) < error(bare, y[name])


def test_a_network_of_pykan_is_refitted(tmp_path, monkeypatch):
    from kan import KAN as PyKAN

    monkeypatch.chdir(tmp_path)
    network = PyKAN([3, 5, 2], grid=4, k=3, device="cpu", auto_save=False, seed=1)
    model, x = adapt(network, r=(2, 2, 3), alpha=0.1), inputs(300) * 0.6
    with torch.no_grad():
        y = model(x)
    report = refit_adapters(model, x, move=lambda kan: kan.update_grid_from_samples(x))
    assert max(report.errors.values()) < 0.3
    assert len(report.errors) == 2
    assert error(model(x), y) < 0.15
    with pytest.raises(RuntimeError, match="update_grid_from_samples"):  # refused again
        network.update_grid_from_samples(x)


def unchanged(model, match, *args, kind=ValueError, **kwargs):
    with refused(match, model, error=kind):
        refit_adapters(model, *args, **kwargs)


def test_a_refused_refit_changes_nothing():
    x, model = inputs(), adapt(KAN([3, 4, 2]))

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


def test_layers_that_cannot_be_refitted_are_refused():
    model = nested()
    model["side"] = KAN([3, 2])
    move = lambda m: m["side"].layers[0].update_grid(X)  # noqa: E731
    unchanged(adapt(model), "side.layers.0.* do not reach", X, move=move)
    unchanged(adapt(base("kanx")), "no `basis`", X, move=lambda m: m.kan.grid.data.mul_(1.1))


def test_the_formula_of_the_former_grid_is_forgotten():
    """The spline of a layer with uniform knots is computed by a formula, which others do not have."""
    x, model = inputs(300), adapt(base("efficient-kan")).train()
    model(x)
    refit_adapters(model, x, move=lambda base: base.kan.update_grid(x))
    merged = copy.deepcopy(model)
    merged.merge_adapter()

    assert_near(merged(x), model.train()(x))


def test_a_moved_grid_is_an_error_of_unmerging():
    model = adapt(base("own"))
    layer = layer_of(model)
    model.merge_adapter()
    layer.update_grid(X * 0.5)
    model(X)

    with pytest.raises(RuntimeError, match="was moved"):
        model.unmerge_adapter()

    model.merge_and_unload()(X)


def test_a_grid_assigned_in_other_memory_has_not_moved():
    model = adapt()
    y, layer = model(X), next(iter(lotra_layers(model).values())).base_layer
    before = layer.grid_bounds
    layer.grid_bounds = before * 1.5

    with pytest.raises(RuntimeError, match="grid"):
        model(X)

    layer.grid_bounds = before.clone()  # back, in other memory

    assert_equal(model(X), y)


def test_update_grid_of_an_adapted_network_is_refused():
    model = adapt()

    with refused("refit_adapters", model, error=RuntimeError):
        model.base_model.model.kan.update_grid(X / 2)


def test_a_grid_may_move_while_there_is_no_adapter():
    model = adapt(base("efficient-kan"))
    layer = layer_of(model)
    model.delete_adapter("default")
    layer.base_layer.update_grid(X)
    add_adapter(model, "new")
    model.set_adapter("new")
    y = model(X)
    model.merge_adapter()

    assert_near(model(X), y)
