# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What does nothing, or something wrong, without a word: it is refused, or it is right."""

from __future__ import annotations

import pytest
import torch
from hostile import Net, X, adapted, assert_refused, differences, save, state_of
from peft import PeftModel
from torch import nn
from torch.nn.utils import prune

from peft_lotra import hotswap_adapter
from peft_lotra.kan import KAN


##########################
# Layers                 #
##########################


def pruned(layer):
    prune.l1_unstructured(layer, "spline_weight", amount=0.3)


def old_weight_norm(layer):
    nn.utils.weight_norm(layer, "spline_weight")


def new_weight_norm(layer):
    nn.utils.parametrizations.weight_norm(layer, "spline_weight")


@pytest.mark.parametrize("change", [pruned, old_weight_norm, new_weight_norm])
@pytest.mark.parametrize("residual", [True, False])
def test_computed_parameters_of_the_base(change, residual):
    base = Net()
    change(base.kan.layers[0])
    expected = base(X)
    before = state_of(base)
    try:
        model = adapted(base, target_modules=["kan.layers.0"], adapt_residual=residual)
    except ValueError as error:
        assert "spline_weight" in str(error) and not differences(before, state_of(base))
        return
    y = model(X)
    assert not torch.allclose(y, expected), "the adapter has no effect"
    with model.disable_adapter():
        torch.testing.assert_close(model(X), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), y)


@pytest.mark.parametrize("name", ["spline_weight", "base_weight"])
def test_layers_that_share_a_parameter(name):
    base = Net()
    base.kan = KAN([3, 3, 3])
    setattr(base.kan.layers[1], name, getattr(base.kan.layers[0], name))
    before = state_of(base)
    try:
        model = adapted(base)
    except ValueError as error:
        assert name in str(error) and not differences(before, state_of(base))
        return
    y = model(X)
    try:
        model.merge_adapter()
    except ValueError as error:
        assert name in str(error)
        torch.testing.assert_close(model(X), y)
        return
    torch.testing.assert_close(model(X), y)


def test_a_layer_in_two_places_shares_nothing_with_another():
    layer = KAN([3, 3]).layers[0]
    model = adapted(nn.Sequential(layer, nn.Tanh(), layer))
    y = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)


def test_unload_while_merged():
    model = adapted()
    model.merge_adapter()
    try:
        base = model.unload()
    except (ValueError, RuntimeError) as error:
        assert "merged" in str(error)
        return
    assert torch.equal(base(X), Net()(X))


##########################
# Hotswap                #
##########################


class Other(Net):
    def __init__(self, **kwargs):
        super().__init__()
        state = {name: value for name, value in self.kan.state_dict().items() if "weight" in name}
        self.kan = KAN([3, 4, 3], **kwargs)
        self.kan.load_state_dict(state, strict=False)


def test_hotswap_of_another_grid(tmp_path):
    save(tmp_path / "a", adapted(Other(grid_range=(-3, 3))))
    model = adapted()
    assert_refused(lambda: hotswap_adapter(model, tmp_path / "a"), model, error=ValueError, match="grid")


def test_hotswap_of_another_base(tmp_path):
    base = Net()
    with torch.no_grad():
        base.kan.layers[0].spline_weight.add_(1)
    save(tmp_path / "a", adapted(base))
    with pytest.warns(UserWarning, match="coefficients"):
        hotswap_adapter(adapted(), tmp_path / "a")


def test_hotswap_of_the_same_base(tmp_path, recwarn):
    save(tmp_path / "a")
    model = adapted()
    hotswap_adapter(model, tmp_path / "a")
    assert not [warning for warning in recwarn if "base" in str(warning.message)]
    torch.testing.assert_close(model(X), PeftModel.from_pretrained(Net(), tmp_path / "a")(X))


def test_hotswap_of_another_grid_on_purpose(tmp_path):
    save(tmp_path / "a", adapted(Other(grid_range=(-3, 3))))
    hotswap_adapter(adapted(), tmp_path / "a", check_base="ignore")
