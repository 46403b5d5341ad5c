# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The B-spline basis on a uniform grid, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

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

    low: Tensor
    high: Tensor
    grid_size: int
    spline_order: int

    @classmethod
    def between(
        cls,
        bounds: Tensor,
        grid_size: int,
        spline_order: int,
    ) -> UniformGrid:
        """Return the grids with the ends `bounds` (I, 2)."""
        low, high = bounds.unbind(-1)
        return cls(low, high, grid_size, spline_order)

    @property
    def num_basis(self) -> int:
        """Number K = G + p of basis functions."""
        return self.grid_size + self.spline_order

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The tensors that the functions depend on."""
        return self.low, self.high

    @property
    def per_unit(self) -> Tensor:
        """Grid intervals per unit of the inputs."""
        return self.grid_size / (self.high - self.low)

    def positions(self, x: Tensor) -> Tensor:
        """Return the distances of points (..., I) from `low` in grid intervals, bounded to be finite.

        They are in float32 at least: a half-precision coordinate would cost more accuracy than half-precision values.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        distance = x.to(dtype) - self.low.to(dtype)
        position = distance * self.per_unit.to(dtype)
        margin = self.spline_order + 1
        return position.clamp(-margin, self.grid_size + margin)

    def functions(self, x: Tensor, derivative: int = 0) -> Tensor:
        """Return the basis functions at points (..., I), or their derivatives: (..., I, K), see `bspline_basis`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        grid = self._replace(low=self.low.to(dtype), high=self.high.to(dtype))
        position = grid.positions(x)
        offset = position.unsqueeze(-1) - grid.centers(position)
        values = cardinal_spline(offset, self.spline_order, derivative, overwrites=True)
        if derivative:
            values = values * grid.per_unit.unsqueeze(-1) ** derivative
        return values.to(x.dtype)

    def centers(self, like: Tensor) -> Tensor:
        """Return the centers (K,) of the basis functions as positions, in the dtype of `like`."""
        numbers = torch.arange(self.num_basis, dtype=like.dtype, device=like.device)
        return numbers - (self.spline_order - 1) / 2


def check_grid(grid_size: int, spline_order: int) -> None:
    """Raise a `ValueError` unless a grid of `grid_size` intervals can have splines of this order."""
    check_count(grid_size, "grid_size")
    if check_count(spline_order, "spline_order") not in SPLINE_ORDERS:
        raise ValueError(f"`spline_order` is {spline_order}, but must be from 1 (piecewise linear) to 5; 3 is cubic.")


def check_input(
    x: Any,
    in_features: int,
    layer: torch.nn.Module,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise a `TypeError` unless `x` is a floating point tensor, a `ValueError` for another shape or dtype."""
    name = type(layer).__name__
    is_tensor = isinstance(x, Tensor)
    if not is_tensor or not x.is_floating_point():
        kind = x.dtype if is_tensor else type(x)
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
    x: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    grid_size: int,
    spline_order: int,
    derivative: int = 0,
) -> Tensor:
    r"""Evaluate the B-splines of a uniform grid at the points `x`, or their derivatives.

    They are of degree p = `spline_order` on G = `grid_size` equal intervals of [low, high]. With spacing
    h = (high - low) / G, basis function j = 0 ... G+p-1 is the cardinal B-spline centered on
    c_j = low + (j - (p-1)/2) h, with support c_j +- h (p+1)/2. It is evaluated in truncated powers of the distance
    s = |x - c_j| / h to the nearer end of its support,

        M_p(s) = 1/p! sum_{m <= p/2} (-1)^m binom(p+1, m) max((p+1)/2 - m - s, 0)^p,

    whose arguments never exceed (p+1)/2, so that no digits are lost in float32. On [low, high] the basis sums to 1.
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
    dtype = torch.promote_types(x.dtype, torch.float32)
    low = torch.as_tensor(low, dtype=dtype, device=x.device)
    high = torch.as_tensor(high, dtype=dtype, device=x.device)
    return UniformGrid(low, high, grid_size, spline_order).functions(x, derivative)


def in_transform() -> bool:
    """Return whether a transform of `torch.func` is at work. Ask `is_tracing` first: compilers cannot trace this."""
    return _functorch.peek_interpreter_stack() is not None


def is_batched(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to `is_grads_batched` of `torch.autograd.grad`, and cannot be written into."""
    return _functorch.is_legacy_batchedtensor(tensor)


def spline_offsets(position: Tensor, grid: UniformGrid) -> Tensor:
    """Return the offsets (N, K, I) of positions (N, I) from the centers of the basis functions.

    The evaluation takes less time in this order.
    """
    return position.unsqueeze(1) - grid.centers(position).unsqueeze(1)


