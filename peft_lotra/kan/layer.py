# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A Kolmogorov-Arnold layer with B-splines on a uniform grid."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import einsum
from torch import Tensor, nn

from ..modules.checks import as_number, check_count
from .basis import UniformGrid, bspline_basis, change_of_basis, check_grid, check_input, moments, spread_points
from .formula import LayerFormula
from .update_product import compute_output


# Share of the variance of a new layer's output that comes from its splines; see `KANLinear.reset_parameters`.
SPLINE_VARIANCE_SHARE = 0.1


class SplineLayer(nn.Module):
    """The sizes and grids of a KAN layer, dense or Slim. Arguments as for `KANLinear`."""

    grid_bounds: Tensor
    spline_weight: Tensor
    base_weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int,
        spline_order: int,
        grid_range: tuple[float, float],
        device,
        dtype,
    ) -> None:
        check_grid(grid_size, spline_order)
        low, high = grid_range
        if not as_number(low) < as_number(high):
            raise ValueError(f"`grid_range` is {grid_range!r}, but must be two finite numbers, the lower one first.")
        super().__init__()
        self.in_features = check_count(in_features, "in_features")
        self.out_features = check_count(out_features, "out_features")
        self.grid_size = grid_size
        self.spline_order = spline_order
        self.grid_range: tuple[float, float] = (low, high)
        bounds = torch.empty(in_features, 2, device=device, dtype=dtype)
        self.register_buffer("grid_bounds", bounds)

    def reset_parameters(self) -> None:
        """Reset the grids to `grid_range`."""
        ends = torch.tensor(self.grid_range, dtype=torch.float64, device="cpu")
        self.grid_bounds.copy_(ends)

    @property
    def grid(self) -> UniformGrid:
        """The grids, as the buffer `grid_bounds` holds them."""
        return UniformGrid.between(self.grid_bounds, self.grid_size, self.spline_order)

    @property
    def formula(self) -> LayerFormula:
        """The formula of the layer with its current parameters."""
        return LayerFormula(self.grid, self.spline_weight, self.base_weight)

    def basis(self, x: Tensor) -> Tensor:
        """The basis functions at `x`: (..., I) to (..., I, grid_size + spline_order), see `bspline_basis`."""
        check_input(x, self.in_features, self)
        return bspline_basis(x, *self.grid)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, grid_size={self.grid_size}, "
            f"spline_order={self.spline_order}, grid_range={self.grid_range}"
        )


