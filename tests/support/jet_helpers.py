# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Networks, points, and the derivatives that jets should return, by nested autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_lotra.kan import KAN


Parts = Sequence[Tensor]


def network(*widths, **kwargs):
    return KAN(widths or (3, 7, 6, 2), dtype=torch.float64, **kwargs)


def points(rows=40, size=3):
    """Some of them outside the grid."""
    return torch.rand(rows, size, dtype=torch.float64) * 2.4 - 1.2


def nested(model, x, directions=None, order=2):
    """What `jet` should return, by differentiating a graph `order` times."""
    directions = torch.eye(x.shape[-1], dtype=x.dtype) if directions is None else directions
    x = x.detach().requires_grad_()
    output = model(x)
    output = getattr(output, "logits", output)
    found = []
    for direction in directions:
        columns = [list(output.unbind(-1))]
        for _ in range(order):
            slopes = [_gradient(column, x) @ direction for column in columns[-1]]
            columns.append(slopes)
        found.append([torch.stack(part, -1) for part in columns[1:]])
    return output, *(torch.stack(parts) for parts in zip(*found, strict=True))


def _gradient(column, x):
    """That of a function of each row; zero where it does not depend on x."""
    if not column.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(column.sum(), x, create_graph=True, allow_unused=True, materialize_grads=True)[0]


def assert_same(actual, expected, tolerance=1e-10):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * e.abs().max()
