# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What a saved adapter holds, read without a base model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..tuner.config import LoTRAConfig
from ..tuner.layer import LoTRALayer
from ..tuner.registration import NAME


@dataclass(frozen=True)
class AdapterRow:
    """What an adapter holds for one layer.

    Attributes:
        name (`str`): The name of the layer in the base model.
        family (`str` or `None`): Its KAN family; None for a module that is saved whole (`modules_to_save`), for which
            the next four are None as well.
        shape (`tuple[int, int, int]` or `None`): The update, (out, in, basis), with the residual branch as the last
            slice of the basis.
        ranks (`tuple[int, int, int]` or `None`): Of the update.
        alpha (`float` or `None`): What the update is multiplied by.
        norm (`float` or `None`): The Frobenius norm of the update.
        parameters (`int`): How many numbers are stored.
        size (`int`): How many bytes they take.
    """

    name: str
    family: str | None
    shape: tuple[int, int, int] | None
    ranks: tuple[int, int, int] | None
    alpha: float | None
    norm: float | None
    parameters: int
    size: int


def adapter_table(model: PeftModel, adapter_name: str = "default") -> list[AdapterRow]:
    """The layers of an adapter of a model, see [`AdapterRow`]: by name, and those that are saved whole last."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return table_of_tensors(model.peft_config[adapter_name], tensors)


def table_of_tensors(config: LoTRAConfig, tensors: dict[str, torch.Tensor]) -> list[AdapterRow]:
    """The layers of an adapter, from its configuration and its tensors as PEFT saves them.

    Raises:
        ValueError: A layer lacks a component, or its components do not fit each other.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in without_other_adapters(tensors).items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".")
        layers.setdefault(name, {})[part] = tensor
    return sorted((_row(config, name, parts) for name, parts in layers.items()), key=_order)


def _order(row: AdapterRow) -> tuple:
    # layers.2 before layers.10; neither files nor configurations keep the order of the model
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in row.name.split(".")]
    return row.ranks is None, parts


def without_other_adapters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PEFT 0.19 puts the tensors of all adapters of a model into each of their files, those of the others with their
    names at the end."""
    other = re.compile(rf".*\.({'|'.join(LoTRALayer.adapter_layer_names)})\..+")
    return {key: tensor for key, tensor in tensors.items() if not other.fullmatch(key)}


def _row(config: LoTRAConfig, name: str, parts: dict[str, torch.Tensor]) -> AdapterRow:
    parameters = sum(tensor.numel() for tensor in parts.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    if not any(part in LoTRALayer.adapter_layer_names for part in parts):
        return AdapterRow(name, None, None, None, None, None, parameters, size)
    missing = [part for part in LoTRALayer.adapter_layer_names if part not in parts]
    if missing:
        raise ValueError(f"The adapter has no {', '.join(missing)} for `{name}`: it is not complete.")
    core, *factors = (parts[part] for part in LoTRALayer.adapter_layer_names)
    if core.ndim != 3 or any(f.ndim != 2 or f.shape[1] != r for f, r in zip(factors, core.shape, strict=True)):
        shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        raise ValueError(f"The components of `{name}` do not fit each other: {shapes}.")
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.alpha)
    family = ((config.base_layers or {}).get(name) or {}).get("family", "unknown")
    shape = tuple(len(factor) for factor in factors)
    return AdapterRow(name, family, shape, tuple(core.shape), alpha, _norm(core, factors, alpha), parameters, size)


def _norm(core: torch.Tensor, factors: list[torch.Tensor], alpha: float) -> float:
    """The norm of the update, without building it: by the Gram matrices of its factors."""
    core = core.double()
    grams = [factor.double().T @ factor.double() for factor in factors]
    squared = (core * torch.einsum("abc,ai,bj,ck->ijk", core, *grams)).sum()
    return abs(alpha) * squared.clamp(min=0).sqrt().item()


def read_adapter(folder: str | Path) -> tuple[LoTRAConfig, dict[str, torch.Tensor]]:
    """Reads a LoTRA adapter without a base model. Nothing is unpickled: only safetensors are read.

    Args:
        folder (`str` or `Path`): What `save_pretrained` wrote.

    Returns:
        Its configuration and its tensors, on the CPU.

    Raises:
        ValueError: The folder holds no LoTRA adapter, or a broken one.
    """
    folder = Path(folder)
    peft_type = peft_type_of(folder / CONFIG_NAME)
    if peft_type != NAME:
        raise ValueError(f"{folder} holds a {peft_type} adapter, and not one of LoTRA.")
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}. (Pickled weights are not read.)")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        return config, load_file(weights)
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"The adapter in {folder} is broken: {error}") from error


def peft_type_of(path: Path) -> str:
    """The PEFT method of an adapter, by its adapter_config.json; a ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is no adapter: it has no {path.name}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is broken: expected a JSON object with a `peft_type`, got {error!r}.") from error


def adapter_folders(folder: str | Path) -> dict[str, Path]:
    """The adapters that `save_pretrained` put into a folder: "default" in it, others in subfolders of their name. The
    checkpoints of `transformers.Trainer` are no adapters of the folder."""
    folder = Path(folder)
    subfolders = (path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}")))
    found = {path.name: path for path in subfolders if not re.fullmatch(r"checkpoint-\d+", path.name)}
    return {"default": folder, **found} if (folder / CONFIG_NAME).is_file() else found