class KANLinear(SplineLayer):
    r"""One layer of a KAN: a learnable function on each edge from input i to output o,

        y[o] = sum_i base_weight[o, i] silu(x[i]) + sum_{i,k} spline_weight[o, i, k] B_k(x[i]),

    where the B_k are the `grid_size + spline_order` B-splines of a uniform grid, one for each input. Outside its grid
    (and `spline_order` intervals beyond), an edge has its base branch only.

    Args:
        in_features, out_features: Sizes I and O of the last dimension of input and output.
        grid_size: Number of intervals of each grid.
        spline_order: Degree of the splines, 1 to 5.
        grid_range: Ends of the grids of a new layer.
        device, dtype: As for `torch.nn.Linear`.

    Attributes:
        spline_weight: Parameter (O, I, grid_size + spline_order), the coefficient tensor.
        base_weight: Parameter (O, I), the base branch.
        grid_bounds: Buffer (I, 2), lower and upper end of each input's grid. It is part of the state,
            since it gives the coefficients their meaning.

    Raises:
        ValueError: A size, the order or the range cannot be used.

    Source: Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv 2404.19756, eqs. (2.10) to (2.12), without the
    redundant scale of the splines.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KANLinear
        >>> KANLinear(2, 3)(torch.rand(10, 2)).shape
        torch.Size([10, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1, 1),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, grid_size, spline_order, grid_range, device, dtype)
        shape = (out_features, in_features, self.grid.num_basis)
        spline_weight = torch.empty(shape, device=device, dtype=dtype)
        base_weight = torch.empty(shape[:2], device=device, dtype=dtype)
        self.spline_weight = nn.Parameter(spline_weight)
        self.base_weight = nn.Parameter(base_weight)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw normal weights that keep the variance of activations, and reset the grids to `grid_range`.

        For inputs x that are normal with the mean and the variance v of the uniform law on `grid_range`, the weights
        of the two branches have the variances s v / (I sum_k E[B_k(x)^2]) and (1-s) v / (I E[silu(x)^2]). Then
        E[y[o]^2] = v over the random weights, and the splines have the share s = `SPLINE_VARIANCE_SHARE` of it.

        Source: the basis-agnostic Glorot-like rule of arXiv 2510.23501, on the forward pass.
        """
        super().reset_parameters()
        variance, products = moments(self.grid_range, self.grid_size, self.spline_order)
        # Python numbers, so that a layer on the meta device needs no special case
        *spline_squares, silu_square = products.diagonal().tolist()
        spline_square = self.in_features * sum(spline_squares)
        silu_square = self.in_features * silu_square
        spline_variance = SPLINE_VARIANCE_SHARE * variance / spline_square
        silu_variance = (1 - SPLINE_VARIANCE_SHARE) * variance / silu_square
        nn.init.normal_(self.spline_weight, std=math.sqrt(spline_variance))
        nn.init.normal_(self.base_weight, std=math.sqrt(silu_variance))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs.

        Args:
            x: Inputs, shape (..., I), of the dtype of the weights.

        Returns:
            Outputs, shape (..., O).

        Raises:
            TypeError: The inputs are no floating point tensor.
            ValueError: Their last dimension is not I, or their dtype differs from the weights (but under autocast).
        """
        check_input(x, self.in_features, self, self.spline_weight.dtype)
        return compute_output(self.formula, x)

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Move each input's grid to the range of the samples, and refit the splines so that the function is kept.

        The new coefficients are the least-squares fit, in float64, of the old splines on the samples and, with a
        hundredth of their weight, on points spread over the new range. The fit is exact where the old splines lie in
        the span of the new basis. An input whose samples do not spread (a pixel that is always black) keeps its grid.

        Args:
            x: Samples, shape (..., I), a few thousand. Two float64 bases of all of them must fit into memory.
            margin: The share of the samples' range that is left free at each end.

        Raises:
            ValueError: Wrong shape, no samples, or values that are not finite. The layer is as before then.
        """
        fits = x.shape[-1:] == (self.in_features,) and x.numel() > 0
        if not fits or not x.isfinite().all():
            raise ValueError(
                f"The samples have shape {tuple(x.shape)}, but must be (..., {self.in_features}), not empty, and "
                "finite. Remove those with NaN or infinite values."
            )
        samples = x.reshape(-1, self.in_features).double()
        low, high = samples.aminmax(dim=0)
        pad = margin * (high - low)
        ends = torch.stack([low - pad, high + pad], dim=-1)
        bounds = ends.to(self.grid_bounds.dtype)

        # An interval must be wider than the spacing of the numbers there, or the basis is noise.
        largest = bounds.double().abs().amax(-1, keepdim=True)
        spacing = torch.finfo(bounds.dtype).eps * largest
        is_wide = bounds.double().diff() > self.grid_size * spacing
        bounds = torch.where(is_wide, bounds, self.grid_bounds)

        # The fit is for the bounds as they are stored.
        old_grid = UniformGrid.between(self.grid_bounds.double(), self.grid_size, self.spline_order)
        new_grid = UniformGrid.between(bounds.double(), self.grid_size, self.spline_order)
        points, weight = spread_points(samples, new_grid.low, new_grid.high, 4 * new_grid.num_basis)
        # Each old basis function in terms of the new ones: the cost does not depend on the number of outputs.
        old_basis = old_grid.functions(points)
        new_basis = new_grid.functions(points)
        transfer = change_of_basis(weight * new_basis, weight * old_basis)
        refitted = einsum(transfer, self.spline_weight.double(), "i new old, o i old -> o i new")
        self.grid_bounds.copy_(bounds)
        self.spline_weight.copy_(refitted)


def copy_with_parameters(
    layer: SplineLayer,
    parameters: Mapping[str, Tensor],
    grid_size: int | None = None,
) -> KANLinear:
    """Return a dense layer like another layer, but with these parameters."""
    grid_size = grid_size or layer.grid_size
    new = KANLinear(
        layer.in_features,
        layer.out_features,
        grid_size,
        layer.spline_order,
        layer.grid_range,
        device="meta",
    )
    new = new.to_empty(device=layer.grid_bounds.device)
    new = new.to(layer.grid_bounds.dtype)

    is_trained = any(parameter.requires_grad for parameter in layer.parameters())
    new.requires_grad_(is_trained)
    with torch.no_grad():
        new.grid_bounds.copy_(layer.grid_bounds)
        for name, value in parameters.items():
            new.get_parameter(name).copy_(value)
    return new.train(layer.training)
