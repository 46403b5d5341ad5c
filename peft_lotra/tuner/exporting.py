# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Traces that torch gets wrong for adapted layers, and refuses to make."""

from __future__ import annotations

import torch
from torch import nn

from ..families.registry import KANLayerSpec


is_tracing = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage] (documented, not exported)


def refuse_trace(spec: KANLayerSpec, base_layer: nn.Module) -> None:
    """Raises in `torch.jit.trace` where that would raise, or record the sizes of a grid as tensors."""
    if not spec.is_of_this_package(base_layer):
        raise NotImplementedError(
            f"torch.jit.trace takes adapted {spec.family} layers only once they are merged: "
            "`model.merge_and_unload()`. Or use `torch.export.export`."
        )
