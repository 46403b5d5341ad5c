# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Stand-ins for convolutional KAN layers, which no package on PyPI has, written from their formulas.

Each has the parameter names, shapes, axis orders and formula of the original (torch-conv-kan), and no other part of
it. With groups, inputs and outputs are split into blocks, and each block has parameters of its own.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from stand_ins import Gaussians, b_splines
from torch import Tensor, nn


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class _ConvKAN(nn.Module):
    """What the families share: the sizes, and one block after the other."""

    def __init__(
        self, input_dim: int, output_dim: int, kernel_size: int, groups: int = 1, padding: int = 0, ndim: int = 2
    ) -> None:
        super().__init__()
        self.inputdim, self.outdim, self.kernel_size, self.ndim = input_dim, output_dim, kernel_size, ndim
        self.groups, self.padding = groups, padding
        self.layer_norm = nn.ModuleList([_NORMS[ndim](output_dim // groups) for _ in range(groups)])

    def convolutions(self, functions: int = 1) -> nn.ModuleList:
        """One convolution for each block, of `functions` channels for each input."""
        inputs, outputs = functions * self.inputdim // self.groups, self.outdim // self.groups
        cls, sizes = _CONVOLUTIONS[self.ndim], {"padding": self.padding, "bias": False}
        return nn.ModuleList([cls(inputs, outputs, self.kernel_size, **sizes) for _ in range(self.groups)])

    def block(self, x: Tensor, group: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.block(part, group) for group, part in enumerate(x.chunk(self.groups, dim=1))], dim=1)


class _PolynomialConv(_ConvKAN):
    """`poly_weights` (g, O/g, (K I/g), k, ...), the degrees outside."""

    def __init__(self, *args, degree: int = 3, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.degree = degree
        self.base_activation = nn.SiLU()
        self.base_conv = self.convolutions()
        inputs, kernel = self.inputdim // self.groups * (degree + 1), [self.kernel_size] * self.ndim
        shape = (self.groups, self.outdim // self.groups, inputs, *kernel)
        self.poly_weights = nn.Parameter(torch.randn(shape) / (inputs * math.prod(kernel)) ** 0.5)

    def polynomials(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def block(self, x: Tensor, group: int) -> Tensor:
        base = self.base_conv[group](self.base_activation(x))
        y = _FUNCTIONS[self.ndim](self.polynomials(x), self.poly_weights[group], padding=self.padding)
        return self.base_activation(self.layer_norm[group](base + y))


class KAGNConvNDLayer(_PolynomialConv):
    """Gram polynomials of tanh(x), whose recurrence has the trained `beta_weights` (K)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.beta_weights = nn.Parameter(0.1 * torch.randn(self.degree + 1))

    def polynomials(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        found = [torch.ones_like(x), x]
        for m in range(2, self.degree + 1):
            n = m - 1
            beta = (m + n) * (m - n) * n**2 / (m**2 / (4 * n**2 - 1)) * self.beta_weights[n]
            found.append(x * found[-1] - beta * found[-2])
        return self.base_activation(torch.cat(found[: self.degree + 1], dim=1))


class KALNConvNDLayer(_PolynomialConv):
    """Legendre polynomials of x, brought to [-1, 1] by the extremes of the batch."""

    def polynomials(self, x: Tensor) -> Tensor:
        x = 2 * (x - x.min()) / (x.max() - x.min()) - 1
        found = [torch.ones_like(x), x]
        for n in range(2, self.degree + 1):
            found.append(((2 * n - 1) * x * found[-1] - (n - 1) * found[-2]) / n)
        return torch.cat(found[: self.degree + 1], dim=1)


class KACNConvNDLayer(_ConvKAN):
    """Chebyshev polynomials of tanh(x), `poly_conv.N.weight` (O/g, (I/g K), k, ...), the inputs outside; no base."""

    def __init__(self, *args, degree: int = 3, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.degree = degree
        self.poly_conv = self.convolutions(degree + 1)
        self.register_buffer("arange", torch.arange(degree + 1).view(1, 1, -1, *[1] * self.ndim))

    def block(self, x: Tensor, group: int) -> Tensor:
        angle = torch.tanh(x).clamp(-1 + 1e-7, 1 - 1e-7).acos().unsqueeze(2)
        polynomials = (angle * self.arange).flatten(1, 2).cos()
        return self.layer_norm[group](self.poly_conv[group](polynomials))


class FastKANConvNDLayer(_ConvKAN):
    """Gaussians of the normalized inputs, `spline_conv.N.weight` (O/g, (I/g K), k, ...), the inputs outside.

    Nothing follows the sum, so that the outputs are linear in the coefficients.
    """

    def __init__(self, *args, grid_size: int = 5, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.grid_size = grid_size
        self.base_activation = nn.SiLU()
        self.base_conv, self.spline_conv = self.convolutions(), self.convolutions(grid_size)
        self.layer_norm = nn.ModuleList([_NORMS[self.ndim](self.inputdim // self.groups) for _ in range(self.groups)])
        self.rbf = Gaussians(-2, 2, grid_size)

    def block(self, x: Tensor, group: int) -> Tensor:
        functions = self.rbf(self.layer_norm[group](x)).moveaxis(-1, 2).flatten(1, 2)
        return self.base_conv[group](self.base_activation(x)) + self.spline_conv[group](functions)


class KANConvNDLayer(_ConvKAN):
    """B-splines on one uniform grid, a plain attribute; a PReLU follows the normalized sum."""

    def __init__(self, *args, grid_size: int = 3, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.grid_size, self.spline_order = grid_size, 3
        self.base_activation = nn.GELU()
        self.base_conv, self.spline_conv = self.convolutions(), self.convolutions(grid_size + self.spline_order)
        self.prelus = nn.ModuleList([nn.PReLU() for _ in range(self.groups)])
        step = 2 / grid_size
        self.grid = torch.linspace(-1 - 3 * step, 1 + 3 * step, grid_size + 7)

    def block(self, x: Tensor, group: int) -> Tensor:
        base = self.base_conv[group](self.base_activation(x))
        splines = b_splines(x.reshape(-1, 1), self.grid.to(x)[None], self.spline_order).view(*x.shape, -1)
        y = self.spline_conv[group](splines.moveaxis(-1, 2).flatten(1, 2))
        return self.prelus[group](self.layer_norm[group](base + y))


# (in_channels, out_channels, groups, ndim) -> layer
CONVOLUTIONS: dict[str, Callable[..., nn.Module]] = {
    cls.__name__.removesuffix("NDLayer").lower(): cls
    for cls in (KAGNConvNDLayer, KALNConvNDLayer, KACNConvNDLayer, FastKANConvNDLayer, KANConvNDLayer)
}


class ConvNet(nn.Module):
    """Two convolutional KAN layers of one family, and a linear head: images (N, C, 4, ...) to (N, 3)."""

    def __init__(self, family: str, channels: int = 4, groups: int = 1, ndim: int = 2, width: int = 6) -> None:
        super().__init__()
        make = CONVOLUTIONS[family]
        self.first = make(channels, width, 3, groups=groups, padding=1, ndim=ndim)
        self.second = make(width, width, 3, groups=groups, padding=1, ndim=ndim)
        self.head = nn.Linear(width * 4**ndim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).flatten(1))


def images(
    rows: int = 3, channels: int = 4, ndim: int = 2, size: int = 4, dtype: torch.dtype = torch.float32
) -> Tensor:
    return (torch.rand(rows, channels, *[size] * ndim) * 2 - 1).to(dtype)
