# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layouts: how a library stores its coefficients, as an einops pattern, and the canonical order (out, in, basis).

A pattern names the axes of the stored parameter. `o` and `i` are the output and input features; every other name
belongs to the basis mode, in the order in which it appears. Parentheses flatten axes as in einops. As in einx, a `+`
inside parentheses concatenates two blocks: the coefficients come first, the residual weights second.

    "o i k"      efficient-kan      "t o i g"          FourierKAN: the basis mode is (t g)
    "o (i k)"    FastKAN            "o ((i k) + i)"    inkan: coefficients and residual weights packed in one
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from einops import rearrange

from ..locks import cached


Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Layout:
    """A parsed pattern.

    Attributes:
        dims: The axis names of each dimension of the coefficients.
        packed_residual: The same for residual weights that are packed into the parameter. Its shape differs from that
            of the coefficients in dimension `concatenated` alone, in which the two are packed.
    """

    pattern: str
    dims: Dims
    packed_residual: Dims | None = None
    concatenated: int = -1

    @cached
    def basis(self) -> tuple[str, ...]:
        """The axes that make up the basis mode."""
        return tuple(axis for dim in self.dims for axis in dim if axis not in ("o", "i"))

    def axis_lengths(self, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
        """The length of every axis, from the shape of the parameter and the lengths that are known.

        Raises a `ValueError` if the pattern does not fit the shape, or leaves a length open.
        """
        lengths = dict(known)
        problem = f"Pattern {self.pattern!r} does not fit a parameter of shape {tuple(shape)}: "
        if len(shape) != len(self.dims):
            raise ValueError(problem + f"it names {len(self.dims)} dimensions, the parameter has {len(shape)}.")
        # An axis on its own may settle one that is flattened with others: simple dimensions first.
        for position in sorted(range(len(shape)), key=lambda p: (p == self.concatenated, len(self.dims[p]))):
            dim, size = self.dims[position], shape[position]
            if self.packed_residual is not None and position == self.concatenated:
                second = self.packed_residual[position]
                if any(axis not in lengths for axis in second):
                    raise ValueError(problem + _open_lengths(second, lengths))
                size -= math.prod(lengths[axis] for axis in second)
            unknown = [axis for axis in dim if axis not in lengths]
            if len(unknown) > 1:
                raise ValueError(problem + _open_lengths(dim, lengths))
            rest = math.prod(lengths[axis] for axis in dim if axis in lengths)
            if unknown and rest > 0 and size > 0 and size % rest == 0:
                lengths[unknown[0]] = size // rest
            elif unknown or rest != size:
                wanted = " * ".join(f"{axis}={lengths.get(axis, '?')}" for axis in dim)
                raise ValueError(problem + f"dimension {position} would have to be {wanted}, which {size} is not.")
        return lengths

    def to_canonical(self, parameter: torch.Tensor, lengths: Mapping[str, int]) -> torch.Tensor:
        """(stored shape) -> (out, in, basis), with the packed residual weights, if any, as the last basis slice."""
        parts: Sequence[torch.Tensor] = [parameter]
        if self.packed_residual is not None:
            blocks = (self.dims, self.packed_residual)
            sizes = [math.prod(lengths[axis] for axis in dims[self.concatenated]) for dims in blocks]
            parts = parameter.split(sizes, dim=self.concatenated)
        parts = [
            rearrange(part, f"{stored} -> {canonical}", **{axis: lengths[axis] for axis in axes})
            for part, (stored, canonical, axes) in zip(parts, self._blocks, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def from_canonical(self, tensor: torch.Tensor, lengths: Mapping[str, int]) -> torch.Tensor:
        """(out, in, basis) -> (stored shape), the inverse of `to_canonical`; differentiable."""
        parts = [tensor] if self.packed_residual is None else [tensor[..., :-1], tensor[..., -1:]]
        parts = [
            rearrange(part, f"{canonical} -> {stored}", **{axis: lengths[axis] for axis in axes})
            for part, (stored, canonical, axes) in zip(parts, self._blocks, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.concatenated)

    @cached
    def _blocks(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """The einops expressions of the stored and of the canonical order, and the axes, of each block."""
        blocks = [(self.dims, f"o i ({' '.join(self.basis)})")]
        if self.packed_residual is not None:
            blocks.append((self.packed_residual, "o i ()"))
        return [(_write(dims), canonical, tuple(axis for dim in dims for axis in dim)) for dims, canonical in blocks]


def _open_lengths(axes: Sequence[str], lengths: Mapping[str, int]) -> str:
    unknown = ", ".join(axis for axis in axes if axis not in lengths)
    return f"the lengths of {unknown} do not follow from it. Give them to register_kan_layer by `axes`."


def _write(dims: Dims) -> str:
    return " ".join(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims)


@cache
def parse_layout(pattern: str) -> Layout:
    """Parses a pattern; raises a `ValueError` if it is malformed, or `o` and `i` do not appear exactly once."""
    problem = f"Pattern {pattern!r} is not a layout of KAN coefficients: "
    first: list[tuple[str, ...]] = []
    second: list[tuple[str, ...]] = []
    concatenated = None
    for token in _split(pattern, problem):
        inner = token[1:-1] if token.startswith("(") else token
        parts = inner.split("+")
        if len(parts) > 2 or (len(parts) == 2 and concatenated is not None):
            raise ValueError(problem + "at most two blocks can be concatenated, by one `+`.")
        if len(parts) == 2:
            concatenated = len(first)
        names = [tuple(re.sub(r"[()]", " ", part).split()) for part in parts]
        if not all(name.isidentifier() for part in names for name in part) or not all(names):
            raise ValueError(problem + f"{token!r} does not consist of axis names.")
        first.append(names[0])
        second.append(names[-1])
    for dims in (first, second):
        axes = [axis for dim in dims for axis in dim]
        if len(set(axes)) != len(axes) or not {"o", "i"} <= set(axes):
            raise ValueError(problem + "`o` and `i` must appear once each, and no other axis twice.")
    if concatenated is None:
        return Layout(pattern, tuple(first))
    layout = Layout(pattern, tuple(first), tuple(second), concatenated)
    if {axis for dim in second for axis in dim} != {"o", "i"}:
        raise ValueError(problem + "the second block of a `+` is the residual weights, of axes `o` and `i` alone.")
    return layout


def _split(pattern: str, problem: str) -> list[str]:
    """Splits a pattern into its dimensions: axis names, and groups in parentheses, which may hold such groups."""
    dimension = r"\((?:[^()]|\([^()]*\))*\)|[^\s()]+"
    if re.sub(dimension, "", pattern).strip():
        raise ValueError(problem + "its parentheses do not match.")
    return re.findall(dimension, pattern)
