# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The file of a family."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from ..hub.base_code import hub_id
from ..hub.card import load_card, save_section
from ..least_squares.problem import trainable_parameters
from ..modules.folders import naming_damage
from .interpolation import FamilyReport, Member, MemberSpace, ranges_of
from .members import argument


FILE = "parametric_adapter.safetensors"
_VERSION = 1


class SavedFamily(NamedTuple):
    """The content of the file of a family."""

    report: FamilyReport  # the members
    log: list[bool]  # whether a parameter is scaled by its logarithm, for each
    config: dict[str, Any]  # of the shared adapter, as PEFT saves it
    tensors: dict[str, Tensor]  # of the shared adapter, where those of the members are zero


def save_family(model: PeftModel, space: MemberSpace, path: Path) -> None:
    """Write the file: the shared adapter, whose cores are zero, as PEFT saves it, and the members."""
    points, vectors, _, indicators, *_ = zip(*space.members, strict=True)
    trained = next(iter(trainable_parameters(model).values()))
    log = space.log.expand(len(points[0])).tolist()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        config = json.loads(Path(folder, CONFIG_NAME).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = hub_id(config.get("base_model_name_or_path"))  # no folder of this machine
    config["weights_sha256"] = None  # the file has one of all its content
    tensors |= {
        "members": torch.from_numpy(np.stack(vectors)).to(torch.promote_types(trained.dtype, torch.float32)),
        "parameters": torch.from_numpy(np.array(points)),
        "indicators": torch.from_numpy(np.array(indicators)),
    }
    metadata = {"format": "pt", "parametric": str(_VERSION), "config": json.dumps(config), "log": json.dumps(log)}
    metadata["sha256"] = _hash(tensors, metadata)
    save_file(tensors, path, metadata)


def _hash(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Return the SHA-256 of the content of a file."""
    entries = [metadata[name] for name in ("parametric", "config", "log")]
    digest = hashlib.sha256(json.dumps(entries).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_family(path: Path) -> SavedFamily:
    """Read the file of a family.

    Raises:
        ValueError: It is damaged or altered, of another kind, or of a newer version.
    """
    with naming_damage(path):
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8:end])["__metadata__"]
        if int(metadata["parametric"]) <= _VERSION:
            return _parse(load(content), metadata)
    raise ValueError(f"{path} was written by a newer version of peft-lotra: upgrade peft-lotra to read it.")


def _parse(tensors: dict[str, Tensor], metadata: dict[str, str]) -> SavedFamily:
    if _hash(tensors, metadata) != metadata["sha256"]:
        raise ValueError("its content has another SHA-256")
    names = ("members", "parameters", "indicators")
    vectors, parameters, indicators = (tensors.pop(name).double().numpy() for name in names)
    rows = zip(map(tuple, parameters.tolist()), vectors, indicators.tolist(), strict=True)
    members = [Member(point, vector, math.nan, indicator, 0, math.nan) for point, vector, indicator in rows]
    report = FamilyReport(members, {}, math.nan, vectors.shape[1])
    return SavedFamily(report, json.loads(metadata["log"]), json.loads(metadata["config"]), tensors)


def load_family(base: nn.Module, path: Path, check_base: str) -> tuple[PeftModel, SavedFamily]:
    """Read the file of a family, and give the base its adapter; a ValueError if it is on another base or grid."""
    family = read_family(path)
    with TemporaryDirectory() as folder:
        Path(folder, CONFIG_NAME).write_text(json.dumps(family.config), encoding="utf-8")
        save_file(family.tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), {"format": "pt"})
        return PeftModel.from_pretrained(base, folder, is_trainable=True, check_base=check_base), family


def write_card(path: Path, members: Sequence[Member]) -> None:
    """Write the model card of a family into README.md; a text by a person stays.

    A card that cannot be read stays as it is, with a warning.
    """
    try:
        card = load_card(path)
        card.data.tags = [*(card.data.tags or []), "parametric"]
        save_section(
            card,
            path,
            "family.md",
            title="A family of LoTRA adapters",
            members=members,
            ranges=ranges_of([member.parameter for member in members]),
            example=argument(members[len(members) // 2].parameter),
        )
    except Exception as error:  # no reason for a save to fail
        warnings.warn(f"The family is saved, its model card is not written: {error}", stacklevel=3)
