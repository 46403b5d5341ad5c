# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io

import pytest
import torch
from hostile import X, adapted
from stand_ins import FAMILIES
from torch import nn


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_saved_and_loaded():
    model = adapted()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, X), file)
    file.seek(0)
    x = torch.rand(7, 3) * 2 - 1
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_another_family_says_what_to_do():
    model = adapted(nn.Sequential(FAMILIES["efficient-kan"](3, 2)))
    with pytest.raises(NotImplementedError, match="efficient-kan layers only once they are merged"):
        torch.jit.trace(model, X)
    y, merged = model(X), model.merge_and_unload()
    torch.testing.assert_close(torch.jit.trace(merged, X)(X), y)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("family", ["own", "fourier-kan"])
def test_an_export_has_the_adapters(family, strict):
    model = adapted(nn.Sequential(FAMILIES[family](3, 2)))
    exported = torch.export.export(model, (X,), strict=strict).module()
    torch.testing.assert_close(exported(X), model(X))
