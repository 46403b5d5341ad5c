# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What an adapter was made for: hashes of the grids and the frozen coefficients of its base.

A hash is taken over the bytes of the tensors. A base that is cast to fewer digits is still the same base, so that a
record holds one hash for each dtype that its tensors can be cast down to. A base that is computed anew, on another
machine or by other kernels, differs in its last bits: a sketch of the values, which changes little, tells so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..families.registry import KANLayerSpec


_PROJECTIONS = 8  # of a sketch
_ROW = 2048  # values that have signs of their own; those of the next row are the same, or all opposite
_CHUNK = 64 * _ROW  # elements that are cast and hashed at a time: whole rows, and few enough for the cache of a core
_ROUNDING = 1e-6  # of the norm: what a base that is computed anew may differ by

# what a floating tensor can be cast down to; the way to half precision leads through float32, as torch's own does.
_FEWER_DIGITS = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.bfloat16: (),
    torch.float16: (),
}

Values = Mapping[str, "torch.Tensor | int | float"]


def hash_values(values: Values, dtype: torch.dtype | None = None) -> str:
    """The hash, 32 hexadecimal digits, of names, shapes and contents; tensors of more digits are cast first."""
    digest = _Digest(dtype)
    _read(values, [digest])
    return str(digest)


def hash_all_dtypes(values: Values) -> dict[str, str]:
    """The hashes of the values as they are, and as they would be cast down, by dtype; `"exact"` without floats.

    With floats, the entry `"sketch"` tells values that differ by rounding from others, see `sketch`.
    """
    own = _widest(values)
    if own is None:
        return {"exact": hash_values(values)}
    readers = {_name(dtype): _Digest(dtype) for dtype in (own, *_FEWER_DIGITS[own])} | {"sketch": _Sketch()}
    _read(values, readers.values())
    return {name: str(reader) for name, reader in readers.items()}


def sketch(values: Values) -> str:
    """What changes little if values change little: a hash of all that is no float, the norm, and projections.

    The projections of all floats, as one vector v, are the sums of v_i s_i for signs s_i that look random: another
    vector at the distance d from v has projections at distances of about d. (A hash of rounded values would not do:
    some of many values are always at the edge of being rounded the other way.)
    """
    result = _Sketch()
    _read(values, [result])
    return str(result)


def _read(values: Values, readers: Collection[_Digest]) -> None:
    """Lets all readers see names, shapes and contents, in one pass over the contents."""
    for name, value in sorted(values.items()):
        for reader in readers:
            reader.begin(name, value)
        if not isinstance(value, torch.Tensor) or value.is_meta:  # without contents
            continue
        flat = value.detach().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            part = flat[start : start + _CHUNK].cpu().contiguous()
            for reader in readers:
                reader.add(part)


