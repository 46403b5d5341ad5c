# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_lotra.derivatives.norms import check_rows_apart, norm_size, through_norm
from peft_lotra.kan.network import BatchNorm, is_norm


NORMS = {
    "layer": lambda: nn.LayerNorm(4),
    "plain layer": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "batch": lambda: BatchNorm(4).eval(),
    "plain batch": lambda: nn.BatchNorm1d(4, affine=False).eval(),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("collapsed", [False, True])
def test_equals_nested_forward_derivatives(name, collapsed):
    norm = NORMS[name]().double()
    with torch.no_grad():
        for tensor in (*norm.parameters(), *norm.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    assert is_norm(norm) and norm_size(norm) == 4
    z, v, a = torch.randn(5, 4).double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()

    def along(t):
        x = z + t * v + t**2 / 2 * a
        if not isinstance(norm, nn.LayerNorm):
            return norm(x)
        # written out: torch's own layer normalization has wrong second derivatives
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return x if norm.weight is None else x * norm.weight + norm.bias

    def slope(t):
        return torch.func.jvp(along, (t,), (torch.ones_like(t),))[1]

    zero = torch.zeros((), dtype=torch.float64)
    expected = along(zero), slope(zero), torch.func.jvp(slope, (zero,), (torch.ones_like(zero),))[1]
    weights = torch.ones(1, dtype=torch.float64) if collapsed else None
    y, dy, d2y = through_norm(norm, z, v.unsqueeze(0), a.unsqueeze(0), weights)
    for found, value in zip((y, dy[0], d2y[0]), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_statistics_of_the_batch_are_refused():
    norm = nn.Sequential(BatchNorm(4))
    assert not is_norm(norm[0])
    with pytest.raises(ValueError, match="`0` is a BatchNorm"):
        check_rows_apart(norm)
    check_rows_apart(norm.eval())
    assert is_norm(norm[0]) and not is_norm(nn.LayerNorm((2, 4)))
