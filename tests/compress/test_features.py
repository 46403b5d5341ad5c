# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Features: what the coefficients of a layer multiply, and how much its outputs count."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import base, inputs, snapshot
from stand_ins import FAMILIES
from torch import nn

from peft_lotra import extract_lotra, slim, suggest_ranks
from peft_lotra.compress.features import Features, gather_features, relative_error
from peft_lotra.compress.inputs import model_outputs
from peft_lotra.compress.updates import read_coefficients
from peft_lotra.kan import KAN
from peft_lotra.layers.registry import get_kan_spec
from peft_lotra.tucker import tucker


def points(rows=40, in_features=3):
    return torch.rand(rows, in_features, dtype=torch.float64) * 1.8 - 0.9


def features_of(layer, x, metric=None):
    return Features(layer, get_kan_spec(layer), x, metric)


def product(layer):
    tensor, scale = read_coefficients("", layer)
    return (tensor if scale is None else tensor * scale).detach()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_outputs_are_those_of_the_layer_but_for_its_bias(family):
    model, x = base(family, torch.float64), points()
    outputs = features_of(model.kan, x).outputs(product(model.kan))
    rest = model(x) - outputs
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=1e-5)


def test_leading_dimensions_are_samples():
    layer, x = KAN([3, 4], dtype=torch.float64).layers[0], points(12)
    assert torch.equal(features_of(layer, x.view(2, 6, 3)).values, features_of(layer, x).values)


def test_the_metrics_are_roots_of_second_moments():
    layer, x = KAN([3, 4], dtype=torch.float64).layers[0], points()
    metric = torch.diag(torch.tensor([4.0, 1.0, 0.25, 0.0], dtype=torch.float64))
    features = features_of(layer, x, metric)
    for root, pattern in zip(features.metrics, ("nik,njk->ij", "nik,nil->kl"), strict=True):
        moments = torch.einsum(pattern, features.values, features.values)
        assert (root - root.T).norm() < 1e-12
        assert (root @ root - moments).norm() < 0.01 * moments.norm()
        assert torch.linalg.eigvalsh(root).min() > 0  # what the samples do not show counts a little
    assert (features.metric_out.square() - metric).norm() < 0.1 * metric.norm()
    assert torch.equal(features_of(layer, x).metric_out, torch.eye(4, dtype=torch.float64))


def test_fit_meets_the_outputs_better_than_the_coefficients_do():
    layer = KAN([8, 6], dtype=torch.float64).layers[0]
    x = torch.tanh(points(200, 2) @ torch.randn(2, 8, dtype=torch.float64))  # two directions
    features, tensor = features_of(layer, x), product(layer)
    fitted = features.fit(tensor, (3, 3, 3))
    assert fitted.ranks == (3, 3, 3)
    for factor in fitted.factors:
        torch.testing.assert_close(factor.T @ factor, torch.eye(3, dtype=torch.float64))
    outputs = features.outputs(tensor)
    error = relative_error(outputs, features.outputs(fitted.dense()))
    assert error < 0.8 * relative_error(outputs, features.outputs(tucker(tensor, (3, 3, 3)).dense()))


def test_outputs_that_count_more_are_met_better():
    layer, x = KAN([6, 4], dtype=torch.float64).layers[0], points(100, 6)
    tensor, missed = product(layer), []
    for weight in (1.0, 1e4):
        features = features_of(layer, x, torch.diag(torch.tensor([weight, 1, 1, 1], dtype=torch.float64)))
        difference = features.outputs(tensor - features.fit(tensor, (1, 3, 3)).dense())
        missed.append(difference[:, 0].norm())
    assert missed[1] < 0.9 * missed[0]


def test_weighed_tensors_have_norm_one():
    layer, x = KAN([3, 4], dtype=torch.float64).layers[0], points()
    features, tensor = features_of(layer, x), product(layer)
    assert features.weigh(tensor).norm().item() == pytest.approx(1)
    torch.testing.assert_close(features.weigh(7 * tensor), features.weigh(tensor))
    assert not features.weigh(torch.zeros_like(tensor)).any()


def test_relative_error_leaves_the_mean_out():
    y = torch.tensor([[100.0], [102.0]])
    assert relative_error(y, y + 1) == pytest.approx(1.0)
    assert relative_error(y, y) == 0


def test_gather_leaves_the_model_as_it_was_and_sees_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.kan = KAN([3, 3], dtype=torch.float64).requires_grad_(False)

        def forward(self, x):
            return self.kan(self.kan(x))[:, :1]

    model, x = Twice().train(), points()
    layer = model.kan.layers[0]
    before = snapshot(model)
    (features,) = gather_features(model, {"kan.layers.0": (layer, get_kan_spec(layer))}, x).values()
    assert features.values.shape == (80, 3, 9)  # 40 rows, called twice
    after = snapshot(model)
    assert before.pop("state").keys() == after.pop("state").keys() and before == after and model.training
    assert not layer._forward_hooks and all(p.grad is None for p in model.parameters())
    # all outputs of the first call count, and of the second the first one alone
    assert features.metric_out[0, 0] > features.metric_out[1, 1] > 0


def test_what_the_result_does_not_depend_on_counts_alike():
    model, x = KAN([3, 4, 2], dtype=torch.float64), points()
    layers = {f"layers.{i}": (layer, get_kan_spec(layer)) for i, layer in enumerate(model.layers)}
    with torch.no_grad():
        model.layers[1].spline_weight.zero_()
        model.layers[1].base_weight.zero_()
    features = gather_features(model, layers, x)
    assert torch.equal(features["layers.0"].metric_out, torch.eye(4, dtype=torch.float64))


def test_errors():
    model, x = KAN([3, 4]), points().float()
    unused = KAN([3, 4]).layers[0]
    with pytest.raises(ValueError, match=r"None of `inputs` reaches \['unused'\]"):
        gather_features(model, {"unused": (unused, get_kan_spec(unused))}, x)
    for output in (None, 3, (), torch.ones(2, dtype=torch.long)):
        wrapped = nn.Identity()
        with pytest.raises(TypeError, match="must return a tensor of floating point numbers"):
            model_outputs(wrapped, lambda model, output=output: output)
    assert model_outputs(nn.Identity(), lambda model: [x, None]) is x


# the coefficients of a Slim layer are no parameters that could be exchanged
@pytest.mark.parametrize("family", ["own", "efficient-kan", "cheby-kan"])
def test_features_of_slim_layers_are_those_of_dense_ones(family):
    x = inputs(20, torch.float64)
    small = slim(base(family, torch.float64), ranks=(2, 2, 3))
    tuned = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    dense = small.to_dense(), tuned.to_dense()
    assert suggest_ranks(small, tuned, budget=40, inputs=x) == suggest_ranks(*dense, budget=40, inputs=x)
    wrapped = nn.DataParallel(tuned)
    assert suggest_ranks(small, wrapped, budget=40, inputs=x) == suggest_ranks(*dense, budget=40, inputs=x)
    model = extract_lotra(small, tuned, 9, inputs=x)
    torch.testing.assert_close(model(x), tuned(x), atol=1e-5, rtol=1e-4)
