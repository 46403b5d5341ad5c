# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layouts: how a library stores its coefficients, as an einops pattern, and the canonical order (out, in, basis).

A pattern names the axes of the stored parameter. `o` and `i` are the output and input features, or channels, and `...`
the axes of the kernel of a convolution, which make up a fourth mode. An axis of blocks, each with its own inputs (the
groups of a convolution), is named by `groups`. It belongs to the output mode, and `i` counts the inputs of one block.
Every other name belongs to the basis mode, in the order in which it appears. Without one the basis has length one.

Parentheses flatten axes as in einops, and `()` is an axis of length one. As in einx, a `+` inside parentheses
concatenates two blocks: the coefficients come first, the residual weights second. `(i k):2` is a flattened axis that
is stored over two dimensions. A part after the first may lack `o`, `i` or the axes of the kernel: it is shared along
them. Each edge then has the same values, and an update of the parameter is the mean of the updates of the edges.

    "o i k"          efficient-kan    "t o i g"            FourierKAN: the basis mode is (t g)
    "o (i k)"        FastKAN          "o ((i k) + i)"      inkan: coefficients and residual weights packed in one
    "o (k i) ..."    convolutions     "o () (i k):2"       ReLU-KAN: a view of (i k), which splits neither i nor k
                                      "i k"                its phases, which all outputs share
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from einops import EinopsError, reduce, repeat
from einops.parsing import ParsedExpression


Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Layout:
    """A parsed pattern.

    Attributes:
        dims: The axis names of each dimension of the coefficients.
        kernel: The axes of the kernel mode.
        groups: The axes of blocks.
        packed_residual: The axis names of each dimension of residual weights that are packed into the parameter.
        stored_over: The number of stored dimensions of each dimension.
        shared: The axes that the parameter lacks, and is shared along.
    """

    pattern: str
    dims: Dims
    kernel: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    packed_residual: Dims | None = None
    stored_over: tuple[int, ...] = ()
    shared: tuple[str, ...] = ()

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axes, in the order of the pattern."""
        return _flatten(self.dims)

    @cached_property
    def basis(self) -> tuple[str, ...]:
        """The axes that make up the basis mode."""
        others = {"o", "i", *self.groups, *self.kernel}
        return tuple(axis for axis in self.axes if axis not in others)

    def share(self, first: Layout, is_list: bool) -> Layout:
        """Return this layout of a later part, shared along the axes that only the first part has.

        Args:
            first: The layout of the first part.
            is_list: Whether the part is a list of parameters. They are the blocks, and need no axis of blocks.
        """
        groups = self.groups if is_list else first.groups
        missing = tuple(axis for axis in (*groups, "o", "i", *first.kernel) if axis not in self.axes)
        if not missing:
            return self
        return replace(self, shared=missing, groups=groups, kernel=first.kernel)

    def canonical_shape(self, lengths: Mapping[str, int]) -> tuple[int, ...]:
        """Return (out, in, basis) or (out, in, basis, kernel), with a packed base branch in the basis mode."""
        out = _multiply((*self.groups, "o"), lengths)
        basis = _multiply(self.basis, lengths) + (self.packed_residual is not None)
        kernel = [_multiply(self.kernel, lengths)] if self.kernel else []
        return (out, lengths["i"], basis, *kernel)

    def axis_lengths(self, shape: Sequence[int], given: Mapping[str, int]) -> dict[str, int]:
        """Return the length of every axis.

        Args:
            shape: The stored shape of the parameter.
            given: The lengths of axes that this shape does not determine.

        Raises:
            ValueError: The pattern does not fit the shape, or leaves a length open.
        """
        lengths = dict(given)
        problem = ""
        if len(shape) != sum(self.stored_over):
            problem = f"it names {sum(self.stored_over)} dimensions"
        start = 0
        for position, (dim, count) in enumerate(zip(self.dims, self.stored_over, strict=True)):
            size = math.prod(shape[start : start + count])
            start += count
            blocks = [dim]
            if self.packed_residual is not None and position == self._concatenated:
                blocks.append(self.packed_residual[position])
            unknown = [axis for axis in dim if axis not in lengths]
            if len(unknown) == 1:
                # each block is proportional to the unknown length, or lacks this axis
                lengths[unknown[0]] = 0
                constant = sum(_multiply(block, lengths) for block in blocks)
                lengths[unknown[0]] = 1
                slope = sum(_multiply(block, lengths) for block in blocks) - constant
                lengths[unknown[0]] = (size - constant) // max(slope, 1)
            is_solved = len(unknown) < 2 and size == sum(_multiply(block, lengths) for block in blocks) > 0
            if not is_solved:
                problem = problem or f"{_write([dim])} cannot be {size}"
                break
        if problem:
            sizes = {axis: given[axis] for axis in self.axes if axis in given}
            raise ValueError(
                f"Pattern {self.pattern!r} does not fit a parameter of shape {tuple(shape)}, with {sizes}: {problem}. "
                "Correct it, or give lengths of axes by `axes`."
            )
        return lengths

    def to_canonical(self, parameter: torch.Tensor, lengths: Mapping[str, int]) -> torch.Tensor:
        """Return a stored parameter as (out, in, basis[, kernel]), with packed residual weights as the last slice."""
        if self._is_canonical:  # einops takes as long as the arithmetic of a small layer
            return parameter if parameter.dim() == 3 else parameter.unsqueeze(2)
        sizes = [_multiply(dim, lengths) for dim in self.dims]
        blocks = [parameter]
        if self.packed_residual is not None:
            position = self._concatenated
            counts = [sizes[position], _multiply(self.packed_residual[position], lengths)]
            blocks = parameter.split(counts, position)
        elif len(self.dims) < parameter.dim():
            blocks = [parameter.reshape(sizes)]
        tensors = []
        for block, (stored, canonical, axes) in zip(blocks, self._expressions, strict=True):
            tensors.append(repeat(block, f"{stored} -> {canonical}", **{axis: lengths[axis] for axis in axes}))
        return concatenate(tensors, 2)

    def from_canonical(self, tensor: torch.Tensor, lengths: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
        """Return (out, in, basis[, kernel]) in the stored shape, the inverse of `to_canonical`. It is differentiable.

        Along the axes in `shared` the mean is stored.
        """
        if self._is_canonical:
            return tensor if len(self.dims) == 3 else tensor.squeeze(2)
        position = 0
        blocks = [tensor]
        if self.packed_residual is not None:
            position = self._concatenated
            blocks = [tensor[:, :, :-1], tensor[:, :, -1:]]
        tensors = []
        for block, (stored, canonical, axes) in zip(blocks, self._expressions, strict=True):
            tensors.append(reduce(block, f"{canonical} -> {stored}", "mean", **{axis: lengths[axis] for axis in axes}))
        return concatenate(tensors, position).reshape(shape)

    @cached_property
    def _concatenated(self) -> int:
        """The dimension in which coefficients and residual weights are packed."""
        pairs = zip(self.dims, self.packed_residual or (), strict=True)
        return [first == second for first, second in pairs].index(False)

    @cached_property
    def _is_canonical(self) -> bool:
        """Whether the parameter is stored as "o i k" or "o i"."""
        has_more = self.kernel or self.groups or self.packed_residual or self.shared or sum(self.stored_over) > 3
        return self.dims[:2] == (("o",), ("i",)) and not has_more

    @cached_property
    def _expressions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """The einops expressions of the stored and of the canonical order, and the axes, of each block."""
        out = _write([(*self.groups, "o")])
        kernel = f" ({' '.join(self.kernel)})" if self.kernel else ""
        basis = f"({' '.join(self.basis)})"
        expressions = [(_write(self.dims), f"{out} i {basis}{kernel}", self.axes + self.shared)]
        if self.packed_residual is not None:
            axes = _flatten(self.packed_residual)
            expressions.append((_write(self.packed_residual), f"{out} i (){kernel}", axes))
        return expressions


def concatenate(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Return `torch.cat(tensors, dim)`, which would copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors], dim)


def _flatten(dims: Dims) -> tuple[str, ...]:
    return tuple(axis for dim in dims for axis in dim)


def _multiply(axes: Sequence[str], lengths: Mapping[str, int]) -> int:
    return math.prod([lengths[axis] for axis in axes])


def _split_stored(dim: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """Return the axes of a dimension, and over how many stored dimensions `:N` spreads them, 1 by default."""
    if dim and dim[-1][:-1] == "over":
        return dim[:-1], int(dim[-1][-1])
    return dim, 1


def _write(dims: Sequence[tuple[str, ...]]) -> str:
    return " ".join(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims)


@lru_cache(1024)
def parse_layout(pattern: str, groups: str = "", dimensions: int | None = None, may_share: bool = False) -> Layout:
    """Parse a pattern.

    Args:
        pattern: The pattern of a parameter.
        groups: The axis of blocks, which the pattern may lack.
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
    # einops knows neither blocks that are concatenated nor axes that are stored over several dimensions
    texts = [re.sub(r"\):([2-9])", r" over\1)", pattern.replace("...", "kernel"))]
    inner = r"((?:[^()+]|\([^()+]*\))*)"  # a block, perhaps with parentheses
    packed = re.search(rf"\({inner}\+{inner}\)", texts[0])
    if packed:
        before, after = texts[0][: packed.start()], texts[0][packed.end() :]
        blocks = [re.sub("[()]", " ", block) for block in packed.groups()]
        texts = [f"{before}({block}){after}" for block in blocks]
    try:
        parsed = [[tuple(dim) for dim in ParsedExpression(text).composition] for text in texts]
    except EinopsError as error:
        raise ValueError(f"{problem}{error}.") from error
    if any(not isinstance(axis, str) for dims in parsed for axis in _flatten(tuple(dims))):
        raise ValueError(f"{problem}an axis must have a name.")

    stored_over = [_split_stored(dim)[1] for dim in parsed[0]]
    parsed = [[_split_stored(dim)[0] for dim in dims] for dims in parsed]
    kernel: tuple[str, ...] = ()
    if ("kernel",) in parsed[0]:
        count = 2 if dimensions is None else max(dimensions - sum(stored_over) + 1, 0)
        kernel = tuple(f"kernel{n}" for n in range(count))
        position = parsed[0].index(("kernel",))
        stored_over[position : position + 1] = [1] * count
        for dims in parsed:
            dims[position : position + 1] = [(axis,) for axis in kernel]
    dims, *packed_dims = map(tuple, parsed)

    axes = {*_flatten(dims)}
    if not (may_share or {"o", "i"} <= axes):
        raise ValueError(problem + "`o` and `i` must appear once each.")
    group_axes = tuple(axis for axis in groups.split() if axis in axes)
    residual = packed_dims[0] if packed_dims else None
    layout = Layout(pattern, dims, kernel, group_axes, residual, tuple(stored_over))
    if residual is not None and (not layout.basis or {*_flatten(residual)} != axes - {*layout.basis}):
        raise ValueError(problem + "the second block of a `+` is the residual weights, of axes `o` and `i` alone.")
    return layout
