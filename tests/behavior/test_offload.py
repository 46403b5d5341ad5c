# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Models whose parameters accelerate keeps elsewhere, or that are filled after they were adapted."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers import KINDS, X, adapt, net
from torch import nn
from torch.testing import assert_close


@pytest.mark.parametrize("kind", ["own", "efficient-kan", "fast-kan", "cheby-kan"])
@pytest.mark.parametrize("offload", [cpu_offload, "disk"])
def test_an_offloaded_model_has_the_same_outputs(kind, offload, tmp_path):
    model = adapt(net() if kind == "own" else nn.Sequential(KINDS[kind]()))
    with torch.no_grad():
        y = model(X)
        with model.disable_adapter():
            base = model(X)
        if offload == "disk":
            disk_offload(model, str(tmp_path), execution_device="cpu")
        else:
            offload(model, execution_device="cpu")
        assert any(parameter.is_meta for parameter in model.parameters())
        for _ in range(2):
            assert_close(model(X), y)
        with model.disable_adapter():
            assert_close(model(X), base)
        assert not torch.allclose(y, base)


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_that_is_adapted_on_meta_is_filled_afterwards(assign):
    filled = adapt(net())
    with torch.device("meta"):
        model = adapt(net())

    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(filled.state_dict(), assign=assign)

    assert_close(model(X), filled(X))
