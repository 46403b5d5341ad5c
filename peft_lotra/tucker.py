# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Tucker algebra on coefficient tensors (out, in, basis), and (out, in, basis, kernel) of convolutions.

Source: T. G. Kolda, B. W. Bader, "Tensor Decompositions and Applications", SIAM Review 51 (2009), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import add, index, mul
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


# What `r` and `ranks` may be: one rank for all modes, (out, in, basis), or (out, in, basis, kernel); see `cap_ranks`.
Ranks = int | tuple[int, ...]


class Tucker(tuple):
    """A tensor (out, in, basis), or (out, in, basis, kernel) for a convolution, in Tucker form, the n-mode products

        core x1 factor_out x2 factor_in x3 factor_basis [x4 factor_kernel].

    It is the tuple of these components, in this order.

    Args:
        components: core (ro, ri, rb [, rk]), factor_out (out, ro), factor_in (in, ri), factor_basis (basis, rb), and
            with a kernel factor_kernel (kernel, rk).

    Example:
        >>> factors = torch.ones(6, 2), torch.ones(5, 1), torch.ones(4, 3)
        >>> tensor = Tucker(torch.ones(2, 1, 3), *factors)
        >>> tensor.ranks, tensor.shape, tensor.numel(), tensor.dense().shape
        ((2, 1, 3), (6, 5, 4), 35, torch.Size([6, 5, 4]))
    """

    # not a NamedTuple, whose number of components is fixed
    __slots__ = ()
    _fields = ("core", "factor_out", "factor_in", "factor_basis", "factor_kernel")
    core = property(lambda self: self[0])
    factor_out = property(lambda self: self[1])
    factor_in = property(lambda self: self[2])
    factor_basis = property(lambda self: self[3])

    def __new__(cls, *components: Tensor) -> Tucker:
        return super().__new__(cls, components)

    @property
    def factor_kernel(self) -> Tensor:
        """(kernel, rk); an AttributeError without a kernel."""
        if len(self) < 5:
            raise AttributeError("This Tucker tensor has no kernel mode, and so no `factor_kernel`.")
        return self[4]

    def __getnewargs__(self) -> tuple[Tensor, ...]:  # copies and pickles call `__new__` with these
        return tuple(self)

    def _asdict(self) -> dict[str, Tensor]:
        """The components by name."""
        return dict(zip(self._fields, self, strict=False))

    def _replace(self, **components: Tensor) -> Tucker:
        """The tensor with some components in place of its own."""
        return Tucker(*{**self._asdict(), **components}.values())

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """All components but the core."""
        return self[1:]

    @property
    def ranks(self) -> tuple[int, ...]:
        """(ro, ri, rb), or (ro, ri, rb, rk)."""
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, basis), or (out, in, basis, kernel)."""
        return tuple(map(len, self.factors))

    def numel(self) -> int:
        """The number of parameters: ro ri rb + out ro + in ri + basis rb, or with a kernel ro ri rb rk + ..."""
        return sum(component.numel() for component in self)

    def map(self, function: Callable[[Tensor], Tensor]) -> Tucker:
        """`function` of each component."""
        return Tucker(*map(function, self))

    def dense(self, scale: float | Tensor | None = None) -> Tensor:
        """The dense tensor, multiplied by `scale` if given, in the dtype of the components."""
        components, dtype = self, self.core.dtype
        # float16 and bfloat16 products on the CPU are slow, and some are not implemented
        if self.core.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            components = self.map(Tensor.float)
        tensor = reconstruct(*components)
        return (tensor if scale is None else scale * tensor).to(dtype)

    def padded(self, basis: int) -> Tucker:
        """The tensor with zeros up to `basis` slices of the basis mode."""
        return self._replace(factor_basis=pad(self.factor_basis, (0, 0, 0, basis - len(self.factor_basis))))

    @torch.no_grad()
    def orthogonal(self) -> Tucker:
        """The same tensor with factors of orthonormal columns, and ranks at most the sizes of their modes."""
        bases, triangles = zip(*map(torch.linalg.qr, self.factors), strict=True)
        return Tucker(reconstruct(self.core, *triangles), *bases)

    @torch.no_grad()
    def balanced(self) -> Tucker:
        """The same tensor with columns of norm sqrt(out), 1, sqrt(basis) and 1, given factors of orthonormal columns.

        Random starts of adapters have these norms too, and the learning rates suit them.
        """
        gains = (math.sqrt(len(self.factor_out)), 1.0, math.sqrt(len(self.factor_basis)), 1.0)
        return Tucker(self.core / math.prod(gains), *map(mul, self.factors, gains))

    def truncated(self, r: Ranks) -> Tucker:
        """The best approximation of ranks at most `r` that HOOI finds, given factors of orthonormal columns.

        The factors of the result are orthonormal too: the squared error is the loss of squared norm of the core.
        """
        core, *rotations = tucker(self.core, cap_ranks(r, self.ranks))
        return Tucker(core, *map(torch.matmul, self.factors, rotations))


# the names of the components in a model and in a file; the last one is of convolutions alone
COMPONENTS = tuple(f"lotra_{name}" for name in Tucker._fields)


class Update(NamedTuple):
    """`scale` times a Tucker tensor: the update that one adapter adds to the coefficients of a layer."""

    scale: float | Tensor
    tensor: Tucker

    def dense(self) -> Tensor:
        """The update (out, in, basis), or (out, in, basis + 1) with the residual branch as the last slice; with a
        kernel as the fourth mode where the layer has one."""
        return self.tensor.dense(self.scale)


def reconstruct(core: Tensor, *factors: Tensor) -> Tensor:
    """The dense tensor of a core and a factor for each of its modes; differentiable in all components.

    The last modes are expanded first and the output mode last, so that the largest intermediate is (ro, in, basis
    [, kernel]). All products are of matrices: the result of a batched `torch.matmul` differs in its last digits
    between tensors that require a gradient and tensors that do not, and a loaded adapter must equal the trained one
    exactly.
    """
    tensor = core
    for factor in reversed(factors):  # each takes the last mode, and puts it first
        tensor = (factor @ tensor.movedim(-1, 0).flatten(1)).unflatten(1, tensor.shape[:-1])
    return tensor


def expand_inputs(core: Tensor, factor_in: Tensor, *factors: Tensor) -> Tensor:
    """core x2 factor_in x3 factor_basis [x4 factor_kernel], (ro, in, basis [, kernel]); no factor_out."""
    if len(factors) == 1:  # half the operations, for small layers
        return torch.bmm(factor_in.expand(len(core), -1, -1), core) @ factors[0].T
    return reconstruct(core, factor_in, *factors).movedim(-1, 0)


def direct_sum(tensors: Sequence[Tucker]) -> Tucker:
    """Return the exact sum of Tucker tensors of one shape; the ranks add, since the cores are blocks of one core."""
    columns = zip(*(tensor.factors for tensor in tensors), strict=True)
    factors = [torch.cat(of_mode, dim=1) for of_mode in columns]
    # `vmap` over the cores of the last tensor needs zeros like these
    core = tensors[-1].core.new_zeros([factor.shape[1] for factor in factors])
    first = [0] * core.dim()
    for tensor in tensors:
        last = list(map(add, first, tensor.ranks))
        core[tuple(map(slice, first, last))] = tensor.core
        first = last
    return Tucker(core, *factors)


@torch.no_grad()
def tucker(tensor: Tensor, ranks: tuple[int, ...]) -> Tucker:
    """Compute a Tucker approximation by higher-order orthogonal iteration (HOOI), started from the HOSVD.

    Each sweep replaces every factor by the leading left singular vectors of the unfolding that the other factors
    project. No rank is above the size of its mode. The factors have orthonormal columns. HOOI runs in float64 on the
    CPU, and the result has the dtype and the device of the tensor.
    """
    target = tensor.detach().double().cpu()
    core, *factors = truncated_hosvd(target, ranks)
    norm = target.norm()
    error = math.inf
    for _ in range(20):
        for mode, rank in enumerate(ranks):
            projected = target
            for other, factor in enumerate(factors):
                projected = projected.movedim(0, -1)
                if other != mode:
                    projected = projected @ factor
            factors[mode] = _leading_vectors(projected.movedim(mode, 0), rank)
        core = projected @ factors[-1]

        # the factors are orthonormal
        previous, error = error, (norm**2 - core.norm() ** 2).clamp(min=0).sqrt()
        if abs(previous - error) <= 1e-6 * norm:
            break
    return Tucker(core, *factors).map(lambda component: component.to(tensor.device, tensor.dtype))


@torch.no_grad()
def hosvd(tensor: Tensor) -> tuple[Tucker, tuple[Tensor, ...]]:
    """The exact higher-order singular value decomposition in float64, and the singular values of the unfoldings.

    Each rank is the size of its mode, or the product of the others if less. The slices of the core have the singular
    values as norms.
    """
    ranks = tuple(min(size, tensor.numel() // size) for size in tensor.shape)
    decomposition = truncated_hosvd(tensor, ranks)
    core = decomposition.core
    return decomposition, tuple(core.movedim(mode, 0).flatten(1).norm(dim=1) for mode in range(core.dim()))


@torch.no_grad()
def truncated_hosvd(tensor: Tensor, ranks: tuple[int, ...]) -> Tucker:
    """The higher-order singular value decomposition truncated to `ranks`, in float64, with orthonormal columns.

    No rank is above the size of its mode. Unlike those of `hosvd`, ranks may be above the product of the others.
    """
    tensor = tensor.detach().double()
    factors = [_leading_vectors(tensor.movedim(mode, 0), rank) for mode, rank in enumerate(ranks)]
    return Tucker(reconstruct(tensor, *(factor.T for factor in factors)), *factors)


def _leading_vectors(tensor: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors of the unfolding of the first mode.

    A rank above the number of columns takes further orthonormal vectors, which may be any.
    """
    unfolding = tensor.flatten(1)
    # the triangle has the same left singular vectors; the right ones would cost more
    triangle = torch.linalg.qr(unfolding.T, mode="r").R.T
    return torch.linalg.svd(triangle, full_matrices=rank > triangle.shape[1]).U[:, :rank].contiguous()


