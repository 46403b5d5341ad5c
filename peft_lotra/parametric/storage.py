# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The file of a family, and the files of its members while it is fitted."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors import numpy as arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..hub.base_code import hub_id
from ..hub.contents import AdapterContents, AdapterRow
from ..report import Report, TextTable
from .interpolation import Member, Point
from .members import Problem, argument, write
from .report import ranges_of, text_of


FILE = "parametric_adapter.safetensors"
_VERSION = "1"


@dataclass(eq=False)
class SavedFamily(Report):
    """The content of the file of a family, which prints as `peft-lotra inspect` shows it.

    Attributes:
        path: The file.
        members: The members.
        log: Whether a parameter is scaled by its logarithm, for each.
        config: The configuration of the shared adapter, as PEFT saves it.
        tensors: The tensors of the shared adapter, where those of the members are zero.
    """

    path: Path
    members: list[Member]
    log: list[bool]
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def layers(self) -> list[AdapterRow]:
        """The adapted layers."""
        return [row for row in AdapterContents.of(str(self.path), self.config, self.tensors).layers if row.ranks]

    def _table(self) -> TextTable:
        rows = [[text_of(m.parameter), f"{m.indicator:.2e}", f"{np.linalg.norm(m.vector):.3g}"] for m in self.members]
        layers = ", ".join(f"{row.name} {row.ranks}" for row in self.layers)
        size, coordinates = self.path.stat().st_size, self.members[0].vector.size
        notes = [
            f"{len(rows)} members of {coordinates:,} coordinates, {size / 1000:.1f} kB",
            f"adapted layers, with their ranks (out, in, basis): {layers}",
        ]
        return TextTable(["parameter", ">fitted", ">norm"], rows, notes)

    def as_dict(self) -> dict[str, Any]:
        """The content in plain values, for JSON, without the coordinates of the members."""
        members = [
            {"parameter": list(m.parameter), "indicator": m.indicator if math.isfinite(m.indicator) else None}
            for m in self.members
        ]
        layers = [{"name": row.name, "kind": row.kind, "shape": row.shape, "ranks": row.ranks} for row in self.layers]
        sizes = {"coordinates": self.members[0].vector.size, "bytes": self.path.stat().st_size}
        return {"members": members, "log": self.log, **sizes, "layers": layers}


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
    _write(path, lambda temporary: save_file(tensors, temporary, metadata))


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
    members = [Member(point, vector, math.nan, indicator, 0, 0.0) for point, vector, indicator in rows]
    return SavedFamily(path, members, json.loads(metadata["log"]), json.loads(metadata["config"]), tensors)


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


class KnownMembers:
    """The fitted members in a folder, a file for each, by parameter and the number of fits there before.

    The names of the files are hashes of the base and of the settings, too, so that others are fitted again.

    Args:
        folder: The folder, which is made if there is none.
        model: The model with the adapter.
        problem: The settings of the fit.
    """

    def __init__(self, folder: str | os.PathLike, model: nn.Module, problem: Problem) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(repr((problem.train is None, problem.max_steps)).encode())
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.requires_grad:
                digest.update(tensor.detach().cpu().double().numpy().tobytes())
        self._digest = digest.hexdigest()

    def _path(self, key: tuple[Point, int]) -> Path:
        return self.folder / f"member-{hashlib.sha256(f'{self._digest} {key}'.encode()).hexdigest()[:32]}.safetensors"

    def __contains__(self, key: tuple[Point, int]) -> bool:
        return self._path(key).exists()

    def __getitem__(self, key: tuple[Point, int]) -> Member:
        values = arrays.load_file(self._path(key))
        return Member(key[0], values.pop("vector"), **{name: value.item() for name, value in values.items()})

    def __setitem__(self, key: tuple[Point, int], member: Member) -> None:
        values = {name: np.asarray(value) for name, value in member._asdict().items() if name != "parameter"}
        _write(self._path(key), partial(arrays.save_file, values))


def _write(path: Path, save: Callable[[str], None]) -> None:
    """Writes a file in one step, as others may read it."""
    temporary = f"{path}.{os.getpid()}.tmp"
    save(temporary)
    os.replace(temporary, path)
