# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The contents of a saved adapter, read from its two files, without its base model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..report import Report, TextTable
from ..tucker import Tucker


_COMPONENTS = tuple(f"lotra_{part}" for part in Tucker._fields)
_PREFIX = "base_model.model."  # by PEFT, in front of the names in the base model


class AdapterRow(NamedTuple):
    """The contents of an adapter for one layer of the base model.

    `shape` and `ranks` are those of the update, (out, in, basis), where the residual branch is the last slice of the
    basis; `norm` is its Frobenius norm times `alpha`. `parameters` is the number of stored values, `size` that of
    bytes. A module of `modules_to_save` has only a name and sizes.
    """

    name: str
    kind: str | None
    shape: tuple[int, ...] | None
    ranks: tuple[int, ...] | None
    alpha: float | None
    norm: float | None
    parameters: int
    size: int

    def cells(self) -> list[str]:
        """The text of the columns after the name."""
        if self.ranks is None:
            return ["saved copy", *4 * [""], *_size_cells(self.parameters, self.size)]
        update = [str(self.kind), str(self.shape), str(self.ranks), f"{self.alpha:g}", f"{self.norm:.3g}"]
        return [*update, *_size_cells(self.parameters, self.size)]


def _size_cells(parameters: int, size: int) -> list[str]:
    return [f"{parameters:,}", f"{size / 1000:.1f}"]


@dataclass(eq=False)
class AdapterContents(Report):
    """The contents of a saved adapter, which `peft-lotra inspect` shows; `bytes` and `parameters` are totals."""

    adapter: str
    base_model: str | None
    base_class: str | None
    dtype: list[str]
    parameters: int
    bytes: int
    finite: bool
    layers: list[AdapterRow]  # and then the modules of `modules_to_save`

    @classmethod
    def of(cls, adapter: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> AdapterContents:
        """The contents of an adapter, from its configuration and its tensors."""
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.removeprefix(_PREFIX).rpartition(".")
            layers.setdefault(name, {})[part] = tensor
        rows = [_row(config, name, parts) for name, parts in layers.items()]
        # layers.2 before layers.10
        rows.sort(key=lambda row: (row.ranks is None, re.sub(r"\d+", lambda n: n[0].zfill(9), row.name)))
        base, base_class = config.get("base_model_name_or_path"), config.get("auto_mapping") or {}
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
        finite = all(tensor.float().isfinite().all().item() for tensor in tensors.values())
        totals = sum(row.parameters for row in rows), sum(row.size for row in rows)
        return cls(adapter, base, base_class.get("base_model_class"), dtypes, *totals, finite, rows)

    def _table(self) -> TextTable:
        rows = [[row.name, *row.cells()] for row in self.layers]
        rows.append(["total", *5 * [""], *_size_cells(self.parameters, self.bytes)])
        notes = [] if self.finite else ["The adapter is broken: it has values that are NaN or infinite."]
        columns = ["layer", "kind", "update (out, in, basis)", "ranks", ">alpha", ">norm", ">parameters", ">kB"]
        return TextTable(columns, rows, notes)


def adapter_table(model: PeftModel, adapter_name: str = "default") -> list[AdapterRow]:
    """The contents of an adapter of a model: its layers by name, then its modules of `modules_to_save`.

    Args:
        model: A model with LoTRA adapters.
        adapter_name: The name of the adapter.

    Returns:
        One row for each layer.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig
        >>> from peft_lotra.hub import adapter_table
        >>> from peft_lotra.kan import KAN
        >>> (row,) = adapter_table(get_peft_model(KAN([2, 8]), LoTRAConfig(r=2)))
        >>> row.name, row.shape, row.ranks, row.parameters
        ('layers.0', (8, 2, 9), (2, 2, 2), 46)
    """
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # the configuration has the kinds of layers only once it was saved
    specs = {name: getattr(module, "lotra_spec", None) for name, module in model.get_base_model().named_modules()}
    kinds = {name: {"family": spec.family} for name, spec in specs.items() if spec is not None}
    config = {**model.peft_config[adapter_name].to_dict(), "base_layers": kinds}
    return AdapterContents.of(adapter_name, config, tensors).layers


def _row(config: Mapping[str, Any], name: str, parts: Mapping[str, torch.Tensor]) -> AdapterRow:
    parameters = sum(tensor.numel() for tensor in parts.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    if not parts.keys() & set(_COMPONENTS):
        return AdapterRow(name, None, None, None, None, None, parameters, size)
    update = Tucker(*(parts[part].double() for part in _COMPONENTS if part in parts))
    patterns: Any = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns, name), config.get("alpha", 1.0)))
    kind = ((config.get("base_layers") or {}).get(name) or {}).get("family", "unknown")
    # once the factors are orthonormal, the norm of the core is that of the whole tensor
    norm = abs(alpha) * update.orthogonal().core.norm().item()
    return AdapterRow(name, kind, update.shape, update.ranks, alpha, norm, parameters, size)


def read_adapter(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the tensors of a saved adapter, from JSON and safetensors only.

    Raises:
        ValueError: It is no LoTRA adapter, or its files are broken.
    """
    path, weights = Path(folder, CONFIG_NAME), Path(folder, SAFETENSORS_WEIGHTS_NAME)
    for file in (path, weights):
        if not file.is_file():
            raise ValueError(f"{folder} is no adapter: it has no {file.name}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, tensors = config["peft_type"], load_file(weights)
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"The files in {folder} are broken: {error!r}.") from error
    if kind != "LOTRA":
        raise ValueError(f"{folder} holds a {kind} adapter, and not one of LoTRA.")
    return config, tensors


def adapter_folders(folder: str | os.PathLike) -> dict[str, Path]:
    """The folders of the LoTRA adapters that `save_pretrained` wrote into a folder, by name, "default" first."""
    found = {"default": Path(folder)} if Path(folder, CONFIG_NAME).is_file() else {}
    for path in sorted(Path(folder).glob(f"*/{CONFIG_NAME}")):
        # not the checkpoints of transformers.Trainer, nor adapters of other methods
        if not re.match(r"checkpoint-\d+$|\.", path.parent.name) and '"LOTRA"' in path.read_text(encoding="utf-8"):
            found[path.parent.name] = path.parent
    return found
