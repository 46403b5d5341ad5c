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

"""What an adapter was made for: hashes of the grids and the frozen coefficients of its base.

An adapter means something on one base only. Its `adapter_config.json` therefore records, for each adapted layer, the
family, the shape, a hash of the grid and a hash of the frozen parameters, and one digest of all of that.

A hash is taken over the bytes of the tensors, so that it does not depend on the device, and a change of one bit shows.
A base that is cast to fewer digits is still the same base. A record therefore holds one hash for each floating dtype
that the tensors can be cast down to: of float32 tensors as they are, as bfloat16 and as float16. The extra memory is
bounded by `_CHUNK`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..families.registry import KANLayerSpec


# Elements that are cast and hashed at a time.
_CHUNK = 1 << 22

# What a floating tensor can be cast down to; the way to half precision leads through float32, as torch's own does.
_FEWER_DIGITS = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.bfloat16: (),
    torch.float16: (),
}

Values = Mapping[str, "torch.Tensor | int | float"]


def hash_values(values: Values, dtype: torch.dtype | None = None) -> str:
    """The hash (BLAKE2b, 32 hexadecimal digits) of named tensors and numbers, in the order of their names.

    Args:
        values (`dict[str, torch.Tensor | int | float]`): What to hash: names, shapes and contents count.
        dtype (`torch.dtype`, *optional*): The dtype that floating tensors of more digits are cast to first.

    Example:
        >>> hash_values({"a": torch.zeros(2), "n": 3}) == hash_values({"n": 3, "a": torch.zeros(2)})
        True
    """
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
    """The hashes of the values as they are, and as they would be cast down, by the name of the dtype.

    The first is named after the widest floating dtype of the values; without one the result is `{"exact": ...}`.

    Example:
        >>> list(hash_all_dtypes({"a": torch.zeros(2)}))
        ['float32', 'bfloat16', 'float16']
    """
    own = _widest(values)
    if own is None:
        return {"exact": hash_values(values)}
    return {_name(dtype): hash_values(values, dtype) for dtype in (own, *_FEWER_DIGITS[own])}


def is_same(recorded: Mapping[str, str], values: Values) -> bool | None:
    """Whether the values are those that were recorded, allowing for casts to more or fewer digits.

    Returns:
        `bool` or `None`: `None` if no statement is possible: one side is bfloat16 and the other float16, or nothing
        was recorded.
    """
    own = _widest(values)
    if own is None:
        return recorded["exact"] == hash_values(values) if "exact" in recorded else None
    dtypes = {_name(dtype): dtype for dtype in _FEWER_DIGITS}
    known = [dtypes[name] for name in recorded if name in dtypes]
    # compared in the dtype of the values, or, if the record has fewer digits, in the widest of the record
    here = [dtype for dtype in (own, *_FEWER_DIGITS[own]) if dtype in known]
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
    """The tensors that the record of an adapter hashes: the grid of a base layer, and its other parameters.

    The parameters are all that the layer has, also scales, masks and normalizations, without which the coefficients
    mean something else.

    Args:
        layer (`nn.Module`): The base layer.
        spec (`KANLayerSpec`): Its family.
        tensor (`CoefficientTensor`): Where it keeps its coefficients.
        frozen (`dict[str, torch.Tensor]`, *optional*): The values, before the merge, of the parameters that adapters
            are merged into; `None` if they are not known.

    Returns:
        The tensors by `"grid"` and `"parameters"`, without those that cannot be read: on the meta device, sharded, or
        merged.
    """
    grid = spec.read_grid(layer)
    parameters: dict[str, torch.Tensor] = {n: value for n, value in layer.named_parameters() if n not in grid}
    adapted = tensor.read_parameters(layer)
    for name, value in adapted.items():
        owner, _, attribute = name.rpartition(".")
        if attribute in layer.get_submodule(owner).__dict__:  # FSDP has views in the place of parameters
            parameters[name] = value
    try:
        tensor.join(list(adapted.values()))  # a shard has another shape
        whole = True
    except Exception:
        whole = False
    parameters.update(frozen or {})
    values = {"grid": grid} if frozen is None or not whole else {"grid": grid, "parameters": parameters}
    return {
        what: tensors
        for what, tensors in values.items()
        if not any(
            value.is_meta or hasattr(value, "placements")
            for value in tensors.values()
            if isinstance(value, torch.Tensor)
        )
    }


def digest_of(base_layers: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest of the records of all layers, 32 hexadecimal digits."""
    text = json.dumps(base_layers, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _widest(values: Values) -> torch.dtype | None:
    here = {value.dtype for value in values.values() if isinstance(value, torch.Tensor)}
    return next((dtype for dtype in _FEWER_DIGITS if dtype in here), None)


def _is_representable(values: Values, dtype: torch.dtype) -> bool:
    tensors: Iterable[torch.Tensor] = (value for value in values.values() if isinstance(value, torch.Tensor))
    return all(
        torch.equal(value, value.to(dtype).to(value.dtype))
        for value in tensors
        if dtype in _FEWER_DIGITS.get(value.dtype, ())
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
