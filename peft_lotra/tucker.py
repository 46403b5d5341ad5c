# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Tucker algebra on coefficient tensors (out, in, basis).

A tensor of ranks (ro, ri, rb) is  core x1 factor_out x2 factor_in x3 factor_basis  with core (ro, ri, rb), factor_out
(out, ro), factor_in (in, ri) and factor_basis (basis, rb), where x_n is the n-mode product.

References:
    T. G. Kolda, B. W. Bader, "Tensor Decompositions and Applications", SIAM Review 51 (2009), section 4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange


# What moving a number to another place costs in `contract`, in multiplications, measured: for as many numbers as a
# cache holds, and for more.
_COPY_COSTS = (64, 300)
_CACHED = 2**20


# How much the tensor itself counts beside what is measured of it.
_UNSEEN = 1e-3


class Tucker(NamedTuple):
    """
    A tensor (out, in, basis) in Tucker form: core x1 factor_out x2 factor_in x3 factor_basis.

    Attributes:
        core (`torch.Tensor`): (ro, ri, rb).
        factor_out (`torch.Tensor`): (out, ro).
        factor_in (`torch.Tensor`): (in, ri).
        factor_basis (`torch.Tensor`): (basis, rb).
    """

    core: torch.Tensor
    factor_out: torch.Tensor
    factor_in: torch.Tensor
    factor_basis: torch.Tensor

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """factor_out, factor_in and factor_basis."""
        return self[1:]

    @property
    def ranks(self) -> tuple[int, int, int]:
        """(ro, ri, rb)."""
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(out, in, basis)."""
        return tuple(len(factor) for factor in self.factors)

    def numel(self) -> int:
        """The number of parameters: ro ri rb + out ro + in ri + basis rb."""
        return sum(component.numel() for component in self)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Tucker:
        """`function` of each component."""
        return Tucker(*map(function, self))

    def dense(self, scale: float | torch.Tensor | None = None) -> torch.Tensor:
        """The tensor (out, in, basis), multiplied by `scale` if given, in the dtype of the components."""
        components, dtype = self, self.core.dtype
        # float16 and bfloat16 products on the CPU are slow, and some are not implemented
        if self.core.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            components = self.map(torch.Tensor.float)
        tensor = reconstruct(*components)
        return (tensor if scale is None else scale * tensor).to(dtype)

    def expand_inputs(self) -> torch.Tensor:
        """core x2 factor_in x3 factor_basis, (ro, in, basis): the rows that factor_out mixes."""
        return expand_inputs(self.core, self.factor_in, self.factor_basis)

    def padded(self, basis: int) -> Tucker:
        """The same tensor with zeros up to `basis` slices of the basis mode."""
        missing = basis - len(self.factor_basis)
        return self._replace(factor_basis=torch.nn.functional.pad(self.factor_basis, (0, 0, 0, missing)))

    @torch.no_grad()
    def orthogonal(self) -> Tucker:
        """The same tensor with factors of orthonormal columns. Ranks above the sizes of their modes are brought down
        to the sizes, without loss."""
        core, bases = self.core, []
        for factor in self.factors:
            basis, triangle = torch.linalg.qr(factor)
            bases.append(basis)
            core = torch.tensordot(core, triangle, ([0], [1]))  # takes the first mode, puts it last: all three in turn
        return Tucker(core, *bases)

    @torch.no_grad()
    def balanced(self) -> Tucker:
        """The same tensor, whose factors are orthonormal, with columns of norm sqrt(out), 1 and sqrt(basis), which are
        those of a random start and from which training goes on well."""
        gains = (math.sqrt(len(self.factor_out)), 1.0, math.sqrt(len(self.factor_basis)))
        factors = [factor * gain for factor, gain in zip(self.factors, gains, strict=True)]
        return Tucker(self.core / math.prod(gains), *factors)


class Update(NamedTuple):
    """`scale` times a Tucker tensor: what one adapter adds to the coefficients of a layer."""

    scale: float | torch.Tensor
    tensor: Tucker

    def dense(self) -> torch.Tensor:
        """The update (out, in, basis), or (out, in, basis + 1) with the residual branch as the last slice."""
        return self.tensor.dense(self.scale)


def reconstruct(
    core: torch.Tensor, factor_out: torch.Tensor, factor_in: torch.Tensor, factor_basis: torch.Tensor
) -> torch.Tensor:
    """The dense tensor (out, in, basis) of a Tucker decomposition; differentiable in all four.

    The basis mode is expanded first and the output mode last, so that the largest intermediate is (ro, in, basis). The
    products are of matrices: the result of a batched `torch.matmul` differs in its last digits between tensors that
    require a gradient and tensors that do not, and a loaded adapter must equal the trained one exactly.

    Args:
        core (`torch.Tensor`): (ro, ri, rb).
        factor_out (`torch.Tensor`): (out, ro).
        factor_in (`torch.Tensor`): (in, ri).
        factor_basis (`torch.Tensor`): (basis, rb).
    """
    tensor = factor_out @ expand_inputs(core, factor_in, factor_basis).flatten(1)  # (out, in basis)
    return tensor.unflatten(1, (len(factor_in), len(factor_basis)))


def expand_inputs(core: torch.Tensor, factor_in: torch.Tensor, factor_basis: torch.Tensor) -> torch.Tensor:
    """core x2 factor_in x3 factor_basis, (ro, in, basis): the rows that factor_out mixes."""
    ro = len(core)
    tensor = core.flatten(0, 1) @ factor_basis.T  # (ro ri, basis)
    tensor = factor_in @ rearrange(tensor, "(ro ri) k -> ri (ro k)", ro=ro)  # (in, ro basis)
    return rearrange(tensor, "i (ro k) -> ro i k", ro=ro)


def contract(
    basis: torch.Tensor,
    residual: torch.Tensor,
    core: torch.Tensor,
    factor_out: torch.Tensor,
    factor_in: torch.Tensor,
    factor_basis: torch.Tensor,
) -> torch.Tensor:
    """What a layer whose coefficient tensor has this Tucker decomposition returns, factor_in meeting each row's basis
    functions first: the way for few rows, see `expands_first`.

    All products are of matrices, see `reconstruct`. To go from the basis mode inwards would take the fewest
    multiplications of all, but was never the fastest: its matrices are too thin.

    Args:
        basis (`torch.Tensor`): (rows, in, basis), the values of the basis functions.
        residual (`torch.Tensor`): (rows, in), the values of the residual function.
        core, factor_out, factor_in (`torch.Tensor`): (ro, ri, rb), (out, ro), (in, ri).
        factor_basis (`torch.Tensor`): (basis + 1, rb), the residual function last.

    Returns:
        (rows, out).
    """
    functions = basis.shape[-1]
    matrix = (core.flatten(0, 1) @ factor_basis.T).unflatten(0, core.shape[:2])  # (ro, ri, basis + 1)
    z = rearrange(basis, "n i k -> (n k) i") @ factor_in
    z = rearrange(z, "(n k) b -> n (b k)", k=functions) @ matrix[..., :-1].flatten(1).T
    z = z + residual @ factor_in @ matrix[..., -1].T
    return z @ factor_out.T


def expands_first(rows: int, core: torch.Tensor, factor_in: torch.Tensor, factor_basis: torch.Tensor) -> bool:
    """Whether a layer of these components does better to expand the core to a matrix of ro rows, which meets all basis
    functions at once without their being kept (`expand_inputs`, `spline_product`), than to `contract` each row's."""
    ro, ri, _ = core.shape
    size = len(factor_in)
    cached = rows * size * len(factor_basis) <= _CACHED
    copies = size * (_COPY_COSTS[0] if cached else _COPY_COSTS[1])
    return size * ro * (ri + rows) <= rows * (size * ri + ri * ro + copies)


