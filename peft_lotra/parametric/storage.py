# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The file of a family, and the folder of a run that can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import nn

from ..hub.base_code import hub_id
from ..tuner.config import LoTRAConfig
from .members import Member, Point, named, read, write


FILE = "parametric_adapter.safetensors"
RUN = "run.json"
_VERSION = "1"
_ARRAYS = ("modes", "coordinates", "parameters", "indicators")


class Contents(NamedTuple):
    """What the file of a family contains beside the adapter that its members share."""

    vectors: np.ndarray  # (members, P)
    parameters: list[Point]
    indicators: list[float]
    log: list[bool]


def modes_of(vectors: np.ndarray, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal modes (R, P) and coordinates (members, R): the leading singular vectors, all that are not zero."""
    left, values, modes = np.linalg.svd(vectors, full_matrices=False)
    rank = max(1, int((values > values[0] * 1e-14).sum()))
    rank = rank if most is None else min(rank, most)
    return modes[:rank], left[:, :rank] * values[:rank]


def save_family(model: PeftModel, contents: Contents, path: Path, modes: int | None) -> None:
    """Writes the file in one step: the shared part, as PEFT saves an adapter, the modes, and the members in them."""
    dtype = torch.promote_types(next(part.dtype for part in model.parameters() if part.requires_grad), torch.float32)
    directions, coordinates = modes_of(contents.vectors, modes)
    arrays = {
        "modes": torch.from_numpy(directions).to(dtype),
        "coordinates": torch.from_numpy(coordinates),
        "parameters": torch.tensor(contents.parameters, dtype=torch.float64, device="cpu"),
        "indicators": torch.tensor(contents.indicators, dtype=torch.float64, device="cpu"),
    }
    with TemporaryDirectory() as folder:
        write(model, np.zeros(contents.vectors.shape[1]))
        model.save_pretrained(folder)
        shared = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        values = json.loads(Path(folder, CONFIG_NAME).read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = hub_id(values.get("base_model_name_or_path"))  # no folder of this machine
    config = json.dumps(values)
    tensors = {name: part.contiguous() for name, part in (shared | arrays).items()}
    metadata = {"format": "pt", "parametric": _VERSION, "config": config, "log": json.dumps(contents.log)}
    metadata["sha256"] = digest({**arrays, "log": torch.tensor(contents.log)})
    _replace(path, lambda temporary: save_file(tensors, temporary, metadata))


@contextmanager
def opened_family(path: str | Path) -> Iterator[tuple[Path, Contents]]:
    """Yields a folder with the adapter that the members of a file share, as PEFT saves one, and the members.

    Raises:
        ValueError: The file is damaged or of another kind.
    """
    with open_weights(str(path)) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    if metadata.get("parametric") != _VERSION or not set(_ARRAYS) <= tensors.keys():
        raise ValueError(f"{path} holds no family that this version can read: it is no file of a ParametricAdapter.")
    if kinds := sorted({str(tensors[name].dtype) for name in _ARRAYS} - {"torch.float32", "torch.float64"}):
        raise ValueError(f"{path} is damaged: the members are of {', '.join(kinds)}, expected float64 or float32.")
    stored, log = {name: tensors.pop(name) for name in _ARRAYS}, _read_log(metadata)
    sha256 = digest({**stored, "log": torch.tensor(log)})
    if metadata.get("sha256") not in (None, sha256):  # None: of an earlier version
        raise ValueError(f"{path} is damaged: its members are not those that were saved. Get the file anew.")
    arrays = {name: part.double().numpy() for name, part in stored.items()}
    sizes = {name: array.shape for name, array in arrays.items()}
    members = len(arrays["parameters"])
    expected = {
        "modes": (*arrays["coordinates"].shape[1:], *arrays["modes"].shape[1:]),
        "coordinates": (members, *arrays["modes"].shape[:1]),
        "parameters": (members, len(log)),
        "indicators": (members,),
    }
    finite = all(np.isfinite(arrays[name]).all() for name in _ARRAYS[:3])
    if sizes != expected or arrays["modes"].ndim != 2 or not members or not finite:
        raise ValueError(f"{path} is damaged: the members have the shapes {sizes}, expected finite {expected}.")
    points = [tuple(row) for row in arrays["parameters"].tolist()]
    low = arrays["parameters"].min(0).tolist()
    if len(set(points)) < members or any(flag and value <= 0 for flag, value in zip(log, low, strict=True)):
        raise ValueError(
            f"{path} is damaged: parameters {points!r:.200} must differ, and be above 0 where the family is in their "
            f"logarithm ({log})."
        )
    with TemporaryDirectory() as folder:
        Path(folder, CONFIG_NAME).write_text(metadata.get("config", ""), encoding="utf-8")
        save_file(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), {"format": "pt"})
        contents = Contents(arrays["coordinates"] @ arrays["modes"], points, arrays["indicators"].tolist(), log)
        try:
            yield Path(folder), contents
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(path))) from error


def load_family(base: nn.Module, path: str | Path, check_base: str) -> tuple[PeftModel, Contents]:
    """Reads the file of a family, and gives the base its adapter.

    Raises:
        ValueError: The file is damaged or of another kind, or its family is on another base or grid.
    """
    with opened_family(path) as (folder, contents):
        config = LoTRAConfig.from_pretrained(str(folder))
        if not isinstance(config, LoTRAConfig):
            raise ValueError(f"{path} is damaged: its adapter is of the method {config.peft_type}, not LOTRA.")
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=True, check_base=check_base)
        size = len(read(model))
        if contents.vectors.shape[1] != size:
            raise ValueError(f"{path} is damaged: members have {contents.vectors.shape[1]} coordinates, not {size}.")
        for vector, parameter in zip(contents.vectors, contents.parameters, strict=True):
            if not all(part.isfinite().all() for part in named(model, vector).values()):
                raise ValueError(f"{path} is damaged: the member at {parameter} is beyond the dtype of the model.")
    return model, contents


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of the names and contents of tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


@contextmanager
def open_weights(path: str) -> Iterator[Any]:
    """A safetensors file; a ValueError if there is none, or a damaged one."""
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    with file as opened:
        yield opened


def _read_log(metadata: Mapping[str, str]) -> list[bool]:
    try:
        log = json.loads(metadata.get("log", ""))
    except (ValueError, RecursionError):
        log = None
    if not isinstance(log, list) or not log or not all(isinstance(flag, bool) for flag in log):
        raise ValueError("The file of the family is damaged: its entry `log` is no list of booleans.")
    return log


def _replace(path: Path, save: Any) -> None:
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


class RunFolder:
    """The members that a run has fitted, one file each, so that a later run goes on where this one ended.

    Args:
        folder: The folder, which is made if there is none.
        record: What the run fits; a folder with another record is refused.
    """

    def __init__(self, folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.record = dict(record)

    @contextmanager
    def opened(self) -> Iterator[dict[tuple[Point, int], Member]]:
        """Locks the folder, and yields the members in it, by parameter and the number of fits at it before.

        Raises:
            ValueError: Another run is writing to the folder, or it belongs to another family or other settings.
        """
        from filelock import FileLock, Timeout  # a dependency of huggingface_hub

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another run is writing to {self.folder}. Wait until it ends, or choose another folder."
            ) from None
        try:
            self._check_record()
            yield dict(self._members())
        finally:
            lock.release()

    def _check_record(self) -> None:
        path = self.folder / RUN
        if not path.exists():
            _replace(path, lambda it: Path(it).write_text(json.dumps(self.record, indent=2, sort_keys=True)))
            return
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(known, dict):
                raise ValueError(f"expected a JSON object, got {known!r:.100}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is broken: {error}. Choose another folder.") from error
        if known != self.record:
            differ = sorted(name for name in {*known, *self.record} if known.get(name) != self.record.get(name))
            raise ValueError(
                f"{self.folder} holds members of another family or other settings ({', '.join(differ)} differ). "
                "Choose another folder, or delete this one."
            )

    def _members(self) -> Iterator[tuple[tuple[Point, int], Member]]:
        for path in sorted(self.folder.glob("member-*.safetensors")):
            try:
                with open_weights(str(path)) as file:
                    values = json.loads((file.metadata() or {})["member"])
                    vector = file.get_tensor("vector").numpy()
                point = tuple(map(float, values.pop("parameter")))
                number = int(values.pop("number"))
                steps = int(values.pop("steps"))
                member = Member(point, vector, steps=steps, **{name: float(value) for name, value in values.items()})
                size = self.record.get("coordinates", vector.size)
                if vector.shape != (size,) or vector.dtype != np.float64:
                    raise ValueError(f"{vector.dtype} {vector.shape} for {size} coordinates")
                if not (np.isfinite(vector).all() and np.isfinite(point).all()):
                    raise ValueError("it is not finite")
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
                raise ValueError(f"{path} is damaged ({error}): delete it, and it is fitted again.") from error
            yield (point, number), member

    def add(self, member: Member, number: int) -> None:
        """Writes a member, the one of this number at its parameter, in one step."""
        values = {name: value for name, value in member._asdict().items() if name != "vector"} | {"number": number}
        name = hashlib.blake2b(json.dumps(member.parameter).encode(), digest_size=8).hexdigest()
        metadata = {"member": json.dumps(values)}
        path = self.folder / f"member-{name}-{number}.safetensors"
        _replace(path, lambda temporary: save_arrays({"vector": member.vector}, temporary, metadata))
