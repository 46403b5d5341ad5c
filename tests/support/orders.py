# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""KAN layers that keep their coefficients in any order of axes, and modules by a formula."""

import torch
from stand_ins import b_splines
from torch import nn


class Layer(nn.Module):
    """y = after(sum_k A[o,i,k] before(x)[i]^k + W silu(x)), where A and W (`base`) have any order of axes."""

    def __init__(self, i, o, k=5, order="o i k", before=None, after=None, residual=None):
        super().__init__()
        sizes = {"o": o, "i": i, "k": k}
        self.order, self.residual = order.replace(" ", ""), residual
        self.A = nn.Parameter(torch.randn([sizes[axis] for axis in self.order]))
        self.base = None if residual is None else nn.Parameter(torch.randn([sizes[axis] for axis in residual]))
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x):
        powers = self.before(x)[..., None] ** torch.arange(self.A.shape[self.order.index("k")])
        y = torch.einsum(f"bik,{self.order}->bo", powers, self.A.type_as(powers))
        if self.base is not None:
            y = y + torch.einsum(f"bi,{self.residual}->bo", nn.functional.silu(x), self.base)
        return self.after(y)


class Flat(nn.Module):
    """Powers of tanh(x), with the inputs and the basis in one axis of `table`."""

    def __init__(self, i, o, k=4, inner="ik", first=True):
        super().__init__()
        self.in_features, self.k, self.inner, self.first = i, k, inner, first
        self.table = nn.Parameter(torch.randn((o, i * k) if first else (i * k, o)))

    def forward(self, x):
        basis = torch.tanh(x)[..., None] ** torch.arange(self.k)
        flat = (basis if self.inner == "ik" else basis.transpose(1, 2)).flatten(1)
        return flat @ (self.table.T if self.first else self.table)


class Legendre(nn.Module):
    """torch-conv-kan's dense KALNLayer: Legendre polynomials of x, brought to [-1, 1] by the extremes of all rows."""

    def __init__(self, i=3, o=4):
        super().__init__()
        self.input_features, self.output_features, self.polynomial_order = i, o, 3
        self.base_activation, self.layer_norm = nn.SiLU(), nn.LayerNorm(o)
        self.base_weight = nn.Parameter(torch.randn(o, i))
        self.poly_weight = nn.Parameter(torch.randn(o, i * 4))

    def forward(self, x):
        z = 2 * (x - x.min()) / (x.max() - x.min()) - 1
        polynomials = torch.stack([torch.ones_like(z), z, (3 * z**2 - 1) / 2, (5 * z**3 - 3 * z) / 2], dim=-1)
        y = self.base_activation(x) @ self.base_weight.T + polynomials.flatten(1) @ self.poly_weight.T
        return self.base_activation(self.layer_norm(y))


class Wavelets(nn.Module):
    """Wav-KAN: y[o] = sum_i A[o,i] psi((x[i] - t[o,i]) / s[o,i]), with a batch norm."""

    def __init__(self, i=3, o=4, norm=True):
        super().__init__()
        self.scale, self.translation = nn.Parameter(torch.ones(o, i)), nn.Parameter(torch.zeros(o, i))
        self.A, self.norm = nn.Parameter(torch.randn(o, i)), nn.BatchNorm1d(o) if norm else nn.Identity()

    def forward(self, x):
        u = (x[:, None] - self.translation) / self.scale
        return self.norm((self.A * (1 - u**2) * torch.exp(-(u**2) / 2)).sum(-1))


class OtherCheby(nn.Module):
    """ChebyKAN as ikan stores it: (out, in, degree + 1)."""

    def __init__(self, i, o, degree=4):
        super().__init__()
        self.cheby_coeffs = nn.Parameter(torch.randn(o, i, degree + 1) / i)

    def forward(self, x):
        angles = torch.tanh(x).clamp(-0.999, 0.999).acos()[..., None] * torch.arange(self.cheby_coeffs.shape[-1])
        return torch.einsum("bik,oik->bo", angles.cos(), self.cheby_coeffs)


class KnotsAsParameter(nn.Module):
    """Cubic splines whose knots are a parameter that is not trained, as pykan stores them; a norm follows."""

    def __init__(self, i=3, o=4, intervals=5):
        super().__init__()
        knots = torch.arange(-3, intervals + 4) * 2 / intervals - 1
        self.knots = nn.Parameter(knots.repeat(i, 1)).requires_grad_(False)
        self.table = nn.Parameter(torch.randn(o, i, intervals + 3))
        self.base, self.norm = nn.Parameter(torch.randn(o, i)), nn.LayerNorm(o)

    def forward(self, x):
        splines = torch.einsum("bik,oik->bo", b_splines(x, self.knots, 3), self.table)
        return self.norm(splines + nn.functional.silu(x) @ self.base.T)

    @torch.no_grad()
    def update_knots(self, x):
        self.knots.add_(x.mean(0)[:, None])


class Formula(nn.Module):
    """A module that computes `function(module, x)`, of parameters, given by their shapes, and other parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.randn(part)) if isinstance(part, tuple) else part)

    def forward(self, x):
        return self.function(self, x)


def skan(inputs, outputs):
    """Return SKAN: one number for each edge, of which a function of the input is made; ones join the inputs."""

    def forward(m, x):
        x = nn.functional.pad(x, (0, 1), value=1.0)
        return torch.sin(m.weight * x[..., None, :]).sum(-1)

    return Formula(forward, weight=(outputs, inputs + 1))


def assert_one_edge(layer, tensor, x, mixes_inputs=False):
    """Adding to one edge (o, i) of the canonical tensor moves output o alone, and only as far as input i goes."""
    out, inputs = edge = max(tensor.shape[0] - 2, 0), min(1, tensor.shape[1] - 1)
    delta = torch.zeros_like(tensor.read(layer))
    delta[edge] = torch.randn(delta[edge].shape)
    before = {name: layer.get_parameter(name).detach().clone() for name in tensor.parameters}

    @torch.no_grad()
    def change(x):
        found = [layer(x)]
        for name, part in tensor.split(delta).items():
            layer.get_parameter(name).add_(part)
        found.append(layer(x))
        for name, value in before.items():
            layer.get_parameter(name).copy_(value)
        y, z = (y[0] if isinstance(y, tuple) else y for y in found)
        return (z - y).movedim(1, -1).flatten(0, -2)

    moved = change(x)
    assert (moved.abs().amax(0) > 1e-4).nonzero().flatten().tolist() == [out]
    if not mixes_inputs:
        others, own = x.clone(), x.shape[1] - tensor.shape[1] + inputs  # of the last group
        rest = [place for place in range(x.shape[1]) if place != own]
        others[:, rest] = 0.9 * x[:, rest].roll(1, 1)
        torch.testing.assert_close(change(others), moved, rtol=0, atol=1e-4)
