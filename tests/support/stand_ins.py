# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Stand-ins for the layers of KAN libraries that cannot be installed in a test environment.

Each has the parameter names, shapes, attributes and formula of the original, and no other part of it. `LAYER_KINDS`
lists the stand-ins and the layers of installed libraries: a test runs over every layer that the package knows.
"""

import math
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn


def b_splines(x, knots, degree, closed_interval=None):
    """B-spline basis by the Cox-de Boor recursion: x (B, I) and knots (I, M) give (B, I, M - 1 - degree).

    `closed_interval` (I,) names the knot interval of each input that includes its right end.
    """
    x = x[..., None]
    basis = ((knots[:, :-1] <= x) & (x < knots[:, 1:])).to(x.dtype)
    if closed_interval is not None:
        index = closed_interval[:, None]
        end = knots.gather(1, index + 1)
        at_end = (x >= knots.gather(1, index)) & torch.isclose(x, end, rtol=1e-8, atol=1e-10)
        here = torch.arange(basis.shape[-1], device=x.device) == index
        basis = torch.where(at_end & here, torch.ones_like(basis), basis)
    for p in range(1, degree + 1):
        span = knots[:, p:] - knots[:, :-p]
        ramp = (x - knots[:, :-p]) / torch.where(span.float().abs() < 1e-8, torch.ones_like(span), span)
        basis = ramp[..., :-1] * basis[..., :-1] + (1 - ramp[..., 1:]) * basis[..., 1:]
    return basis


class OldEfficientKANLayer(nn.Module):
    """Stands for the older, renamed copies of efficient-kan's KANLinear, which take two-dimensional inputs only."""

    def __init__(
        self,
        in_features,
        out_features,
        grid_size=5,
        spline_order=3,
        base_activation=nn.SiLU,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order = grid_size, spline_order
        self.base_activation = base_activation()

        knots = torch.arange(-spline_order, grid_size + spline_order + 1) * (2 / grid_size) - 1
        self.register_buffer("grid", knots.repeat(in_features, 1))
        scale = 1 / math.sqrt(in_features)
        self.base_weight = nn.Parameter(torch.randn(out_features, in_features) * scale)
        self.spline_weight = nn.Parameter(torch.randn(out_features, in_features, grid_size + spline_order) * scale)
        self.spline_scaler = nn.Parameter(torch.randn(out_features, in_features))

    def b_splines(self, x):
        assert x.dim() == 2 and x.size(1) == self.in_features
        return b_splines(x, self.grid, self.spline_order).contiguous()

    @property
    def scaled_spline_weight(self):
        return self.spline_weight * self.spline_scaler[..., None]

    def forward(self, x):
        base = F.linear(self.base_activation(x), self.base_weight)
        return base + F.linear(self.b_splines(x).flatten(1), self.scaled_spline_weight.flatten(1))


class Gaussians(nn.Module):
    def __init__(self, low, high, count):
        super().__init__()
        self.grid = nn.Parameter(torch.linspace(low, high, count), requires_grad=False)
        self.denominator = (high - low) / (count - 1)

    def forward(self, x):
        return torch.exp(-(((x[..., None] - self.grid) / self.denominator) ** 2))


class _ReflectionalSwitchFunction(nn.Module):
    def __init__(self, num_grids):
        super().__init__()
        self.grid = nn.Parameter(torch.linspace(-1.2, 0.2, num_grids), requires_grad=False)
        self.inv_denominator = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x):
        return 1 - torch.tanh(x[..., None] - self.grid) ** 2


class _SplineLinear(nn.Linear):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self):
        nn.init.trunc_normal_(self.weight, std=0.1)


class FastKANLayer(nn.Module):
    """Stands for fast-kan's FastKANLayer: Gaussians of the normalized input, and a linear layer as base branch."""

    def __init__(self, input_dim, output_dim, num_grids=8, use_layernorm=True):
        super().__init__()
        assert input_dim > 1 or not use_layernorm
        self.input_dim, self.output_dim = input_dim, output_dim
        self.layernorm = nn.LayerNorm(input_dim) if use_layernorm else None
        self.rbf = Gaussians(-2, 2, num_grids)
        self.spline_linear = _SplineLinear(input_dim * num_grids, output_dim)
        self.base_activation = F.silu
        self.base_linear = nn.Linear(input_dim, output_dim)

    def forward(self, x, use_layernorm=True):
        normalized = self.layernorm(x) if self.layernorm is not None and use_layernorm else x
        return self.spline_linear(self.rbf(normalized).flatten(-2)) + self.base_linear(self.base_activation(x))


