# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A KAN layer of any library with its coefficient tensor in Tucker form."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kan.slim_kan import SlimKANLinear
from ..modules.calls import LayerLock, call_with_parameters, is_tracing, read_attribute
from ..tucker import Tucker
from .coefficients import CoefficientTensor
from .kinds import REGISTERED, Grid, KANLayerSpec


class SlimLayer(nn.Module):
    """A KAN layer of another library whose coefficients, with its residual weights, are a core and three factors.

    The layer runs with coefficients that are built from the factors. This is exact for every kind, and saves
    parameters, not time. Other attributes come from the layer with these coefficients.
    """

    kan_spec: ClassVar[KANLayerSpec]  # set below

    def __init__(self, layer: nn.Module, spec: KANLayerSpec, components: Tucker) -> None:
        super().__init__()
        self.spec = spec
        self.lotra_lock = LayerLock()
        self.tensor = spec.locate(layer)
        self.out_features, self.in_features, _ = self.tensor.shape
        coefficients = self.tensor.get_parameter(layer)
        for name, value in zip(Tucker._fields, components, strict=False):
            if value is not None:
                value = value.to(coefficients).contiguous()
                value = nn.Parameter(value, requires_grad=coefficients.requires_grad)
            self.register_parameter(name, value)
        self.scale = spec.find_edge_scale(layer)
        # the shapes of the parameters that are taken out of the layer
        self.removed: dict[str, torch.Size] = {}
        for name in filter(None, [*self.tensor.parameters, self.scale]):
            self.removed[name] = layer.get_parameter(name).shape
            _set_parameter(layer, name, None)
        self.layer = layer
        self.train(layer.training)

    # the components have the same names in `SlimKANLinear`
    ranks = SlimKANLinear.ranks
    components = SlimKANLinear.components

    @property
    def coefficients(self) -> Tensor:
        """The coefficient tensor (out, in, basis), built from the factors without the base branch."""
        count = self.tensor.shape[-1]
        return self.components.sliced(slice(count)).dense()

    @property
    def residual(self) -> Tensor | None:
        """The residual weights (out, in), built from the factors, or None without a base branch."""
        count = self.tensor.shape[-1]
        last = self.components.sliced(slice(count, None))
        return last.dense().squeeze(-1) if last.shape[2] else None

    def effective_parameters(self, delta: Tensor | float = 0.0) -> dict[str, Tensor]:
        """Return the parameters, as the layer stores them, of the factors' tensor plus `delta` of the same shape."""
        dense = self.components.dense() + delta
        parameters = self.tensor.split(dense.contiguous())
        if self.scale is not None:
            parameters[self.scale] = self.core.new_ones(self.removed[self.scale])
        return parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_with(0.0, *args, **kwargs)

    def forward_with(self, delta: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """Return the output with a dense tensor added to the factors' tensor."""
        with nullcontext() if is_tracing() else self.lotra_lock:
            parameters = self.effective_parameters(delta)
            return call_with_parameters(self.layer, parameters, self.layer, args, kwargs)

    def to_dense(self) -> nn.Module:
        """Return a layer of the original class that computes the same, up to rounding."""
        layer = copy.deepcopy(self.layer)
        with torch.no_grad():
            parameters = self.effective_parameters()
        for name, value in parameters.items():
            parameter = nn.Parameter(value.contiguous(), requires_grad=self.core.requires_grad)
            _set_parameter(layer, name, parameter)
        return layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "layer" not in self.__dict__.get("_modules", {}):
                raise
        layer = self.layer
        if name in self.spec.grid_methods:
            getattr(layer, name)  # an AttributeError if the layer does not have it either
            return partial(_refuse_grid_method, name)
        return read_attribute(self._call, layer, name, self.removed)

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lotra_lock:
            parameters = self.effective_parameters()
            return call_with_parameters(self.layer, parameters, function, args, kwargs)

    def extra_repr(self) -> str:
        return f"kind={self.spec.kind}, ranks={self.ranks}"


def _set_parameter(layer: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    path, _, attribute = name.rpartition(".")
    layer.get_submodule(path)._parameters[attribute] = parameter


class _SlimSpec(KANLayerSpec):
    """The description of `SlimLayer`. The grid belongs to the layer inside."""

    def read_grid(self, layer: nn.Module) -> Grid:
        assert isinstance(layer, SlimLayer)
        grid = layer.spec.read_grid(layer.layer)
        return {f"layer.{name}": value for name, value in grid.items()}


SlimLayer.kan_spec = REGISTERED["slim"] = _SlimSpec(
    "slim",
    matches=SlimLayer,
    coefficients=("coefficients", "o i k"),
    residual=("residual", "o i"),
)


def _refuse_grid_method(name: str, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        f"`{name}` refits the coefficients one by one, and here they are a Tucker tensor. Move the grid of the dense "
        "model (`to_dense()`), and compress it again with `slim`."
    )


def call_with_coefficients(
    layer: nn.Module,
    tensor: CoefficientTensor,
    coefficients: Tensor,
    *args: Any,
) -> Any:
    """Call a layer with other coefficients in the canonical order. In a Slim layer they are a product."""
    if isinstance(layer, (SlimKANLinear, SlimLayer)):
        delta = coefficients - tensor.read(layer)
        return layer.forward_with(delta, *args)
    parameters = tensor.split(coefficients)
    return call_with_parameters(layer, parameters, layer, args, {})
