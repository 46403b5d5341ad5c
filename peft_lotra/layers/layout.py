# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layouts: how a library stores its coefficients, as an einops pattern, and the canonical order (out, in, basis).

A pattern names the axes of the stored parameter. `o` and `i` are the output and input features, or channels, and `...`
the axes of the kernel of a convolution, which make up a fourth mode. An axis of blocks, each with inputs of its own
(the groups of a convolution), is named by `groups`; it belongs to the output mode, and `i` counts the inputs of one
block. Every other name belongs to the basis mode, in the order in which it appears; without one the basis has the
length one.

Parentheses flatten axes as in einops, and `()` is an axis of length one. As in einx, a `+` inside parentheses
concatenates two blocks: the coefficients come first, the residual weights second. `(i k):2` is a flattened axis that
is stored over two dimensions. A part after the first may lack `o`, `i` or the axes of the kernel: it is shared along
them. Each edge then has the same values, and an update of the parameter is the mean of what the edges would have.

    "o i k"          efficient-kan    "t o i g"            FourierKAN: the basis mode is (t g)
    "o (i k)"        FastKAN          "o ((i k) + i)"      inkan: coefficients and residual weights packed in one
    "o (k i) ..."    convolutions     "o () (i k):2"       ReLU-KAN: a view of (i k), which splits neither i nor k
                                      "i k"                its phases, of which all outputs have the same
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import permutations

import torch
from einops import reduce, repeat


Dims = tuple[tuple[str, ...], ...]
Shape = tuple[int, ...]


class OpenLengthsError(ValueError):
    """A pattern fits, but leaves the length of an axis open."""