class FasterKANLayer(nn.Module):
    """Stands for faster-kan's FasterKANLayer (the original's own backward is wrong about inputs, this one is not)."""

    def __init__(self, input_dim, output_dim, num_grids=8):
        super().__init__()
        self.layernorm = nn.LayerNorm(input_dim)
        self.rbf = _ReflectionalSwitchFunction(num_grids)
        self.spline_linear = _SplineLinear(input_dim * num_grids, output_dim)
        nn.init.xavier_uniform_(self.spline_linear.weight)

    def forward(self, x):
        return self.spline_linear(self.rbf(self.layernorm(x)).view(x.shape[0], -1))


class ChebyKANLayer(nn.Module):
    """Stands for ChebyKAN's ChebyKANLayer, which flattens the leading dimensions of its input."""

    def __init__(self, input_dim, output_dim, degree):
        super().__init__()
        self.inputdim, self.outdim, self.degree = input_dim, output_dim, degree
        self.cheby_coeffs = nn.Parameter(torch.empty(input_dim, output_dim, degree + 1))
        nn.init.normal_(self.cheby_coeffs, std=1 / (input_dim * (degree + 1)))
        self.register_buffer("arange", torch.arange(degree + 1))

    def forward(self, x):
        angle = torch.acos(torch.tanh(x.reshape(-1, self.inputdim, 1)))
        return torch.einsum("bid,iod->bo", torch.cos(self.arange * angle), self.cheby_coeffs)


def sum_harmonics(x, coefficients):
    """Cosines and sines of x (..., I), whose coefficients are (2, O, I, K)."""
    cosine, sine = coefficients
    angle = x[..., None, :, None] * torch.arange(1, cosine.shape[-1] + 1, device=x.device)
    return (angle.cos() * cosine + angle.sin() * sine).sum((-2, -1))


class NaiveFourierKANLayer(nn.Module):
    """Stands for FourierKAN's NaiveFourierKANLayer, which sums over all edges without a matrix product."""

    def __init__(self, inputdim, outdim, gridsize):
        super().__init__()
        self.inputdim, self.outdim, self.gridsize = inputdim, outdim, gridsize
        self.fouriercoeffs = nn.Parameter(torch.randn(2, outdim, inputdim, gridsize) / math.sqrt(inputdim * gridsize))
        self.bias = nn.Parameter(torch.zeros(1, outdim))

    def forward(self, x):
        return sum_harmonics(x, self.fouriercoeffs) + self.bias


class PhysicsNeMoFourierLayer(nn.Module):
    """Stands for PhysicsNeMo's physicsnemo.nn.KolmogorovArnoldNetwork, which is one layer."""

    def __init__(self, input_dim, output_dim, num_harmonics=5):
        super().__init__()
        self.input_dim, self.output_dim = input_dim, output_dim
        self.num_harmonics = num_harmonics
        scale = math.sqrt(input_dim * num_harmonics)
        self.fourier_coeffs = nn.Parameter(torch.randn(2, output_dim, input_dim, num_harmonics) / scale)
        self.bias = nn.Parameter(torch.zeros(1, output_dim))

    def forward(self, x):
        return sum_harmonics(x, self.fourier_coeffs) + self.bias


class KanxKANLinear(nn.Module):
    """Stands for kanx's kanx.torch.layers.KANLinear, whose grid is extended at each call."""

    def __init__(self, in_features, out_features, grid_size=5, spline_order=3):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order, self.num_basis = grid_size, spline_order, grid_size + spline_order
        self.base_activation = F.silu
        self.base_weight = nn.Parameter(torch.empty(in_features, out_features))
        nn.init.xavier_uniform_(self.base_weight)
        self.spline_weight = nn.Parameter(torch.randn(in_features, out_features, self.num_basis) * 0.1)
        self.register_buffer("grid", torch.linspace(-1, 1, grid_size + 1).repeat(in_features, 1))

    def _extended_grid(self):
        first, last = self.grid[:, :1], self.grid[:, -1:]
        offsets = torch.arange(1, self.spline_order + 1).to(self.grid) * (last - first) / self.grid_size
        return torch.cat([first - offsets.flip(1), self.grid, last + offsets], dim=1)

    def forward(self, x):
        basis = b_splines(x, self._extended_grid(), self.spline_order)
        return self.base_activation(x) @ self.base_weight + torch.einsum("bik,iok->bo", basis, self.spline_weight)

    @torch.no_grad()
    def update_grid_from_samples(self, x):
        """Moves the grid to the quantiles of the samples; a new buffer, and no refit."""
        levels = torch.linspace(0, 1, self.grid_size + 1, dtype=x.dtype, device=x.device)
        self.register_buffer("grid", torch.quantile(x, levels, dim=0).T)


