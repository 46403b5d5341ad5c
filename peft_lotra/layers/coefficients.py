# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Where one layer keeps its coefficients, read and written in the canonical order (out, in, basis[, kernel])."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .layout import Layout, concatenate


# A parameter, or with `*` the parameters of a list of modules, and the pattern of each.
Described = tuple[str, str]
_SIZES = {
    "o": "out_features out_channels outdim out_dim output_dim output_size out_planes".split(),
    "i": "in_features in_channels inputdim in_dim input_dim input_size in_planes".split(),
}


class Member(NamedTuple):
    """One parameter: its name, layout, the lengths of all axes, stored shape, and shape in the canonical order."""

    name: str
    layout: Layout
    lengths: Mapping[str, int]
    stored: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CoefficientTensor:
    """Where one layer keeps its coefficients, and how they are read and written as a tensor (out, in, basis).

    The coefficients of a convolution are a tensor (out, in, basis, kernel) with the kernel flattened. Parts are joined
    along the basis mode, and the members of a part, if it has several, along the output mode. Members that have fewer
    inputs or basis functions than others are filled up with zeros, which are never written back. A part that is shared
    by the outputs, or along the kernel, is repeated, and the mean is written back.

    Attributes:
        family: The kind of the layer.
        parts: The members of each part: the coefficients, then the residual weights if they have a parameter of their
            own. Dotted names reach into sub-modules.
        separate_residual: Whether the last part is the residual weights.
    """

    family: str
    parts: tuple[tuple[Member, ...], ...]
    separate_residual: bool = False

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(out, in, basis) or (out, in, basis, kernel), without the residual branch."""
        out, in_, _, *kernel = self._sizes[0]
        return (out, in_, sum(size[2] for size in self._sizes) - self.has_residual, *kernel)

    @cached_property
    def _sizes(self) -> list[tuple[int, ...]]:
        """The canonical shape of each part."""
        columns = [zip(*(member.shape for member in part), strict=True) for part in self.parts]
        return [(sum(out), *map(max, rest)) for out, *rest in columns]

    @cached_property
    def has_residual(self) -> bool:
        """Whether the layer has a residual branch."""
        return self.separate_residual or self.parts[0][0].layout.packed_residual is not None

    @cached_property
    def parameters(self) -> dict[str, Layout]:
        """The layout of each parameter by name, those of the coefficients first."""
        return {member.name: member.layout for part in self.parts for member in part}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters of the coefficients, without those of the residual branch."""
        parts = self.parts[:-1] if self.separate_residual else self.parts
        return tuple(member.name for part in parts for member in part)

    def get_parameter(self, layer: nn.Module) -> torch.Tensor:
        """The first parameter of the coefficients, as stored. Under FSDP it is a plain tensor view."""
        return attrgetter(self.names[0])(layer)

    def read_parameters(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        """The adapted parameters, as stored, by name."""
        return {name: attrgetter(name)(layer) for name in self.parameters}

    def read(self, layer: nn.Module) -> torch.Tensor:
        """The coefficients of the layer as (out, in, basis[, kernel]), with the residual branch as the last slice."""
        return self.join(list(self.read_parameters(layer).values()))

    def read_parts(
        self, layer: nn.Module, parameters: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The coefficients (out, in, basis[, kernel]) and the residual weights (out, in[, kernel]), if any.

        They are views where layouts allow it. `parameters` replace those of the layer.
        """
        given = parameters or {}
        tensors = self._canonical(given[n] if n in given else attrgetter(n)(layer) for n in self.parameters)
        residual = tensors.pop()[:, :, 0] if self.separate_residual else None
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors, 2)
        basis = self.shape[2]
        if residual is None and tensor.shape[2] > basis:
            return tensor[:, :, :basis], tensor[:, :, basis]
        return tensor, residual

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The canonical tensor of parts that are laid out like `parameters`, e.g. of their gradients."""
        return concatenate(self._canonical(parts), 2)

    def _canonical(self, values: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Each part in the canonical order, of the values of all members."""
        values = iter(values)
        return [
            part[0].layout.to_canonical(next(values), part[0].lengths)
            if len(part) == 1
            else torch.cat([_filled(it.layout.to_canonical(next(values), it.lengths), size) for it in part])
            for part, size in zip(self.parts, self._sizes, strict=True)
        ]

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inverse of `read`: the parts of a canonical tensor, each in the layout of its parameter.

        A tensor without the residual slice gives no part for a residual parameter, and zeros where it is packed.
        """
        parts, values = self.parts, {}
        if tensor.shape[2] == self.shape[2]:
            if self.separate_residual:
                parts = parts[:-1]
            elif self.has_residual:
                tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 3) + (0, 1))
        basis = 0
        for part, size in zip(parts, self._sizes, strict=False):
            out = 0
            for name, layout, lengths, stored, shape in part:
                own = tensor[out : out + shape[0], : shape[1], basis : basis + shape[2]]
                out += shape[0]
                values[name] = layout.from_canonical(own, lengths, stored)
            basis += size[2]
        return values


def _filled(tensor: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The tensor with zeros at the end of its inputs and basis functions, up to the size of the part."""
    missing = 0, size[2] - tensor.shape[2], 0, size[1] - tensor.shape[1]
    return F.pad(tensor, (0, 0) * (tensor.dim() - 3) + missing) if any(missing) else tensor


def named_size(layer: nn.Module, axis: str) -> tuple[str, int | None]:
    """The attribute by which a layer names the number of its outputs (`"o"`) or inputs (`"i"`), and that, if any."""
    for name in _SIZES[axis]:
        value = getattr(layer, name, None)
        if isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0:  # of numpy too
            return name, int(value)
    return "", None


def expand_name(layer: nn.Module, name: str) -> list[str]:
    """The names of the parameters that a name with `*` stands for; a name without it stands for itself."""
    before, star, after = name.partition("*")
    if not star:
        return [name]
    owner = get_or_none(layer, before[:-1]) if before else layer
    if not isinstance(owner, nn.Module):
        return []
    members = owner._modules if after else owner._parameters
    if not members and isinstance(owner, nn.ParameterList):  # sharded: plain tensors
        members = range(len(owner))
    return [full for member in members for full in expand_name(layer, f"{before}{member}{after}")]


def get_or_none(layer: nn.Module, name: str, default: Any = None) -> Any:
    """The attribute of a dotted name, `None` or another default where any part of it is absent."""
    try:
        return attrgetter(name)(layer)
    except AttributeError:
        return default
