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
from itertools import accumulate, permutations

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
        packed_residual: As `dims`, for residual weights that are packed into the parameter.
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

    def canonical_shape(self, lengths: Mapping[str, int]) -> tuple[int, ...]:
        """(out, in, basis) or (out, in, basis, kernel), with a packed residual branch."""
        modes = [*self.groups, "o"], "i", self.basis, *([self.kernel] if self.kernel else [])
        out, in_, basis, *kernel = (math.prod([lengths[axis] for axis in mode]) for mode in modes)
        return (out, in_, basis + (self.packed_residual is not None), *kernel)

    def axis_lengths(self, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
        """The length of every axis, from the shape of the parameter and the lengths that are known.

        Raises a `ValueError` if the pattern does not fit the shape, or leaves a length open.
        """
        lengths, counts = dict(known), self.stored_over or (1,) * len(self.dims)
        sizes = [math.prod(shape[end - count : end]) for count, end in zip(counts, accumulate(counts), strict=True)]
        if self.packed_residual is not None:
            packed = self.packed_residual[self._concatenated]
            sizes[self._concatenated] -= math.prod([lengths.get(axis, 0) for axis in packed])
        for dim, size in zip(self.dims, sizes, strict=True):
            unknown = [axis for axis in dim if axis not in lengths]
            rest = math.prod([lengths[axis] for axis in dim if axis in lengths])
            length = size // rest if unknown else 1
            if len(shape) != sum(counts) or len(unknown) > 1 or length < 1 or size != rest * length:
                given = {axis: known[axis] for axis in self.axes if axis in known}
                is_long = len(shape) == sum(counts)
                why = f"{_write([dim])} cannot be {size}" if is_long else f"it names {sum(counts)} dimensions"
                raise ValueError(
                    f"Pattern {self.pattern!r} does not fit a parameter of shape {tuple(shape)}, with {given}: "
                    f"{why}. Correct it, or give lengths of axes by `axes`."
                )
            lengths |= dict.fromkeys(unknown, length)
        return lengths

    def _split(self, parameter: torch.Tensor, lengths: Mapping[str, int]) -> Sequence[torch.Tensor]:
        """The coefficients and the packed residual weights, if any, each with the dimensions of the pattern."""
        for position, count in enumerate(self.stored_over):
            parameter = parameter.flatten(position, position + count - 1) if count > 1 else parameter
        if self.packed_residual is None:
            return [parameter]
        residual = math.prod([lengths[axis] for axis in self.packed_residual[self._concatenated]])
        dim = self._concatenated
        return parameter.split([parameter.shape[dim] - residual, residual], dim=dim)

    def to_canonical(self, parameter: torch.Tensor, lengths: Mapping[str, int]) -> torch.Tensor:
        """(stored shape) -> (out, in, basis[, kernel]), with packed residual weights, if any, as the last slice."""
        if self._is_canonical:  # einops takes as long as the arithmetic of a small layer
            return parameter if parameter.dim() == 3 else parameter.unsqueeze(2)
        parts = [
            repeat(part, f"{stored} -> {canonical}", **{axis: lengths[axis] for axis in axes})
            for part, (stored, canonical, axes) in zip(self._split(parameter, lengths), self._blocks, strict=True)
        ]
        return concatenate(parts, 2)

    def from_canonical(self, tensor: torch.Tensor, lengths: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
        """(out, in, basis[, kernel]) -> the stored shape, the inverse of `to_canonical`; differentiable.

        Along the axes in `shared` the mean is stored.
        """
        if self._is_canonical:
            return tensor if len(self.dims) == 3 else tensor.squeeze(2)
        parts = [tensor] if self.packed_residual is None else [tensor[:, :, :-1], tensor[:, :, -1:]]
        parts = [
            reduce(part, f"{canonical} -> {stored}", "mean", **{axis: lengths[axis] for axis in axes})
            for part, (stored, canonical, axes) in zip(parts, self._blocks, strict=True)
        ]
        return concatenate(parts, self._concatenated if self.packed_residual else 0).reshape(shape)

    @cached_property
    def _concatenated(self) -> int:
        """The dimension in which coefficients and residual weights are packed."""
        pairs = zip(self.dims, self.packed_residual or (), strict=True)
        return next(position for position, (first, second) in enumerate(pairs) if first != second)

    @cached_property
    def _is_canonical(self) -> bool:
        """Whether the parameter is stored as "o i k" or "o i"."""
        return self in (Layout(self.pattern, dims) for dims in ((("o",), ("i",)), (("o",), ("i",), self.dims[-1])))

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


def concatenate(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """`torch.cat`, which would copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors], dim)


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
    stored_over = [
        int(count or 1) for count in re.findall(r"(?:\((?:[^()]|\([^()]*\))*\)|[^\s():]+)(?::(\d))?", pattern)
    ]
    count = 2 if dimensions is None else max(dimensions - sum(stored_over) + 1, 0)
    kernel = [f"kernel{place}" for place in range(count if "..." in pattern else 0)]
    text = re.sub(r"\):[2-9]", ")", pattern.replace("...", " ".join(kernel)))
    texts = [text]
    if plus := re.search(r"\(([^+]*)\+([^+]*)\)", text):
        inner = (re.sub("[()]", " ", block) for block in plus.groups())
        texts = [f"{text[: plus.start()]}({block}){text[plus.end() :]}" for block in inner]
    try:
        dims, *packed = (tuple(map(tuple, ParsedExpression(text).composition)) for text in texts)
    except EinopsError as error:
        raise ValueError(f"{problem}{error}.") from error
    named = {axis for dim in dims for axis in dim}
    if not (may_share or {"o", "i"} <= named):
        raise ValueError(problem + "`o` and `i` must appear once each.")
    layout = Layout(
        pattern,
        dims,
        tuple(kernel),
        tuple(axis for axis in groups.split() if axis in named),
        packed[0] if packed else None,
        tuple(stored_over) if max(stored_over) > 1 else (),
    )
    if packed and (not layout.basis or {axis for dim in packed[0] for axis in dim} != named - set(layout.basis)):
        raise ValueError(problem + "the second block of a `+` is the residual weights, of axes `o` and `i` alone.")
    return layout


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