class VectorizedSpline(nn.Module):
    """Stands for PINA's VectorizedSpline, the child `spline` of its KANBlock; `order` is the degree plus one."""

    def __init__(self, order, knots, control_points):
        super().__init__()
        self.order = order
        self.register_buffer("_knots", knots.sort(dim=-1).values)
        intervals = torch.arange(knots.shape[1] - 1)
        self.register_buffer("_boundary_interval_idx", torch.where(self._knots.diff() > 0, intervals, 0).amax(1))
        self._control_points = nn.Parameter(control_points)

    @property
    def knots(self):
        return self._knots

    def basis(self, x):
        return b_splines(x.to(self.knots.dtype), self.knots, self.order - 1, self._boundary_interval_idx)

    def forward(self, x):
        return torch.einsum("bsc,soc->bso", self.basis(x), self._control_points)


class PINAKANBlock(nn.Module):
    """Stands for PINA's pina.model.block.KANBlock: the coefficients are a property of a child, over clamped knots."""

    def __init__(
        self,
        input_dimensions,
        output_dimensions,
        spline_order=3,
        n_knots=10,
        grid_range=(0.0, 1.0),
    ):
        super().__init__()
        low, high = (torch.full((spline_order,), float(end)) for end in grid_range)
        inner = torch.linspace(*grid_range, max(0, n_knots - 2 * spline_order) + 2)[1:-1]
        knots = torch.cat([low, inner, high]).repeat(input_dimensions, 1)
        shape = (input_dimensions, output_dimensions, knots.shape[1] - spline_order)
        self.spline = VectorizedSpline(spline_order, knots, torch.randn(shape) * 1e-2)
        self.base_function = nn.SiLU()
        self.base_weight = nn.Parameter(torch.randn(output_dimensions, input_dimensions) / math.sqrt(input_dimensions))
        self.bias = nn.Parameter(torch.zeros(output_dimensions))

    def forward(self, x):
        y = self.spline(x) + torch.einsum("bi,oi->bio", self.base_function(x), self.base_weight)
        return y.sum(dim=1) + self.bias


# Layers of public repositories that are of no known kind


class FixedFunctions(nn.Module):
    """A linear layer on fixed functions of each input: Gaussians, or Chebyshev polynomials, flattened in any order."""

    def __init__(self, inputs, outputs, count=6, inner="i k", functions="gaussians"):
        super().__init__()
        self.count, self.inner, self.functions = count, inner, functions
        self.head = nn.Linear(inputs * count, outputs)

    def forward(self, x):
        if self.functions == "gaussians":
            basis = torch.exp(-((2 * (x[..., None] - torch.linspace(-1, 1, self.count))) ** 2))
        else:
            angle = torch.tanh(x).clamp(-0.999, 0.999).acos()
            basis = torch.cos(angle[..., None] * torch.arange(self.count))
        if self.inner == "k i":
            basis = basis.transpose(-1, -2)
        return self.head(basis.flatten(-2))


class TrainedGaussians(nn.Module):
    """Gaussians whose centers and widths are trained, (basis, in): all outputs share them."""

    def __init__(self, inputs, outputs, count=8):
        super().__init__()
        self.centers = nn.Parameter(torch.linspace(-1, 1, count)[:, None].repeat(1, inputs))
        self.log_width = nn.Parameter(0.1 * torch.randn(count, inputs))
        self.coefficients = nn.Parameter(torch.randn(outputs, inputs, count))

    def forward(self, x):
        basis = torch.exp(-((2 * (x[:, None] - self.centers) * self.log_width.exp()) ** 2))
        return torch.einsum("bki,oik->bo", basis, self.coefficients)