class _Digest:
    """A hash, value by value and part by part; tensors of more digits than `dtype` has are cast to it."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._hash, self._dtype = hashlib.blake2b(digest_size=16), dtype

    def begin(self, name: str, value: torch.Tensor | int | float) -> None:
        if not isinstance(value, torch.Tensor):
            self._hash.update(f"{name}={value!r};".encode())
            return
        self._target = self._dtype if self._dtype in _FEWER_DIGITS.get(value.dtype, ()) else value.dtype
        self._hash.update(f"{name}:{self._target}{tuple(value.shape)};".encode())

    def add(self, part: torch.Tensor) -> None:
        if self._target != part.dtype:
            part = part.float().to(self._target)
        self._hash.update(part.view(torch.uint8).numpy().data)

    def __str__(self) -> str:
        return self._hash.hexdigest()


class _Sketch(_Digest):
    """A sketch, value by value and part by part; its digest is that of all that is no float."""

    def __init__(self) -> None:
        super().__init__()
        self._square_sum = 0.0
        self._projections: list[torch.Tensor] = []  # of each row, on the signs of its values

    def begin(self, name: str, value: torch.Tensor | int | float) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            self._hash.update(f"{name}={str(tuple(value.shape))!r};".encode())
        else:
            super().begin(name, value)

    def add(self, part: torch.Tensor) -> None:
        if not part.is_floating_point():
            super().add(part)
            return
        part, signs = part.double(), _signs(0, _ROW, 0)
        whole = len(part) - len(part) % _ROW
        self._square_sum += part.dot(part).item()
        if whole:
            self._projections.append((signs.T @ part[:whole].view(-1, _ROW).T).T)
        if whole < len(part):  # the last row of a tensor
            self._projections.append(part[whole:].unsqueeze(0) @ signs[: len(part) - whole])

    def __str__(self) -> str:
        rows = torch.cat(self._projections or [torch.zeros(0, _PROJECTIONS, dtype=torch.float64, device="cpu")])
        sums = (rows * _signs(0, len(rows), _PROJECTIONS)).sum(0)
        return f"{super().__str__()}:" + ",".join(f"{x:.10e}" for x in (math.sqrt(self._square_sum), *sums.tolist()))


@lru_cache(maxsize=16)  # all layers have the same
@torch.inference_mode(False)
def _signs(start: int, end: int, first_column: int) -> torch.Tensor:
    """Signs (end - start, _PROJECTIONS), in float64, that look random and are the same everywhere."""
    rows = torch.arange(start, end, device="cpu")
    columns = torch.arange(first_column, first_column + _PROJECTIONS, device="cpu")
    mixed = (rows.unsqueeze(1) * 2654435761 + columns * 2246822519 + 374761393) & 0xFFFFFFFF
    for factor in (2246822519, 3266489917):
        mixed = ((mixed ^ (mixed >> 15)) * factor) & 0xFFFFFFFF
    return (((mixed >> 16) & 1) * 2 - 1).double()


def _differs_by_rounding(recorded: str, values: Values) -> bool:
    """Whether the sketch of values is that recorded, up to a few of the last bits of float32."""
    try:
        (before, now) = (
            (text.split(":")[0], [*map(float, text.split(":")[1].split(","))]) for text in (recorded, sketch(values))
        )
    except (ValueError, IndexError):  # a record that was changed
        return False
    same = before[0] == now[0] and len(before[1]) == len(now[1])
    return same and all(abs(a - b) <= _ROUNDING * now[1][0] for a, b in zip(before[1], now[1], strict=True))


def is_same(recorded: Mapping[str, str], values: Values) -> bool | None:
    """Whether the values are those recorded, cast to more or fewer digits or not, or differ by rounding alone.

    `None` if no dtype serves both.
    """
    same = _is_cast(recorded, values)
    return _differs_by_rounding(recorded["sketch"], values) if same is False and "sketch" in recorded else same


def _is_cast(recorded: Mapping[str, str], values: Values) -> bool | None:
    own = _widest(values)
    if own is None:
        return recorded["exact"] == hash_values(values) if "exact" in recorded else None
    # compared in the dtype of the values, or, if the record has fewer digits, in the widest of the record
    here = [dtype for dtype in (own, *_FEWER_DIGITS[own]) if _name(dtype) in recorded]
    if not here:
        return None
    if recorded[_name(here[0])] == hash_values(values, here[0]):
        return True
    # values that were cast down and up again lose nothing by being cast down once more
    return any(
        recorded[_name(dtype)] == hash_values(values, dtype) for dtype in here[1:] if _is_representable(values, dtype)
    )


def layer_values(
    layer: nn.Module,
    spec: KANLayerSpec,
    tensor: CoefficientTensor,
    frozen: Mapping[str, torch.Tensor] | None,
    symbolic: nn.Module | None = None,
) -> dict[str, Values]:
    """The tensors to hash, as far as they can be read: the `"grid"` of a base layer, and all its other `"parameters"`.

    `frozen` has the values before a merge of the parameters that adapters are merged into, `None` if they are unknown.
    `symbolic` is the layer of symbolic functions beside a layer of pykan, whose outputs are added; where functions
    were set, they count as parameters.
    """
    grid = spec.read_grid(layer)
    parameters: dict[str, torch.Tensor] = {
        name.replace("original_module.", ""): value  # a part that `modules_to_save` has copied
        for name, value in layer.named_parameters()
        if name not in grid and "modules_to_save." not in name
    }
    adapted = tensor.read_parameters(layer)
    for name, value in adapted.items():
        owner, _, attribute = name.rpartition(".")
        if attribute in layer.get_submodule(owner).__dict__:  # FSDP has views in the place of parameters
            parameters[name] = value
    try:
        tensor.join(list(adapted.values()))  # a shard has another shape
    except Exception:
        frozen = None
    others: dict[str, Any] = _symbolic_values(symbolic) if symbolic is not None else {}
    values = {"grid": grid} if frozen is None else {"grid": grid, "parameters": {**parameters, **frozen, **others}}
    return {
        what: tensors
        for what, tensors in values.items()
        if not any(value.is_meta or hasattr(value, "placements") for value in _tensors(tensors))
    }


def symbolic_of(modules: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    """The layer of symbolic functions that pykan's networks have beside `act_fun.N`, `None` for all other layers."""
    parent, _, index = name.rpartition(".")
    if parent.rpartition(".")[2] != "act_fun":
        return None
    return modules.get(f"{parent.removesuffix('act_fun')}symbolic_fun.{index}")


def _symbolic_values(layer: nn.Module) -> dict[str, Any]:
    mask = getattr(layer, "mask", None)
    if not isinstance(mask, torch.Tensor) or not mask.any():  # without functions, a layer is recorded as ever
        return {}
    named = {f"symbolic.{name}": value for name, value in layer.named_parameters()}
    return {**named, "symbolic.mask": mask, "symbolic.names": repr(getattr(layer, "funs_name", None))}


def digest_of(value: Any) -> str:
    """The digest of a value that is written as JSON, 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _tensors(values: Values) -> list[torch.Tensor]:
    return [value for value in values.values() if isinstance(value, torch.Tensor)]


def _widest(values: Values) -> torch.dtype | None:
    return next((dtype for dtype in _FEWER_DIGITS if any(value.dtype == dtype for value in _tensors(values))), None)


def _is_representable(values: Values, dtype: torch.dtype) -> bool:
    return all(
        torch.equal(value, value.to(dtype).to(value.dtype))
        for value in _tensors(values)
        if dtype in _FEWER_DIGITS.get(value.dtype, ())
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
