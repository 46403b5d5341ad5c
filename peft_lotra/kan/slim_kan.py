# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Slim KANs: KANs whose coefficient tensors are Tucker tensors from the start."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..modules.calls import is_tracing
from ..tucker import Ranks, Tucker, cap_ranks, check_ranks, component_shapes, expand_inputs
from .basis import check_input, moments
from .layer import KANLinear, SplineLayer
from .network import KAN, LayerStack, Norm, pairs, with_norms
from .product import spline_product


# Share of the variance of a new layer's output that comes from its splines, half of that of a dense layer, and the
# gains of the columns of factor_in and factor_basis; see `SlimKANLinear.reset_parameters`.
SLIM_VARIANCE_SHARE = 0.05
GAIN_IN = 0.3
GAIN_BASIS = 0.3

# Rows from which `spline_product` costs less than a product of `factor_in` with the basis: measured at widths of 64 to
# 512, ranks of (8, 8, 4) to (32, 32, 6). `examples/studies/benchmarks/slim_speed.py`
_EXPAND_FROM = 64


class SlimKANLinear(SplineLayer):
    r"""A `KANLinear` whose coefficient tensor is a Tucker tensor: its parameters are a core and three factors.

    With the residual branch as the last slice of the basis mode, the tensor A (O, I, K + 1), K = `grid_size +
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
        warn_capped({f"SlimKANLinear({in_features}, {out_features})": (ranks, shape, capped)})
        shapes = component_shapes(capped, shape)
        for name in Tucker._fields[:4]:
            sizes = shapes.get(name)
            parameter = None if sizes is None else nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Makes the layer a new one: grids on `grid_range`, and components that keep the variance of the activations.

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
        variance, of_functions = moments(self.grid_range, self.grid_size, self.spline_order)
        *of_splines, of_silu = of_functions.diagonal()
        variances = [SLIM_VARIANCE_SHARE / sum(of_splines)] * len(of_splines) + [(1 - SLIM_VARIANCE_SHARE) / of_silu]
        scales = of_functions.new_tensor(variances).sqrt()
        if self.factor_basis is not None:
            noise = torch.randn(self.factor_basis.shape, dtype=torch.float64, device="cpu")
            factor_basis = GAIN_BASIS * scales.unsqueeze(1) * noise
            self.factor_basis.copy_(factor_basis)
            of_functions = factor_basis.T @ of_functions @ factor_basis
        variance = self.out_features * variance
        for factor, gain in ((self.factor_out, math.sqrt(self.out_features)), (self.factor_in, GAIN_IN)):
            if factor is not None:
                factor.copy_(_orthogonal(factor) * gain)
                variance = variance / gain**2
        core = _orthogonal(self.core.flatten(1)).double().view(self.core.shape)
        if self.factor_basis is None:
            core = core * scales.to(core.device)
        self.core.copy_(core * (variance / (core * (core @ of_functions.to(core.device))).sum()).sqrt())

    @property
    def ranks(self) -> tuple[int, ...]:
        """(ro, ri, rb)."""
        return self.components.ranks

    @property
    def components(self) -> Tucker:
        """core, factor_out, factor_in and factor_basis, None for full modes."""
        return Tucker(self.core, self.factor_out, self.factor_in, self.factor_basis)

    @property
    def spline_weight(self) -> torch.Tensor:
        """The coefficient tensor (O, I, K) of the equivalent dense layer, built anew; differentiable."""
        return self.components.sliced(slice(-1)).dense()

    @property
    def base_weight(self) -> torch.Tensor:
        """The residual weights (O, I) of the equivalent dense layer, built anew; differentiable."""
        return self.components.sliced(slice(-1, None)).dense().squeeze(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs (..., I) to outputs (..., O); raises as `KANLinear.forward`."""
        check_input(x, self.in_features, self, self.core.dtype)
        rows = x.reshape(-1, self.in_features)
        components = self.components
        core, factor_out, factor_in, factor_basis = components
        if is_tracing() or factor_in is None or len(rows) >= _EXPAND_FROM:  # a graph is for any number of rows
            splines, _, *factors = components.sliced(slice(-1))
            z = spline_product(rows, *self.grid, expand_inputs(splines, *factors))
            last, _, *factors = components.sliced(slice(-1, None))
            z = z + F.linear(F.silu(rows), expand_inputs(last, *factors).squeeze(-1))
        else:
            z = rearrange(self._functions(rows), "n i k -> (n k) i") @ factor_in
            matrix = expand_inputs(core, None, factor_basis)  # (ro, ri, K + 1)
            z = rearrange(z, "(n k) r -> n (k r)", k=matrix.shape[2]) @ matrix.transpose(1, 2).flatten(1).T
        y = z if factor_out is None else z @ factor_out.T
        return y.view(*x.shape[:-1], self.out_features)

    def forward_with(self, delta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The output with a dense tensor (O, I, K + 1) added to the coefficients."""
        y = self._functions(x).flatten(-2) @ delta.flatten(1).T
        return SlimKANLinear.forward(self, x) + y

    def _functions(self, x: torch.Tensor) -> torch.Tensor:
        """The basis functions and silu at x (..., I): (..., I, K + 1)."""
        return torch.cat([self.basis(x), F.silu(x).unsqueeze(-1)], -1)

    def to_dense(self) -> KANLinear:
        """The `KANLinear` that computes the same, up to rounding."""
        return filled(self, {"spline_weight": self.spline_weight, "base_weight": self.base_weight})

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks}"


def filled(like: SplineLayer, parameters: Mapping[str, torch.Tensor], grid_size: int | None = None) -> Any:
    """A layer with these parameters, by their names a `SlimKANLinear` or a `KANLinear`, and the rest as in `like`."""
    sizes = (like.in_features, like.out_features)
    others = (grid_size or like.grid_size, like.spline_order, like.grid_range, "meta")
    is_slim = "core" in parameters
    new = SlimKANLinear(*sizes, tuple(parameters["core"].shape), *others) if is_slim else KANLinear(*sizes, *others)
    new = new.to_empty(device=like.grid_bounds.device).to(like.grid_bounds.dtype)
    new.requires_grad_(any(parameter.requires_grad for parameter in like.parameters()))
    with torch.no_grad():
        new.grid_bounds.copy_(like.grid_bounds)
        for name, value in parameters.items():
            new.get_parameter(name).copy_(value)
    return new.train(like.training)


def _orthogonal(like: torch.Tensor) -> torch.Tensor:
    """A random matrix of this shape and device with orthonormal columns or rows."""
    # the QR decomposition behind it does not exist in half precision
    return nn.init.orthogonal_(torch.empty_like(like, dtype=torch.promote_types(like.dtype, torch.float32)))


class SlimKAN(LayerStack):
    """A stack of `SlimKANLinear` layers.

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
        if isinstance(ranks, (list, tuple)) and any(r is None or isinstance(r, (list, tuple)) for r in ranks):
            per_layer = cast(Sequence[Any], ranks)
        else:  # a list of three integers counts for all layers, as a tuple does
            per_layer = [check_ranks(ranks, "ranks", kernel=False)] * len(sizes)  # pyright: ignore[reportArgumentType]
        if len(per_layer) != len(sizes):
            raise ValueError(
                f"`ranks` has {len(per_layer)} entries, but the network has {len(sizes)} layers: give (ro, ri, rb) or "
                "None for each of them, or one (ro, ri, rb) for all."
            )
        arguments = (grid_size, spline_order, grid_range, device, dtype)
        layers = [
            KANLinear(*size, *arguments) if r is None else SlimKANLinear(*size, r, *arguments)
            for size, r in zip(sizes, per_layer, strict=True)
        ]
        super().__init__(with_norms(layers, norm, device, dtype))

    def to_dense(self) -> KAN:
        """The `KAN` that computes the same, up to rounding."""
        kan = KAN([1, 1], device="meta")
        kan.layers = nn.ModuleList(
            layer.to_dense() if isinstance(layer, SlimKANLinear) else copy.deepcopy(layer) for layer in self.layers
        )
        return kan.train(self.training)


def warn_capped(layers: dict[str, tuple]) -> None:
    """Warns of layers with lower ranks than asked for; name: (ranks asked for, shape of the tensor, ranks)."""
    fewer = {}
    for name, (asked, shape, ranks) in layers.items():
        modes = asked if isinstance(asked, tuple) else (asked,) * 3
        if any(rank != "full" and rank > size for rank, size in zip(modes, shape, strict=False)):
            fewer[name] = asked, shape, ranks
    if fewer:
        listed = "; ".join(f"{name}: {asked} for {shape}, made {got}" for name, (asked, shape, got) in fewer.items())
        warnings.warn(
            "Ranks are larger than the modes (out, in, basis), where more make no difference: capped. " + listed,
            stacklevel=3,
        )
