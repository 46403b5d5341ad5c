# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layouts: how a library stores its coefficients, as an einops pattern, and the canonical order (out, in, basis).

A pattern names the axes of the stored parameter:

* `o` and `i` are the outputs and the inputs, features or channels.
* `...` stands for the axes of the kernel of a convolution, which make up a fourth mode.
* A group axis, whose name is the argument `groups` of `parse_layout`, counts the groups of a grouped convolution. It
  belongs to the output mode, and `i` then counts the inputs of one group.
* Every other name belongs to the basis mode, in the order in which it appears. Without one, the basis has length one.

Parentheses flatten axes as in einops, and `()` is an axis of length one. Two marks are not of einops:

* `(i k):2` is a flattened axis that is stored as two dimensions. These need not have the lengths of i and k: only the
  product of both counts.
* `+` inside parentheses concatenates two blocks, as in einx: first the coefficients, then the residual weights.

A layer may have several parameters, its *parts*, whose basis functions follow one another. A later part may lack `o`,
`i` or the axes of the kernel, and has the same values for all edges along them. The mean of their updates is stored.

    "o i k"          efficient-kan
    "t o i g"        FourierKAN: the basis mode is (t g)
    "o (i k)"        FastKAN
    "o ((i k) + i)"  inkan: coefficients and residual weights in one parameter
    "o (k i) ..."    convolutions
    "o () (i k):2"   ReLU-KAN: the two dimensions are not those of i and k
    "i k"            ReLU-KAN's phases, which all outputs share
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, islice

from einops import EinopsError, reduce, repeat
from einops.parsing import ParsedExpression
from torch import Tensor

from ..kan.product import concatenate


Axes = tuple[str, ...]
Dims = tuple[Axes, ...]  # the axes of each dimension
Lengths = Mapping[str, int]  # by axis
# `(i k):2` is "(i k over2)" for the parser of einops, which has no `:2`: these names are marks, not axes.
_STORED_OVER = {f"over{count}": count for count in range(2, 10)}