def cardinal_spline(
    offset: Tensor,
    spline_order: int,
    derivative: int = 0,
    overwrites: bool = False,
) -> Tensor:
    """Evaluate the cardinal spline M_p of `bspline_basis`, or its derivative, at offsets from its center.

    Offsets that need no gradient may be overwritten, which saves memory.
    """
    power = spline_order - derivative
    if power < 0:
        return torch.zeros_like(offset)
    is_traced = is_tracing() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if is_traced or in_transform() or forward_ad.unpack_dual(offset).tangent is not None:
        total = _evaluate_differentiably(offset, spline_order, derivative)
    elif offset.requires_grad:
        return _CardinalSpline.apply(offset, spline_order, derivative)
    else:
        (total,) = evaluate_splines(offset, spline_order, [derivative], overwrites)
    return total.mul_(_factor(spline_order, derivative))


def _factor(spline_order: int, derivative: int) -> float:
    """Return the factor that `evaluate_splines` leaves out."""
    return (-1) ** derivative / math.factorial(spline_order - derivative)


def _evaluate_differentiably(offset: Tensor, spline_order: int, derivative: int) -> Tensor:
    """Compute one result of `evaluate_splines` by operations that transforms and compilers differentiate."""
    # not `abs`, to which torch gives the slope 0 at the center: the second derivative needs that of one side
    minus_distance = torch.sub(offset, offset.relu(), alpha=2)
    half_width = (spline_order + 1) / 2
    distances = _distances_to_ends(minus_distance + half_width, spline_order)
    power = spline_order - derivative
    total = _sum_powers(distances, spline_order, power)
    if derivative % 2 == 0:
        return total
    if power == 0:
        return total * offset.sign()
    one = torch.ones((), dtype=offset.dtype, device=offset.device)
    return total * one.copysign(offset)


class _CardinalSpline(torch.autograd.Function):
    """A derivative of the cardinal spline, whose backward pass evaluates the next derivative."""

    @staticmethod
    def forward(
        ctx,
        offset,
        spline_order,
        derivative,
    ):
        ctx.save_for_backward(offset)
        ctx.arguments = spline_order, derivative
        (total,) = evaluate_splines(offset, spline_order, [derivative])
        return total.mul_(_factor(spline_order, derivative))

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride] (torch declares *grad_outputs)
        (offset,) = ctx.saved_tensors
        spline_order, derivative = ctx.arguments
        slope = cardinal_spline(offset, spline_order, derivative + 1)
        return gradient * slope, None, None


def evaluate_splines(
    offset: Tensor,
    spline_order: int,
    derivatives: Sequence[int],
    overwrites: bool = False,
) -> list[Tensor]:
    """Evaluate derivatives of the cardinal spline, each of order d times (-1)^d (p - d)!, without gradients.

    The factors would cost further passes over memory. If it may overwrite the offsets and no derivative is odd, the
    last result is in their memory.
    """
    has_odd = any(derivative % 2 for derivative in derivatives)
    memory = offset if overwrites else None
    distance = torch.abs(offset, out=None if has_odd else memory)
    half_width = torch.tensor((spline_order + 1) / 2, dtype=offset.dtype, device=offset.device)
    torch.sub(half_width, distance, out=distance)
    distances = _distances_to_ends(distance, spline_order)

    results = []
    last = len(derivatives) - 1
    for number, derivative in enumerate(derivatives):
        power = spline_order - derivative
        total = _sum_powers(distances, spline_order, power, overwrites=number == last)
        if derivative % 2:
            total.mul_(torch.sign(offset, out=memory))
        results.append(total)
    return results


