# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA on layers that are Tucker tensors already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..layers.registry import get_kan_spec
from ..modules.calls import share_hooks, without_autocast
from ..tucker import Tucker, Update, direct_sum
from .layer import LoTRALayer, Target


class SlimLoTRALayer(LoTRALayer):
    """
    A Slim layer (`SlimKANLinear` or `SlimLayer`) with LoTRA adapters.

    The base layer runs with the components of its sum with the updates, a Tucker tensor of more ranks: no dense tensor
    is built. A merge replaces the base layer by its dense equivalent, exactly.
    """

    base_layer: Any

    # The Slim layer while its dense equivalent is in its place. As a module, and not in a tuple, it would be a part of
    # the state dict.
    _slim: Target | None = None

    def _parameters_with(self, updates: Sequence[Update]) -> dict[str, torch.Tensor]:
        if self._slim is not None or not updates:
            return super()._parameters_with(updates)
        parts: list[Tucker] = [self.base_layer.components]
        (basis, _), dtype = parts[0].factor_basis.shape, parts[0].core.dtype
        with without_autocast(parts[0].core):
            for scale, tensor in updates:
                # without the residual branch, its slice of the update is zero
                tensor = tensor.padded(basis)._replace(core=scale * tensor.core)
                parts.append(tensor.map(lambda part: part.to(dtype)))
            return direct_sum(parts)._asdict()

    def _base_parameters(self) -> dict[str, torch.Tensor]:
        return {}  # a merge leaves the Slim layer as it is

    def base_before_merge(self) -> Target:
        return self._slim or super().base_before_merge()

    def _coefficients_before_merge(self) -> torch.Tensor:
        slim = self.base_before_merge()
        return slim.tensor.read(slim.layer).detach()

    def _add(self, updates: Sequence[Update]) -> None:
        if self._slim is None:
            slim = self.base_before_merge()
            # a tensor that is made in inference mode could never be trained
            with torch.inference_mode(False), torch.autocast(self.base_layer.core.device.type, enabled=False):
                dense = self.base_layer.to_dense()
            share_hooks(self.base_layer, dense)
            spec = get_kan_spec(dense)
            assert spec is not None
            self.exchange_base(dense, spec, spec.locate(dense))
            self._slim = slim
        super()._add(updates)

    def _restore(self) -> None:
        self.exchange_base(*self.base_before_merge())
        self._slim = None

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        slim = self.base_before_merge().layer
        base_layer = super().unload_and_optionally_merge_module(*args, **kwargs)
        if base_layer is not slim:  # its dense equivalent is as trainable
            base_layer.requires_grad_(any(part.requires_grad for part in slim.parameters()))
        return base_layer

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> SlimLoTRALayer:
        super()._apply(fn, *args, **kwargs)
        if self._slim is not None:
            self._slim[0]._apply(fn, *args, **kwargs)
        return self
