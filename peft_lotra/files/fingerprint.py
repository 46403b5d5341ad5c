# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What an adapter was made for: hashes of the grids and the frozen coefficients of its base.

A hash is taken over the bytes of the tensors: a change of one bit shows, on any device. A base that is cast to fewer
digits is still the same base, so that a record holds one hash for each dtype that its tensors can be cast down to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..families.registry import KANLayerSpec


_CHUNK = 1 << 22  # elements that are cast and hashed at a time, which bounds the extra memory

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
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(values.items()):
        if not isinstance(value, torch.Tensor):
            digest.update(f"{name}={value!r};".encode())
            continue
        target = dtype if dtype in _FEWER_DIGITS.get(value.dtype, ()) else value.dtype
        digest.update(f"{name}:{target}{tuple(value.shape)};".encode())
        flat = value.detach().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            part = flat[start : start + _CHUNK]
            part = (part.float() if target != value.dtype else part).to(target).cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_all_dtypes(values: Values) -> dict[str, str]:
    """The hashes of the values as they are, and as they would be cast down, by dtype; `"exact"` without floats."""
    own = _widest(values)
    if own is None:
        return {"exact": hash_values(values)}
    return {_name(dtype): hash_values(values, dtype) for dtype in (own, *_FEWER_DIGITS[own])}


def is_same(recorded: Mapping[str, str], values: Values) -> bool | None:
    """Whether the values are those recorded, cast to more or fewer digits or not; `None` if no dtype serves both."""
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
    layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor, frozen: Mapping[str, torch.Tensor] | None
) -> dict[str, Values]:
    """The tensors to hash, as far as they can be read: the `"grid"` of a base layer, and all its other `"parameters"`.

    `frozen` has the values before a merge of the parameters that adapters are merged into, `None` if they are unknown.
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
    values = {"grid": grid} if frozen is None else {"grid": grid, "parameters": {**parameters, **frozen}}
    return {
        what: tensors
        for what, tensors in values.items()
        if not any(value.is_meta or hasattr(value, "placements") for value in _tensors(tensors))
    }


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
