# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The B-spline basis on a uniform grid, in closed form."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..modules.calls import is_tracing
from ..modules.checks import check_count


_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue] (no stub)
SPLINE_ORDERS = range(1, 6)


class UniformGrid(NamedTuple):
    """The grid of B-splines of degree `spline_order` on `grid_size` equal intervals of [low, high].

    Attributes:
        low, high: Ends of the grid, which broadcast to (I,).
        grid_size: Number G of intervals.
        spline_order: Degree p of the splines, 1 to 5.
    """

    low: torch.Tensor
    high: torch.Tensor
    grid_size: int
    spline_order: int

    @classmethod
    def between(cls, bounds: torch.Tensor, grid_size: int, spline_order: int) -> UniformGrid:
        """The grid with the ends `bounds` (I, 2)."""
        low, high = bounds.unbind(-1)
        return cls(low, high, grid_size, spline_order)

    @property
    def num_basis(self) -> int:
        """Number K = G + p of basis functions."""
        return self.grid_size + self.spline_order

    @property
    def per_unit(self) -> torch.Tensor:
        """Grid intervals per unit of the inputs."""
        return self.grid_size / (self.high - self.low)


def check_grid(grid_size: int, spline_order: int) -> None:
    """Raises a `ValueError` unless a grid of `grid_size` intervals can carry splines of this order."""
    check_count(grid_size, "grid_size")
    if check_count(spline_order, "spline_order") not in SPLINE_ORDERS:
        raise ValueError(f"`spline_order` is {spline_order}, but must be from 1 (piecewise linear) to 5; 3 is cubic.")


def check_input(x: object, in_features: int, layer: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
    """Raise a `TypeError` unless `x` is a floating point tensor, a `ValueError` for another shape or dtype."""
    name = type(layer).__name__
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = getattr(x, "dtype", type(x))
        raise TypeError(f"The input is of {kind}, but {name} takes a floating point tensor (..., {in_features}).")
    if x.shape[-1:] != (in_features,):
        raise ValueError(
            f"The input has shape {tuple(x.shape)}, but {name} expects a last dimension of {in_features} "
            "(`in_features`)."
        )
    if dtype is not None and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"The input is of {x.dtype}, but {name} has parameters of {dtype}: cast one of them, by `x.to({dtype})` "
            f"or `model.to({x.dtype})`."
        )


