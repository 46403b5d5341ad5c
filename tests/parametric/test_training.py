# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Families that a function of the user trains."""

from __future__ import annotations

import family_problems as problems
import numpy as np
import pytest
import torch
from torch import nn

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN


def test_a_training_function_instead_of_terms():
    torch.manual_seed(0)
    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    problems.train_by_adam(base, 3.0)
    family = ParametricAdapter(base, ranks=4, loss_of=problems.loss_of)
    family.fit([2.5, 3.0, 3.5], train=problems.train_by_adam, progress=False)
    prediction = family.predict(2.75)
    assert prediction.indicator < problems.loss_of(base, 2.75).item() and np.isnan(prediction.residual)
    assert prediction.indicator == pytest.approx(prediction.apply(problems.loss_of, 2.75).item())
    with pytest.raises(ValueError, match="no residual terms"):
        family.refine(2.75)


def test_training_without_a_loss_has_no_indicator():
    family = ParametricAdapter(KAN([1, 3, 1]).double(), ranks=2)
    family.fit([2.5, 3.0], train=problems.train_by_adam, progress=False)
    assert np.isnan(family.predict(2.7).indicator)
    with pytest.raises(ValueError, match="`loss_of`"):
        family.fit(between=(2.0, 3.0), train=problems.train_by_adam)


def test_training_that_changes_what_members_share():
    """Modes, flags, running statistics and the base stay as they were."""

    def train(model, c):
        model.train().requires_grad_(True)
        for module in model.modules():
            module.training = True
        model(torch.rand(20, 1) + 5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(c)

    torch.manual_seed(0)
    family = ParametricAdapter(nn.Sequential(KAN([1, 4, 1]), nn.BatchNorm1d(1), nn.Dropout(0.5)), ranks=2)
    before = {name: tensor.clone() for name, tensor in family.model.state_dict().items() if "lotra_core" not in name}
    family.fit([1.0, 2.0], train=train, progress=False)
    assert all(torch.equal(family.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all("lotra_core" in name for name, part in family.model.named_parameters() if part.requires_grad)
    x, prediction = torch.rand(9, 1), family.predict(1.5)
    assert torch.equal(prediction(x), prediction(x))  # without dropout
    assert any(part.any() for name, part in family.as_adapter(2.0).named_parameters() if "lotra_core" in name)
