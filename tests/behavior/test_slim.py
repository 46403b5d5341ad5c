# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Compressed networks."""

import pytest
import torch
from behaving import KINDS, X, adapted, apart, same, state

from peft_lotra import slim, to_dense
from peft_lotra.kan import KAN, KANLinear, SlimKAN, SlimKANLinear


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["own", "efficient-kan", "pykan", "fast-kan", "cheby-kan"])
def test_all_energy_is_exact(kind):
    base = KINDS[kind]()
    y, before = base(X).detach(), state(base)
    assert apart(slim(base, energy=1.0)(X), y) < 1e-4 and same(state(base), before)


def test_back_to_dense():
    small, x = slim(KAN([12, 10, 8]), budget=500), torch.rand(20, 12) * 2 - 1
    assert small.slim_report.parameters[1] <= 500 and all(type(layer) is SlimKANLinear for layer in small.layers)
    for dense in (to_dense(small), small.to_dense()):
        assert all(type(layer) is KANLinear for layer in dense.layers) and apart(dense(x), small(x)) < 1e-5


def test_merged_and_unloaded():
    model, x = adapted(SlimKAN([6, 7, 5], ranks=2), r=2), torch.rand(20, 6) * 2 - 1
    y = model(x)
    with pytest.raises(ValueError, match="adapter"):
        slim(model, 2)
    merged = model.merge_and_unload()
    assert apart(merged(x), y) < 1e-4 and not any("lotra_" in name for name in merged.state_dict())
