# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Traces and exports that torch gets wrong for adapted layers, and refuses to make."""

from __future__ import annotations

import torch
from torch import nn

from ..families.registry import KANLayerSpec


# a base layer that runs with exchanged parameters is exported as the base: seen with 2.7 and 2.8, and not with 2.10
_STRICT_EXPORT_IS_WRONG = torch.__version__ < "2.10"

is_tracing = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage] (documented, not exported)


class StrictExportIsWrong(NotImplementedError):
    """Before torch 2.10, strict export leaves adapters out: pass `strict=False`, or merge the adapters first.

    The exporter shows the name of this class, and no message.
    """


def refuse_strict_export() -> None:
    """Raises in `torch.export.export(..., strict=True)` of a version that exports adapted layers wrongly."""
    if _STRICT_EXPORT_IS_WRONG and torch.compiler.is_dynamo_compiling() and torch.compiler._is_exporting_flag:
        raise StrictExportIsWrong


def refuse_trace(spec: KANLayerSpec, base_layer: nn.Module) -> None:
    """Raises in `torch.jit.trace` where that would raise, or record the sizes of a grid as tensors."""
    if not spec.is_of_this_package(base_layer):
        raise NotImplementedError(
            f"torch.jit.trace takes adapted {spec.family} layers only once they are merged: "
            "`model.merge_and_unload()`. Or use `torch.export.export`."
        )
