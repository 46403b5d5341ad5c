# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Scales, several adapters, dropout, and batches whose rows use different adapters."""

from __future__ import annotations

import pytest
import torch
from helpers import ROUNDING, adapt, base, inputs, lotra_layers, nested, relative
from stand_ins import FAMILIES, ChebyKANLayer
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


every_family = pytest.mark.parametrize("family", FAMILIES)


def with_two_adapters(model, first=None, second=None):
    adapted = adapt(model, adapter_name="first", **(first or {}))
    adapted.add_adapter("second", LoTRAConfig(**{"r": 2, "init_weights": False, **(second or {})}))
    return adapted.eval()


def layer_of(model):
    (layer,) = lotra_layers(model).values()
    return layer


def update(model, x):
    """What the active adapters change."""
    with torch.no_grad(), model.disable_adapter():
        before = model(x)
    return model(x).detach() - before


##########
# Scales #
##########


@every_family
def test_the_update_is_proportional_to_alpha(family):
    x = inputs(dtype=torch.float64)
    changes = []
    for alpha in (1.0, 3.0):
        torch.manual_seed(1)
        changes.append(update(adapt(base(family, torch.float64), alpha=alpha), x))
    torch.testing.assert_close(changes[1], 3 * changes[0], rtol=0, atol=1e-10)


def test_set_scale():
    model = adapt(base("own", torch.float64), alpha=2.0)
    x = inputs(dtype=torch.float64)
    layer, full = layer_of(model), update(model, x)
    for scale in (0.5, 0.0, 1.0):  # of alpha, not of the last scale
        layer.set_scale("default", scale)
        torch.testing.assert_close(update(model, x), scale * full, rtol=0, atol=1e-12)
    layer.set_scale("unknown", 7.0)
    torch.testing.assert_close(update(model, x), full, rtol=0, atol=1e-12)


def test_scale_and_unscale_the_active_adapters():
    model = with_two_adapters(base("own", torch.float64), {"alpha": 2.0})
    x = inputs(dtype=torch.float64)
    layer, first = layer_of(model), update(model, x)
    model.set_adapter("second")
    second = update(model, x)
    model.set_adapter("first")

    def is_now(expected):
        torch.testing.assert_close(update(model, x), expected, rtol=0, atol=1e-12)

    layer.scale_layer(3.0)
    is_now(3 * first)
    layer.scale_layer(0.5)
    is_now(1.5 * first)
    layer.unscale_layer(0.5)
    is_now(3 * first)
    layer.unscale_layer()
    is_now(first)
    layer.scale_layer(4.0)
    model.set_adapter("second")
    is_now(second)
    model.set_adapter("first")
    is_now(4 * first)


def test_merging_uses_the_scale():
    model = adapt(base("own", torch.float64))
    x = inputs(dtype=torch.float64)
    layer_of(model).set_scale("default", 0.25)
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=0, atol=1e-12)


####################
# Several adapters #
####################


@every_family
def test_active_adapters_add_up(family):
    model = with_two_adapters(base(family, torch.float64), {"adapt_residual": False}, {"alpha": 0.5})
    x = inputs(dtype=torch.float64)
    first = update(model, x)
    model.set_adapter("second")
    second = update(model, x)
    model.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(update(model, x), first + second, rtol=0, atol=1e-10)
    y = model(x)
    model.merge_adapter()
    assert layer_of(model).merged_adapters == ["first", "second"]
    assert relative(model(x), y) <= ROUNDING[torch.float64]


def test_merge_one_of_several():
    model = with_two_adapters(base("own", torch.float64))
    x = inputs(dtype=torch.float64)
    model.set_adapter("second")
    second = update(model, x)
    model.set_adapter("first")
    with model.disable_adapter():
        before = model(x)
    merged = model.merge_and_unload(adapter_names=["second"])
    torch.testing.assert_close(merged(x), before + second, rtol=0, atol=1e-12)


@every_family
def test_disabled_adapters(family):
    model = base(family)
    x = inputs()
    before = model(x)
    adapted = adapt(model)
    y = adapted(x)
    assert relative(y, before) > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), before)
    assert torch.equal(adapted(x), y)
    adapted.merge_adapter()
    with adapted.disable_adapter():
        # each rounding of a coefficient is of the size of the merged one
        assert (adapted(x) - before).abs().max() < 1e-5 * max(y.abs().max(), before.abs().max())


@pytest.mark.parametrize("train", [None, "core"])
def test_deleting_an_adapter_leaves_nothing_of_it(train):
    model = with_two_adapters(base("own"), {"train": train}, {"train": train})
    x = inputs()
    y = model(x)
    model.delete_adapter("second")
    layer = layer_of(model)
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        # adapters that are trained whole have no entry there
        assert set(getattr(layer, name)) == ({"first"} if train or name != "lotra_frozen" else set()), name
    assert torch.equal(model(x), y)
    assert not any("second" in key for key in model.state_dict())


###########
# Dropout #
###########


@pytest.mark.parametrize("family", ["own", "fast-kan", "inkan"])
@pytest.mark.parametrize("name", ["rank_dropout", "module_dropout"])
def test_dropout_in_evaluation_and_in_merging(family, name):
    torch.manual_seed(3)
    plain = adapt(base(family))
    torch.manual_seed(3)
    model = adapt(base(family), **{name: 0.5})
    x = inputs()
    assert torch.equal(model(x), plain(x))
    y = model(x)
    model.train().merge_adapter()
    assert relative(model(x), y) <= 1e-6  # merged with all components, whatever the mode
    assert torch.equal(model(x), model(x))


