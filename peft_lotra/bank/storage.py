# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A bank as one safetensors file."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..hub.base_code import hub_id
from ..kan.row_updates import PackedTucker
from ..modules.checks import list_first
from ..modules.folders import naming_damage
from ..tuner.by_row import check_names
from ..tuner.linear_path import PATH, LinearPath
from .reading import match_layers
from .snapshot import BASE, Form, Snapshot, check_finite, check_known


FILE_NAME = "adapter_bank.safetensors"
_FORMAT = 1
_TENSOR = "adapters"
_TABLE = "adapter_bank"
_CHECKSUM = "adapter_bank_crc32"


def write_bank(
    folder: str,
    snapshot: Snapshot,
    names: Sequence[str],
    record: dict[str, Any],
) -> None:
    """Write the base and adapters of these names into the file of a folder, with the record of their base.

    Raises:
        ValueError: An adapter has values that are not finite.
    """
    packed = snapshot.gather(names).detach().cpu().contiguous()
    check_finite(packed, names, "Remove them, or leave them out by `skip=`.")
    table = {
        "format": _FORMAT,
        "adapters": {name: snapshot.form_of[name] for name in names},
        "checksums": _checksums(packed),
        "layers": snapshot.layers,
        "forms": snapshot.forms,
        "base_layers": record,
    }
    text = json.dumps(table)
    metadata = {_TABLE: text, _CHECKSUM: _checksum(text)}
    save_file({_TENSOR: packed}, os.path.join(folder, FILE_NAME), metadata)


def _checksum(text: str) -> str:
    return str(zlib.crc32(text.encode()))


def read_bank(
    folder: str,
    base: nn.Module,
    check_base: str | None,
    names: Sequence[str] | None,
    revision: str | None,
) -> Snapshot:
    """Read the adapters of a folder or repository, see `AdapterBank.load`.

    Raises:
        ValueError: There is no such file or adapter, it is of another base, or damaged; the message names damaged
            adapters.
    """
    path = os.path.join(folder, FILE_NAME)
    if not os.path.isfile(path):
        repo_id = None if os.path.isdir(folder) else hub_id(folder)
        if repo_id is None:
            raise ValueError(f"There is no {FILE_NAME} in {folder}. `AdapterBank.save(folder)` writes one.")
        path = hf_hub_download(repo_id, FILE_NAME, revision=revision)
    with naming_damage(path):
        file = safe_open(path, "pt")
        metadata = file.metadata()
        table = json.loads(metadata[_TABLE])
        is_newer = table["format"] > _FORMAT
        if not is_newer and metadata[_CHECKSUM] != _checksum(metadata[_TABLE]):
            raise ValueError("its table was altered")
    if is_newer:
        raise ValueError(f"A newer version of peft-lotra wrote {path} (format {table['format']}). Upgrade peft-lotra.")

    form_of = table["adapters"]
    row_of = {name: row for row, name in enumerate(form_of)}
    if names is not None:
        names = check_names(names)
        check_known(names, form_of)
        form_of = {name: form_of[name] for name in [BASE, *names]}
    rows = [row_of[name] for name in form_of]
    _, layer_names = match_layers(table["base_layers"], base, check_base)
    with naming_damage(path):
        # a copy: otherwise all of the file stays mapped, and changes with it
        packed = file.get_tensor(_TENSOR)[rows]
        layers = _read_layers(table["layers"], layer_names)
        if PATH in layers and not isinstance(base, LinearPath):
            raise ValueError("its adapters have linear paths: load it for `LinearPath(network)`")
        forms = [Form(_read_layers(of_form, layer_names), start) for of_form, start in table["forms"]]
    packed[0] = 0  # the base, whatever the file has
    damaged = []
    for name, checksum in zip(form_of, _checksums(packed), strict=True):
        if checksum != table["checksums"][row_of[name]]:
            damaged.append(repr(name))
    if damaged:
        raise ValueError(
            f"{path} has damaged adapters: {list_first(damaged)}. Save or download it again, or load the "
            "others by `names=`."
        )
    return Snapshot.of_rows(packed, layers, forms, form_of)


def _checksums(packed: Tensor) -> list[int]:
    """Return the CRC-32 of each row."""
    return list(map(zlib.crc32, packed.view(torch.uint8).numpy()))


def _read_layers(
    table: dict[str, Any],
    names: dict[str, str],
) -> dict[str, PackedTucker]:
    """Return the layers of a table by their names in the base; JSON has made lists of their tuples."""
    layers = {}
    for name, (shape, form) in table.items():
        layers[names.get(name, name)] = PackedTucker(tuple(shape), tuple(form))
    return layers
