# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Tucker algebra on coefficient tensors (out, in, basis), and (out, in, basis, kernel) of convolutions.

Source: T. G. Kolda, B. W. Bader, "Tensor Decompositions and Applications", SIAM Review 51 (2009), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


# What `r` and `ranks` may be: one rank for all modes, (out, in, basis), or (out, in, basis, kernel); see `cap_ranks`.
Rank = int | Literal["full"]
Ranks = Rank | tuple[Rank, ...]


class Tucker(tuple):
    """A tensor (out, in, basis), or (out, in, basis, kernel) for a convolution, in Tucker form, the n-mode products

        core x1 factor_out x2 factor_in x3 factor_basis [x4 factor_kernel].

    It is the tuple of these components, in this order. A full mode has its size as rank, and None as factor.

    Args:
        components: core (ro, ri, rb [, rk]), factor_out (out, ro), factor_in (in, ri), factor_basis (basis, rb), and
            with a kernel factor_kernel (kernel, rk).

    Example:
        >>> tensor = Tucker(torch.ones(6, 1, 3), None, torch.ones(5, 1), torch.ones(4, 3))
        >>> tensor.ranks, tensor.form, tensor.shape, tensor.numel(), tensor.dense().shape
        ((6, 1, 3), ('full', 1, 3), (6, 5, 4), 35, torch.Size([6, 5, 4]))
    """

    # a NamedTuple would have a fixed number of components
    __slots__ = ()
    _fields = ("core", "factor_out", "factor_in", "factor_basis", "factor_kernel")
    core: Any = property(lambda self: self[0])
    factor_out: Any = property(lambda self: self[1])
    factor_in: Any = property(lambda self: self[2])
    factor_basis: Any = property(lambda self: self[3])
    factor_kernel: Any = property(lambda self: self[4])

    def __new__(cls, *components: Tensor | None) -> Tucker:
        return super().__new__(cls, components)

    def __getnewargs__(self) -> tuple[Tensor | None, ...]:  # copies and pickles call `__new__` with these
        return tuple(self)

    def _asdict(self) -> dict[str, Tensor]:
        """Return the core and the factors that the tensor has, by name."""
        named = zip(self._fields, self, strict=False)
        return {name: component for name, component in named if component is not None}

    def _replace(self, **components: Tensor | None) -> Tucker:
        """Return the tensor with other components under these names."""
        named = dict(zip(self._fields, self, strict=False))
        return Tucker(*(named | components).values())

    @property
    def factors(self) -> tuple[Tensor | None, ...]:
        """The factor of each mode. None for a full mode."""
        return self[1:]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks (ro, ri, rb), or (ro, ri, rb, rk)."""
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes (out, in, basis), or (out, in, basis, kernel)."""
        modes = zip(self.ranks, self.factors, strict=True)
        return tuple(rank if factor is None else len(factor) for rank, factor in modes)

    @property
    def form(self) -> tuple[Rank, ...]:
        """The ranks, "full" for full modes."""
        modes = zip(self.ranks, self.factors, strict=True)
        return tuple("full" if factor is None else rank for rank, factor in modes)

    def numel(self) -> int:
        """Return the number of parameters: ro ri rb + out ro + in ri + basis rb, or with a kernel ro ri rb rk + ..."""
        return sum(component.numel() for component in self._asdict().values())

    def map(self, function: Callable[[Tensor], Tensor]) -> Tucker:
        """Apply a function to each component."""
        components = [None if component is None else function(component) for component in self]
        return Tucker(*components)

    def dense(self, scale: float | None = None) -> Tensor:
        """Return the dense tensor, multiplied by `scale`, in the dtype of the components."""
        dtype = self.core.dtype
        components = self
        # float16 and bfloat16 products on the CPU are slow, and some are not implemented
        if self.core.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            components = self.map(Tensor.float)
        tensor = reconstruct(*components)
        if scale is not None:
            tensor = scale * tensor
        return tensor.to(dtype)

    def padded(self, basis: int) -> Tucker:
        """Return the tensor with zeros up to `basis` slices of the basis mode."""
        added = basis - self.shape[2]
        return self._map_basis(lambda tensor, dim: _pad_mode(tensor, added, dim))

    def sliced(self, functions: slice) -> Tucker:
        """Return the tensor of some slices of the basis mode."""
        if self.factor_basis is None:
            return self._replace(core=self.core[:, :, functions])
        return self._replace(factor_basis=self.factor_basis[functions])

    def on_basis(self, transfer: Tensor) -> Tucker:
        """Multiply the basis mode by `transfer` (basis', basis), in its dtype."""

        def multiply(tensor: Tensor, dim: int) -> Tensor:
            product = multiply_mode(tensor.to(transfer), transfer, dim)
            return product.to(tensor).contiguous()

        return self._map_basis(multiply)

    def _map_basis(self, function: Callable[[Tensor, int], Tensor]) -> Tucker:
        """Apply a function of a tensor and a dimension to the basis mode, of its factor or else of the core."""
        if self.factor_basis is None:
            return self._replace(core=function(self.core, 2))
        return self._replace(factor_basis=function(self.factor_basis, 0))

    def raised(self, ranks: Sequence[int]) -> Tucker:
        """Return the same tensor with these ranks, none of which is lower.

        The components are padded with zeros. The core takes in the factor of a mode that becomes full.
        """
        core, *factors = self
        for mode, (rank, size) in enumerate(zip(ranks, self.shape, strict=True)):
            factor = factors[mode]
            if factor is None:
                continue
            if rank == size:
                core = multiply_mode(core, factor, mode)
                factors[mode] = None
            else:
                added = rank - factor.shape[1]
                core = _pad_mode(core, added, mode)
                factors[mode] = _pad_mode(factor, added, 1)
        return Tucker(core, *factors)

    @torch.no_grad()
    def orthogonal(self) -> Tucker:
        """Return the same tensor with factors of orthonormal columns, and full modes where ranks reach the sizes."""
        core, *factors = self
        for mode, factor in enumerate(self.factors):
            if factor is None:
                continue
            triangle = factor
            factors[mode] = None
            if factor.shape[1] < len(factor):
                factors[mode], triangle = torch.linalg.qr(factor)
            core = multiply_mode(core, triangle, mode)
        return Tucker(core, *factors)

    @torch.no_grad()
    def balanced(self) -> Tucker:
        """Return the same tensor with columns of norm sqrt(out), 1, sqrt(basis) and 1.

        The factors must have orthonormal columns. Random starts of adapters have these norms too, and the learning
        rates suit them.
        """
        core, *factors = self
        out, _, basis, *_ = self.shape
        norms = (math.sqrt(out), 1.0, math.sqrt(basis), 1.0)
        for mode, factor in enumerate(self.factors):
            if factor is not None:
                core = core / norms[mode]
                factors[mode] = factor * norms[mode]
        return Tucker(core, *factors)

    def truncated(self, r: Ranks) -> Tucker:
        """Return the best approximation of ranks at most `r` that HOOI finds, given factors of orthonormal columns.

        Its factors have orthonormal columns too. The squared error is the decrease of the squared norm of the core.
        """
        ranks = cap_ranks(r, self.ranks)
        core, *rotations = tucker(self.core, ranks)
        factors = list(self.factors)
        for mode, rotation in enumerate(rotations):
            if rotation is not None:
                factors[mode] = multiply_mode(rotation, factors[mode], 0)
        return Tucker(core, *factors)


