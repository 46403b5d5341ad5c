# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Where one layer keeps its coefficients, read and written in the canonical order (out, in, basis)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..locks import cached
from .layout import Layout


@dataclass(frozen=True)
class CoefficientTensor:
    """Where one layer keeps its coefficients, and how they are read and written as a tensor (out, in, basis).

    Attributes:
        family: The family of the layer.
        parameters: The layout of each parameter by name: the coefficients, then the residual weights if they have a
            parameter of their own. Dotted names reach into sub-modules.
        lengths: The length of each axis that the layouts name.
    """

    family: str
    parameters: Mapping[str, Layout]
    lengths: Mapping[str, int] = field(repr=False)

    @cached
    def shape(self) -> tuple[int, int, int]:
        """(out, in, basis), without the residual branch."""
        basis = prod(self.lengths[axis] for axis in self.parameters[self.name].basis)
        return self.lengths["o"], self.lengths["i"], basis

    @cached
    def has_residual(self) -> bool:
        """Whether the layer has a residual branch."""
        return len(self.parameters) == 2 or self.parameters[self.name].packed_residual is not None

    @cached
    def name(self) -> str:
        """The name of the parameter of the coefficients."""
        return next(iter(self.parameters))

    def get_parameter(self, layer: nn.Module) -> torch.Tensor:
        """The parameter of the coefficients, as stored. Under FSDP it is a plain tensor view."""
        return attrgetter(self.name)(layer)

    def read_parameters(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        """The adapted parameters, as stored, by name."""
        return {name: attrgetter(name)(layer) for name in self.parameters}

    def read(self, layer: nn.Module, residual: bool = True) -> torch.Tensor:
        """The coefficients of the layer as (out, in, basis), or (out, in, basis + 1) with the residual branch."""
        tensor = self.join(list(self.read_parameters(layer).values()))
        return tensor if residual else tensor[..., : self.shape[-1]]

    def read_parts(
        self, layer: nn.Module, parameters: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The coefficients (out, in, basis) and the residual weights (out, in), if any; views where layouts allow it.

        `parameters` replace those of the layer.
        """
        tensor, *residual = self._canonical({**self.read_parameters(layer), **(parameters or {})}.values())
        if residual:
            return tensor, residual[0].squeeze(-1)
        basis = self.shape[-1]
        return tensor[..., :basis], tensor[..., basis] if tensor.shape[-1] > basis else None

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The canonical tensor of parts that are laid out like `parameters`, e.g. of their gradients."""
        tensors = self._canonical(parts)
        return torch.cat(tensors, dim=-1) if len(tensors) > 1 else tensors[0]

    def _canonical(self, parts: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        layouts = self.parameters.values()
        return [layout.to_canonical(part, self.lengths) for layout, part in zip(layouts, parts, strict=True)]

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inverse of `read`: the parts of a canonical tensor, each in the layout of its parameter.

        A tensor without the residual slice gives no part for a residual parameter, and zeros where it is packed.
        """
        basis = self.shape[-1]
        (name, layout), *residual = self.parameters.items()
        if layout.packed_residual is not None:
            if tensor.shape[-1] == basis:
                tensor = nn.functional.pad(tensor, (0, 1))
            return {name: layout.from_canonical(tensor, self.lengths)}
        parts = {name: layout.from_canonical(tensor[..., :basis], self.lengths)}
        if residual and tensor.shape[-1] > basis:
            name, layout = residual[0]
            parts[name] = layout.from_canonical(tensor[..., basis:], self.lengths)
        return parts


def get_or_none(layer: nn.Module, name: str) -> Any:
    """The attribute of a dotted name, `None` where any part of it is absent."""
    try:
        return attrgetter(name)(layer)
    except AttributeError:
        return None
