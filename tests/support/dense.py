# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""KAN layers in plain float64 tensors, written from their formulas: what the package is compared with.

Nothing here is of the package, nor of a KAN library: a layer is its coefficient tensor (out, in, basis), with the
residual branch as the last slice, and the functions that the basis mode stands for,

    y[o] = bias[o] + sum_{i,k} scale[o, i, k] tensor[o, i, k] basis_k(x)[i].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


State = Mapping[str, Tensor]


class DenseLayer(NamedTuple):
    tensor: Tensor  # (O, I, K)
    basis: Callable[[Tensor], Tensor]  # (B, I) to (B, I, K)
    scale: Tensor | float = 1.0  # (O, I, K), of what the library multiplies its coefficients by
    bias: Tensor | float = 0.0  # (O,)
    has_residual: bool = True

    def __call__(self, x: Tensor, update: Tensor | float = 0.0) -> Tensor:
        return torch.einsum("bik,oik->bo", self.basis(x), self.scale * (self.tensor + update)) + self.bias


def cox_de_boor(x: Tensor, knots: Tensor, degree: int = 3) -> Tensor:
    """B-splines by their recursion: x (B, I) and knots (I, M) give (B, I, M - 1 - degree)."""
    x = x[..., None]
    values = ((knots[:, :-1] <= x) & (x < knots[:, 1:])).to(x.dtype)
    for p in range(1, degree + 1):
        span = knots[:, p:] - knots[:, :-p]
        up = (x - knots[:, :-p]) / span
        values = up[..., :-1] * values[..., :-1] + (1 - up)[..., 1:] * values[..., 1:]
    return values


def _splines_and_silu(knots: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([cox_de_boor(x, knots), silu(x)[..., None]], dim=-1)


def _own(s: State) -> DenseLayer:
    low, high = s["grid_bounds"][:, :1], s["grid_bounds"][:, 1:]
    knots = low + (high - low) * torch.arange(-3, 9) / 5
    return DenseLayer(_stacked(s, "base_weight", "spline_weight"), _splines_and_silu(knots))


def _efficient_kan(s: State) -> DenseLayer:
    scale = 1.0
    if "spline_scaler" in s and "spline_weight" in s:
        scale = torch.cat(
            [
                s["spline_scaler"][..., None].expand_as(s["spline_weight"]),
                torch.ones_like(s["base_weight"])[..., None],
            ],
            dim=-1,
        )
    return DenseLayer(_stacked(s, "base_weight", "spline_weight"), _splines_and_silu(s["grid"]), scale)


def _inkan(s: State) -> DenseLayer:
    starts = s["grid_starts"]
    knots = torch.cat([starts, starts[-1] + (starts[1] - starts[0]) * torch.arange(1, 5)])
    weight, count = s["weight"], len(starts)
    width = weight.shape[1] // (count + 1)
    splines, residual = weight.split([width * count, width], dim=1)
    tensor = torch.cat([splines.unflatten(1, (width, count)), residual[..., None]], dim=-1)
    return DenseLayer(tensor, _splines_and_silu(knots.expand(width, -1)))


def _cheby_kan(s: State) -> DenseLayer:
    tensor = s["cheby_coeffs"].permute(1, 0, 2) if "cheby_coeffs" in s else torch.empty(0)
    orders = s["arange"]
    return DenseLayer(tensor, lambda x: torch.cos(orders * torch.acos(torch.tanh(x))[..., None]), has_residual=False)


def _fast_kan(s: State) -> DenseLayer:
    grid = s["rbf.grid"]
    width = 4 / (len(grid) - 1)

    def basis(x: Tensor) -> Tensor:
        z = x
        if "layernorm.weight" in s:
            spread = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            z = (x - x.mean(-1, keepdim=True)) / spread * s["layernorm.weight"] + s["layernorm.bias"]
        bumps = torch.exp(-(((z[..., None] - grid) / width) ** 2))
        return torch.cat([bumps, silu(x)[..., None]], dim=-1)

    splines = s["spline_linear.weight"].unflatten(1, (-1, len(grid)))
    tensor = torch.cat([splines, s["base_linear.weight"][..., None]], dim=-1)
    return DenseLayer(tensor, basis, bias=s["base_linear.bias"])


def _physicsnemo(s: State) -> DenseLayer:
    cosine, sine = s["fourier_coeffs"]
    harmonics = torch.arange(1, cosine.shape[-1] + 1)

    def basis(x: Tensor) -> Tensor:
        angle = x[..., None] * harmonics
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    return DenseLayer(torch.cat([cosine, sine], dim=-1), basis, bias=s["bias"].flatten(), has_residual=False)


def _kanx(s: State) -> DenseLayer:
    grid = s["grid"]
    step = (grid[:, -1:] - grid[:, :1]) / (grid.shape[1] - 1)
    out = torch.arange(1, 4) * step
    knots = torch.cat([grid[:, :1] - out.flip(1), grid, grid[:, -1:] + out], dim=1)
    tensor = torch.cat([s["spline_weight"], s["base_weight"][..., None]], dim=-1).permute(1, 0, 2)
    return DenseLayer(tensor, _splines_and_silu(knots))


def _stacked(s: State, residual: str, splines: str) -> Tensor:
    return torch.cat([s[splines], s[residual][..., None]], dim=-1) if splines in s else torch.empty(0)


READERS = {
    "own": _own,
    "efficient-kan": _efficient_kan,
    "efficient-kan-no-scaler": _efficient_kan,
    "inkan": _inkan,
    "cheby-kan": _cheby_kan,
    "fast-kan": _fast_kan,
    "physicsnemo": _physicsnemo,
    "kanx": _kanx,
}
SLIM = ("own", "efficient-kan", "cheby-kan")  # that are tried as Slim layers too


def read_layer(family: str, layer: nn.Module) -> DenseLayer:
    """A layer of `READERS`, or its Slim form, as a dense one."""
    state = {name: tensor.detach().double().clone() for name, tensor in layer.state_dict().items()}
    if "factor_out" not in state:
        return READERS[family](state)
    inner = {name.removeprefix("layer."): tensor for name, tensor in state.items()}
    parts = [state[name] for name in ("core", "factor_out", "factor_in", "factor_basis")]
    return READERS[family](inner)._replace(tensor=dense(parts))


def dense(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """core (a, b, c), factor_out (O, a), factor_in (I, b) and factor_basis (K, c) as one tensor (O, I, K)."""
    return torch.einsum("abc,oa,ib,kc->oik", *parts)
