# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA on layers whose coefficients are Tucker tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..modules.calls import without_autocast
from ..tucker import Tucker, Update, direct_sum
from .layer import LoTRALayer, Tensors


class SlimLoTRALayer(LoTRALayer):
    """
    A Slim layer (`SlimKANLinear` or `SlimLayer`) with LoTRA adapters.

    The base layer runs with the components of `coefficients + updates`, a Tucker tensor of higher ranks: no dense
    tensor is built. A merge stores these components, so that the layer stays Slim.
    """

    base_layer: Any

    def _parameters_with(self, updates: Sequence[Update]) -> dict[str, Any]:
        if not updates:
            return {}
        base: Tucker = self.base_layer.components
        terms = [base]
        dtype = base.core.dtype
        with without_autocast(base.core):
            for scale, tensor in updates:
                tensor = tensor.padded(base.shape[2])  # without the base branch, its slice is zero
                tensor = tensor._replace(core=scale * tensor.core)
                terms.append(tensor.map(lambda component: component.to(dtype)))
            # a mode that the updates make full loses its factor: None
            return dict(zip(Tucker._fields, direct_sum(terms), strict=False))

    def _base_parameters(self) -> Tensors:
        return self.base_layer.components._asdict()

    def _add(self, updates: Sequence[Update]) -> None:
        merged = Tucker(*self._parameters_with(updates).values())
        factors = [factor for factor in merged.factors if factor is not None]
        if any(factor.shape[1] >= len(factor) for factor in factors):
            # a mode whose rank reaches its size needs no factor; QR does not exist in half precision
            dtype = torch.promote_types(merged.core.dtype, torch.float32)
            with without_autocast(merged.core):
                merged = merged.map(lambda component: component.to(dtype)).orthogonal()
        self._write(dict(zip(Tucker._fields, merged, strict=False)))

    @torch.inference_mode(False)
    def _write(self, values: dict[str, Any]) -> None:
        removed = vars(self).setdefault("_removed", {})  # the factors of modes that a merge has made full
        for name, value in values.items():
            parameter = getattr(self.base_layer, name)
            if value is not None:
                if parameter is None:
                    parameter = removed.pop(name)
                    setattr(self.base_layer, name, parameter)
                # a copy: a tensor that is made in inference mode could never be trained
                parameter.data = value.detach().to(self.base_layer.core.dtype, copy=True)
            elif parameter is not None:
                removed[name] = parameter
                setattr(self.base_layer, name, None)