@torch.no_grad()
def tucker(tensor: torch.Tensor, ranks: tuple[int, int, int]) -> Tucker:
    """The best Tucker approximation that higher-order orthogonal iteration (HOOI) finds, started from the HOSVD.

    Args:
        tensor (`torch.Tensor`): (out, in, basis).
        ranks (`tuple[int, int, int]`): (ro, ri, rb), none above the size of its mode.

    Returns:
        `Tucker`: Factors of orthonormal columns, of the dtype and on the device of `tensor`. Computed in float64.
    """
    import tensorly.decomposition  # not at the top: scipy would double the time that importing the package takes

    array = tensor.detach().double().cpu().numpy()
    # whatever backend the user of tensorly has set
    with tensorly.backend_context("numpy", local_threadsafe=True), warnings.catch_warnings():
        # of a zero tensor, and of ranks above the product of the other two, for which any orthonormal columns will do
        warnings.simplefilter("ignore")
        core, factors = tensorly.decomposition.tucker(array, rank=list(ranks), init="svd", n_iter_max=20, tol=1e-6)
    return Tucker(core, *factors).map(lambda array: torch.from_numpy(array.copy()).to(tensor))


@torch.no_grad()
def hosvd(tensor: torch.Tensor) -> tuple[Tucker, list[torch.Tensor]]:
    """The higher-order singular value decomposition, without truncation; exact.

    Args:
        tensor (`torch.Tensor`): (out, in, basis).

    Returns:
        `Tucker`, whose factors are the left singular vectors of the three unfoldings, and their singular values, in
        falling order. In float64; each rank is the size of its mode, or the product of the other two if that is less.
    """
    core = tensor.detach().double()
    factors, singular_values = [], []
    for mode in range(3):
        left, values, _ = torch.linalg.svd(tensor.detach().double().movedim(mode, 0).flatten(1), full_matrices=False)
        factors.append(left)
        singular_values.append(values)
        core = torch.tensordot(core, left, ([0], [0]))  # takes the first mode and puts it last: all three in turn
    return Tucker(core, *factors), singular_values