def draws(model, x, n):
    with torch.no_grad():
        return torch.stack([model.train()(x) for _ in range(n)])


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_rank_dropout_keeps_the_expected_update(p):
    model = adapt(base("own"), r=(3, 2, 2), rank_dropout=p)
    x = inputs(2)
    change = update(model, x)
    results = draws(model, x, 1500)
    with model.disable_adapter():
        mean = (results - model(x)).mean(0)
    assert relative(mean, change) < 0.1
    # each of the three components is there or is not
    assert 2 < len(results.flatten(1).mul(1e4).round().unique(dim=0)) <= 2**3


def test_module_dropout_skips_the_whole_adapter():
    model = adapt(base("own"), module_dropout=0.25)
    x = inputs(2)
    full = model(x)
    with model.disable_adapter():
        bare = model(x)
    results = draws(model, x, 400)
    is_full = torch.isclose(results, full).flatten(1).all(1)
    is_bare = torch.isclose(results, bare).flatten(1).all(1)
    assert (is_full ^ is_bare).all()
    assert 0.68 < is_full.float().mean() < 0.82


def test_dropout_of_one_layer_does_not_decide_for_the_others():
    model = adapt(KAN([3, 4, 2]), module_dropout=0.5)
    x = inputs(2)
    assert len(draws(model, x, 60).flatten(1).mul(1e4).round().unique(dim=0)) == 4


#################
# Mixed batches #
#################


def row_by_row(model, x, names, repeats=1):
    """What each row gives in a batch of its adapter alone."""
    rows = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                y = model(x)
        else:
            model.set_adapter(name)
            y = model(x)
        rows.append(y.reshape(len(names), repeats, *y.shape[1:])[row])
    return torch.cat(rows)


NAMES = ["first", "__base__", "second", "second", "first", "__base__"]


@every_family
@pytest.mark.parametrize(
    "names", [NAMES, ["second"] * 6, ["__base__"] * 6, ["first"] * 5 + ["second"]], ids=["all", "one", "base", "two"]
)
def test_each_row_by_its_adapter(family, names):
    model = with_two_adapters(base(family, torch.float64))
    x = inputs(dtype=torch.float64)
    expected = row_by_row(model, x, names)
    model.set_adapter("first")
    torch.testing.assert_close(model(x, adapter_names=names), expected, rtol=0, atol=1e-12)
    # the layer's own output, which is a tuple in pykan
    layer = layer_of(model)
    y, plain = layer(x, adapter_names=names), layer(x)
    assert type(y) is type(plain)
    if isinstance(y, tuple):
        assert [part.shape for part in y] == [part.shape for part in plain]
        for position, name in enumerate(names):
            if name == "first":
                assert all(torch.allclose(a[position], b[position]) for a, b in zip(y, plain, strict=True))


def test_rows_of_a_layer_that_flattens_its_input():
    model = with_two_adapters(nn.Sequential(ChebyKANLayer(3, 4, degree=3)).double())
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    expected = row_by_row(model, x, NAMES, repeats=5)
    y = model(x, adapter_names=NAMES)
    assert y.shape == (30, 4)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_rows_of_higher_dimension():
    model = with_two_adapters(KAN([3, 4, 2], dtype=torch.float64))
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x, adapter_names=NAMES), row_by_row(model, x, NAMES), rtol=0, atol=1e-12)


def test_adapters_that_do_not_touch_all_layers_and_modules_to_save():
    model = nested().double()
    model = adapt(model, adapter_name="first", target_modules=["body.0"], modules_to_save=["head"])
    second = {"target_modules": ["body.1", "tail.layers.0"], "modules_to_save": ["head"], "init_weights": False}
    model.add_adapter("second", LoTRAConfig(**second))
    for name, parameter in model.eval().named_parameters():
        if "modules_to_save.second" in name:
            parameter.data.mul_(2)
    x = inputs(dtype=torch.float64)
    torch.testing.assert_close(model(x, adapter_names=NAMES), row_by_row(model, x, NAMES), rtol=0, atol=1e-12)


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(
    "names, message",
    [
        (["first", "unknown", "other"] * 2, "non-existing adapter\\(s\\): other, unknown$"),
        (["first"] * 5, "Length of `adapter_names` should be the same as the number of inputs, but got 5 and 6"),
        ([], "Length of `adapter_names` should be the same as the number of inputs, but got 0 and 6"),
    ],
)
def test_wrong_names(names, message):
    model = with_two_adapters(base("own"))
    x = inputs()
    y = model(x)
    with pytest.raises(ValueError, match=message):
        model(x, adapter_names=names)
    assert hooks(model) == 0 and torch.equal(model(x), y)


def test_not_in_training_mode():
    model = with_two_adapters(base("own")).train()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode."):
        model(inputs(), adapter_names=NAMES)


def test_not_while_merged():
    model = with_two_adapters(base("own"))
    model.merge_adapter()
    message = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
    with pytest.raises(ValueError, match=message):
        model(inputs(), adapter_names=NAMES)
    model.unmerge_adapter()
    model(inputs(), adapter_names=NAMES)


def test_hooks_are_removed_after_an_exception():
    model = with_two_adapters(KAN([3, 4, 2]))
    model(inputs(), adapter_names=NAMES)
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="last dimension of 3"):
        model(torch.randn(6, 2), adapter_names=NAMES)
    assert hooks(model) == 0
