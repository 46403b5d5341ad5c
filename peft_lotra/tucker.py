# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Tucker algebra on coefficient tensors (out, in, basis).

Source: T. G. Kolda, B. W. Bader, "Tensor Decompositions and Applications", SIAM Review 51 (2009), section 4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch.nn.functional import pad


# What `r` and `ranks` may be: one rank for the three modes, or (out, in, basis).
Ranks = int | tuple[int, int, int]

# The cost in `contract` of moving a number, in multiplications: for as many numbers as a cache holds, and for more. To
# measure it again, time `contract` and `expand_inputs` over rows, sizes and ranks.
_COPY_COSTS = (64, 300)
_CACHED = 2**20

_UNSEEN = 1e-3  # the weight in `tucker_scaled` of the tensor itself beside the measured values


class Tucker(NamedTuple):
    """A tensor (out, in, basis) in Tucker form: core x1 factor_out x2 factor_in x3 factor_basis (n-mode products).

    Example:
        >>> tensor = Tucker(torch.ones(2, 1, 3), torch.ones(6, 2), torch.ones(5, 1), torch.ones(4, 3))
        >>> tensor.ranks, tensor.shape, tensor.numel(), tensor.dense().shape
        ((2, 1, 3), (6, 5, 4), 35, torch.Size([6, 5, 4]))
    """

    core: torch.Tensor  # (ro, ri, rb)
    factor_out: torch.Tensor  # (out, ro)
    factor_in: torch.Tensor  # (in, ri)
    factor_basis: torch.Tensor  # (basis, rb)

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """factor_out, factor_in and factor_basis."""
        return self[1:]

    @property
    def ranks(self) -> tuple[int, int, int]:
        """(ro, ri, rb)."""
        return triple(self.core.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(out, in, basis)."""
        return triple(len(factor) for factor in self.factors)

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
        """See the function `expand_inputs`."""
        return expand_inputs(self.core, self.factor_in, self.factor_basis)

    def padded(self, basis: int) -> Tucker:
        """The tensor with zeros up to `basis` slices of the basis mode."""
        missing = basis - len(self.factor_basis)
        return self._replace(factor_basis=pad(self.factor_basis, (0, 0, 0, missing)))

    @torch.no_grad()
    def orthogonal(self) -> Tucker:
        """The same tensor with factors of orthonormal columns, and ranks at most the sizes of their modes."""
        bases, triangles = zip(*map(torch.linalg.qr, self.factors), strict=True)
        return Tucker(_project(self.core, [triangle.T for triangle in triangles]), *bases)

    @torch.no_grad()
    def balanced(self) -> Tucker:
        """The same tensor with columns of norm sqrt(out), 1 and sqrt(basis), given factors of orthonormal columns.

        Random starts of adapters have these norms too, and the learning rates suit them.
        """
        gains = (math.sqrt(len(self.factor_out)), 1.0, math.sqrt(len(self.factor_basis)))
        factors = [factor * gain for factor, gain in zip(self.factors, gains, strict=True)]
        return Tucker(self.core / math.prod(gains), *factors)

    def truncated(self, r: Ranks) -> Tucker:
        """The best approximation of ranks at most `r` that HOOI finds, given factors of orthonormal columns.

        The factors of the result are orthonormal too: the squared error is the loss of squared norm of the core.
        """
        core, *rotations = tucker(self.core, cap_ranks(r, self.ranks))
        return Tucker(core, *(factor @ rotation for factor, rotation in zip(self.factors, rotations, strict=True)))


class Update(NamedTuple):
    """`scale` times a Tucker tensor: what one adapter adds to the coefficients of a layer."""

    scale: float | torch.Tensor
    tensor: Tucker

    def dense(self) -> torch.Tensor:
        """The update (out, in, basis), or (out, in, basis + 1) with the residual branch as the last slice."""
        return self.tensor.dense(self.scale)


def triple(sizes: Iterable[int]) -> tuple[int, int, int]:
    """Three sizes as a tuple of three ints."""
    out, in_, basis = sizes
    return out, in_, basis


def reconstruct(
    core: torch.Tensor, factor_out: torch.Tensor, factor_in: torch.Tensor, factor_basis: torch.Tensor
) -> torch.Tensor:
    """The dense tensor (out, in, basis) of a Tucker decomposition; differentiable in all four.

    The basis mode is expanded first and the output mode last, so that the largest intermediate is (ro, in, basis). All
    products are of matrices: the result of a batched `torch.matmul` differs in its last digits between tensors that
    require a gradient and tensors that do not, and a loaded adapter must equal the trained one exactly.
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
    """The output (rows, out) of a layer whose coefficients are a Tucker tensor, from the values of the basis functions
    (rows, in, basis) and of the residual function (rows, in), to which the last row of factor_basis belongs.

    factor_in meets the basis functions first, which suits few rows. All products are of matrices, see `reconstruct`.
    """
    functions = basis.shape[-1]
    matrix = (core.flatten(0, 1) @ factor_basis.T).unflatten(0, core.shape[:2])  # (ro, ri, basis + 1)
    z = rearrange(basis, "n i k -> (n k) i") @ factor_in
    z = rearrange(z, "(n k) b -> n (b k)", k=functions) @ matrix[..., :-1].flatten(1).T
    z = z + residual @ factor_in @ matrix[..., -1].T
    return z @ factor_out.T


def expands_first(rows: int, core: torch.Tensor, factor_in: torch.Tensor, factor_basis: torch.Tensor) -> bool:
    """Whether `expand_inputs`, with a product that keeps no values of basis functions, is faster than `contract`."""
    ro, ri, _ = core.shape
    size = len(factor_in)
    cached = rows * size * len(factor_basis) <= _CACHED
    copies = size * (_COPY_COSTS[0] if cached else _COPY_COSTS[1])
    return size * ro * (ri + rows) <= rows * (size * ri + ri * ro + copies)


def direct_sum(tensors: Sequence[Tucker]) -> Tucker:
    """The exact sum of Tucker tensors of one shape; the ranks add, since the cores are blocks of one core."""
    _, ri, rb = (sum(ranks) for ranks in zip(*(tensor.ranks for tensor in tensors), strict=True))
    blocks, b, c = [], 0, 0
    for tensor in tensors:
        _, own_ri, own_rb = tensor.ranks
        blocks.append(pad(tensor.core, (c, rb - c - own_rb, b, ri - b - own_ri)))
        b, c = b + own_ri, c + own_rb
    factors = zip(*(tensor.factors for tensor in tensors), strict=True)
    return Tucker(torch.cat(blocks), *(torch.cat(columns, dim=1) for columns in factors))


@torch.no_grad()
def tucker(tensor: torch.Tensor, ranks: tuple[int, int, int]) -> Tucker:
    """The best Tucker approximation that higher-order orthogonal iteration (HOOI) finds, started from the HOSVD.

    No rank is above the size of its mode. The factors have orthonormal columns. HOOI runs in float64, and the result
    has the dtype and the device of the tensor.
    """
    import tensorly.decomposition  # not at the top: scipy would double the time that importing the package takes

    array = tensor.detach().double().cpu().numpy()
    # whatever backend the user of tensorly has set; pyright does not see the attributes that tensorly adds to itself
    backend = tensorly.backend_context("numpy", local_threadsafe=True)  # pyright: ignore[reportAttributeAccessIssue]
    with backend, warnings.catch_warnings():
        # of a zero tensor, and of ranks above the product of the other two, for which any orthonormal columns will do
        warnings.simplefilter("ignore")
        options = {"init": "svd", "n_iter_max": 20, "tol": 1e-6, "random_state": 0}  # not numpy's global generator
        core, factors = tensorly.decomposition.tucker(array, rank=list(ranks), **options)
    return Tucker(*(torch.tensor(part, dtype=tensor.dtype, device=tensor.device) for part in (core, *factors)))


@torch.no_grad()
def hosvd(tensor: torch.Tensor) -> tuple[Tucker, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The exact higher-order singular value decomposition in float64, and the singular values of the three unfoldings.

    Each rank is the size of its mode, or the product of the other two if less.
    """
    tensor = tensor.detach().double()
    unfoldings = [tensor.movedim(mode, 0).flatten(1) for mode in range(3)]
    out, in_, basis = (torch.linalg.svd(unfolding, full_matrices=False) for unfolding in unfoldings)
    factors = out.U, in_.U, basis.U
    return Tucker(_project(tensor, factors), *factors), (out.S, in_.S, basis.S)


def _project(tensor: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """tensor x1 matrices[0]^T x2 matrices[1]^T x3 matrices[2]^T."""
    for matrix in matrices:
        tensor = torch.tensordot(tensor.movedim(0, -1), matrix, 1)  # takes the first mode, puts it last: three in turn
    return tensor


@torch.enable_grad()
def fit(start: Tucker, loss: Callable[[torch.Tensor], torch.Tensor], steps: int) -> Tucker:
    """Minimizes a function of the dense tensor (out, in, basis) by L-BFGS; returns factors of orthonormal columns."""
    parts = start.map(lambda part: part.detach().clone(memory_format=torch.contiguous_format).requires_grad_())
    optimizer = torch.optim.LBFGS(parts, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(parts.dense())
        value.backward()
        return value

    optimizer.step(closure)
    return parts.map(torch.Tensor.detach).orthogonal()


def tucker_scaled(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    ranks: tuple[int, int, int],
    measure: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Tucker:
    """A Tucker tensor T that minimizes ||scale * T - tensor||, or ||measure(scale * T - tensor)||, by L-BFGS.

    `measure` is a linear map; the tensor itself then counts to a thousandth, for the kernel of the map.
    """
    tensor, scale = tensor.detach().double(), scale.detach().double()
    # the gradient step from zero; tensor / scale would give the greatest weight to the entries of least effect
    start = tucker(scale * tensor / scale.abs().max().clamp(min=1e-30) ** 2, ranks)
    measured = tensor if measure is None else measure(tensor)

    def loss(found: torch.Tensor) -> torch.Tensor:
        missed = scale * found - tensor
        own = relative_energy(missed, tensor)
        return own if measure is None else _UNSEEN * own + relative_energy(measure(missed), measured)

    return fit(start, loss, steps=400)


def relative_energy(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The squared norm of a tensor as a share of that of another; 0 if both are zero."""
    return tensor.square().sum() / whole.square().sum().clamp(min=1e-300)


def check_ranks(r: Ranks, name: str = "r") -> Ranks:
    """Returns `r`, a list (as of JSON) as a tuple; raises a ValueError if it is no positive int, nor three of them."""
    ranks = tuple(r) if isinstance(r, (tuple, list)) else (r,)
    wrong = any(isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0 for rank in ranks)
    if wrong or len(ranks) != (3 if isinstance(r, (tuple, list)) else 1):
        raise ValueError(
            f"`{name}` should be a positive integer value, or three of them for the modes (out, in, basis), but the "
            f"value passed is {r}"
        )
    return triple(ranks) if isinstance(r, (tuple, list)) else r


def cap_ranks(r: Ranks, shape: Sequence[int]) -> tuple[int, int, int]:
    """The ranks (ro, ri, rb), an int for the three, none above the size of its mode in the shape (out, in, basis)."""
    ranks = r if isinstance(r, tuple) else (r, r, r)
    return triple(min(rank, size) for rank, size in zip(ranks, shape, strict=True))