def imported(path, **options):
    """Return a builder of layers of a class, by its dotted name, which is imported when a layer is made."""

    def make(*sizes, **others):
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)(*sizes, **options, **others)

    return make


def _fast_kan(in_features, out_features):
    return FastKANLayer(in_features, out_features, use_layernorm=in_features > 1)


# (in_features, out_features) -> layer
LAYER_KINDS = {
    "own": imported("peft_lotra.kan.KANLinear"),
    "efficient-kan": imported("qkan.kan.KANLinear"),
    "efficient-kan-no-scaler": imported("qkan.kan.KANLinear", enable_standalone_scale_spline=False),
    "efficient-kan-old": OldEfficientKANLayer,
    "pykan": imported("kan.KANLayer.KANLayer", device="cpu"),
    "fast-kan": _fast_kan,
    "faster-kan": FasterKANLayer,
    "cheby-kan": partial(ChebyKANLayer, degree=4),
    "fourier-kan": partial(NaiveFourierKANLayer, gridsize=4),
    "physicsnemo": PhysicsNeMoFourierLayer,
    "flashkan": imported("flashkan.KANLayer"),
    "inkan": imported("inkan.KANLayer", compile_basis=False),
    "kanx": KanxKANLinear,
    "pina": partial(PINAKANBlock, grid_range=(-1.0, 1.0)),
}


class Single(nn.Module):
    """A model of one KAN layer, `kan`, that returns a tensor even where the layer returns a tuple, as pykan's does."""

    def __init__(self, layer):
        super().__init__()
        self.kan = layer

    def forward(self, x):
        y = self.kan(x)
        return y[0] if isinstance(y, tuple) else y


as_model = Single


# Convolutional layers of torch-conv-kan, which no package on PyPI has. With groups, inputs and outputs are split into
# blocks, and each block has its own parameters.


