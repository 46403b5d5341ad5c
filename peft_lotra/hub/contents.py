# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The contents of a saved adapter, read from its two files, without its base model."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from ..modules.calls import PREFIX
from ..modules.checks import natural_order
from ..modules.folders import naming_damage
from ..modules.report import Report, TextTable
from ..tucker import COMPONENTS, Rank, form_text, read_components


class AdapterRow(NamedTuple):
    """The contents of an adapter for one layer of the base model.

    `shape` and `ranks` describe the update, (out, in, basis), where the base branch is the last slice of the
    basis; `norm` is its Frobenius norm times `alpha`. `parameters` is the number of stored values. A module of
    `modules_to_save`, of the kind "saved copy", has no update.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None = None
    ranks: tuple[Rank, ...] | None = None
    alpha: float | None = None
    norm: float | None = None
    parameters: int = 0


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
    def of(
        cls,
        adapter: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
    ) -> AdapterContents:
        """Make the contents of an adapter, from its configuration and its tensors."""
        layers = defaultdict(dict)
        for key, tensor in tensors.items():
            name, _, component = key.removeprefix(PREFIX).rpartition(".")
            layers[name][component] = tensor
        rows = []
        for name, components in layers.items():
            parameters = sum(tensor.numel() for tensor in components.values())
            if COMPONENTS[0] not in components:
                rows.append(AdapterRow(name, "saved copy", parameters=parameters))
                continue

            patterns = config["alpha_pattern"]
            key = get_pattern_key(list(patterns), name)
            alpha = float(patterns.get(key, config["alpha"]))
            record = config["base_layers"].get(name, {})
            kind = record.get("kind", "unknown")
            update = read_components(components).map(torch.Tensor.double)
            # once the factors are orthonormal, the norm of the core is the norm of the whole tensor
            norm = abs(alpha) * update.orthogonal().core.norm().item()
            rows.append(AdapterRow(name, kind, update.shape, update.form, alpha, norm, parameters))

        rows.sort(key=lambda row: (row.ranks is None, natural_order(row.name)))  # saved copies come last
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
        return cls(
            adapter=adapter,
            base_model=config["base_model_name_or_path"],
            base_class=(config["auto_mapping"] or {}).get("base_model_class"),
            dtype=sorted(dtypes),
            parameters=sum(row.parameters for row in rows),
            bytes=sum(tensor.nbytes for tensor in tensors.values()),
            finite=all(tensor.float().isfinite().all() for tensor in tensors.values()),
            layers=rows,
        )

    def _table(self) -> TextTable:
        rows = []
        for name, kind, shape, ranks, alpha, norm, parameters in self.layers:
            row = [name, kind, form_text(shape), form_text(ranks)]
            row += ["", ""] if alpha is None else [f"{alpha:.3g}", f"{norm:.3g}"]
            rows.append([*row, str(parameters)])
        notes = [f"{self.parameters:,} parameters, {self.bytes / 1000:.1f} kB of {' and '.join(self.dtype)}"]
        if not self.finite:
            notes.append("The adapter is broken: it has values that are NaN or infinite.")
        columns = ["layer", "kind", "update (out, in, basis)", "ranks", ">alpha", ">norm", ">parameters"]
        return TextTable(columns, rows, notes)


def read_adapter(
    folder: str | os.PathLike,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the configuration and the tensors of a saved adapter, from JSON and safetensors only.

    Raises:
        ValueError: It is no LoTRA adapter, or one of its files is damaged.
    """
    folder = Path(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    for file in (folder / CONFIG_NAME, weights):
        if not file.is_file():
            raise ValueError(f"{folder} is no adapter: it has no {file.name}.")
    config = read_config(folder)
    method = config["peft_type"]
    if method != "LOTRA":
        raise ValueError(f"{folder} holds a {method} adapter, and not one of LoTRA.")
    with naming_damage(weights):
        return config, load_file(weights)


def saved_adapters(folder: str | os.PathLike) -> dict[str, Path]:
    """Return the folders of the adapters in a folder, of any PEFT method, by name, "default" first.

    `save_pretrained` writes "default" into the folder and each other adapter into a subfolder of its name. Hidden
    folders and the checkpoints of transformers.Trainer are left out.
    """
    root = Path(folder)
    folders = {"default": root}
    for path in sorted(root.glob("*")):
        if not re.match(r"checkpoint-\d+$|\.", path.name):
            folders[path.name] = path
    adapters = {}
    for name, path in folders.items():
        if (path / CONFIG_NAME).is_file() or (path / SAFETENSORS_WEIGHTS_NAME).is_file():
            adapters[name] = path
    return adapters


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a saved adapter; raise a ValueError if it is damaged."""
    path = folder / CONFIG_NAME
    with naming_damage(path):
        config = json.loads(path.read_text(encoding="utf-8"))
        config["peft_type"]  # the PEFT method, such as "LOTRA", which each has
        return config


def adapter_folders(folder: str | os.PathLike) -> dict[str, Path]:
    """Find the folders of the LoTRA adapters that `save_pretrained` wrote into a folder, by name, "default" first.

    Raises:
        ValueError: There is none.
    """
    folders = {}
    for name, path in saved_adapters(folder).items():
        config = path / CONFIG_NAME
        if config.is_file() and (name == "default" or '"LOTRA"' in config.read_text(encoding="utf-8")):
            folders[name] = path
    if not folders:
        raise ValueError(f"{folder} is no adapter: it has no {CONFIG_NAME}. Save the adapter there first.")
    return folders


def fetch_folder(
    source: str | os.PathLike,
    files: list[str],
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Return a local file or folder as it is; for a repository on the Hub, a folder with its files of these patterns.

    Raises:
        ValueError: There is no such file or folder, and no such repository.
    """
    path = Path(source)
    if path.exists():
        return path
    try:
        return Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no file or folder {source}, and no repository of that name could be read from the Hub. {error}"
        ) from error
