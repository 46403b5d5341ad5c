# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A bank as one safetensors file, and one of its adapters as a folder that PEFT loads."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import hf_hub_download, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn

from ..hub.base_code import hub_id, source_of_base
from ..hub.card import README, load_card, save_section
from ..kan.row_product import PackedTucker
from ..modules.calls import PREFIX
from ..tucker import COMPONENTS
from ..tuner.config import LoTRAConfig, pattern_key
from ..tuner.targets import exact_targets
from .store import Form, Store


FILE_NAME = "adapter_bank.safetensors"
_FORMAT = 1


def write_bank(folder: str | os.PathLike, store: Store, names: list[str], record: dict[str, Any]) -> None:
    """Writes the file, whole or not at all.

    Args:
        folder: The folder.
        store: The adapters, in the order of the rows behind the first, which is the base.
        names: Their names.
        record: The record of the base.
    """
    packed = store.packed.cpu().contiguous()
    of_adapters = zip(store.form_of.tolist(), _checksums(packed), strict=True)
    table = {
        "format": _FORMAT,
        "adapters": dict(zip(["__base__", *names], of_adapters, strict=True)),  # the form and CRC-32 of each row
        "layers": store.layers,
        "forms": store.forms,
        "base_layers": record,
    }
    os.makedirs(folder, exist_ok=True)
    with TemporaryDirectory(prefix=".saving-", dir=folder) as stage:
        path = os.path.join(stage, FILE_NAME)
        save_file({"adapters": packed}, path, metadata={"adapter_bank": json.dumps(table)})
        os.replace(path, os.path.join(folder, FILE_NAME))


def write_card(
    folder: str, repo_id: str, names: Sequence[str], base: nn.Module, base_model: str | None, base_code: str | None
) -> None:
    """Writes the model card of a bank, README.md, with a table of its first adapters; text by a person stays."""
    path = Path(folder, README)
    card = load_card(path)
    card.data.base_model = base_model
    base_class, code = source_of_base({}, base, base_model)
    save_section(
        card,
        path,
        "bank.md",
        title=repo_id.rpartition("/")[2],
        base_class=base_class,
        code=(base_code or code).strip(),
        repo_id=repo_id,
        first=json.dumps(names[0]),
        names=names,
    )