class _ConvKAN(nn.Module):
    """What the kinds share: the sizes, and one block after the other."""

    def __init__(self, input_dim, output_dim, kernel_size, groups=1, padding=0, ndim=2):
        super().__init__()
        self.inputdim, self.outdim, self.kernel_size, self.ndim = input_dim, output_dim, kernel_size, ndim
        self.groups, self.padding = groups, padding
        self.layer_norm = self.norms(output_dim)

    def norms(self, channels):
        """One norm for each block."""
        cls = getattr(nn, f"InstanceNorm{self.ndim}d")
        return nn.ModuleList([cls(channels // self.groups) for _ in range(self.groups)])

    def convolutions(self, functions=1):
        """One convolution for each block, of `functions` channels for each input."""
        inputs, outputs = functions * self.inputdim // self.groups, self.outdim // self.groups
        cls, sizes = getattr(nn, f"Conv{self.ndim}d"), {"padding": self.padding, "bias": False}
        return nn.ModuleList([cls(inputs, outputs, self.kernel_size, **sizes) for _ in range(self.groups)])

    def forward(self, x):
        return torch.cat([self.block(part, group) for group, part in enumerate(x.chunk(self.groups, dim=1))], dim=1)


class _PolynomialConv(_ConvKAN):
    """`poly_weights` (g, O/g, (K I/g), k, ...), the degrees outside."""

    def __init__(self, *args, degree=3, **kwargs):
        super().__init__(*args, **kwargs)
        self.degree = degree
        self.base_activation = nn.SiLU()
        self.base_conv = self.convolutions()
        inputs, kernel = self.inputdim // self.groups * (degree + 1), [self.kernel_size] * self.ndim
        shape = (self.groups, self.outdim // self.groups, inputs, *kernel)
        self.poly_weights = nn.Parameter(torch.randn(shape) / (inputs * math.prod(kernel)) ** 0.5)

    def block(self, x, group):
        base = self.base_conv[group](self.base_activation(x))
        convolve = getattr(F, f"conv{self.ndim}d")
        y = convolve(self.polynomials(x), self.poly_weights[group], padding=self.padding)
        return self.base_activation(self.layer_norm[group](base + y))


class KAGNConvNDLayer(_PolynomialConv):
    """Gram polynomials of tanh(x), whose recurrence has the trained `beta_weights` (K)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta_weights = nn.Parameter(0.1 * torch.randn(self.degree + 1))

    def polynomials(self, x):
        x = torch.tanh(x)
        found = [torch.ones_like(x), x]
        for m in range(2, self.degree + 1):
            n = m - 1
            beta = (m + n) * (m - n) * n**2 / (m**2 / (4 * n**2 - 1)) * self.beta_weights[n]
            found.append(x * found[-1] - beta * found[-2])
        return self.base_activation(torch.cat(found[: self.degree + 1], dim=1))


class KALNConvNDLayer(_PolynomialConv):
    """Legendre polynomials of x, brought to [-1, 1] by the extremes of the batch."""

    def polynomials(self, x):
        x = 2 * (x - x.min()) / (x.max() - x.min()) - 1
        found = [torch.ones_like(x), x]
        for n in range(2, self.degree + 1):
            found.append(((2 * n - 1) * x * found[-1] - (n - 1) * found[-2]) / n)
        return torch.cat(found[: self.degree + 1], dim=1)


class KACNConvNDLayer(_ConvKAN):
    """Chebyshev polynomials of tanh(x), `poly_conv.N.weight` (O/g, (I/g K), k, ...), the inputs outside; no base."""

    def __init__(self, *args, degree=3, **kwargs):
        super().__init__(*args, **kwargs)
        self.degree = degree
        self.poly_conv = self.convolutions(degree + 1)
        self.register_buffer("arange", torch.arange(degree + 1).view(1, 1, -1, *[1] * self.ndim))

    def block(self, x, group):
        angle = torch.tanh(x).clamp(-1 + 1e-7, 1 - 1e-7).acos().unsqueeze(2)
        polynomials = (angle * self.arange).flatten(1, 2).cos()
        return self.layer_norm[group](self.poly_conv[group](polynomials))


class FastKANConvNDLayer(_ConvKAN):
    """Gaussians of the normalized inputs, `spline_conv.N.weight` (O/g, (I/g K), k, ...), the inputs outside.

    Nothing follows the sum, so that the outputs are linear in the coefficients.
    """

    def __init__(self, *args, grid_size=5, **kwargs):
        super().__init__(*args, **kwargs)
        self.grid_size = grid_size
        self.base_activation = nn.SiLU()
        self.base_conv, self.spline_conv = self.convolutions(), self.convolutions(grid_size)
        self.layer_norm = self.norms(self.inputdim)
        self.rbf = Gaussians(-2, 2, grid_size)

    def block(self, x, group):
        functions = self.rbf(self.layer_norm[group](x)).moveaxis(-1, 2).flatten(1, 2)
        return self.base_conv[group](self.base_activation(x)) + self.spline_conv[group](functions)


class KANConvNDLayer(_ConvKAN):
    """B-splines on one uniform grid, a plain attribute; a PReLU follows the normalized sum."""

    def __init__(self, *args, grid_size=3, **kwargs):
        super().__init__(*args, **kwargs)
        self.grid_size, self.spline_order = grid_size, 3
        self.base_activation = nn.GELU()
        self.base_conv, self.spline_conv = self.convolutions(), self.convolutions(grid_size + self.spline_order)
        self.prelus = nn.ModuleList([nn.PReLU() for _ in range(self.groups)])
        step = 2 / grid_size
        self.grid = torch.linspace(-1 - 3 * step, 1 + 3 * step, grid_size + 7)

    def block(self, x, group):
        base = self.base_conv[group](self.base_activation(x))
        splines = b_splines(x.reshape(-1, 1), self.grid.to(x)[None], self.spline_order).view(*x.shape, -1)
        y = self.spline_conv[group](splines.moveaxis(-1, 2).flatten(1, 2))
        return self.prelus[group](self.layer_norm[group](base + y))


# (in_channels, out_channels, groups, ndim) -> layer
CONVOLUTIONS = {
    cls.__name__.removesuffix("NDLayer").lower(): cls
    for cls in (KAGNConvNDLayer, KALNConvNDLayer, KACNConvNDLayer, FastKANConvNDLayer, KANConvNDLayer)
}


class ConvNet(nn.Module):
    """Two convolutional KAN layers of one kind, and a linear head: images (N, C, 4, ...) to (N, 3)."""

    def __init__(self, kind, channels=4, groups=1, ndim=2, width=6):
        super().__init__()
        make = CONVOLUTIONS[kind]
        self.first = make(channels, width, 3, groups=groups, padding=1, ndim=ndim)
        self.second = make(width, width, 3, groups=groups, padding=1, ndim=ndim)
        self.head = nn.Linear(width * 4**ndim, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x)).flatten(1))