# The names of the components in a model and in a file. Only convolutions have the last one.
COMPONENTS = tuple(f"lotra_{name}" for name in Tucker._fields)


def read_components(tensors: Mapping[str, Tensor], prefix: str = "") -> Tucker:
    """Return the Tucker tensor whose components have these names, after a prefix, in a state dict."""
    names = [prefix + name for name in COMPONENTS]
    core = tensors[names[0]]
    factors = [tensors.get(name) for name in names[1 : 1 + core.dim()]]
    return Tucker(core, *factors)


class Update(NamedTuple):
    """`scale` times a Tucker tensor: the update that one adapter adds to the coefficients of a layer."""

    scale: float
    tensor: Tucker

    def dense(self) -> Tensor:
        """Return the update (out, in, basis [, kernel]). An adapted base branch is the last slice of the basis."""
        return self.tensor.dense(self.scale)


def _pad_mode(tensor: Tensor, added: int, mode: int) -> Tensor:
    """Append zeros to a mode of a tensor."""
    zeros = [0, 0] * (tensor.dim() - 1 - mode)
    return pad(tensor, [*zeros, 0, added])


def multiply_mode(tensor: Tensor, factor: Tensor | None, mode: int) -> Tensor:
    """Multiply a mode of a tensor by a factor. None is the identity."""
    if factor is None:
        return tensor
    product = torch.tensordot(factor, tensor, ([1], [mode]))  # pyright: ignore[reportArgumentType] (its stub has int)
    return product.movedim(0, mode)


