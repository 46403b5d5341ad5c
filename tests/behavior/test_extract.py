# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The adapter that comes closest to a full fine-tuning."""

import copy

import pytest
import torch
from behaving import X, apart, layers, net, same, state
from peft import PeftModel
from torch import nn

from peft_lotra import extract_lotra


def tuned(low_rank=True):
    """The network with another first layer, which differs by a tensor of rank (1, 1, 1), and another head."""
    model = copy.deepcopy(net())
    weight = model.kan.layers[0].spline_weight
    parts = [torch.randn(size) for size in weight.shape]
    weight.data += torch.einsum("o,i,k->oik", *parts) if low_rank else torch.randn_like(weight)
    model.head.weight.data += 1
    return model


def test_a_change_of_low_rank_is_extracted(tmp_path):
    full = tuned()
    model = extract_lotra(net(), full, energy=0.9999).eval()
    assert isinstance(model, PeftModel) and model.extraction_report.ranks == {"kan.layers.0": (1, 1, 1)}
    assert list(layers(model)) == ["base_model.model.kan.layers.0"] and apart(model(X), full(X)) < 1e-4
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path).eval()(X), model(X))


def test_more_ranks_come_closer():
    full = tuned(low_rank=False)
    errors = [apart(extract_lotra(net(), full, r=r).eval()(X), full(X)) for r in (1, 3, 6, 100)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < errors[0]


@pytest.mark.parametrize("other", [net(), net(hidden=5), nn.Linear(3, 2)])
def test_what_is_refused(other):
    base = net()
    with pytest.raises(ValueError):
        extract_lotra(base, other, r=2)
    assert same(state(base), state(net())) and not layers(base)