def energy_table(core: torch.Tensor) -> torch.Tensor:
    """The share of the squared norm in each leading block: entry (a - 1, b - 1, c - 1) is that in core[:a, :b, :c].

    For the core of a HOSVD that is what its truncation to ranks (a, b, c) keeps. 1 everywhere for a zero core.
    """
    squares = core.square().cumsum(0).cumsum(1).cumsum(2)
    total = squares[-1, -1, -1]
    return squares / total if total > 0 else torch.ones_like(squares)


def tucker_scaled(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    ranks: tuple[int, int, int],
    steps: int = 400,
    measure: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Tucker:
    """A Tucker decomposition that, multiplied by `scale` entry by entry, comes closest to `tensor`.

    HOOI gives the start, the tensor multiplied by the scale (the gradient step from zero); L-BFGS does the rest. That
    is no division by the scale, which would give the entries of least effect the greatest weight.

    Args:
        tensor, scale (`torch.Tensor`): (out, in, basis).
        ranks (`tuple[int, int, int]`): (ro, ri, rb), none above the size of its mode.
        steps (`int`): The most iterations of L-BFGS.
        measure (`Callable[[torch.Tensor], torch.Tensor]`, *optional*): A linear map of such tensors: closest is then
            what it makes of them, and to a thousandth the tensor itself, for what the map does not see.

    Returns:
        `Tucker`: Factors of orthonormal columns, in float64.
    """
    tensor, scale = tensor.detach().double(), scale.detach().double()
    energy = tensor.square().sum()
    measured = None if measure is None else measure(tensor).square().sum().clamp(min=1e-300)
    start = tucker(scale * tensor / scale.abs().max().clamp(min=1e-30) ** 2, ranks)
    parts = start.map(lambda part: part.contiguous().requires_grad_())
    optimizer = torch.optim.LBFGS(parts, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        missed = scale * parts.dense() - tensor
        loss = missed.square().sum() / energy
        if measure is not None:
            loss = _UNSEEN * loss + measure(missed).square().sum() / measured
        loss.backward()
        return loss

    if energy > 0:
        optimizer.step(closure)
    return parts.map(torch.Tensor.detach).orthogonal()


def check_ranks(r: int | tuple[int, int, int], name: str = "r") -> int | tuple[int, int, int]:
    """Returns `r`, a list of three (as JSON has it) as a tuple.

    Raises:
        ValueError: `r`, which the message calls by `name`, is neither a positive int nor three of them.
    """
    ranks = tuple(r) if isinstance(r, (tuple, list)) else (r,)
    wrong = any(isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0 for rank in ranks)
    if wrong or len(ranks) != (3 if isinstance(r, (tuple, list)) else 1):
        raise ValueError(
            f"`{name}` should be a positive integer value, or three of them for the modes (out, in, basis), but the "
            f"value passed is {r}"
        )
    return ranks if isinstance(r, (tuple, list)) else r


def cap_ranks(r: int | tuple[int, int, int], shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The ranks (ro, ri, rb) for a tensor of the given shape: an int counts for the three modes, and a rank above the
    size of its mode is brought down to it, since more columns than rows are linearly dependent."""
    ranks = r if isinstance(r, tuple) else (r, r, r)
    return tuple(min(rank, size) for rank, size in zip(ranks, shape, strict=True))