def _read_some(place: str, names: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
    """The table and the matrix of some adapters of the file at a path or URL; of the others nothing is read."""
    start = 8 + int.from_bytes(_read_range(place, 0, 8), "little")
    header = json.loads(_read_range(place, 8, start))
    table, entry = json.loads(header["__metadata__"]["adapter_bank"]), header["adapters"]
    numbers = {name: number for number, name in enumerate(table["adapters"])}
    if unknown := [name for name in names if name not in numbers]:
        raise ValueError(f"The bank has no adapter {', '.join(map(repr, unknown[:3]))} ({len(unknown)} unknown).")
    table["adapters"] = {name: table["adapters"][name] for name in ("__base__", *names)}
    (first, last), (rows, width) = entry["data_offsets"], entry["shape"]
    size = (last - first) // rows
    starts = [start + first + numbers[name] * size for name in table["adapters"]]
    content = b"".join([_read_range(place, at, at + size) for at in starts])
    entry |= {"shape": [len(starts), width], "data_offsets": [0, len(content)]}
    text = json.dumps({"adapters": entry}).encode()
    return table, load(len(text).to_bytes(8, "little") + text + content)["adapters"]


def _read_range(place: str, start: int, end: int) -> bytes:
    """Some bytes of a file, or of one on the Hub."""
    if not place.startswith("http"):
        with open(place, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    response = get_session().get(place, headers={**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"})
    hf_raise_for_status(response)
    return response.content if response.status_code == 206 else response.content[start:end]


def read_bank(
    folder: str, mapped: bool, skip_damaged: bool, only: Sequence[str] | None = None, revision: str | None = None
) -> tuple[Store, list[str], dict[str, Any]]:
    """Reads the file of a folder or a repository, or `only` some adapters of it: what `write_bank` got.

    `mapped`, adapters are read when they are used, and not checked.

    Raises:
        ValueError: There is no such file or adapter, or it is damaged; the message names damaged adapters. With
            `skip_damaged` they are left out, with a warning.
    """
    path = os.path.join(folder, FILE_NAME)
    if not os.path.isfile(path):
        repo_id = None if os.path.isdir(folder) else hub_id(folder)
        if repo_id is None:
            raise ValueError(f"There is no {FILE_NAME} in {folder}. `AdapterBank.save(folder)` writes one.")
        path = (hf_hub_download if only is None else hf_hub_url)(repo_id, FILE_NAME, revision=revision)
    table, packed = ({}, torch.empty(0)) if only is None else _read_some(path, only)
    try:
        if only is None:
            with safe_open(path, "pt") as file:
                table, packed = json.loads((file.metadata() or {})["adapter_bank"]), file.get_tensor("adapters")
        names, record, layers = list(table["adapters"])[1:], table["base_layers"], _as_layers(table["layers"])
        forms = [Form(_as_layers(of_layers), from_gradient) for of_layers, from_gradient in table["forms"]]
        of_form, crc32 = zip(*table["adapters"].values(), strict=True)
        shape = (len(of_form), sum([form.width() for form in layers.values()]))
        if table["format"] != _FORMAT or packed.shape != shape or not packed.is_floating_point():
            raise ValueError("its table does not fit its tensor")
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r:.200}. Save or download the bank again.") from error
    store = Store(packed, layers, forms, torch.tensor(of_form, dtype=torch.int32, device="cpu"))
    if mapped:
        return store._replace(added=packed[:0].clone()), names, record
    store = store._replace(packed=packed.clone())  # or all of the file stays mapped, and changes with it
    store.packed[0] = 0
    pairs = enumerate(zip(_checksums(store.packed), crc32, strict=True))
    damaged = {row for row, (own, recorded) in pairs if own != recorded and row}
    if damaged:
        wrong = ", ".join(repr(names[row - 1]) for row in sorted(damaged)[:3])
        message = f"{path} has damaged adapters: {wrong} ({len(damaged)} of {len(names)})."
        if not skip_damaged:
            raise ValueError(f"{message} `skip_damaged=True` loads the others.")
        warnings.warn(f"{message} They are left out.", stacklevel=3)
        store = store.select([row for row in range(len(packed)) if row not in damaged])
        names = [name for row, name in enumerate(names, 1) if row not in damaged]
    return store, names, record


def _as_layers(table: dict[str, Any]) -> dict[str, PackedTucker]:
    return {name: PackedTucker(*map(tuple, it)) for name, it in table.items()}


def _checksums(packed: Tensor) -> list[int]:
    """The CRC-32 of the bytes of each row."""
    return [zlib.crc32(row) for row in packed.view(torch.uint8).numpy()]


def export_adapter(folder: str | os.PathLike, store: Store, row: int, record: dict[str, Any], base: nn.Module) -> None:
    """Writes an adapter as `PeftModel.save_pretrained` does; the factor `alpha` is in the cores."""
    components = store.components(row)
    basis = {name: record[name]["shape"][2] for name in components}
    # the configuration says of all layers together whether the residual branch is adapted
    adapt_residual = any(it.shape[2] > basis[name] for name, it in components.items())
    tensors = {}
    for name, parts in components.items():
        parts = parts.padded(basis[name] + (adapt_residual and record[name]["has_residual"]))
        for component, part in zip(COMPONENTS, parts, strict=False):
            tensors[f"{PREFIX}{name}.{component}"] = part.cpu().contiguous()
    config = LoTRAConfig(
        r=next(iter(components.values())).ranks,
        rank_pattern={pattern_key(name): parts.ranks for name, parts in components.items()},
        target_modules=exact_targets(components, base),
        adapt_residual=adapt_residual,
        init_weights="gradient" if store.from_gradient()[row] else True,
        base_layers={name: record[name] for name in components},
        inference_mode=True,
    )
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
