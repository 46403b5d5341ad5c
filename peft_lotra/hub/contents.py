# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What a saved adapter contains, read without its base model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError

from ..families.registry import short_name
from ..files.checkpoint import by_short_name, own_tensors
from ..files.format import check_size, open_weights
from ..report import Report, TextTable
from ..tucker import tucker_of
from ..tuner.config import LoTRAConfig
from ..tuner.layer import COMPONENTS, LoTRALayer
from ..tuner.registration import NAME


class AdapterRow(NamedTuple):
    """What an adapter contains for one layer of the base model.

    `parameters` is the number of stored values, and `size` is the number of their bytes. `shape` and `ranks` are those
    of the update, (out, in, basis); the residual branch is the last slice of the basis. `norm` is the Frobenius norm
    of the update, `alpha` included. A module that is saved whole (`modules_to_save`) has only a name and sizes, and so
    have the running statistics of a normalization, with these words as their `family`.
    """

    name: str
    family: str | None
    shape: tuple[int, ...] | None
    ranks: tuple[int, ...] | None
    alpha: float | None
    norm: float | None
    parameters: int
    size: int

    def cells(self) -> list[str]:
        """Family, shape and ranks as text."""
        adapted = [str(self.family), str(self.shape), str(self.ranks)]
        return adapted if self.ranks else [self.family or "saved whole", "", ""]


@dataclass(eq=False)
class AdapterContents(Report):
    """The contents of one saved adapter, as `peft-lotra inspect` shows them; `bytes` and `parameters` are totals."""

    adapter: str
    peft_type: str
    base_model: str | None
    base_class: str | None
    dtype: list[str]
    parameters: int
    bytes: int
    finite: bool
    layers: list[AdapterRow]

    @classmethod
    def of(cls, adapter: str, config: LoTRAConfig, tensors: dict[str, torch.Tensor]) -> AdapterContents:
        """The contents of an adapter, from its configuration and its tensors."""
        rows = table_of_tensors(config, tensors)
        return cls(
            adapter=adapter,
            peft_type=NAME,
            base_model=config.base_model_name_or_path,
            base_class=(config.auto_mapping or {}).get("base_model_class"),
            dtype=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
            parameters=sum(row.parameters for row in rows),
            bytes=sum(row.size for row in rows),
            # torch knows isfinite of no float8
            finite=all((t.float() if t.element_size() == 1 else t).isfinite().all().item() for t in tensors.values()),
            layers=rows,
        )

    def _table(self) -> TextTable:
        rows = []
        for row in self.layers:
            numbers = [f"{row.alpha:g}", f"{row.norm:.3g}"] if row.ranks else ["", ""]
            rows.append([row.name, *row.cells(), *numbers, *size_cells([row])])
        rows.append(["total", *5 * [""], *size_cells(self.layers)])
        notes = [] if self.finite else ["The adapter is broken: it has values that are NaN or infinite."]
        columns = ["layer", "family", "update (out, in, basis)", "ranks", ">alpha", ">norm", ">parameters", ">kB"]
        return TextTable(columns, rows, notes)


def size_cells(rows: Sequence[AdapterRow]) -> list[str]:
    """The number of parameters of the rows and their size in kB (1,000 bytes), as text."""
    return [f"{sum(row.parameters for row in rows):,}", f"{sum(row.size for row in rows) / 1000:.1f}"]


def adapter_table(model: PeftModel, adapter_name: str = "default") -> list[AdapterRow]:
    """The contents of an adapter of a model: its layers by name, then the modules that are saved whole.

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
    return table_of_tensors(cast(LoTRAConfig, model.peft_config[adapter_name]), tensors)


def table_of_tensors(config: LoTRAConfig, tensors: dict[str, torch.Tensor]) -> list[AdapterRow]:
    """The contents of an adapter; a ValueError if a layer lacks a component, or has some that do not fit."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in own_tensors(tensors).items():
        name, _, part = short_name(key).rpartition(".")
        layers.setdefault(name, {})[part] = tensor
    return sorted((_row(config, name, parts) for name, parts in layers.items()), key=_order)


def _order(row: AdapterRow) -> tuple[bool, list]:
    # layers.2 before layers.10; neither files nor configurations keep the order of the model
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in row.name.split(".")]
    return row.ranks is None, parts


def _row(config: LoTRAConfig, name: str, parts: dict[str, torch.Tensor]) -> AdapterRow:
    parameters = sum(tensor.numel() for tensor in parts.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    names = [part for part in COMPONENTS if part in parts or part in LoTRALayer.adapter_layer_names]
    if not any(part in names for part in parts):
        kind = "running statistics" if all(part.startswith("lotra_") for part in parts) else None
        return AdapterRow(name, kind, None, None, None, None, parameters, size)
    missing = [part for part in names if part not in parts]
    if missing:
        raise ValueError(f"The adapter has no {', '.join(missing)} for `{name}`: it is not complete.")
    update = tucker_of(*(parts[part] for part in names))
    ranks = tuple(factor.shape[1] if factor.ndim == 2 else None for factor in update.factors)
    if ranks != update.core.shape:
        shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        raise ValueError(f"The components of `{name}` do not fit each other: {shapes}.")
    _, alpha = config.ranks_and_alpha(name)
    family = ((config.base_layers or {}).get(name) or {}).get("family", "unknown")
    # with orthonormal factors, the norm of the core is that of the whole tensor
    norm = abs(alpha) * update.map(torch.Tensor.double).orthogonal().core.norm().item()
    return AdapterRow(name, family, update.shape, update.ranks, alpha, norm, parameters, size)


def read_adapter(folder: str | Path) -> tuple[LoTRAConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors of a saved adapter, from safetensors only; a ValueError if it is broken."""
    folder = Path(folder)
    peft_type = peft_type_of(folder / CONFIG_NAME)
    if peft_type != NAME:
        raise ValueError(f"{folder} holds a {peft_type} adapter, and not one of LoTRA.")
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}. (Pickled weights are not read.)")
    try:
        config = cast(LoTRAConfig, PeftConfig.from_pretrained(str(folder)))
        with open_weights(str(weights)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        config.resolve({name: tuple(tensor.shape) for name, tensor in by_short_name(tensors).items()})
        return config, tensors
    except (SafetensorError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"The adapter in {folder} is broken: {error}") from error


def peft_type_of(path: Path) -> str:
    """The PEFT method of an adapter_config.json; a ValueError if there is no such file, or a broken one."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is no adapter: it has no {path.name}.")
    check_size(str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is broken: expected a JSON object with a `peft_type`, got {error!r}.") from error


def is_checkpoint(name: str) -> bool:
    """Whether a folder is a checkpoint of transformers.Trainer, which does not count as an adapter of its folder."""
    return re.fullmatch(r"checkpoint-\d+", name) is not None


def adapter_folders(folder: str | Path) -> dict[str, Path]:
    """The folders of the adapters that `save_pretrained` wrote into a folder, by name."""
    folder = Path(folder)
    # the folder itself has the adapter "default"
    subfolders = (path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}")))
    found = {path.name: path for path in subfolders if not is_checkpoint(path.name)}
    return {"default": folder, **found} if (folder / CONFIG_NAME).is_file() else found
