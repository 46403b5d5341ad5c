# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Slim KANs: KANs whose coefficient tensors are Tucker tensors from the start."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.calls import is_tracing
from ..tucker import Ranks, Tucker, cap_ranks, check_ranks, component_shapes, expand_inputs
from .basis import check_input, moments
from .layer import KANLinear, SplineLayer, copy_with_parameters
from .network import KAN, LayerStack, Norm, pairs, with_norms
from .product import spline_product


# The share of the splines in the variance of a new output, half of a dense layer's, and the
# gains of the columns of factor_in and factor_basis; see `SlimKANLinear.reset_parameters`.
SLIM_VARIANCE_SHARE = 0.05
GAIN_IN = 0.3
GAIN_BASIS = 0.3

# Rows from which `spline_product` costs less than a product of `factor_in` with the basis: measured at widths of 64 to
# 512, ranks of (8, 8, 4) to (32, 32, 6). `examples/studies/benchmarks/slim_speed.py`
_EXPAND_FROM = 64


class SlimKANLinear(SplineLayer):
    r"""A `KANLinear` whose coefficient tensor is a Tucker tensor: its parameters are a core and three factors.

    With the base branch as the last slice of the basis mode, the tensor A (O, I, K + 1), K = `grid_size +
    spline_order`, is  core x1 factor_out x2 factor_in x3 factor_basis:

        y[o] = sum_a factor_out[o, a] sum_{b,c} core[a, b, c] sum_i factor_in[i, b] f_c(x[i]),
        f_c(x) = sum_k factor_basis[k, c] B_k(x) + factor_basis[K, c] silu(x).

    All edges are combinations of the same rb functions f_c. The dense tensor is never built in the forward pass. A
    full mode, whose rank is its size, has no factor.

    Args:
        in_features, out_features, grid_size, spline_order, grid_range, device, dtype: As for `KANLinear`.
        ranks: (ro, ri, rb) for the modes (out, in, basis), or one number for the three; `"full"` is the size of a
            mode. A rank above the size of its mode is capped, with a warning.

    Attributes:
        core: Parameter (ro, ri, rb).
        factor_out, factor_in, factor_basis: Parameters (O, ro), (I, ri) and (K + 1, rb), None for full modes.
        grid_bounds: Buffer (I, 2), as in `KANLinear`.

    Raises:
        ValueError: An argument that `KANLinear` refuses, or ranks that are not positive integers.

    Source: Gao, Ng and Tan, "Low Tensor-Rank Adaptation of Kolmogorov-Arnold Networks", arXiv 2502.06153, Slim KANs.

    Example:
        >>> from peft_lotra.kan import SlimKANLinear
        >>> layer = SlimKANLinear(64, 10, ranks=(5, 8, 3))
        >>> layer.core.shape, layer(torch.zeros(7, 64)).shape
        (torch.Size([5, 8, 3]), torch.Size([7, 10]))
    """

    core: nn.Parameter
    factor_out: nn.Parameter | None
    factor_in: nn.Parameter | None
    factor_basis: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Ranks,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1, 1),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, grid_size, spline_order, grid_range, device, dtype)
        ranks = check_ranks(ranks, "ranks", kernel=False)
        shape = (out_features, in_features, self.grid.num_basis + 1)
        capped = cap_ranks(ranks, shape)
        requested = ranks if isinstance(ranks, tuple) else (ranks,) * 3
        pairs_of_ranks = zip(requested, capped, strict=True)
        if any(rank not in ("full", capped_rank) for rank, capped_rank in pairs_of_ranks):
            warnings.warn(
                "Ranks are larger than the modes (out, in, basis), where more make no difference: capped. "
                f"SlimKANLinear({in_features}, {out_features}): {ranks} for {shape}, made {capped}",
                stacklevel=2,
            )
        for name in Tucker._fields[:4]:
            self.register_parameter(name, None)
        for name, sizes in component_shapes(capped, shape).items():
            component = torch.empty(sizes, device=device, dtype=dtype)
            setattr(self, name, nn.Parameter(component))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the grids to `grid_range`, and draw components that keep the variance of the activations.

        The factors factor_out and factor_in get orthogonal columns of norm sqrt(O) and `GAIN_IN`. The rows of
        factor_basis are normal, and scaled so that the mean square of the functions f_c is `GAIN_BASIS` squared, of
        which the splines have the share `SLIM_VARIANCE_SHARE`. The core, as a matrix (ro, ri rb), gets orthogonal
        rows (or columns), and the size with which E[y^2] = v, for independent inputs that are normal with the mean and
        the variance v of the uniform law on `grid_range`. The gains set how far an optimizer's step moves each
        component; the function does not depend on them. Without factor_basis, the core takes the scales of its rows.

        Source: the basis-agnostic Glorot-like rule of arXiv 2510.23501, on the forward pass.
        """
        super().reset_parameters()
        if self.core.is_meta:
            return

        # the scale of each row of factor_basis: of the splines, and of silu as the last one
        variance, products = moments(self.grid_range, self.grid_size, self.spline_order)
        squares = products.diagonal()
        variances = torch.full_like(squares, SLIM_VARIANCE_SHARE) / squares[:-1].sum()
        variances[-1] = (1 - SLIM_VARIANCE_SHARE) / squares[-1]
        scales = variances.sqrt()
        if self.factor_basis is not None:
            noise = torch.randn(self.factor_basis.shape, dtype=torch.float64, device="cpu")
            factor_basis = GAIN_BASIS * scales.unsqueeze(1) * noise
            self.factor_basis.copy_(factor_basis)
            products = factor_basis.T @ products @ factor_basis

        # what the core contributes, after the gains of factor_out and factor_in
        core_variance = self.out_features * variance
        gains = ((self.factor_out, math.sqrt(self.out_features)), (self.factor_in, GAIN_IN))
        for factor, gain in gains:
            if factor is not None:
                factor.copy_(_orthogonal(factor) * gain)
                core_variance = core_variance / gain**2

        matrix = _orthogonal(self.core.flatten(1))
        core = matrix.view(self.core.shape).double().cpu()
        if self.factor_basis is None:
            core = core * scales
        # `products` has the means of the products of two functions, and the inputs are independent
        size = (core * (core @ products)).sum()
        scale = (core_variance / size).sqrt()
        self.core.copy_(core * scale)

    @property
    def ranks(self) -> tuple[int, ...]:
        """(ro, ri, rb)."""
        return self.components.ranks

    @property
    def components(self) -> Tucker:
        """core, factor_out, factor_in and factor_basis, None for full modes."""
        return Tucker(self.core, self.factor_out, self.factor_in, self.factor_basis)

    @property
    def spline_weight(self) -> Tensor:
        """The coefficient tensor (O, I, K) of the equivalent dense layer, computed on each access; differentiable."""
        splines = self.components.sliced(slice(-1))
        return splines.dense()

    @property
    def base_weight(self) -> Tensor:
        """The residual weights (O, I) of the equivalent dense layer, computed on each access; differentiable."""
        residual = self.components.sliced(slice(-1, None))
        return residual.dense().squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs (..., O) for inputs (..., I). Raise as `KANLinear.forward`."""
        check_input(x, self.in_features, self, self.core.dtype)
        rows = x.reshape(-1, self.in_features)
        components = self.components
        core, factor_out, factor_in, factor_basis = components
        if is_tracing() or factor_in is None or len(rows) >= _EXPAND_FROM:  # a graph is for any number of rows
            splines, _, *factors = components.sliced(slice(-1))
            weight = expand_inputs(splines, *factors)
            y = spline_product(rows, self.grid, weight)
            residual, _, *factors = components.sliced(slice(-1, None))
            residual_weight = expand_inputs(residual, *factors).squeeze(-1)
            y = y + F.linear(F.silu(rows), residual_weight)
        else:
            silu = F.silu(rows).unsqueeze(-1)
            functions = torch.cat([self.basis(rows), silu], -1).mT
            # torch takes another product of batches, with other last digits, if the factor requires a gradient
            functions = (functions.flatten(0, 1) @ factor_in).unflatten(0, functions.shape[:2])  # (N, K + 1, ri)
            weight = expand_inputs(core, None, factor_basis)  # (ro, ri, K + 1)
            y = F.linear(functions.flatten(1), weight.mT.flatten(1))
        if factor_out is not None:
            y = y @ factor_out.T
        return y.view(*x.shape[:-1], self.out_features)

    def to_dense(self) -> KANLinear:
        """Return the `KANLinear` that computes the same, up to rounding."""
        parameters = {"spline_weight": self.spline_weight, "base_weight": self.base_weight}
        return copy_with_parameters(self, parameters)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks}"