@dataclass(frozen=True)
class Layout:
    """A parsed pattern.

    Attributes:
        blocks: The axes of each dimension of the coefficients, then of residual weights in the same parameter.
        kernel: The axes of the kernel mode.
        groups: The group axes.
        stored_over: The number of stored dimensions of each dimension.
        shared: The axes that the parameter lacks, and is shared along.
    """

    pattern: str
    blocks: tuple[Dims, ...]
    kernel: Axes = ()
    groups: Axes = ()
    stored_over: tuple[int, ...] = ()
    shared: Axes = ()

    @cached_property
    def axes(self) -> Axes:
        """All axes, in the order of the pattern."""
        return _flatten(self.blocks[0])

    @cached_property
    def basis(self) -> Axes:
        """The axes that make up the basis mode."""
        other_modes = {"o", "i", *self.groups, *self.kernel}
        return tuple(axis for axis in self.axes if axis not in other_modes)

    @cached_property
    def _modes(self) -> list[Axes]:
        """The axes of each canonical mode."""
        modes = [(*self.groups, "o"), ("i",), self.basis]
        return [*modes, self.kernel] if self.kernel else modes

    @cached_property
    def has_residual(self) -> bool:
        """Whether residual weights are packed into the parameter."""
        return len(self.blocks) > 1

    def share(self, first: Layout, is_list: bool) -> Layout:
        """Return this layout of a later part, shared along the axes that only the first part has.

        Args:
            first: The layout of the first part.
            is_list: Whether the part is a list with a parameter for each group, which needs no group axis.
        """
        groups = self.groups if is_list else first.groups
        needed = (*groups, "o", "i", *first.kernel)
        missing = tuple(axis for axis in needed if axis not in self.axes)
        if not missing:
            return self
        return replace(self, shared=missing, groups=groups, kernel=first.kernel)

    def canonical_shape(self, lengths: Lengths) -> tuple[int, ...]:
        """Return (out, in, basis) or (out, in, basis, kernel), with a packed base branch in the basis mode."""
        sizes = [_multiply(mode, lengths) for mode in self._modes]
        if self.has_residual:
            sizes[2] += 1
        return tuple(sizes)

    def axis_lengths(self, shape: Sequence[int], given: Lengths) -> dict[str, int]:
        """Return the length of every axis.

        Args:
            shape: The stored shape of the parameter.
            given: The lengths of axes that this shape does not determine.

        Raises:
            ValueError: The pattern does not fit the shape, or leaves a length open.
        """
        lengths = dict(given)
        problem = self._solve_lengths(shape, lengths)
        if problem:
            known = {axis: given[axis] for axis in self.axes if axis in given}
            raise ValueError(
                f"Pattern {self.pattern!r} does not fit a parameter of shape {tuple(shape)}, with {known}: {problem}. "
                "Correct it, or give lengths of axes by `axes`."
            )
        return lengths

    def _solve_lengths(self, shape: Sequence[int], lengths: dict[str, int]) -> str:
        """Add the unknown lengths of axes to `lengths`. Return the contradiction, or an empty string."""
        dimensions = sum(self.stored_over)
        if len(shape) != dimensions:
            return f"it names {dimensions} dimensions"
        sizes = iter(shape)
        for count, dim, *packed in zip(self.stored_over, *self.blocks, strict=True):
            size = math.prod(islice(sizes, count))
            # a set, in which equal blocks count once: they differ only in the dimension of the `+`, where sizes add up
            blocks = {dim, *packed}
            if not _solve_length(blocks, dim, size, lengths):
                return f"{_write([dim])} cannot be {size}"
        return ""

    def to_canonical(self, parameter: Tensor, lengths: Lengths) -> Tensor:
        """Return a stored parameter as (out, in, basis[, kernel]), with packed residual weights as the last slice."""
        if self._is_canonical:  # einops takes as long as the arithmetic of a small layer
            return parameter if parameter.dim() == 3 else parameter.unsqueeze(2)

        if len(self.stored_over) < parameter.dim():
            shape = [_multiply(dim, lengths) for dim in self.blocks[0]]
            parameter = parameter.reshape(shape)
        blocks: Sequence[Tensor] = [parameter]
        if self.has_residual:
            sizes = [_multiply(dims[self._packed_dim], lengths) for dims in self.blocks]
            blocks = parameter.split(sizes, self._packed_dim)
        tensors = []
        for block, (stored, canonical, axes) in zip(blocks, self._expressions, strict=True):
            lengths_of_axes = {axis: lengths[axis] for axis in axes}
            tensor = repeat(block, f"{stored} -> {canonical}", **lengths_of_axes)
            tensors.append(tensor)
        return concatenate(tensors, 2)

    def from_canonical(
        self,
        tensor: Tensor,
        lengths: Lengths,
        shape: Sequence[int],
    ) -> Tensor:
        """Return (out, in, basis[, kernel]) in the stored shape, the inverse of `to_canonical`. It is differentiable.

        Along the axes in `shared` the mean is stored.
        """
        if self._is_canonical:
            return tensor if len(shape) == 3 else tensor.squeeze(2)
        blocks = [tensor]
        if self.has_residual:
            blocks = [tensor[:, :, :-1], tensor[:, :, -1:]]
        tensors = []
        for block, (stored, canonical, axes) in zip(blocks, self._expressions, strict=True):
            lengths_of_axes = {axis: lengths[axis] for axis in axes}
            tensor = reduce(block, f"{canonical} -> {stored}", "mean", **lengths_of_axes)
            tensors.append(tensor)
        return concatenate(tensors, self._packed_dim).reshape(shape)

    @cached_property
    def _packed_dim(self) -> int:
        """The dimension in which coefficients and residual weights are concatenated; 0 without."""
        for position, dims in enumerate(zip(*self.blocks, strict=True)):
            if len({*dims}) > 1:
                return position
        return 0

    @cached_property
    def _is_canonical(self) -> bool:
        """Whether the parameter is stored as "o i k" or "o i"."""
        if self.kernel or self.groups or self.has_residual or self.shared:
            return False
        begins_with_edges = self.blocks[0][:2] == (("o",), ("i",))
        dimensions = sum(self.stored_over)  # two, or three with the basis
        return begins_with_edges and dimensions <= 3

    @cached_property
    def _expressions(self) -> list[tuple[str, str, Axes]]:
        """The einops expressions of the stored and of the canonical order, and the axes, of each block."""
        expressions = []
        for dims in self.blocks:
            axes = _flatten(dims) + self.shared
            modes = []
            for mode in self._modes:
                present = [axis for axis in mode if axis in axes]
                modes.append(tuple(present))
            expressions.append((_write(dims), _write(modes), axes))
        return expressions


def _flatten(dims: Iterable[Axes]) -> Axes:
    return tuple(chain.from_iterable(dims))


def _multiply(axes: Sequence[str], lengths: Lengths) -> int:
    return math.prod([lengths[axis] for axis in axes])


