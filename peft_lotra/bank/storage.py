# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A bank as one safetensors file, and one of its adapters as a folder that PEFT loads."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
import zlib
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from ..kan.row_product import PackedTucker
from ..layers.registry import PREFIX
from ..tucker import Tucker
from ..tuner.config import LoTRAConfig, pattern_key
from ..tuner.layer import COMPONENTS
from ..tuner.targets import exact_targets
from .store import Form, Store


FILE_NAME = "adapter_bank.safetensors"
_FORMAT = 1


class Content(NamedTuple):
    """The adapters of a file, in the order of the rows behind the first, which is the base."""

    store: Store
    names: list[str]
    forms: list[Form]
    form_of: Tensor  # (1 + adapters,)
    record: dict[str, Any]  # of the base


def write_bank(folder: str | os.PathLike, content: Content) -> None:
    """Writes the file, whole or not at all."""
    os.makedirs(folder, exist_ok=True)
    table = {
        "format": _FORMAT,
        "names": content.names,
        "layers": {name: form._asdict() for name, form in content.store.forms.items()},
        "forms": content.forms,
        "base_layers": content.record,
    }
    packed = content.store.packed.cpu().contiguous()
    tensors = {"adapters": packed, "form_of": content.form_of, "crc32": _checksums(packed)}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as stage:
        path = os.path.join(stage, FILE_NAME)
        save_file(tensors, path, metadata={"adapter_bank": json.dumps(table)})
        os.replace(path, os.path.join(folder, FILE_NAME))


def read_bank(folder: str | os.PathLike, mapped: bool, skip_damaged: bool) -> Content:
    """Reads the file; `mapped`, the adapters are read when they are used, and not checked.

    Raises:
        ValueError: There is no such file, or it is damaged; the message names damaged adapters. With `skip_damaged`
            they are left out, with a warning.
    """
    path = os.path.join(folder, FILE_NAME)
    if not os.path.isfile(path):
        raise ValueError(f"There is no {FILE_NAME} in {folder}. `AdapterBank.save(folder)` writes one.")
    try:
        with safe_open(path, "pt") as file:
            table = json.loads((file.metadata() or {})["adapter_bank"])
            packed, form_of, crc32 = (file.get_tensor(name) for name in ("adapters", "form_of", "crc32"))
        names, record = table["names"], table["base_layers"]
        layers = {n: PackedTucker(tuple(it["shape"]), tuple(it["ranks"])) for n, it in table["layers"].items()}
        forms = [{n: (tuple(ranks), basis) for n, (ranks, basis) in form.items()} for form in table["forms"]]
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r:.200}. Save or download the bank again.") from error
    width = sum([form.width() for form in layers.values()])
    fits = table["format"] == _FORMAT and packed.shape == (len(names) + 1, width) and packed.is_floating_point()
    if not fits or len(form_of) != len(packed) or len(crc32) != len(packed) or len(set(names)) < len(names):
        raise ValueError(f"{path} is damaged: its table does not fit its tensors. Save or download the bank again.")
    if mapped:
        return Content(Store(packed, layers), names, forms, form_of, record)
    packed, form_of = packed.clone(), form_of.clone()  # or all of the file stays mapped, and changes with it
    right = (_checksums(packed) == crc32) & _are_finite(packed) & (form_of >= 0) & (form_of < len(forms))
    if not right[0]:
        raise ValueError(f"{path} is damaged: the row of the base is not zero. Save or download the bank again.")
    if right.all():
        return Content(Store(packed, layers), names, forms, form_of, record)
    damaged = [name for name, is_right in zip(names, right[1:].tolist(), strict=True) if not is_right]
    message = f"{path} has damaged adapters: {', '.join(map(repr, damaged[:3]))} ({len(damaged)} of {len(names)})."
    if not skip_damaged:
        raise ValueError(f"{message} `skip_damaged=True` loads the others.")
    warnings.warn(f"{message} They are left out.", stacklevel=3)
    names = [name for name, is_right in zip(names, right[1:].tolist(), strict=True) if is_right]
    return Content(Store(packed[right], layers), names, forms, form_of[right], record)


def _are_finite(packed: Tensor) -> Tensor:
    """Whether all numbers of each row are finite, by blocks of rows, whose memory is used again."""
    return torch.cat([block.isfinite().all(1) for block in packed.split(1024)])


def _checksums(packed: Tensor) -> Tensor:
    """The CRC-32 of the bytes of each row."""
    rows = packed.view(torch.uint8) if packed.numel() else torch.zeros(len(packed), 0, dtype=torch.uint8, device="cpu")
    return torch.tensor([zlib.crc32(row) for row in rows.numpy()], dtype=torch.int64, device="cpu")


def export_adapter(
    folder: str | os.PathLike, components: dict[str, Tucker], record: dict[str, Any], base: nn.Module
) -> None:
    """Writes a folder as `PeftModel.save_pretrained` does; the factor `alpha` is in the cores."""
    full = {name: record[name]["shape"][2] + bool(record[name]["has_residual"]) for name in components}
    # the configuration says of all layers together whether the residual branch is adapted
    adapt_residual = any(
        len(it.factor_basis) == full[name] > record[name]["shape"][2] for name, it in components.items()
    )
    tensors = {}
    for name, parts in components.items():
        missing = (full[name] if adapt_residual else record[name]["shape"][2]) - len(parts.factor_basis)
        parts = parts._replace(factor_basis=pad(parts.factor_basis, (0, 0, 0, missing)))
        for component, part in zip(COMPONENTS, parts, strict=False):
            tensors[f"{PREFIX}{name}.{component}"] = part.cpu().contiguous()
    config = LoTRAConfig(
        r=next(iter(components.values())).ranks,
        rank_pattern={pattern_key(name): parts.ranks for name, parts in components.items()},
        target_modules=exact_targets(components, base),
        adapt_residual=adapt_residual,
        base_layers={name: record[name] for name in components},
        inference_mode=True,
    )
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