def bspline_basis(
    x: torch.Tensor,
    low: torch.Tensor | float,
    high: torch.Tensor | float,
    grid_size: int,
    spline_order: int,
    derivative: int = 0,
) -> torch.Tensor:
    r"""Evaluate the B-splines of a uniform grid at the points `x`, or their derivatives.

    They are of degree p = `spline_order` on G = `grid_size` equal intervals of [low, high]. With spacing
    h = (high - low) / G, basis function j = 0 ... G+p-1 is the cardinal B-spline centered on
    c_j = low + (j - (p-1)/2) h, with support c_j +- h (p+1)/2. It is evaluated in truncated powers of the distance
    s = |x - c_j| / h to the nearer end of its support,

        M_p(s) = 1/p! sum_{m <= p/2} (-1)^m binom(p+1, m) max((p+1)/2 - m - s, 0)^p,

    whose arguments never exceed (p+1)/2, and float32 loses no digits. On [low, high] the basis sums to 1.
    Outside its support a basis function, and each derivative of it, is exactly 0. The d-th derivative has the powers
    p - d, the factor p! / (p - d)! / h^d, and for odd d the sign of c_j - x. At a knot, the p-th derivative is 0 in
    the parts that jump.

    Differentiable any number of times; runs under `torch.func` and `torch.compile(fullgraph=True)`.

    Args:
        x: Points, shape (..., I), of a floating point dtype. NaN gives NaN; an infinity is outside every support, and
            gives zeros with zero gradients.
        low, high: Ends of the grid, numbers or tensors that broadcast to (I,).
        grid_size: Number G of intervals between `low` and `high`.
        spline_order: Degree p of the splines, 1 to 5.
        derivative: Order d of the derivative, from 0 (the values).

    Returns:
        Tensor of shape (..., I, G + p) and of the dtype of `x`. float16 and bfloat16 are evaluated in float32.

    Raises:
        ValueError: `grid_size`, `spline_order` or `derivative` is out of range.
        TypeError: `x` is not floating point.

    Source: I. J. Schoenberg, "Contributions to the problem of approximation of equidistant data by analytic
    functions", Quart. Appl. Math. 4 (1946), with the symmetry M_p(-s) = M_p(s).

    Example:
        >>> import torch
        >>> from peft_lotra.kan import bspline_basis
        >>> bspline_basis(torch.tensor([0.25]), 0, 1, grid_size=2, spline_order=1)
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    check_grid(grid_size, spline_order)
    check_count(derivative, "derivative", low=0)
    if not x.is_floating_point():
        raise TypeError(f"`x` has dtype {x.dtype}, but the basis needs floating point values; convert it first.")
    # A half-precision coordinate would cost more accuracy than half-precision values do.
    dtype = torch.promote_types(x.dtype, torch.float32)
    low, high = (torch.as_tensor(end, dtype=dtype, device=x.device) for end in (low, high))
    per_unit = grid_size / (high - low)
    centers = torch.arange(grid_size + spline_order, dtype=dtype, device=x.device) - (spline_order - 1) / 2
    position = ((x.to(dtype) - low) * per_unit).clamp(-spline_order - 1, grid_size + spline_order + 1)  # finite
    offset = position.unsqueeze(-1) - centers
    values = cardinal_spline(offset, spline_order, derivative)
    if derivative:
        values = values * per_unit.unsqueeze(-1) ** derivative
    return values.to(x.dtype)


def in_transform() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return not is_tracing() and _functorch.peek_interpreter_stack() is not None


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether the tensor belongs to `is_grads_batched` of `torch.autograd.grad`, and cannot be written into."""
    return _functorch.is_legacy_batchedtensor(tensor)


def cardinal_spline(offset: torch.Tensor, spline_order: int, derivative: int = 0) -> torch.Tensor:
    """The cardinal spline M_p of `bspline_basis`, or its derivative, at offsets (any shape) from the center."""
    power = spline_order - derivative
    if power < 0:
        return torch.zeros_like(offset)
    # not `abs`, to which autograd gives the slope 0 at the center: the second derivative needs that of one side
    distance = torch.sub(offset, offset.relu(), alpha=2) + (spline_order + 1) / 2
    total = None
    for factor in spline_factors(spline_order):
        distance = (distance if total is None else distance - 1).relu()
        term = distance.pow(power) if power else (distance > 0).to(distance.dtype)
        share = factor / math.factorial(power)
        total = term * share if total is None else total.add(term, alpha=share)
    assert total is not None
    if derivative % 2 == 0:
        return total
    return -total * (torch.ones_like(offset).copysign(offset) if power else offset.sign())


