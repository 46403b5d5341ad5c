# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapted layer stands in for its base layer: parents that reach into it find what they look for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..families.registry import KANLayerSpec
from ..modules.calls import attribute_by, call_with_parameters
from ..modules.locks import exclusively


class BaseLayerProxy(nn.Module):
    """Answers attributes that the adapted layer does not have itself from its `base_layer`.

    The adapted parameters, and the properties and methods of the base layer, see the coefficients in force (base +
    active adapters), and their gradient reaches the adapters. Methods that change the grid, and with it the meaning of
    the adapters, raise while adapters are attached and not merged.
    """

    # what LoTRALayer provides
    lotra_spec: KANLayerSpec
    lotra_tensor: CoefficientTensor
    merged: bool
    parameters_in_force: Callable[[], dict[str, torch.Tensor]]
    _get_available_adapters: Callable[[], set[str]]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        base_layer = self.base_layer
        if name in self.lotra_spec.grid_methods and not self.merged and self._get_available_adapters():
            getattr(base_layer, name)  # an AttributeError if the base layer does not have it either
            return partial(_refuse_grid_method, name, sorted(self._get_available_adapters()))
        return attribute_by(self._with_parameters_in_force, base_layer, name, self.lotra_tensor.parameters)

    @exclusively
    def _with_parameters_in_force(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls a function while the base layer holds the coefficients that are in force."""
        return call_with_parameters(self.base_layer, self.parameters_in_force(), function, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # A parent that sets `layer.grid` or `layer.out_dim` means the base layer. Names with an underscore belong to
        # frameworks (accelerate, FSDP), which set them on each module for themselves.
        base_layer = self.__dict__.get("_modules", {}).get("base_layer")
        if (
            base_layer is None
            or name.startswith("_")
            or name in self.__dict__
            or hasattr(type(self), name)
            or any(name in self.__dict__[kind] for kind in ("_parameters", "_buffers", "_modules"))
            or not hasattr(base_layer, name)
        ):
            return super().__setattr__(name, value)
        if name in self.lotra_spec.grid and not self.merged and self._get_available_adapters():
            _refuse_grid_method(name, sorted(self._get_available_adapters()))
        setattr(base_layer, name, value)
        self.__dict__["_grid_watch"].changed = True  # what is set may change what the layer computes


def _refuse_grid_method(name: str, adapters: list[str], *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        f"`{name}` changes what the coefficients mean, and would silently change the meaning of the adapters "
        f"{adapters}, which are not merged. Merge them first (`merge_and_unload()`, or `merge_adapter()` to keep the "
        "layers adapted), unload them, or carry them over with `peft_lotra.refit_adapters(model, inputs, move)`."
    )
