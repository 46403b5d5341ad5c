# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Networks, points, and the derivatives that jets should return, by nested autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peft_lotra.kan import KAN


Parts = tuple[Tensor, Tensor, Tensor]


def network(*widths: int, **kwargs) -> KAN:
    return KAN(widths or (3, 7, 6, 2), dtype=torch.float64, **kwargs)


def points(rows: int = 40, size: int = 3) -> Tensor:
    """Some of them outside the grid."""
    return torch.rand(rows, size, dtype=torch.float64) * 2.4 - 1.2


def nested(model: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor | None = None) -> Parts:
    """What `jet` should return, by differentiating a graph twice."""
    directions = torch.eye(x.shape[-1], dtype=x.dtype) if directions is None else directions
    x = x.detach().requires_grad_()
    output = model(x)
    output = getattr(output, "logits", output)
    first, second = [], []
    for direction in directions:
        slopes, bends = [], []
        for column in output.unbind(-1):
            (gradient,) = torch.autograd.grad(column.sum(), x, create_graph=True)
            slope = gradient @ direction
            (gradient,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
            slopes.append(slope)
            bends.append(gradient @ direction)
        first.append(torch.stack(slopes, -1))
        second.append(torch.stack(bends, -1))
    return output, torch.stack(first), torch.stack(second)


def assert_same(actual: Parts, expected: Parts, tolerance: float = 1e-10) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * e.abs().max()