def reconstruct(core: Tensor, *factors: Tensor | None) -> Tensor:
    """Return the dense tensor of a core and a factor for each of its modes. All components are differentiable.

    The last modes are expanded first and the output mode last. The largest intermediate is (ro, in, basis [, kernel]).
    All products are of matrices. The result of a batched `torch.matmul` differs in its last digits between tensors
    that require a gradient and tensors that do not, but a loaded adapter must equal the trained one exactly.
    """
    if all(factor is None for factor in factors):
        return core.clone()  # the dense tensor does not change with the parameter
    tensor = core
    for factor in reversed(factors):
        # multiply the last mode, and put it first; `torch.tensordot` takes longer
        sizes = tensor.shape[:-1]
        tensor = tensor.movedim(-1, 0)
        if factor is not None:
            product = factor @ tensor.flatten(1)
            tensor = product.unflatten(1, sizes)
    return tensor.contiguous()


def expand_inputs(core: Tensor, factor_in: Tensor | None, factor_basis: Tensor | None) -> Tensor:
    """Return core x2 factor_in x3 factor_basis, (ro, in, basis).

    It takes half the operations of `reconstruct`, which counts in small layers.
    """
    if factor_in is not None:
        matrices = factor_in.expand(len(core), -1, -1)
        core = torch.bmm(matrices, core)
    return core if factor_basis is None else core @ factor_basis.T


def direct_sum(tensors: Sequence[Tucker]) -> Tucker:
    """Return the exact sum of Tucker tensors of one shape.

    The ranks add, since the cores are blocks of one core. A mode that is full in one of them is full in the sum.
    """
    factors: list[Any] = []
    ranks = []
    for mode, size in enumerate(tensors[0].shape):
        mode_factors: list[Any] = [tensor.factors[mode] for tensor in tensors]
        total = None
        if all(factor is not None for factor in mode_factors):
            total = torch.cat(mode_factors, dim=1)
            size = total.shape[1]
        factors.append(total)
        ranks.append(size)

    # `vmap` over the cores of the last tensor needs zeros like these
    core = tensors[-1].core.new_zeros(ranks)
    starts = [0] * core.dim()
    # each core is added to its own block, which is the whole length of modes that are full in the sum
    for tensor in tensors:
        block = tensor.core
        target = core
        for mode, rank in enumerate(tensor.ranks):
            if factors[mode] is None:
                block = multiply_mode(block, tensor.factors[mode], mode)
            else:
                target = target.narrow(mode, starts[mode], rank)
                starts[mode] += rank
        target += block
    return Tucker(core, *factors)


