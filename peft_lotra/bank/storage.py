# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A bank as one safetensors file."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn

from ..hub.base_code import hub_id
from ..kan.row_product import PackedTucker
from ..modules.checks import list_first
from ..modules.folders import naming_damage
from ..tuner.by_row import check_names
from .reading import match_layers
from .snapshot import BASE, Form, Snapshot, bytes_of, check_finite, check_known


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
        ValueError: An adapter has values that are not finite, or is damaged in the mapped file.
    """
    packed = snapshot.gather_checked(names).detach().cpu().contiguous()
    check_finite(packed, names, "Remove them, or leave them out by `skip=`.")
    table = {
        "format": _FORMAT,
        "adapters": {name: snapshot.entries[name].form for name in names},
        "checksums": list(map(zlib.crc32, bytes_of(packed))),
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
    mapped: bool,
    skip_damaged: bool,
    names: Sequence[str] | None,
    revision: str | None,
) -> Snapshot:
    """Read the adapters of a folder or repository, see `AdapterBank.load`.

    Raises:
        ValueError: There is no such file or adapter, it is of another base, or damaged; the message names damaged
            adapters.
    """
    if names is not None:
        names = check_names(names)
    path = os.path.join(folder, FILE_NAME)
    is_remote = False
    if not os.path.isfile(path):
        repo_id = None if os.path.isdir(folder) else hub_id(folder)
        if repo_id is None:
            raise ValueError(f"There is no {FILE_NAME} in {folder}. `AdapterBank.save(folder)` writes one.")
        is_remote = names is not None  # only their rows are downloaded
        find_path = hf_hub_url if is_remote else hf_hub_download
        path = find_path(repo_id, FILE_NAME, revision=revision)
    with naming_damage(path):
        metadata, read_rows = _open_remote(path) if is_remote else _open_file(path)
        table = json.loads(metadata[_TABLE])
        is_newer = table["format"] > _FORMAT
        if not is_newer and metadata[_CHECKSUM] != _checksum(metadata[_TABLE]):
            raise ValueError("its table was altered")
    if is_newer:
        raise ValueError(f"A newer version of peft-lotra wrote {path} (format {table['format']}). Upgrade peft-lotra.")

    form_of = table["adapters"]
    rows = slice(None)
    if names is not None:
        check_known(names, form_of)
        row_of = {name: row for row, name in enumerate(form_of)}
        form_of = {name: form_of[name] for name in [BASE, *names]}
        rows = [row_of[name] for name in form_of]
    _, layer_names = match_layers(table["base_layers"], base, check_base)
    with naming_damage(path):
        packed = read_rows(rows)
        layers = _read_layers(table["layers"], layer_names)
        forms = [Form(_read_layers(of_form, layer_names), start) for of_form, start in table["forms"]]
        checksums = np.array(table["checksums"])[rows].tolist()
    if mapped:
        snapshot = Snapshot.of_rows(packed, layers, forms, form_of)
        return snapshot._replace(packed=packed[:0].clone(), mapped=packed, checksums=checksums)

    # a copy: otherwise all of the file stays mapped, and changes with it
    packed = packed.clone()
    packed[0] = 0  # the base, whatever the file has
    checksums_now = list(map(zlib.crc32, bytes_of(packed)))
    is_intact = np.equal(checksums_now, checksums)
    damaged = [name for name, intact in zip(form_of, is_intact, strict=True) if not intact]
    if damaged:
        message = f"{path} has damaged adapters: {list_first(map(repr, damaged))}."
        if not skip_damaged:
            raise ValueError(f"{message} `skip_damaged=True` loads the others.")
        warnings.warn(f"{message} They are left out.", stacklevel=3)
        packed = packed[is_intact]
        for name in damaged:
            del form_of[name]
    return Snapshot.of_rows(packed, layers, forms, form_of)


def _open_file(
    path: str,
) -> tuple[dict[str, str], Callable[[Any], Tensor]]:
    """Return the metadata of a file, and a function that returns rows of its matrix, mapped."""
    file = safe_open(path, "pt")
    return file.metadata(), lambda rows: file.get_tensor(_TENSOR)[rows]


def _open_remote(
    url: str,
) -> tuple[dict[str, str], Callable[[Any], Tensor]]:
    """Do the same with a file on the Hub, and download nothing else of it."""
    start = 8 + int.from_bytes(_download(url, 0, 8), "little")
    header = json.loads(_download(url, 8, start))

    def read_rows(rows: list[int]) -> Tensor:
        entry = header[_TENSOR]
        count, width = entry["shape"]
        first, last = entry["data_offsets"]
        size = (last - first) // count
        begin = start + first
        starts = [begin + row * size for row in rows]
        content = b"".join([_download(url, offset, offset + size) for offset in starts])
        # a file with these rows
        entry = entry | {"shape": [len(rows), width], "data_offsets": [0, len(content)]}
        text = json.dumps({_TENSOR: entry}).encode()
        return load(len(text).to_bytes(8, "little") + text + content)[_TENSOR]

    return header["__metadata__"], read_rows


def _download(url: str, start: int, end: int) -> bytes:
    """Return some bytes of a file on the Hub."""
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
    try:
        response = get_session().get(url, headers=headers)
    except Exception as error:  # an error of httpx is no OSError, and the file would be called damaged
        raise ConnectionError(f"{url} cannot be downloaded: {error}") from error
    hf_raise_for_status(response)
    return response.content


def _read_layers(
    table: dict[str, Any],
    names: dict[str, str],
) -> dict[str, PackedTucker]:
    """Return the layers of a table by their names in the base; JSON has made lists of their tuples."""
    layers = {}
    for name, (shape, form) in table.items():
        layers[names[name]] = PackedTucker(tuple(shape), tuple(form))
    return layers
