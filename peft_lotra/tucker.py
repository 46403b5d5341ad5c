# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Tucker algebra on coefficient tensors (out, in, basis), and (out, in, basis, kernel) of convolutions.

Source: T. G. Kolda, B. W. Bader, "Tensor Decompositions and Applications", SIAM Review 51 (2009), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import index
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

    It is the tuple of these components, in this order. A full mode, whose rank is its size, has no factor: None.

    Args:
        components: core (ro, ri, rb [, rk]), factor_out (out, ro), factor_in (in, ri), factor_basis (basis, rb), and
            with a kernel factor_kernel (kernel, rk).

    Example:
        >>> tensor = Tucker(torch.ones(6, 1, 3), None, torch.ones(5, 1), torch.ones(4, 3))
        >>> tensor.ranks, tensor.form, tensor.shape, tensor.numel(), tensor.dense().shape
        ((6, 1, 3), ('full', 1, 3), (6, 5, 4), 35, torch.Size([6, 5, 4]))
    """

    # not a NamedTuple, whose number of components is fixed
    __slots__ = ()
    _fields = ("core", "factor_out", "factor_in", "factor_basis", "factor_kernel")
    core: Any = property(lambda self: self[0])
    factor_out: Any = property(lambda self: self[1])
    factor_in: Any = property(lambda self: self[2])
    factor_basis: Any = property(lambda self: self[3])

    def __new__(cls, *components: Tensor | None) -> Tucker:
        return super().__new__(cls, components)

    @property
    def factor_kernel(self) -> Tensor | None:
        """(kernel, rk); an AttributeError without a kernel."""
        if len(self) < 5:
            raise AttributeError("This Tucker tensor has no kernel mode, and so no `factor_kernel`.")
        return self[4]

    def __getnewargs__(self) -> tuple[Tensor | None, ...]:  # copies and pickles call `__new__` with these
        return tuple(self)

    def _asdict(self) -> dict[str, Tensor]:
        """The core and the factors that the tensor has, by name."""
        named = zip(self._fields, self, strict=False)
        return {name: component for name, component in named if component is not None}

    def _replace(self, **components: Tensor | None) -> Tucker:
        """The tensor with some components in place of its own."""
        return Tucker(*{**dict(zip(self._fields, self, strict=False)), **components}.values())

    @property
    def factors(self) -> tuple[Tensor | None, ...]:
        """One for each mode, None for a full mode."""
        return self[1:]

    @property
    def ranks(self) -> tuple[int, ...]:
        """(ro, ri, rb), or (ro, ri, rb, rk)."""
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, basis), or (out, in, basis, kernel)."""
        modes = zip(self.ranks, self.factors, strict=True)
        return tuple(rank if factor is None else len(factor) for rank, factor in modes)

    @property
    def form(self) -> tuple[Rank, ...]:
        """The ranks, "full" for full modes."""
        modes = zip(self.ranks, self.factors, strict=True)
        return tuple("full" if factor is None else rank for rank, factor in modes)

    def numel(self) -> int:
        """The number of parameters: ro ri rb + out ro + in ri + basis rb, or with a kernel ro ri rb rk + ..."""
        return sum(component.numel() for component in self._asdict().values())

    def map(self, function: Callable[[Tensor], Tensor]) -> Tucker:
        """`function` of each component."""
        return Tucker(*(None if component is None else function(component) for component in self))

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
        missing = basis - self.shape[2]
        if not missing:
            return self
        if self.factor_basis is None:
            return self._replace(core=_pad_mode(self.core, missing, 2))
        return self._replace(factor_basis=pad(self.factor_basis, (0, 0, 0, missing)))

    def sliced(self, functions: slice) -> Tucker:
        """The tensor of some slices of the basis mode."""
        if self.factor_basis is None:
            return self._replace(core=self.core[:, :, functions])
        return self._replace(factor_basis=self.factor_basis[functions])

    def on_basis(self, transfer: Tensor) -> Tucker:
        """The tensor with its basis mode multiplied by `transfer` (basis', basis), in the dtype of the latter."""
        core, factor = self.core, self.factor_basis
        if factor is None:
            return self._replace(core=multiply_mode(core.to(transfer), transfer, 2).to(core).contiguous())
        return self._replace(factor_basis=(transfer @ factor.to(transfer)).to(factor))

    def raised(self, ranks: Sequence[int]) -> Tucker:
        """The same tensor with these ranks, none of which is lower.

        Zeros fill up. The core takes in the factor of a mode that becomes full.
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
                missing = rank - factor.shape[1]
                core = _pad_mode(core, missing, mode)
                factors[mode] = pad(factor, (0, missing))
        return Tucker(core, *factors)

    @torch.no_grad()
    def orthogonal(self) -> Tucker:
        """The same tensor with factors of orthonormal columns, and full modes where ranks reach the sizes."""
        core, *factors = self
        for mode, factor in enumerate(self.factors):
            if factor is None:
                continue
            is_full = factor.shape[1] >= len(factor)
            factors[mode], multiplier = (None, factor) if is_full else torch.linalg.qr(factor)
            core = multiply_mode(core, multiplier, mode)
        return Tucker(core, *factors)

    @torch.no_grad()
    def balanced(self) -> Tucker:
        """The same tensor with columns of norm sqrt(out), 1, sqrt(basis) and 1, given factors of orthonormal columns.

        Random starts of adapters have these norms too, and the learning rates suit them.
        """
        core, *factors = self
        gains = (math.sqrt(self.shape[0]), 1.0, math.sqrt(self.shape[2]), 1.0)
        for mode, factor in enumerate(self.factors):
            if factor is not None:
                core = core / gains[mode]
                factors[mode] = factor * gains[mode]
        return Tucker(core, *factors)

    def truncated(self, r: Ranks) -> Tucker:
        """The best approximation of ranks at most `r` that HOOI finds, given factors of orthonormal columns.

        The factors of the result are orthonormal too: the squared error is the loss of squared norm of the core.
        """
        core, *rotations = tucker(self.core, cap_ranks(r, self.ranks))
        factors = list(self.factors)
        for mode, rotation in enumerate(rotations):
            factor = factors[mode]
            if rotation is not None:
                factors[mode] = rotation if factor is None else factor @ rotation
        return Tucker(core, *factors)


# the names of the components in a model and in a file; the last one is of convolutions alone
COMPONENTS = tuple(f"lotra_{name}" for name in Tucker._fields)


def read_components(tensors: Mapping[str, Tensor], prefix: str = "") -> Tucker:
    """Return the Tucker tensor whose components have these names, after a prefix, in a state dict."""
    core = tensors[f"{prefix}{COMPONENTS[0]}"]
    names = COMPONENTS[1 : 1 + core.dim()]
    return Tucker(core, *(tensors.get(f"{prefix}{name}") for name in names))


class Update(NamedTuple):
    """`scale` times a Tucker tensor: the update that one adapter adds to the coefficients of a layer."""

    scale: float | Tensor
    tensor: Tucker

    def dense(self) -> Tensor:
        """The update (out, in, basis), or (out, in, basis + 1) with the residual branch as the last slice; with a
        kernel as the fourth mode where the layer has one."""
        return self.tensor.dense(self.scale)


def _pad_mode(tensor: Tensor, missing: int, mode: int) -> Tensor:
    """Append so many zeros to a mode of a tensor."""
    later = [0, 0] * (tensor.dim() - 1 - mode)
    return pad(tensor, [*later, 0, missing])


def multiply_mode(tensor: Tensor, factor: Tensor | None, mode: int) -> Tensor:
    """The product of a tensor with a factor in one of its modes; None stands for the identity."""
    if factor is None:
        return tensor
    product = factor @ tensor.movedim(mode, 0).flatten(1)
    return product.unflatten(1, tensor.movedim(mode, 0).shape[1:]).movedim(0, mode)


def reconstruct(core: Tensor, *factors: Tensor | None) -> Tensor:
    """The dense tensor of a core and a factor for each of its modes; differentiable in all components.

    The last modes are expanded first and the output mode last, so that the largest intermediate is (ro, in, basis
    [, kernel]). All products are of matrices: the result of a batched `torch.matmul` differs in its last digits
    between tensors that require a gradient and tensors that do not, and a loaded adapter must equal the trained one
    exactly.
    """
    tensor = core
    if all(factor is None for factor in factors):
        return core.clone()  # what is made of a parameter does not change with it
    for factor in reversed(factors):  # each takes the last mode, and puts it first
        sizes = tensor.shape[:-1]
        tensor = tensor.movedim(-1, 0)
        if factor is not None:
            tensor = (factor @ tensor.flatten(1)).unflatten(1, sizes)
    return tensor.contiguous()


def expand_inputs(core: Tensor, factor_in: Tensor | None, *factors: Tensor | None) -> Tensor:
    """core x2 factor_in x3 factor_basis [x4 factor_kernel], (ro, in, basis [, kernel]); no factor_out."""
    factor_basis = factors[0]
    if len(factors) > 1:
        return reconstruct(core, None, factor_in, *factors)
    # half the operations, for small layers
    if factor_in is not None:
        core = torch.bmm(factor_in.expand(len(core), -1, -1), core)
    return core if factor_basis is None else core @ factor_basis.T


def direct_sum(tensors: Sequence[Tucker]) -> Tucker:
    """Return the exact sum of Tucker tensors of one shape.

    The ranks add, since the cores are blocks of one core. A mode that is full in one of them is full in the sum.
    """
    factors: list[Any] = []
    ranks = []
    for mode, size in enumerate(tensors[0].shape):
        of_mode: list[Any] = [tensor.factors[mode] for tensor in tensors]
        is_full = any(factor is None for factor in of_mode)
        factors.append(None if is_full else torch.cat(of_mode, dim=1))
        ranks.append(size if is_full else factors[-1].shape[1])
    # `vmap` over the cores of the last tensor needs zeros like these
    core = tensors[-1].core.new_zeros(ranks)
    first = [0] * core.dim()
    for tensor in tensors:
        block = tensor.core
        place = []
        for mode, factor in enumerate(factors):
            if factor is None:
                block = multiply_mode(block, tensor.factors[mode], mode)
                place.append(slice(None))
            else:
                last = first[mode] + block.shape[mode]
                place.append(slice(first[mode], last))
                first[mode] = last
        core[tuple(place)] += block
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
                others = [*factors[:mode], None, *factors[mode + 1 :]]
                factors[mode] = _leading_vectors(project(target, others).movedim(mode, 0), rank)
        core = project(target, factors)

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
    tensor = tensor.detach().double()
    factors = []
    for mode, size in enumerate(tensor.shape):
        factors.append(_leading_vectors(tensor.movedim(mode, 0), min(size, tensor.numel() // size)))
    core = project(tensor, factors)
    return Tucker(core, *factors), tuple(core.movedim(mode, 0).flatten(1).norm(dim=1) for mode in range(core.dim()))


@torch.no_grad()
def truncated_hosvd(tensor: Tensor, ranks: tuple[int, ...]) -> Tucker:
    """The higher-order singular value decomposition truncated to `ranks`, in float64, with orthonormal columns.

    No rank is above the size of its mode, and one that equals it has no factor. Unlike those of `hosvd`, ranks may be
    above the product of the others.
    """
    tensor = tensor.detach().double()
    factors: list[Tensor | None] = []
    for mode, (rank, size) in enumerate(zip(ranks, tensor.shape, strict=True)):
        factors.append(None if rank == size else _leading_vectors(tensor.movedim(mode, 0), rank))
    return Tucker(project(tensor, factors), *factors)


def project(tensor: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Multiply a tensor by the transposed factor of each mode."""
    return reconstruct(tensor, *(None if factor is None else factor.T for factor in factors))


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
    parameters = minimum._asdict().values()
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

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