@torch.no_grad()
def tucker(tensor: Tensor, ranks: tuple[int, ...]) -> Tucker:
    """Compute a Tucker approximation by higher-order orthogonal iteration (HOOI), started from the HOSVD.

    Each sweep replaces every factor by the leading left singular vectors of the unfolding that the other factors
    project. No rank is above the size of its mode, and one that equals it has no factor. The factors have orthonormal
    columns. HOOI runs in float64 on the CPU, and the result has the dtype and the device of the tensor.
    """
    target = tensor.detach().double().cpu()
    core, *factors = truncated_hosvd(target, ranks)
    norm = target.norm()
    error = math.inf
    for _ in range(20):
        for mode, rank in enumerate(ranks):
            if factors[mode] is not None:
                factors[mode] = None
                projected = project(target, factors)
                factors[mode] = _leading_vectors(projected, mode, rank)
        core = project(target, factors)

        previous = error
        square = norm**2 - core.norm() ** 2  # since the factors are orthonormal
        error = square.clamp(min=0).sqrt()
        if abs(previous - error) <= 1e-6 * norm:
            break
    return Tucker(core, *factors).map(lambda component: component.to(tensor))


@torch.no_grad()
def hosvd(tensor: Tensor) -> tuple[Tucker, tuple[Tensor, ...]]:
    """Compute the exact higher-order singular value decomposition in float64.

    Returns:
        The decomposition, with ranks that are the size of the mode or the product of the other sizes, whichever is
        less; and for each mode the singular values of the unfolding, which are the norms of the slices of the core.
    """
    tensor = tensor.detach().double()
    factors = []
    for mode, size in enumerate(tensor.shape):
        rank = min(size, tensor.numel() // size)
        factors.append(_leading_vectors(tensor, mode, rank))
    core = project(tensor, factors)
    singular_values = []
    for mode in range(core.dim()):
        slices = core.movedim(mode, 0)
        singular_values.append(slices.flatten(1).norm(dim=1))
    return Tucker(core, *factors), tuple(singular_values)


@torch.no_grad()
def truncated_hosvd(tensor: Tensor, ranks: tuple[int, ...]) -> Tucker:
    """Compute the higher-order singular value decomposition truncated to `ranks`, in float64.

    No rank is above the size of its mode, and one that equals it has no factor. Unlike in `hosvd`, ranks may be above
    the product of the other sizes. The columns of the factors are orthonormal.
    """
    tensor = tensor.detach().double()
    factors: list[Tensor | None] = []
    for mode, (rank, size) in enumerate(zip(ranks, tensor.shape, strict=True)):
        factor = None
        if rank != size:
            factor = _leading_vectors(tensor, mode, rank)
        factors.append(factor)
    return Tucker(project(tensor, factors), *factors)


def project(tensor: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Multiply a tensor by the transposed factor of each mode."""
    transposed = [None if factor is None else factor.T for factor in factors]
    return reconstruct(tensor, *transposed)


def _leading_vectors(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """Return the leading left singular vectors of the unfolding of a mode.

    If the rank is above the number of columns, the last vectors are any orthonormal ones.
    """
    unfolding = tensor.movedim(mode, 0).flatten(1)
    # the triangle has the same left singular vectors; the right ones would cost more
    triangle = torch.linalg.qr(unfolding.T, mode="r").R.T
    needs_more = rank > triangle.shape[1]
    vectors = torch.linalg.svd(triangle, full_matrices=needs_more).U
    return vectors[:, :rank].contiguous()


@torch.enable_grad()
def fit(start: Tucker, loss: Callable[[Tensor], Tensor]) -> Tucker:
    """Minimize a function of the dense tensor by L-BFGS; return factors with orthonormal columns."""

    def make_leaf(component: Tensor) -> Tensor:
        copy = component.detach().clone(memory_format=torch.contiguous_format)
        return copy.requires_grad_()

    minimum = start.map(make_leaf)
    optimizer = torch.optim.LBFGS(
        list(minimum._asdict().values()),
        max_iter=400,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

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
    """Return a Tucker tensor T that minimizes ||scale * T - tensor||, or ||measure(scale * T - tensor)||, by L-BFGS.

    `measure` is a linear map. The error of the tensor then counts by a thousandth, for the kernel of the map.
    """
    tensor = tensor.detach().double()
    scale = scale.detach().double()
    # the gradient step from zero; tensor / scale would give the greatest weight to the entries of least effect
    largest = scale.abs().max().clamp(min=1e-30)
    start = tucker(scale * tensor / largest**2, ranks)
    measured = tensor if measure is None else measure(tensor)

    def loss(dense: Tensor) -> Tensor:
        error = scale * dense - tensor
        energy = relative_energy(error, tensor)
        if measure is None:
            return energy
        measured_energy = relative_energy(measure(error), measured)
        return 1e-3 * energy + measured_energy

    return fit(start, loss)


def relative_energy(tensor: Tensor, whole: Tensor) -> Tensor:
    """Return the squared norm of a tensor as a share of the squared norm of the whole. 0 if both are zero."""
    smallest = torch.finfo(whole.dtype).tiny
    energy = whole.square().sum().clamp(min=smallest)
    return tensor.square().sum() / energy


def check_ranks(r: Any, name: str = "r", kernel: bool = True) -> Ranks:
    """Return `r` with plain integers, a list (as of JSON) as a tuple.

    Raises:
        ValueError: It is no rank, and not three ranks, or with a `kernel` four.
    """
    is_sequence = isinstance(r, (tuple, list))
    ranks: tuple[Any, ...] = tuple(r) if is_sequence else (r,)
    counts = (3, 3 + kernel) if is_sequence else (1,)
    if len(ranks) not in counts or not all(map(_is_rank, ranks)):
        four = ", or four with the kernel of convolutions" * kernel
        raise ValueError(
            f'`{name}` should be a positive integer or "full", or three of them for the modes (out, in, basis){four}, '
            f"but the value passed is {r!r:.100}"
        )
    ranks = tuple(rank if rank == "full" else int(rank) for rank in ranks)
    return ranks if is_sequence else ranks[0]


def _is_rank(rank: Any) -> bool:
    if isinstance(rank, Integral) and not isinstance(rank, bool):
        return int(rank) > 0
    return isinstance(rank, str) and rank == "full"


def cap_ranks(r: Ranks, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the rank of each mode in the shape (out, in, basis [, kernel]), none above the size of the mode.

    A single rank is for all modes, and "full" is the size of a mode. Three ranks leave the kernel full, since it is
    small. The fourth rank counts only if there is a kernel: one `r` serves a network of convolutions and dense layers.

    Example:
        >>> cap_ranks(4, (16, 8, 5, 9)), cap_ranks(("full", 4, 1), (16, 8, 5, 9))
        ((4, 4, 4, 4), (16, 4, 1, 9))
        >>> cap_ranks((4, 4, 3, 2), (16, 8, 5))
        (4, 4, 3)
    """
    ranks = r if isinstance(r, tuple) else (r,) * len(shape)
    capped = list(shape)
    for mode, rank in enumerate(ranks[: len(shape)]):
        if rank != "full":
            capped[mode] = min(rank, shape[mode])
    return tuple(capped)


def component_shapes(r: Ranks, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the components of a tensor of this shape, by name: the core, and factors of modes not full.

    Ranks above the size of their mode are capped, as by `cap_ranks`. The shape of the core are the capped ranks.

    Example:
        >>> component_shapes(("full", 4, 1), (16, 8, 5))
        {'core': (16, 4, 1), 'factor_in': (8, 4), 'factor_basis': (5, 1)}
    """
    ranks = cap_ranks(r, shape)
    shapes = {"core": ranks}
    for name, size, rank in zip(Tucker._fields[1:], shape, ranks, strict=False):
        if rank != size:
            shapes[name] = (size, rank)
    return shapes


def form_text(form: Sequence[Rank] | None) -> str:
    """Return ranks as text, e.g. "(full, full, 1)"."""
    if form is None:
        return ""
    return f"({', '.join(map(str, form))})"


def full_shape(tensor: Any) -> tuple[int, ...]:
    """Return (out, in, basis [, kernel]) of a coefficient tensor, with the base branch as a slice of the basis.

    Args:
        tensor: Any description with a `shape` and `has_residual`, such as those that `find_kan_layers` returns.
    """
    out, in_features, basis, *kernel = tensor.shape
    return (out, in_features, basis + tensor.has_residual, *kernel)
