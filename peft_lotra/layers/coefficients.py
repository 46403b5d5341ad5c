# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Where one layer keeps its coefficients, read and written in the canonical order (out, in, basis[, kernel])."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Layout, concatenate


# A parameter, or with `*` the parameters of a list of modules, and the pattern of each.
Described = tuple[str, str]


@dataclass(frozen=True)
class Member:
    """One parameter: its name, layout, the lengths of all axes, and the stored shape."""

    name: str
    layout: Layout
    lengths: dict[str, int]
    stored: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape in the canonical order."""
        return self.layout.canonical_shape(self.lengths)


@dataclass(frozen=True)
class CoefficientTensor:
    """Where one layer keeps its coefficients, and how they are read and written as a tensor (out, in, basis).

    A convolution has coefficients (out, in, basis, kernel) with the kernel flattened. Parts are joined along the basis
    mode, and the members of a part along the output mode. Members with fewer inputs or basis functions are padded with
    zeros, which are never written back. A part that is shared by the outputs, or along the kernel, is repeated, and
    the mean is written back.

    Attributes:
        kind: The kind of the layer.
        parts: The members of each part: the coefficients, then the residual weights if they have a parameter of their
            own. Dotted names reach into sub-modules.
        separate_residual: Whether the last part is the residual weights.
    """

    kind: str
    parts: tuple[tuple[Member, ...], ...]
    separate_residual: bool = False

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(out, in, basis) or (out, in, basis, kernel), without the base branch."""
        out, inputs, _, *kernel = self.part_shapes[0]
        basis = sum(shape[2] for shape in self.part_shapes)
        return (out, inputs, basis - self.has_residual, *kernel)

    @cached_property
    def part_shapes(self) -> list[tuple[int, ...]]:
        """The canonical shape of each part: the outputs of its members follow each other."""
        shapes = []
        for part in self.parts:
            out, *others = zip(*(member.shape for member in part), strict=True)
            shapes.append((sum(out), *map(max, others)))
        return shapes

    @cached_property
    def has_residual(self) -> bool:
        """Whether the layer has a base branch."""
        return self.separate_residual or self.parts[0][0].layout.has_residual

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The members of all parts."""
        return tuple(member for part in self.parts for member in part)

    @cached_property
    def parameters(self) -> dict[str, Layout]:
        """The layout of each parameter by name, the coefficients first."""
        return {member.name: member.layout for member in self.members}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the coefficients, without the base branch."""
        parts = self.parts[:-1] if self.separate_residual else self.parts
        return tuple(member.name for part in parts for member in part)

    def get_parameter(self, layer: nn.Module) -> Tensor:
        """Return the first parameter of the coefficients, as stored. Under FSDP it is a plain tensor view."""
        return attrgetter(self.members[0].name)(layer)

    def read_parameters(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the adapted parameters, as stored, by name."""
        return {name: attrgetter(name)(layer) for name in self.parameters}

    def read(self, layer: nn.Module) -> Tensor:
        """Return the coefficients as (out, in, basis[, kernel]), with the base branch as the last slice."""
        return self.join(self.read_parameters(layer).values())

    def read_parts(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return the coefficients (out, in, basis[, kernel]) and the residual weights (out, in[, kernel]).

        The residual weights are None without a base branch. Both are views if the layout allows it.
        """
        tensors = self._to_canonical(self.read_parameters(layer).values())
        residual = tensors.pop()[:, :, 0] if self.separate_residual else None
        tensor = concatenate(tensors, 2)
        if tensor.shape[2] == self.shape[2]:
            return tensor, residual
        return tensor[:, :, :-1], tensor[:, :, -1]

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return the canonical tensor of tensors that are laid out like `parameters`, e.g. of their gradients."""
        return concatenate(self._to_canonical(tensors), 2)

    def join_sample(self, tensors: Iterable[Tensor], axis: int, positions: Tensor) -> Tensor:
        """Return some outputs (axis 0) or inputs (axis 1) of the canonical tensor, without making the whole one."""
        parts = [part.index_select(axis, positions) for part in self._to_canonical(tensors)]
        return concatenate(parts, 2)

    def _to_canonical(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return each part in the canonical order."""
        iterator = iter(tensors)
        result = []
        for part, shape in zip(self.parts, self.part_shapes, strict=True):
            members = [member.layout.to_canonical(next(iterator), member.lengths) for member in part]
            if len(members) > 1:
                members = [_pad(member, shape) for member in members]
            result.append(concatenate(members, 0))
        return result

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the parameters of a canonical tensor, each in its stored layout: the inverse of `read`.

        A tensor without the residual slice gives no residual parameter, and zeros where it is packed.
        """
        parts = self.parts
        if tensor.shape[2] == self.shape[2]:
            if self.separate_residual:
                parts = parts[:-1]
            elif self.has_residual:
                tensor = _pad(tensor, (*tensor.shape[:2], tensor.shape[2] + 1))
        parameters = {}
        basis = 0
        for part, part_shape in zip(parts, self.part_shapes, strict=False):
            out = 0
            for member in part:
                rows, inputs, count, *_ = member.shape
                block = tensor[out : out + rows, :inputs, basis : basis + count]
                parameters[member.name] = member.layout.from_canonical(block, member.lengths, member.stored)
                out += rows
            basis += part_shape[2]
        return parameters


def _pad(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Add zeros at the end of the inputs and basis functions, up to a shape."""
    _, inputs, basis, *kernel = tensor.shape
    padding = [0, 0] * len(kernel)
    padding += [0, shape[2] - basis]
    padding += [0, shape[1] - inputs]
    return F.pad(tensor, padding)


def expand_name(layer: nn.Module, name: str) -> list[str]:
    """Return the names of the parameters that a name with `*` stands for, or the name without it."""
    before, star, after = name.partition("*")
    if not star:
        return [name]
    owner = get_or_none(layer, before[:-1]) if before else layer
    if not isinstance(owner, nn.Module):
        return []
    members = owner._modules if after else owner._parameters
    if not members and isinstance(owner, nn.ParameterList):  # sharded: plain tensors
        members = range(len(owner))
    names = []
    for member in members:
        names += expand_name(layer, f"{before}{member}{after}")
    return names


def get_or_none(layer: nn.Module, name: str, default: Any = None) -> Any:
    """Return the attribute of a dotted name, or a default where a module of it is absent."""
    try:
        return attrgetter(name)(layer)
    except AttributeError:
        return default