def _distances_to_ends(distance: Tensor, spline_order: int) -> list[Tensor]:
    """Return the arguments of the truncated powers, given the distance to the nearer end of the support."""
    distances = [distance.relu_()]
    for _ in range(spline_order // 2):
        following = distances[-1] - 1
        distances.append(following.relu_())
    return distances


def _sum_powers(
    distances: Sequence[Tensor],
    spline_order: int,
    power: int,
    overwrites: bool = False,
) -> Tensor:
    """Return sum_m (-1)^m binom(p+1, m) distances[m]^power, for p = `spline_order`."""
    powers = []
    for distance in distances:
        memory = distance if overwrites else None
        powers.append(_integer_power(distance, power, out=memory))
    total, *terms = powers
    for m, term in enumerate(terms, 1):
        factor = (-1) ** m * math.comb(spline_order + 1, m)
        total.add_(term, alpha=factor)
    return total


def _integer_power(x: Tensor, n: int, out: Tensor | None) -> Tensor:
    """Return x^n for x >= 0, where 0^0 is 0, in the memory of `out` if given."""
    if n == 0:
        return torch.sign(x, out=out)
    if n <= 3:  # the exponents that torch.pow is fast for
        return torch.pow(x, n, out=out)
    square = x.square()
    if n == 4:
        return torch.square(square, out=out)
    return torch.mul(x, square.square(), out=out)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def spline_pieces(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the B-splines in a grid interval as polynomials in the distance from its start, and five derivatives.

    Returns:
        (6, p + 1, p + 1), powers ascending, with the spline that begins first in row 0.
    """
    powers = torch.arange(order + 1, dtype=torch.float64, device="cpu")
    start = (order - 1) / 2 - powers
    coefficients = []
    for power in range(order + 1):
        point = start + 0.5 if power == order else start  # the last derivative jumps at the start
        derivative = cardinal_spline(point, order, power)
        coefficients.append(derivative / math.factorial(power))

    polynomials = [torch.stack(coefficients, -1)]
    for _ in range(5):
        multiplied = polynomials[-1] * powers
        derivative = F.pad(multiplied[:, 1:], (0, 1))
        polynomials.append(derivative)
    return torch.stack(polynomials).to(device, dtype)


def silu_derivatives(x: Tensor, highest: int) -> list[Tensor]:
    """Return silu and its derivatives up to the order `highest`."""
    sigmoids = logistic_derivatives(torch.sigmoid, x, highest)
    derivatives = [x * sigmoids[0]]
    for n in range(1, highest + 1):
        # the n-th derivative of x f(x) is n f^(n-1) + x f^(n)
        derivatives.append(torch.add(x * sigmoids[n], sigmoids[n - 1], alpha=n))
    return derivatives


def logistic_derivatives(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    highest: int,
) -> list[Tensor]:
    """Return the values of `torch.sigmoid`, y' = y - y^2, or `torch.tanh`, y' = 1 - y^2, and their derivatives."""
    derivatives = [function(x)]
    for n in range(highest):
        total = derivatives[n]
        if function is torch.tanh:
            total = torch.full_like(x, float(n == 0))
        # the sum of binom(n, k) y^(k) y^(n-k) is symmetric
        for k in range(n // 2 + 1):
            factor = math.comb(n, k)
            if 2 * k < n:
                factor *= 2
            total = torch.addcmul(total, derivatives[k], derivatives[n - k], value=-factor)
        derivatives.append(total)
    return derivatives


def change_of_basis(new: Tensor, old: Tensor) -> Tensor:
    """Return old basis functions as combinations of new ones by least squares, (I, K', K).

    Args:
        new, old: Values of the new and the old functions at the same points, (N, I, K') and (N, I, K), multiplied by
            the square roots of the points' weights.
    """
    matrices = new.transpose(0, 1)
    targets = old.transpose(0, 1)
    return torch.linalg.lstsq(matrices, targets).solution


def spread_points(
    samples: Tensor,
    low: Tensor,
    high: Tensor,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Return samples (N, I) and `count` points spread over [low, high]; the roots of their weights (N + count, 1, 1).

    The spread points have a hundredth of the weight of the samples: enough to determine coefficients where no sample
    lies, too little to disturb a fit elsewhere.
    """
    fractions = torch.linspace(0, 1, count, dtype=samples.dtype, device=samples.device)
    spread = torch.lerp(low, high, fractions[:, None])
    points = torch.cat([samples, spread])
    weight = points.new_ones(len(points), 1, 1)
    weight[len(samples) :] = math.sqrt(0.01 * len(samples) / count)
    return points, weight


def moments(
    grid_range: tuple[float, float],
    grid_size: int,
    spline_order: int,
) -> tuple[float, Tensor]:
    """Return the variance of the uniform law on `grid_range`, and E[f_j(x) f_k(x)] (K + 1, K + 1).

    The f are the B-splines and silu, and x is normal with the mean and the variance of that law. The expectations are
    computed by quadrature, in float64 on the CPU.
    """
    low, high = grid_range
    variance = (high - low) ** 2 / 12
    z = torch.linspace(-6, 6, 1025, dtype=torch.float64, device="cpu")
    probability = torch.softmax(-(z**2) / 2, dim=0)
    x = (low + high) / 2 + variance**0.5 * z

    basis = bspline_basis(x, low, high, grid_size, spline_order)
    silu = F.silu(x).unsqueeze(-1)
    functions = torch.cat([basis, silu], dim=-1)
    products = (functions.T * probability) @ functions
    return variance, products