def check_ranks(r: Any, name: str = "r", kernel: bool = True) -> Ranks:
    """Return `r` with plain integers, a list (as of JSON) as a tuple.

    Raises:
        ValueError: It is no rank, nor three of them, or with a `kernel` four.
    """
    several = isinstance(r, (tuple, list))
    try:
        ranks = tuple(map(_check_rank, r if several else (r,)))
    except (TypeError, ValueError):
        ranks = ()
    if len(ranks) not in ((3, 3 + kernel) if several else (1,)):
        four = ", or four with the kernel of convolutions" * kernel
        raise ValueError(
            f'`{name}` should be a positive integer or "full", or three of them for the modes (out, in, basis){four}, '
            f"but the value passed is {r!r:.100}"
        )
    return ranks if several else next(iter(ranks))


def _check_rank(rank: Any) -> Any:
    if isinstance(rank, str):
        if rank == "full":
            return "full"
        raise ValueError
    number = index(rank)
    if isinstance(rank, bool) or number <= 0:
        raise ValueError
    return number


def cap_ranks(r: Ranks, shape: Sequence[int]) -> tuple[int, ...]:
    """The rank of each mode in the shape (out, in, basis [, kernel]), none above the size of the mode.

    A single rank is for all modes, and "full" is the size of a mode. Three ranks leave the kernel full, since it is
    small; of four, the last counts only where there is a kernel, so that one `r` serves a network of convolutions and
    dense layers.

    Example:
        >>> cap_ranks(4, (16, 8, 5, 9)), cap_ranks(("full", 4, 1), (16, 8, 5, 9))
        ((4, 4, 4, 4), (16, 4, 1, 9))
        >>> cap_ranks((4, 4, 3, 2), (16, 8, 5))
        (4, 4, 3)
    """
    ranks = r if isinstance(r, tuple) else (r,) * len(shape)
    ranks = (*ranks, *shape[len(ranks) :])[: len(shape)]
    return tuple(size if rank == "full" else min(rank, size) for rank, size in zip(ranks, shape, strict=True))


def component_shapes(ranks: Sequence[int], shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shapes of the core and of the factors of the modes that are not full, by name."""
    shapes = {"core": tuple(ranks)}
    for name, size, rank in zip(Tucker._fields[1:], shape, ranks, strict=False):
        if rank != size:
            shapes[name] = (size, rank)
    return shapes


def count_parameters(ranks: Sequence[int], shape: Sequence[int]) -> int:
    """The number of parameters of a Tucker tensor of these ranks and this shape."""
    return sum(map(math.prod, component_shapes(ranks, shape).values()))


def form_text(form: Sequence[Rank] | None) -> str:
    """Ranks as text, e.g. "(full, full, 1)"."""
    return "" if form is None else f"({', '.join(map(str, form))})"


def full_shape(tensor: Any) -> tuple[int, ...]:
    """(out, in, basis [, kernel]) of a coefficient tensor, its residual branch counted as the last slice of the basis.

    Args:
        tensor: Any description with a `shape` and `has_residual`, such as those that `find_kan_layers` returns.
    """
    out, in_features, basis, *kernel = tensor.shape
    return (out, in_features, basis + tensor.has_residual, *kernel)
