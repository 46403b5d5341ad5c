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
from collections.abc import Callable, Sequence

import torch
from einops import rearrange


# What moving a number to another place costs in `contract`, in multiplications, measured: for as many numbers as a
# cache holds, and for more.
_COPY_COSTS = (64, 300)
_CACHED = 2**20


# How much the tensor itself counts beside what is measured of it.
_UNSEEN = 1e-3


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


def dense_update(scale: float | torch.Tensor, core: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
    """The update (out, in, basis) in the dtype of its components."""
    dtype = core.dtype
    # float16 and bfloat16 products on the CPU are slow, and some are not implemented
    if core.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        core, *factors = (component.float() for component in (core, *factors))
    return (scale * reconstruct(core, *factors)).to(dtype)


@torch.no_grad()
def tucker(tensor: torch.Tensor, ranks: tuple[int, int, int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The best Tucker approximation that higher-order orthogonal iteration (HOOI) finds, started from the HOSVD.

    Args:
        tensor (`torch.Tensor`): (out, in, basis).
        ranks (`tuple[int, int, int]`): (ro, ri, rb), none above the size of its mode.

    Returns:
        core (ro, ri, rb), and the factors (out, ro), (in, ri), (basis, rb), which have orthonormal columns; of the
        dtype and on the device of `tensor`. Computed in float64.
    """
    import tensorly.decomposition  # not at the top: scipy would double the time that importing the package takes

    array = tensor.detach().double().cpu().numpy()
    # whatever backend the user of tensorly has set
    with tensorly.backend_context("numpy", local_threadsafe=True), warnings.catch_warnings():
        # of a zero tensor, and of ranks above the product of the other two, for which any orthonormal columns will do
        warnings.simplefilter("ignore")
        core, factors = tensorly.decomposition.tucker(array, rank=list(ranks), init="svd", n_iter_max=20, tol=1e-6)
    return torch.from_numpy(core).to(tensor), [torch.from_numpy(factor.copy()).to(tensor) for factor in factors]


@torch.no_grad()
def hosvd(tensor: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The higher-order singular value decomposition, without truncation; exact.

    Args:
        tensor (`torch.Tensor`): (out, in, basis).

    Returns:
        core (ro, ri, rb); the factors (out, ro), (in, ri), (basis, rb), the left singular vectors of the three
        unfoldings; their singular values, in falling order. In float64; each rank is the size of its mode, or the
        product of the other two where that is less.
    """
    core = tensor.detach().double()
    factors, singular_values = [], []
    for mode in range(3):
        left, values, _ = torch.linalg.svd(tensor.detach().double().movedim(mode, 0).flatten(1), full_matrices=False)
        factors.append(left)
        singular_values.append(values)
        core = torch.tensordot(core, left, ([0], [0]))  # takes the first mode and puts it last: all three in turn
    return core, factors, singular_values


def energy_table(core: torch.Tensor) -> torch.Tensor:
    """The share of the squared norm in each leading block: entry (a - 1, b - 1, c - 1) is that in core[:a, :b, :c].

    For the core of a HOSVD that is what its truncation to ranks (a, b, c) keeps. 1 everywhere for a zero core.
    """
    squares = core.square().cumsum(0).cumsum(1).cumsum(2)
    total = squares[-1, -1, -1]
    return squares / total if total > 0 else torch.ones_like(squares)


@torch.no_grad()
def orthogonalize(core: torch.Tensor, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same tensor with factors of orthonormal columns, no more of them than rows. Ranks above the sizes of their
    modes are thereby brought down to them, without loss.

    Args:
        core (`torch.Tensor`): (ro, ri, rb).
        factors (`Sequence[torch.Tensor]`): (out, ro), (in, ri), (basis, rb), of any rank.
    """
    bases = []
    for factor in factors:
        basis, triangle = torch.linalg.qr(factor)
        bases.append(basis)
        core = torch.tensordot(core, triangle, ([0], [1]))  # takes the first mode and puts it last: all three in turn
    return core, bases


@torch.no_grad()
def balance(core: torch.Tensor, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same tensor, of orthonormal factors, with columns of norm sqrt(out), 1 and sqrt(basis), from which a few
    more training steps go on well (by Adam at 1e-3; orthonormal columns were no better)."""
    gains = (math.sqrt(len(factors[0])), 1.0, math.sqrt(len(factors[2])))
    return core / math.prod(gains), [factor * gain for factor, gain in zip(factors, gains, strict=True)]


def tucker_scaled(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    ranks: tuple[int, int, int],
    steps: int = 400,
    measure: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
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
        core and factors, which have orthonormal columns, in float64.
    """
    tensor, scale = tensor.detach().double(), scale.detach().double()
    energy = tensor.square().sum()
    measured = None if measure is None else measure(tensor).square().sum().clamp(min=1e-300)
    core, factors = tucker(scale * tensor / scale.abs().max().clamp(min=1e-30) ** 2, ranks)
    parts = [part.contiguous().requires_grad_() for part in (core, *factors)]
    optimizer = torch.optim.LBFGS(parts, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        missed = scale * reconstruct(*parts) - tensor
        loss = missed.square().sum() / energy
        if measure is not None:
            loss = _UNSEEN * loss + measure(missed).square().sum() / measured
        loss.backward()
        return loss

    if energy > 0:
        optimizer.step(closure)
    core, *factors = (part.detach() for part in parts)
    return orthogonalize(core, factors)


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