@dataclass(frozen=True)
class Layout:
    """A parsed pattern.

    Attributes:
        dims: The axis names of each dimension of the coefficients.
        kernel: The axes of the kernel mode.
        groups: The axes of blocks.
        packed_residual: As `dims`, for residual weights that are packed into the parameter. Its shape differs from
            that of the coefficients in dimension `concatenated` alone, in which the two are packed.
        stored_over: The number of stored dimensions of each dimension, if one of them has several.
        shared: The axes that the parameter lacks, and is shared along.
    """

    pattern: str
    dims: Dims
    kernel: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    packed_residual: Dims | None = None
    concatenated: int = -1
    stored_over: tuple[int, ...] | None = None
    shared: tuple[str, ...] = ()

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axes, in the order of the pattern."""
        return tuple(axis for dim in self.dims for axis in dim)

    @cached_property
    def basis(self) -> tuple[str, ...]:
        """The axes that make up the basis mode."""
        return tuple(axis for axis in self.axes if axis not in ("o", "i", *self.groups, *self.kernel))

    def beside(self, first: Layout, is_listed: bool = False) -> Layout:
        """This layout beside that of the first parameter: it is shared along the axes that only the first has.

        The members of a list, `is_listed`, are the blocks, and need no axis of blocks.
        """
        groups = self.groups if is_listed else first.groups
        missing = tuple(axis for axis in (*groups, "o", "i", *first.kernel) if axis not in self.axes)
        return replace(self, shared=missing, groups=groups, kernel=first.kernel) if missing else self

    def canonical_shape(self, lengths: Mapping[str, int]) -> Shape:
        """(out, in, basis) or (out, in, basis, kernel), with a packed residual branch."""
        modes = [*self.groups, "o"], "i", self.basis, *([self.kernel] if self.kernel else [])
        out, in_, basis, *kernel = (math.prod([lengths[axis] for axis in mode]) for mode in modes)
        return (out, in_, basis + (self.packed_residual is not None), *kernel)

    def axis_lengths(self, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
        """The length of every axis, from the shape of the parameter and the lengths that are known.

        Raises a `ValueError` if the pattern does not fit the shape, an `OpenLengthsError` if it leaves a length open.
        """
        lengths = dict(known)
        problem = f"Pattern {self.pattern!r} does not fit a parameter of shape {tuple(shape)}: "
        dimensions = sum(self.stored_over or ()) or len(self.dims)
        if len(shape) != dimensions:
            raise ValueError(problem + f"it names {dimensions} dimensions, the parameter has {len(shape)}.")
        shape = self._flattened(shape)
        # An axis on its own may settle one that is flattened with others: simple dimensions first.
        for position in sorted(range(len(shape)), key=lambda p: (p == self.concatenated, len(self.dims[p]))):
            dim, size = self.dims[position], shape[position]
            if self.packed_residual is not None and position == self.concatenated:
                second = self.packed_residual[position]
                if any(axis not in lengths for axis in second):
                    raise OpenLengthsError(problem + _open_lengths(second, lengths))
                size -= math.prod([lengths[axis] for axis in second])
            unknown = [axis for axis in dim if axis not in lengths]
            if len(unknown) > 1:
                raise OpenLengthsError(problem + _open_lengths(dim, lengths))
            rest = math.prod([lengths[axis] for axis in dim if axis in lengths])
            if unknown and rest > 0 and size > 0 and size % rest == 0:
                lengths[unknown[0]] = size // rest
            elif unknown or rest != size:
                wanted = " * ".join(f"{axis}={lengths.get(axis, '?')}" for axis in dim) or "1"
                raise ValueError(problem + f"dimension {position} would have to be {wanted}, which {size} is not.")
        return lengths

    def _flattened(self, shape: Sequence[int]) -> Shape:
        if self.stored_over is None:
            return tuple(shape)
        sizes = iter(shape)
        return tuple(math.prod([next(sizes) for _ in range(count)]) for count in self.stored_over)

    def to_canonical(self, parameter: torch.Tensor, lengths: Mapping[str, int]) -> torch.Tensor:
        """(stored shape) -> (out, in, basis[, kernel]), with packed residual weights, if any, as the last slice."""
        if self._is_canonical:  # einops takes as long as the arithmetic of a small layer
            return parameter if parameter.dim() == 3 else parameter.unsqueeze(2)
        if self.stored_over is not None:
            parameter = parameter.reshape(self._flattened(parameter.shape))
        parts: Sequence[torch.Tensor] = [parameter]
        if self.packed_residual is not None:
            blocks = (self.dims, self.packed_residual)
            sizes = [math.prod([lengths[axis] for axis in dims[self.concatenated]]) for dims in blocks]
            parts = parameter.split(sizes, dim=self.concatenated)
        parts = [
            repeat(part, f"{stored} -> {canonical}", **{axis: lengths[axis] for axis in axes})
            for part, (stored, canonical, axes) in zip(parts, self._blocks, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def from_canonical(
        self, tensor: torch.Tensor, lengths: Mapping[str, int], shape: Sequence[int] | None = None
    ) -> torch.Tensor:
        """(out, in, basis[, kernel]) -> (stored shape), the inverse of `to_canonical`; differentiable.

        Along the axes in `shared` the mean is stored. `shape` is the stored shape, which a layout with `stored_over`
        needs.
        """
        if self._is_canonical:
            return tensor if len(self.dims) == 3 else tensor.squeeze(2)
        parts = [tensor] if self.packed_residual is None else [tensor[:, :, :-1], tensor[:, :, -1:]]
        parts = [
            reduce(part, f"{canonical} -> {stored}", "mean", **{axis: lengths[axis] for axis in axes})
            for part, (stored, canonical, axes) in zip(parts, self._blocks, strict=True)
        ]
        stored = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.concatenated)
        return stored if self.stored_over is None or shape is None else stored.reshape(shape)

    @cached_property
    def _is_canonical(self) -> bool:
        """Whether the parameter is stored as "o i k" or "o i"."""
        plain = not (self.packed_residual or self.shared or self.kernel or self.groups or self.stored_over)
        axes = len(self.dims) < 4 and all(len(dim) == 1 for dim in self.dims)
        return plain and axes and self.dims[:2] == (("o",), ("i",))

    @cached_property
    def _blocks(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """The einops expressions of the stored and of the canonical order, and the axes, of each block."""
        out = _write([(*self.groups, "o")])
        kernel = f" ({' '.join(self.kernel)})" if self.kernel else ""
        blocks = [(self.dims, f"{out} i ({' '.join(self.basis)}){kernel}")]
        if self.packed_residual is not None:
            blocks.append((self.packed_residual, f"{out} i (){kernel}"))
        return [
            (_write(dims), canonical, (*(axis for dim in dims for axis in dim), *self.shared))
            for dims, canonical in blocks
        ]


def _open_lengths(axes: Sequence[str], lengths: Mapping[str, int]) -> str:
    unknown = ", ".join(axis for axis in axes if axis not in lengths)
    return f"the lengths of {unknown} do not follow from it. Give them to register_kan_layer by `axes`."


def _write(dims: Sequence[tuple[str, ...]]) -> str:
    return " ".join(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims)


@lru_cache(1024)
def parse_layout(pattern: str, groups: str = "", dimensions: int | None = None, may_share: bool = False) -> Layout:
    """Parses a pattern.

    Args:
        pattern: The pattern of a parameter.
        groups: The axis of blocks, which the pattern may lack.
        dimensions: The number of dimensions of the parameter, for the number of axes in `...`.
        may_share: Whether the pattern may lack `o` or `i`, as those of later parts.

    Raises:
        ValueError: It is malformed, or `o` and `i` do not appear exactly once.
    """
    problem = f"Pattern {pattern!r} is not a layout of KAN coefficients: "
    # axis names, and groups in parentheses, which may hold such groups
    dimension = r"\((?:[^()]|\([^()]*\))*\)(?::[1-9](?!\d))?|[^\s()]+"
    tokens, kernel = re.findall(dimension, pattern), ()
    if re.sub(dimension, "", pattern).strip():
        raise ValueError(problem + "its parentheses do not match.")
    if tokens.count("...") == 1:
        count = 2 if dimensions is None else max(dimensions - len(tokens) + 1, 0)
        kernel = tuple(f"kernel{position}" for position in range(count))
        place = tokens.index("...")
        tokens[place : place + 1] = kernel
    first: list[tuple[str, ...]] = []
    second: list[tuple[str, ...]] = []
    stored_over: list[int] = []
    packed_at = []
    for place, token in enumerate(tokens):
        token, _, count = token.partition(":") if token.startswith("(") else (token, "", "")
        blocks = token[1:-1].split("+") if token.startswith("(") else [token]
        packed_at += [place] * (len(blocks) - 1)
        names = [tuple(re.sub(r"[()]", " ", block).split()) for block in blocks]
        is_one = len(blocks) == 1 and not names[0] and token.startswith("(")
        if not all(name.isidentifier() for block in names for name in block) or not (all(names) or is_one):
            raise ValueError(problem + f"{token!r} does not consist of axis names.")
        first.append(names[0])
        second.append(names[-1])
        stored_over.append(int(count or 1))
    if len(packed_at) > 1:
        raise ValueError(problem + "at most two blocks can be concatenated, by one `+`.")
    for dims in (first, second):
        axes = [axis for dim in dims for axis in dim]
        if len(set(axes)) != len(axes) or not (may_share or {"o", "i"} <= set(axes)):
            raise ValueError(problem + "`o` and `i` must appear once each, and no other axis twice.")
    named = {axis for dim in first for axis in dim}
    layout = Layout(
        pattern,
        tuple(first),
        kernel,
        tuple(axis for axis in groups.split() if axis in named),
        stored_over=tuple(stored_over) if set(stored_over) != {1} else None,
    )
    if not packed_at:
        return layout
    if {axis for dim in second for axis in dim} != named - set(layout.basis) or not layout.basis:
        raise ValueError(problem + "the second block of a `+` is the residual weights, of axes `o` and `i` alone.")
    return replace(layout, packed_residual=tuple(second), concatenated=packed_at[0])


def axis_patterns(
    shape: Sequence[int], letter: str = "k", sizes: tuple[int | None, int | None] = (None, None)
) -> Iterator[str]:
    """The patterns of a parameter of this shape that have each axis on its own.

    Args:
        shape: The shape of the parameter.
        letter: The axis of the basis, or of several what their names begin with.
        sizes: The numbers of outputs and inputs, if they are known: the patterns that fit them come first.

    Example:
        >>> list(axis_patterns((3, 5, 1), sizes=(5, 3)))[:2]
        ['i o ()', 'k o i']
    """
    places = range(len(shape))
    pairs = sorted(
        permutations(places, 2), key=lambda pair: -sum(shape[p] == s for p, s in zip(pair, sizes, strict=True))
    )
    for pair in pairs:
        names = dict(zip(pair, "oi", strict=True))
        basis = [place for place in places if place not in names and shape[place] > 1]
        names |= {place: letter if len(basis) == 1 else f"{letter}{place}" for place in basis}
        yield " ".join(names.get(place, "()") for place in places)
