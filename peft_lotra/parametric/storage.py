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
    tensors: dict[str, Tensor]  # of the shared adapter, whose trained component is zero


def save_family(model: PeftModel, space: MemberSpace, path: Path) -> None:
    """Write the file: the shared adapter, whose cores are zero, as PEFT saves it, and the members."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        config = json.loads(Path(folder, CONFIG_NAME).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = hub_id(config.get("base_model_name_or_path"))  # no folder of this machine
    config["weights_sha256"] = None  # the file has one of all its content

    points, vectors, _, indicators, *_ = zip(*space.members, strict=True)
    trained = next(iter(trainable_parameters(model).values()))
    dtype = torch.promote_types(trained.dtype, torch.float32)
    tensors["members"] = torch.from_numpy(np.stack(vectors)).to(dtype)
    tensors["parameters"] = torch.from_numpy(np.array(points))
    tensors["indicators"] = torch.from_numpy(np.array(indicators))
    log = space.log.expand(len(points[0])).tolist()
    text = json.dumps({"version": _VERSION, "config": config, "log": log})
    metadata = {"format": "pt", "family": text, "sha256": _hash(tensors, text)}
    save_file(tensors, path, metadata)


def _hash(tensors: dict[str, Tensor], text: str) -> str:
    """Return the SHA-256 of the content of a file."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
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
        family = json.loads(metadata["family"])
        if family["version"] <= _VERSION:
            tensors = load(content)
            if _hash(tensors, metadata["family"]) != metadata["sha256"]:
                raise ValueError("its content has another SHA-256")
            points = tensors.pop("parameters").tolist()
            vectors = tensors.pop("members").double().numpy()
            indicators = tensors.pop("indicators").tolist()
            members = []
            for point, vector, indicator in zip(points, vectors, indicators, strict=True):
                members.append(Member(tuple(point), vector, math.nan, indicator, 0, math.nan))
            report = FamilyReport(members, {}, math.nan, vectors.shape[1])
            return SavedFamily(report, family["log"], family["config"], tensors)
    raise ValueError(f"{path} was written by a newer version of peft-lotra: upgrade peft-lotra to read it.")


def load_family(
    base: nn.Module,
    path: Path,
    check_base: str,
) -> tuple[PeftModel, SavedFamily]:
    """Read the file of a family, and give the base its adapter; a ValueError if it is on another base or grid."""
    family = read_family(path)
    with TemporaryDirectory() as folder:
        Path(folder, CONFIG_NAME).write_text(json.dumps(family.config), encoding="utf-8")
        save_file(family.tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), {"format": "pt"})
        model = PeftModel.from_pretrained(base, folder, is_trainable=True, check_base=check_base)
    return model, family


def write_card(path: Path, members: Sequence[Member]) -> None:
    """Write the model card of a family into README.md; a text by a person stays.

    A card that cannot be read stays unchanged, with a warning.
    """
    try:
        card = load_card(path)
        card.data.tags = [*(card.data.tags or []), "parametric"]
        points = [member.parameter for member in members]
        save_section(
            card,
            path,
            "family.md",
            title="A family of LoTRA adapters",
            members=members,
            ranges=ranges_of(points),
            example=argument(points[len(points) // 2]),
        )
    except Exception as error:  # no reason for a save to fail
        warnings.warn(f"The family is saved, its model card is not written: {error}", stacklevel=3)
