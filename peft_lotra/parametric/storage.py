# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The file of a family."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..hub.base_code import hub_id
from .interpolation import FamilyReport, Member, ranges_of
from .members import argument, write


FILE = "parametric_adapter.safetensors"
_VERSION = "1"


class SavedFamily(NamedTuple):
    """The content of the file of a family."""

    report: FamilyReport  # the members
    log: list[bool]  # whether a parameter is scaled by its logarithm, for each
    config: dict[str, Any]  # of the shared adapter, as PEFT saves it
    tensors: dict[str, Tensor]  # of the shared adapter, where those of the members are zero


def save_family(model: PeftModel, members: list[Member], log: list[bool], path: Path) -> None:
    """Writes the file: the shared adapter, as PEFT saves it, and the members."""
    dtype = torch.promote_types(next(part.dtype for part in model.parameters() if part.requires_grad), torch.float32)
    vectors = torch.from_numpy(np.stack([member.vector for member in members]))
    with TemporaryDirectory() as folder:
        write(model, np.zeros(vectors.shape[1]))
        model.save_pretrained(folder)
        tensors = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        config = json.loads(Path(folder, CONFIG_NAME).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = hub_id(config.get("base_model_name_or_path"))  # no folder of this machine
    tensors |= {
        # a reader multiplies them: earlier files have fewer modes than members
        "modes": vectors.to(dtype),
        "coordinates": torch.eye(len(members), dtype=torch.float64, device="cpu"),
        "parameters": torch.tensor([member.parameter for member in members], dtype=torch.float64, device="cpu"),
        "indicators": torch.tensor([member.indicator for member in members], dtype=torch.float64, device="cpu"),
    }
    metadata = {"format": "pt", "parametric": _VERSION, "config": json.dumps(config), "log": json.dumps(log)}
    save_file(tensors, path, metadata)


def read_family(path: Path) -> SavedFamily:
    """Reads the file of a family; a ValueError if it is damaged, or of another kind."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}. Get the file anew.") from error
    names = ("modes", "coordinates", "parameters", "indicators")
    if metadata.get("parametric") != _VERSION or not set(names) <= tensors.keys():
        raise ValueError(f"{path} holds no family that this version can read: it is no file of a ParametricAdapter.")
    modes, coordinates, parameters, indicators = (tensors.pop(name).double().numpy() for name in names)
    vectors = coordinates @ modes
    if not (np.isfinite(vectors).all() and np.isfinite(parameters).all()):
        raise ValueError(f"{path} is damaged: its members have NaN or infinite coordinates. Get the file anew.")
    rows = zip(map(tuple, parameters.tolist()), vectors, indicators.tolist(), strict=True)
    members = [Member(point, vector, math.nan, indicator, 0, math.nan) for point, vector, indicator in rows]
    report = FamilyReport(members, {}, math.nan, vectors.shape[1])
    return SavedFamily(report, json.loads(metadata["log"]), json.loads(metadata["config"]), tensors)


def load_family(base: nn.Module, path: Path, check_base: str) -> tuple[PeftModel, SavedFamily]:
    """Reads the file of a family, and gives the base its adapter; a ValueError if it is on another base or grid."""
    family = read_family(path)
    with TemporaryDirectory() as folder:
        Path(folder, CONFIG_NAME).write_text(json.dumps(family.config), encoding="utf-8")
        save_file(family.tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), {"format": "pt"})
        return PeftModel.from_pretrained(base, folder, is_trainable=True, check_base=check_base), family


def card_of(members: Sequence[Member]) -> ModelCard:
    """The model card of a saved family."""
    points = [member.parameter for member in members]
    return ModelCard(
        "---\nlibrary_name: peft\ntags:\n- kan\n- lotra\n- peft-plugin\n- parametric\n---\n\n"
        "# A family of LoTRA adapters\n\n"
        f"{len(points)} adapters of one Kolmogorov-Arnold network, of {members[0].vector.size:,} coordinates each, "
        f"for parameters from {', and from '.join(ranges_of(points))}. Between them adapters are predicted without "
        "training.\n\n```python\nfrom peft_lotra import ParametricAdapter\n\n"
        "# `base` is the network that the family was fitted on\n"
        'family = ParametricAdapter.from_pretrained(base, ".")  # this folder, or the name of the repository\n'
        f"output = family.predict({argument(points[len(points) // 2])})(x)\n```\n"
    )
