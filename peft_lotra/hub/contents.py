# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The files of saved adapters, read without their base model."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from ..modules.calls import PREFIX
from ..modules.checks import natural_order
from ..modules.folders import naming_damage
from ..modules.report import printable
from ..tucker import COMPONENTS, form_text, read_components


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the ranks of each layer, one on a line, and the size of all tensors of an adapter."""
    layers = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, component = key.removeprefix(PREFIX).rpartition(".")
        layers[name][component] = tensor
    lines = []
    for name in sorted(layers, key=natural_order):
        components = layers[name]
        if COMPONENTS[0] in components:  # not a copy of a module in `modules_to_save`
            ranks = form_text(read_components(components).form)
            lines.append(printable(f"{name}: {ranks}"))

    parameters = sum(tensor.numel() for tensor in tensors.values())
    kilobytes = sum(tensor.nbytes for tensor in tensors.values()) / 1000
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    lines.append(f"{parameters:,} parameters, {kilobytes:.1f} kB of {' and '.join(sorted(dtypes))}")
    return "\n".join(lines)


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