@torch.enable_grad()
def fit(start: Tucker, loss: Callable[[Tensor], Tensor], steps: int) -> Tucker:
    """Minimize a function of the dense tensor by L-BFGS; return factors with orthonormal columns."""
    minimum = start.map(lambda part: part.detach().clone(memory_format=torch.contiguous_format).requires_grad_())
    optimizer = torch.optim.LBFGS(minimum, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(minimum.dense())
        value.backward()
        return value

    optimizer.step(closure)
    return minimum.orthogonal()


def tucker_scaled(
    tensor: Tensor,
    scale: Tensor,
    ranks: tuple[int, ...],
    measure: Callable[[Tensor], Tensor] | None = None,
) -> Tucker:
    """A Tucker tensor T that minimizes ||scale * T - tensor||, or ||measure(scale * T - tensor)||, by L-BFGS.

    `measure` is a linear map; the tensor itself then counts to a thousandth, for the kernel of the map.
    """
    tensor, scale = tensor.detach().double(), scale.detach().double()
    # the gradient step from zero; tensor / scale would give the greatest weight to the entries of least effect
    start = tucker(scale * tensor / scale.abs().max().clamp(min=1e-30) ** 2, ranks)
    measured = tensor if measure is None else measure(tensor)

    def loss(dense: Tensor) -> Tensor:
        error = scale * dense - tensor
        energy = relative_energy(error, tensor)
        if measure is None:
            return energy
        return 1e-3 * energy + relative_energy(measure(error), measured)

    return fit(start, loss, steps=400)


def relative_energy(tensor: Tensor, whole: Tensor) -> Tensor:
    """The squared norm of a tensor as a share of that of another; 0 if both are zero."""
    return tensor.square().sum() / whole.square().sum().clamp(min=1e-300)


def check_ranks(r: Ranks, name: str = "r", kernel: bool = True) -> Ranks:
    """Returns `r` as plain integers, a list (as of JSON) as a tuple; a ValueError if it is no positive integer, nor 3
    of them, or with a `kernel` 4."""
    several = isinstance(r, (tuple, list))
    try:
        ranks = tuple(0 if isinstance(rank, bool) else index(rank) for rank in (r if several else (r,)))
    except TypeError:
        ranks = ()
    if len(ranks) not in ((3, 3 + kernel) if several else (1,)) or min(ranks) <= 0:
        four = ", or four with the kernel of convolutions" * kernel
        raise ValueError(
            f"`{name}` should be a positive integer value, or three of them for the modes (out, in, basis){four}, "
            f"but the value passed is {r}"
        )
    return ranks if several else min(ranks)


def cap_ranks(r: Ranks, shape: Sequence[int]) -> tuple[int, ...]:
    """The rank of each mode in the shape (out, in, basis [, kernel]), none above the size of the mode.

    An int is for all modes. Three ranks leave the kernel full, since it is small; of four, the last counts only where
    there is a kernel, so that one `r` serves a network of convolutions and dense layers.

    Example:
        >>> cap_ranks(4, (16, 8, 5, 9)), cap_ranks((4, 4, 3), (16, 8, 5, 9))
        ((4, 4, 4, 4), (4, 4, 3, 9))
        >>> cap_ranks((4, 4, 3, 2), (16, 8, 5))
        (4, 4, 3)
    """
    ranks = r if isinstance(r, tuple) else (r,) * len(shape)
    ranks = (*ranks, *shape[len(ranks) :])[: len(shape)]
    return tuple(min(rank, size) for rank, size in zip(ranks, shape, strict=True))


def full_shape(tensor: Any) -> tuple[int, ...]:
    """(out, in, basis [, kernel]) of a coefficient tensor, its residual branch counted as the last slice of the basis.

    Args:
        tensor: Any description with a `shape` and `has_residual`, such as those that `find_kan_layers` returns.
    """
    out, in_features, basis, *kernel = tensor.shape
    return (out, in_features, basis + tensor.has_residual, *kernel)


def default_ranks(shape: Sequence[int]) -> tuple[int, ...]:
    """The largest ranks up to 4 of a tensor of this shape that take fewer numbers than it has.

    The rank of the basis is lowered first, then those of the kernel, the inputs and the outputs; each is at least 1.

    Example:
        >>> [default_ranks(shape) for shape in ((16, 16, 9), (5, 2, 9), (1, 5, 9))]
        [(4, 4, 4), (4, 2, 3), (1, 4, 1)]
    """
    ranks = [min(4, size) for size in shape]
    for mode in (mode for mode in (2, 3, 1, 0) if mode < len(shape)):
        while ranks[mode] > 1 and math.prod(ranks) + sum(map(mul, shape, ranks)) >= math.prod(shape):
            ranks[mode] -= 1
    return tuple(ranks)
