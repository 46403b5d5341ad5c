# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Sums of adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import adapt, assert_same, base, inputs, lotra_layers, nested, relative, snapshot
from peft import PeftModel

from peft_lotra import LoTRAConfig


def two_adapters(family: str, first=(2, 3, 4), second=(3, 1, 2), **config) -> PeftModel:
    model = adapt(base(family), r=first, adapter_name="first", alpha=0.5)
    model.add_adapter("second", LoTRAConfig(r=second, alpha=2.0, init_weights=False, **config))
    return model


def padded(delta, other):
    return torch.nn.functional.pad(delta, (0, other.shape[-1] - delta.shape[-1]))


@pytest.mark.parametrize("family", ["own", "efficient-kan", "pykan", "kanx", "cheby-kan"])
def test_cat_is_the_sum_of_the_updates(family, tmp_path):
    model, x = two_adapters(family), inputs()
    bare = copy.deepcopy(model).unload()
    errors = model.add_weighted_adapter(["first", "second"], [0.7, -1.5], "sum", combination_type="cat")
    (layer,) = lotra_layers(model).values()
    expected = 0.7 * layer.get_delta_weight("first") - 1.5 * layer.get_delta_weight("second")
    assert relative(layer.get_delta_weight("sum"), expected) < 1e-6
    assert errors["kan"] < 1e-6
    # ranks add, and are brought down to the sizes: (4, 3, ...)
    assert layer.lotra_r["sum"][:2] == (4, 3)
    # it was added, no more
    assert model.active_adapters == ["first"]
    assert not any(component.requires_grad for component in layer.get_components("sum"))

    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(bare, tmp_path / "sum")
    assert torch.equal(loaded(x), model(x))


def test_the_scale_of_the_moment_counts():
    model = two_adapters("own")
    (layer,) = lotra_layers(model).values()
    layer.set_scale("first", 3.0)
    model.add_weighted_adapter(["first"], [2.0], "more")
    assert relative(layer.get_delta_weight("more"), 2 * layer.get_delta_weight("first")) < 1e-6
    assert layer.lotra_alpha["more"] == 1.0


def test_adapters_with_and_without_the_residual_branch():
    model = two_adapters("own", adapt_residual=False)
    model.add_weighted_adapter(["second", "first"], [1.0, 2.0], "sum")
    (layer,) = lotra_layers(model).values()
    first, second, total = (layer.get_delta_weight(name) for name in ("first", "second", "sum"))
    assert relative(total, 2 * first + padded(second, first)) < 1e-6


def test_adapters_of_different_layers():
    model = adapt(nested(), adapter_name="first", r=2, target_modules=["body.0", "layers.0"])
    model.add_adapter("second", LoTRAConfig(r=3, init_weights=False, target_modules=["layers.0", "body.1"]))
    errors = model.add_weighted_adapter(["first", "second"], [1.0, 0.5], "sum")
    layers = lotra_layers(model.base_model.model)
    assert set(errors) == set(layers) == {"body.0", "body.1", "tail.layers.0"}
    for layer in layers.values():
        expected = sum(
            weight * layer.get_delta_weight(name)
            for name, weight in (("first", 1.0), ("second", 0.5))
            if name in layer.lotra_core
        )
        assert relative(layer.get_delta_weight("sum"), expected) < 1e-6


@pytest.mark.parametrize("family", ["own", "efficient-kan", "pykan"])
def test_svd_truncates_and_reports_the_error(family):
    model = two_adapters(family)
    errors = model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "small", "svd", ranks=(2, 2, 2))
    (layer,) = lotra_layers(model).values()
    expected = layer.get_delta_weight("first") + layer.get_delta_weight("second")
    assert layer.lotra_r["small"] == (2, 2, 2)
    error = ((layer.get_delta_weight("small") - expected).norm() / expected.norm()).item()
    assert 0.01 < error < 1 and errors["kan"] == pytest.approx(error, abs=1e-6)
    # by default the larger ranks of the two, and ranks that suffice lose nothing
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "larger", "svd")
    assert layer.lotra_r["larger"] == (3, 3, 4)
    assert model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "all", "svd", ranks=9)["kan"] < 1e-6


def test_linear_is_exact_for_adapters_that_agree_in_their_factors():
    model = two_adapters("own", second=(2, 3, 4))
    (layer,) = lotra_layers(model).values()
    assert model.add_weighted_adapter(["first", "first"], [0.25, 0.5], "same", "linear")["kan"] < 1e-6
    with torch.no_grad():
        for first, second in zip(layer.get_components("first")[1:], layer.get_components("second")[1:], strict=True):
            second.copy_(first)
    assert model.add_weighted_adapter(["first", "second"], [0.7, -1.5], "sum", "linear")["kan"] < 1e-5
    assert layer.lotra_r["sum"] == (2, 3, 4)


def test_a_sum_of_zero():
    model = two_adapters("own")
    for kind in ("cat", "svd"):
        errors = model.add_weighted_adapter(["first", "first"], [1.0, -1.0], kind, kind)
        assert errors["kan"] < 1e-6


@pytest.mark.parametrize(
    "args, message",
    [
        ((["first", "third"], [1, 1], "sum"), r"\['third'\] not found"),
        (([], [], "sum"), "one or more adapters"),
        (("first", [1], "sum"), "a list of strings"),
        ((["first", "second"], [1], "sum"), "finite number for each"),
        ((["first"], [float("nan")], "sum"), "finite number for each"),
        ((["first"], [1], "second"), "'second'.*choose another name"),
        ((["first"], [1], "sum", "ties"), "one of .*'cat', 'linear', 'svd'"),
        ((["first"], [1], "sum", "cat", 3), "`ranks` are for"),
        ((["first"], [1], "sum", "svd", 0), "positive integer"),
        ((["first", "second"], [1, 1], "sum", "linear"), "at `kan` the ranks differ"),
        ((["first", "first"], [1, -1], "sum", "linear"), "sum up to 0"),
        ((["whole"], [1], "sum"), "modules_to_save"),
    ],
)
def test_errors_change_nothing(args, message):
    model = two_adapters("own")
    model.peft_config["whole"] = LoTRAConfig(modules_to_save=["head"])
    before, configs = snapshot(model), dict(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*args)
    assert_same(model, before)
    assert model.peft_config == configs
