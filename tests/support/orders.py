# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""KAN layers that keep their coefficients in any order of axes."""

from __future__ import annotations

import torch
from torch import nn


class Layer(nn.Module):
    """y = after(sum_k A[o,i,k] before(x)[i]^k), with A stored in any order of its axes."""

    def __init__(self, i, o, k=5, order="o i k", before=None, after=None):
        super().__init__()
        self.order = order
        self.A = nn.Parameter(torch.randn([{"o": o, "i": i, "k": k}[axis] for axis in order.split()]))
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x):
        powers = self.before(x)[..., None] ** torch.arange(self.A.shape[self.order.split().index("k")])
        return self.after(torch.einsum(f"bik,{self.order.replace(' ', '')}->bo", powers, self.A.type_as(powers)))


class OtherCheby(nn.Module):
    """ChebyKAN as ikan stores it: (out, in, degree + 1)."""

    def __init__(self, i, o, degree=4):
        super().__init__()
        self.cheby_coeffs = nn.Parameter(torch.randn(o, i, degree + 1) / i)

    def forward(self, x):
        angles = torch.tanh(x).clamp(-0.999, 0.999).acos()[..., None] * torch.arange(self.cheby_coeffs.shape[-1])
        return torch.einsum("bik,oik->bo", angles.cos(), self.cheby_coeffs)