def _solve_length(
    blocks: Collection[Axes],
    dim: Axes,
    size: int,
    lengths: dict[str, int],
) -> bool:
    """Add the unknown length of a dimension to `lengths`. Return whether the blocks in it then have its size."""
    unknown = [axis for axis in dim if axis not in lengths]
    if len(unknown) > 1:
        return False
    # the size is constant + slope * unknown length: a block has the unknown axis once, or lacks it
    constant = slope = 0
    for block in blocks:
        product = math.prod([lengths.get(axis, 1) for axis in block])
        if unknown and unknown[0] in block:
            slope += product
        else:
            constant += product

    if not unknown:
        return size == constant > 0
    if slope == 0:  # an axis beside the unknown one has length zero
        return False
    length = (size - constant) // slope
    lengths[unknown[0]] = length
    return size == constant + slope * length > 0


def _write(dims: Sequence[Axes]) -> str:
    words = []
    for dim in dims:
        word = " ".join(dim)
        words.append(word if len(dim) == 1 else f"({word})")
    return " ".join(words)


@lru_cache(1024)
def parse_layout(
    pattern: str,
    groups: str = "",
    dimensions: int | None = None,
    may_share: bool = False,
) -> Layout:
    """Parse a pattern.

    Args:
        pattern: The pattern of a parameter.
        groups: The group axis, which the pattern may lack.
        dimensions: The number of dimensions of the parameter. It gives the number of axes in `...`.
        may_share: Whether the pattern may lack `o` or `i`, as the patterns of later parts may.

    Raises:
        ValueError: The pattern is malformed, or `o` and `i` do not appear exactly once.

    Example:
        >>> layout = parse_layout("o (i k)")
        >>> layout.axis_lengths((4, 15), {"i": 3})
        {'i': 3, 'o': 4, 'k': 5}
        >>> layout.to_canonical(torch.zeros(4, 15), {"o": 4, "i": 3, "k": 5}).shape
        torch.Size([4, 3, 5])
    """
    problem = f"Pattern {pattern!r} is not a layout of KAN coefficients: "
    blocks = []
    stored_over: list[int] = []
    for text in _split_blocks(pattern):
        try:
            composition = ParsedExpression(text).composition
        except EinopsError as error:
            raise ValueError(f"{problem}{error}.") from error
        dims = []
        stored_over = []
        for dim in composition:
            if not all(isinstance(axis, str) for axis in dim):
                raise ValueError(f"{problem}an axis must have a name.")
            dims.append(tuple(axis for axis in dim if axis not in _STORED_OVER))
            mark = dim[-1] if dim else ""
            stored_over.append(_STORED_OVER.get(mark, 1))
        blocks.append(dims)

    kernel: Axes = ()
    if ("kernel",) in blocks[0]:
        count = 2
        if dimensions is not None:
            others = sum(stored_over) - 1
            count = max(dimensions - others, 0)
        kernel = tuple(f"kernel{n}" for n in range(count))
        position = blocks[0].index(("kernel",))
        stored_over[position : position + 1] = [1] * count
        for dims in blocks:
            dims[position : position + 1] = [(axis,) for axis in kernel]

    axes = {*_flatten(blocks[0])}
    if not (may_share or {"o", "i"} <= axes):
        raise ValueError(problem + "`o` and `i` must appear once each.")
    group_axes = tuple(axis for axis in groups.split() if axis in axes)
    frozen_blocks = tuple(tuple(dims) for dims in blocks)
    layout = Layout(pattern, frozen_blocks, kernel, group_axes, tuple(stored_over))
    axes_of_residual = axes - {*layout.basis}
    for residual in layout.blocks[1:]:
        if not layout.basis or {*_flatten(residual)} != axes_of_residual:
            raise ValueError(problem + "the second block of a `+` is the residual weights, of axes `o` and `i` alone.")
    return layout


def _split_blocks(pattern: str) -> list[str]:
    """Return the pattern of each block of a `+`, in the syntax of einops, which has no `+` and no `:N`.

    "o ((i k) + i)" is split into "o ( i k )" and "o (i)", and "(i k):2" becomes "(i k over2)".
    """
    text = pattern.replace("...", "kernel")
    text = re.sub(r"\):([2-9])", r" over\1)", text)
    inner = r"((?:[^()+]|\([^()+]*\))*)"  # a block, perhaps with parentheses
    packed = re.search(rf"\({inner}\+{inner}\)", text)
    if packed is None:
        return [text]
    blocks = [re.sub("[()]", " ", block) for block in packed.groups()]
    return [text.replace(packed[0], f"({block})") for block in blocks]
