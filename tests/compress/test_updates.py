# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Updates: what fine-tuning did to the coefficients."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import adapt, base, lotra_layers, nested
from stand_ins import FAMILIES

from peft_lotra.compress.updates import CoefficientUpdate, coefficient_updates, read_coefficients
from peft_lotra.kan import KAN


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_of_an_adapter_is_its_delta(family):
    model = base(family, torch.float64)
    adapted = adapt(copy.deepcopy(model))
    (layer,) = lotra_layers(adapted).values()
    delta = layer.get_delta_weight("default").double()
    update = coefficient_updates(model, adapted)["kan"]
    assert update.scale is None and update.tensor.dtype == torch.float64
    torch.testing.assert_close(update.tensor, delta, rtol=1e-6, atol=1e-7)
    assert update.missed(delta).norm() < 1e-5 * delta.norm()
    with adapted.disable_adapter():
        assert not coefficient_updates(model, adapted)["kan"].tensor.any()
    adapted.merge_adapter()
    torch.testing.assert_close(coefficient_updates(model, adapted)["kan"].tensor, delta, rtol=1e-6, atol=1e-7)


def test_an_adapter_without_the_residual_branch_leaves_its_slice():
    model = base("own", torch.float64)
    update = coefficient_updates(model, adapt(copy.deepcopy(model), adapt_residual=False))["kan"].tensor
    assert update.shape == (4, 3, 9) and update[..., :8].any() and not update[..., 8].any()


@pytest.mark.parametrize("family, scale", [("efficient-kan", "spline_scaler"), ("pykan", "scale_sp")])
def test_scales_count_if_they_changed_or_if_asked_for(family, scale):
    model = base(family, torch.float64)
    coefficients, scales = read_coefficients("kan", model.kan)
    assert scales.shape == coefficients.shape and (scales[..., -1] == 1).all()  # the residual branch has none
    tuned = copy.deepcopy(model)
    assert coefficient_updates(model, tuned)["kan"].scale is None
    update = coefficient_updates(model, tuned, scaled=True)["kan"]
    assert torch.equal(update.scale, scales) and not update.tensor.any()
    with torch.no_grad():
        getattr(tuned.kan, scale).mul_(1.5)
    update = coefficient_updates(model, tuned)["kan"]
    splines = (scales * coefficients)[..., :-1]
    torch.testing.assert_close(update.tensor[..., :-1], 0.5 * splines)
    torch.testing.assert_close(update.missed(0.5 * coefficients)[..., :-1], torch.zeros_like(splines))


def test_missed_without_scales_is_the_difference():
    update = CoefficientUpdate(torch.full((2, 2, 2), 3.0, dtype=torch.float64))
    assert torch.equal(update.missed(torch.ones(2, 2, 2)), torch.full((2, 2, 2), 2.0, dtype=torch.float64))


def test_what_is_read_is_a_copy():
    model = base("own", torch.float64)
    coefficients, scale = read_coefficients("kan", model.kan)
    before = model.kan.spline_weight.detach().clone()
    with torch.no_grad():
        coefficients.zero_()
    assert scale is None and torch.equal(model.kan.spline_weight, before)


def test_every_layer_is_compared_by_name():
    model = nested()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned["tail"].layers[1].spline_weight.add_(1)
    updates = coefficient_updates(model, tuned)
    assert [name for name, update in updates.items() if update.tensor.any()] == ["tail.layers.1"]
    assert list(updates) == ["body.0", "body.1", "tail.layers.0", "tail.layers.1"]


def test_errors():
    model = KAN([3, 5, 4])
    with pytest.raises(ValueError, match=r"differs: .*\(4, 5, 8\).* in the base model, .*\(6, 5, 8\)"):
        coefficient_updates(model, KAN([3, 5, 6]))
    with pytest.raises(ValueError, match="No KAN layer was found"):
        coefficient_updates(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    broken = copy.deepcopy(model)
    broken.layers[0].base_weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"`layers\.0` in the base model are not finite"):
        coefficient_updates(broken, model)