def spline_factors(spline_order: int) -> list[int]:
    """(-1)^m binom(p+1, m) for m = 0 ... p/2, the factors of the truncated powers."""
    return [(-1) ** m * math.comb(spline_order + 1, m) for m in range(spline_order // 2 + 1)]


@lru_cache(maxsize=64)
def spline_pieces(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The B-splines in a grid interval as polynomials in the distance from the start of the interval, and their
    first five derivatives: (6, p + 1, p + 1), powers ascending, the spline that begins first in row 0."""
    with torch.inference_mode(False):
        start = (order - 1) / 2 - torch.arange(order + 1, dtype=torch.float64, device="cpu")
        points = [start] * order + [start + 0.5]  # the last derivative jumps at the start
        derivatives = [
            torch.stack([cardinal_spline(x, order, q) / math.factorial(q) for q, x in enumerate(points)], -1)
        ]
        for _ in range(5):
            lower = derivatives[-1] * torch.arange(order + 1, dtype=torch.float64, device="cpu")
            derivatives.append(F.pad(lower[:, 1:], (0, 1)))
        return torch.stack(derivatives).to(device, dtype)


def integer_power(x: torch.Tensor, n: int, out: torch.Tensor) -> torch.Tensor:
    """x^n for x >= 0, where 0^0 is 0, written into `out`, which may be `x`."""
    if n == 0:
        return torch.sign(x, out=out)
    if n <= 3:  # the exponents that torch.pow is fast for
        return torch.pow(x, n, out=out)
    if n == 4:
        return torch.square(x, out=out).square_()
    return torch.mul(x, x.square().square_(), out=out)


def silu_derivatives(x: torch.Tensor, highest: int) -> list[torch.Tensor]:
    """silu and its derivatives up to the order `highest`."""
    return times_argument(x, logistic_derivatives(torch.sigmoid(x), highest))


def logistic_derivatives(y: torch.Tensor, highest: int, of_tanh: bool = False) -> list[torch.Tensor]:
    """The values y of the sigmoid, y' = y - y^2, or of tanh, y' = 1 - y^2, and the derivatives up to an order."""
    derivatives = [y]
    for n in range(highest):
        total = torch.full_like(y, float(n == 0)) if of_tanh else derivatives[n]
        for k in range(n // 2 + 1):  # of the sum of binom(n, k) y^(k) y^(n-k), which is symmetric
            factor = math.comb(n, k) * (1 if 2 * k == n else 2)
            total = torch.addcmul(total, derivatives[k], derivatives[n - k], value=-factor)
        derivatives.append(total)
    return derivatives


def times_argument(x: torch.Tensor, functions: list[torch.Tensor]) -> list[torch.Tensor]:
    """x f(x) and its derivatives, from the derivatives of f."""
    pairs = zip(functions, functions[1:], strict=False)
    return [x * functions[0], *(torch.addcmul(f * n if n > 1 else f, x, df) for n, (f, df) in enumerate(pairs, 1))]


def change_of_basis(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Old basis functions as combinations of new ones, by least squares: (I, K', K).

    Args:
        new, old: Values of the new and the old functions at the same points, (N, I, K') and (N, I, K), multiplied by
            the square roots of the points' weights.
    """
    return torch.linalg.lstsq(new.transpose(0, 1), old.transpose(0, 1)).solution


def spread_points(
    samples: torch.Tensor, low: torch.Tensor, high: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples (N, I) and `count` points spread over [low, high]; the roots of their weights (N + count, 1, 1).

    The points that are spread have a hundredth of the weight of the samples: enough to settle coefficients where no
    sample lies, too little to disturb a fit elsewhere.
    """
    spread = torch.linspace(0, 1, count, dtype=samples.dtype, device=samples.device)[:, None]
    weight = samples.new_ones(len(samples) + count, 1, 1)
    weight[len(samples) :] = math.sqrt(0.01 * len(samples) / count)
    return torch.cat([samples, torch.lerp(low, high, spread)]), weight


def moments(grid_range: tuple[float, float], grid_size: int, spline_order: int) -> tuple[float, torch.Tensor]:
    """The variance of the uniform law on `grid_range`, and E[f_j(x) f_k(x)] of the B-splines and of silu,
    (K + 1, K + 1), for x normal with the mean and the variance of that law, by quadrature in float64 on the CPU."""
    low, high = grid_range
    variance = (high - low) ** 2 / 12
    z = torch.linspace(-6, 6, 1025, dtype=torch.float64, device="cpu")
    probability = torch.softmax(-(z**2) / 2, dim=0)
    x = (low + high) / 2 + variance**0.5 * z
    basis = bspline_basis(x, low, high, grid_size, spline_order)
    functions = torch.cat([basis, F.silu(x).unsqueeze(-1)], dim=-1)
    return variance, (functions.T * probability) @ functions
