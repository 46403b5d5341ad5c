# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from helpers import relative
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, find_kan_layers, register_kan_layer
from peft_lotra.layers.registry import get_kan_spec


class Copy(nn.Module):
    """Looks like a layer of efficient-kan, whose parameters are not all used."""

    def __init__(self, i, o, count=6, uses=("base", "scale")):
        super().__init__()
        self.in_features, self.out_features, self.uses = i, o, " ".join(uses)
        self.spline_weight = nn.Parameter(torch.randn(o, i, count))
        self.base_weight, self.spline_scaler = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.rand(o, i) + 0.5)
        self.register_buffer("grid", torch.linspace(-2, 2, count).expand(i, -1).clone())

    def b_splines(self, x):
        return torch.exp(-((x[..., None] - self.grid) ** 2))

    def forward(self, x):
        weight = self.spline_weight
        if "scale" in self.uses:
            weight = weight * self.spline_scaler[..., None]
        y = torch.einsum("bik,oik->bo", self.b_splines(x), weight)
        return y + nn.functional.silu(x) @ self.base_weight.T if "base" in self.uses else y

    def update_grid(self):
        self.grid.mul_(2)


@pytest.mark.parametrize("count", [6, 3])  # families with `spline_scaler` as a factor, and as a part
@pytest.mark.parametrize("uses", [("base", "scale"), ("base",), ("scale",), ()])
def test_parameters_that_a_copy_no_longer_uses_are_left_out(uses, count, tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(Copy(4, 5, count, uses), Copy(5, 2, count, uses))

    expected = {"spline_weight"} | ({"base_weight"} if "base" in uses else set())
    if count == 3 and "scale" in uses:
        expected.add("spline_scaler")
    layer = build()[0]
    tensor = get_kan_spec(layer).locate(layer)
    assert set(tensor.parameters) == expected and tensor.has_residual == ("base" in uses)
    assert get_kan_spec(layer).family.startswith("efficient-kan")

    x = torch.rand(8, 4)
    model = get_peft_model(build(), LoTRAConfig(r=2))
    torch.testing.assert_close(model(x), build()(x))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(RuntimeError, match="update_grid"):
        model.base_model.model[0].update_grid()
    y = model(x)
    model.save_pretrained(tmp_path)
    assert relative(PeftModel.from_pretrained(build(), tmp_path)(x), y) < 1e-5
    merged = model.merge_and_unload()
    assert relative(merged(x), y) < 1e-5 and type(merged[0]) is Copy
    for name in {"base_weight", "spline_scaler"} - expected:
        assert torch.equal(merged[0].get_parameter(name), build()[0].get_parameter(name))


def test_a_layer_that_uses_none_of_them_is_refused_by_name():
    class Nothing(Copy):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="does not use `spline_weight`, `base_weight`"):
        get_peft_model(nn.Sequential(Nothing(4, 4)), LoTRAConfig(r=2))


def test_what_a_user_describes_is_not_changed():
    register_kan_layer("mine", matches=Copy, coefficients=("spline_weight", "o i k"), residual=("base_weight", "o i"))
    with pytest.raises(ValueError, match="does not use `base_weight`"):
        get_peft_model(nn.Sequential(Copy(4, 5, uses=())), LoTRAConfig(r=2))


def test_a_layer_that_cannot_be_run_is_as_described_until_it_can():
    layer = Copy(4, 7, uses=())
    assert get_kan_spec(layer.to("meta")).residual is not None
    real = Copy(4, 7, uses=())
    assert get_kan_spec(real).residual is None
    assert [kan.has_residual for kan in find_kan_layers(nn.Sequential(real))] == [False]