def _orthogonal(like: Tensor) -> Tensor:
    """Return a random matrix of this shape and device with orthonormal columns or rows."""
    # QR does not exist in half precision
    dtype = torch.promote_types(like.dtype, torch.float32)
    matrix = torch.empty_like(like, dtype=dtype)
    return nn.init.orthogonal_(matrix)


class SlimKAN(LayerStack):
    """A KAN with fewer parameters: a stack of `SlimKANLinear` layers.

    Activations start with about the same variance at each depth, unless the ranks are low and the network is deep;
    `norm` helps there.

    Args:
        widths, grid_size, spline_order, grid_range, norm, device, dtype: As for `KAN`.
        ranks: (ro, ri, rb) or one rank, as for `SlimKANLinear`, the same in each layer; or a list with ranks for
            each layer, where None makes a dense `KANLinear`. Ranks above the sizes of a layer's modes are capped, with
            a warning.

    Attributes:
        layers: The layers, an `nn.ModuleList`, with the normalizations between them.

    Raises:
        ValueError: An argument that `KAN` refuses, ranks that are not positive integers, or a list of them that has
            not one entry for each layer.

    Example:
        >>> from peft_lotra.kan import SlimKAN
        >>> model = SlimKAN([64, 64, 10], ranks=(20, 20, 2))
        >>> sum(part.numel() for part in model.parameters())  # of a KAN 42,624
        5076
    """

    def __init__(
        self,
        widths: Sequence[int],
        ranks: Ranks | Sequence[Ranks | None],
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1, 1),
        norm: Norm = None,
        device=None,
        dtype=None,
    ) -> None:
        sizes = pairs(widths)
        all_ranks: Any = ranks
        entries = all_ranks if isinstance(ranks, (list, tuple)) else ()
        is_by_layer = any(entry is None or isinstance(entry, (list, tuple)) for entry in entries)
        if not is_by_layer:
            # one rank, or three integers, for all layers
            checked = check_ranks(all_ranks, "ranks", kernel=False)
            all_ranks = [checked] * len(sizes)
        if len(all_ranks) != len(sizes):
            raise ValueError(
                f"`ranks` has {len(all_ranks)} entries, but the network has {len(sizes)} layers: give (ro, ri, rb) or "
                "None for each of them, or one (ro, ri, rb) for all."
            )

        arguments = (grid_size, spline_order, grid_range, device, dtype)
        layers = []
        for size, layer_ranks in zip(sizes, all_ranks, strict=True):
            if layer_ranks is None:
                layer = KANLinear(*size, *arguments)
            else:
                layer = SlimKANLinear(*size, layer_ranks, *arguments)
            layers.append(layer)
        super().__init__(with_norms(layers, norm, device, dtype))

    def to_dense(self) -> KAN:
        """Return the `KAN` that computes the same, up to rounding."""
        kan = KAN([1, 1], device="meta")
        kan.layers = copy.deepcopy(self.layers)
        for number, layer in enumerate(self.layers):
            if isinstance(layer, SlimKANLinear):
                kan.layers[number] = layer.to_dense()
        return kan.train(self.training)
