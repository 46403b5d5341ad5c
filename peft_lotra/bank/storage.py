# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A bank as one safetensors file, and one of its adapters as a folder that PEFT loads."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from ..hub.base_code import hub_id, source_of_base
from ..kan.row_product import PackedTucker
from ..layers.registry import PREFIX
from ..tucker import Tucker
from ..tuner.config import LoTRAConfig, pattern_key
from ..tuner.layer import COMPONENTS
from ..tuner.targets import exact_targets
from .store import Form, Store


FILE_NAME = "adapter_bank.safetensors"
_FORMAT = 1
_ROWS_OF_CARD = 100


def write_bank(folder: str | os.PathLike, store: Store, names: list[str], record: dict[str, Any]) -> None:
    """Writes the file, whole or not at all.

    Args:
        folder: The folder.
        store: The adapters, in the order of the rows behind the first, which is the base.
        names: Their names.
        record: The record of the base.
    """
    os.makedirs(folder, exist_ok=True)
    table = {
        "format": _FORMAT,
        "names": names,
        "layers": {name: form._asdict() for name, form in store.layers.items()},
        "forms": store.forms,
        "base_layers": record,
    }
    packed = store.packed.cpu().contiguous()
    tensors = {"adapters": packed, "form_of": store.form_of, "crc32": _checksums(packed)}
    with TemporaryDirectory(prefix=".saving-", dir=folder) as stage:
        path = os.path.join(stage, FILE_NAME)
        save_file(tensors, path, metadata={"adapter_bank": json.dumps(table)})
        os.replace(path, os.path.join(folder, FILE_NAME))


def write_card(
    folder: str, repo_id: str, names: Sequence[str], base: nn.Module, base_model: str | None, base_code: str | None
) -> None:
    """Writes the model card of a bank, README.md, with a table of its first adapters."""
    cls, code = source_of_base({}, base, base_model)
    data = ModelCardData(library_name="peft", base_model=base_model, tags=["kan", "lotra", "peft-plugin"])
    rows = [f"| {number} | `{name}` |" for number, name in enumerate(names[:_ROWS_OF_CARD])]
    rows += [f"\nand {len(names) - len(rows):,} more"] * (len(names) > len(rows))
    table = "\n".join(rows)
    text = f"""
# {repo_id.rpartition("/")[2]}

{len(names):,} adapters of {base_model or f"a `{cls}`"}, a Kolmogorov-Arnold network, by low tensor-rank adaptation
([LoTRA](https://arxiv.org/abs/2502.06153)), in one file of [peft-lotra](https://github.com/peft-lotra/peft-lotra).

```python
from peft_lotra import AdapterBank
{(base_code or code).strip()}

bank = AdapterBank.load(base, "{repo_id}")
one = AdapterBank.load(base, "{repo_id}", names=[{json.dumps(names[0])}])  # without the others
```

| number | adapter |
|---:|---|
{table}
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(os.path.join(folder, "README.md"))


def _copy_members(read: Callable[[int, int], bytes], names: Sequence[str], folder: str) -> None:
    """Writes a bank with some adapters of another, of which `read(start, end)` reads the table and their bytes."""
    start = 8 + int.from_bytes(read(0, 8), "little")
    header = json.loads(read(8, start))
    table = json.loads(header["__metadata__"]["adapter_bank"])
    numbers = {name: number for number, name in enumerate(table["names"], 1)}
    table["names"] = list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in numbers]:
        raise ValueError(f"The bank has no adapter {', '.join(map(repr, unknown[:3]))} ({len(unknown)} unknown).")
    content, rows = b"", [0, *(numbers[name] for name in table["names"])]
    for tensor in ("adapters", "form_of", "crc32"):
        (first, last), shape = header[tensor]["data_offsets"], header[tensor]["shape"]
        size, first = (last - first) // shape[0], first + start
        if len(shape) == 1:  # a number of each adapter
            every = read(first, last + start)
            parts = [every[row * size : (row + 1) * size] for row in rows]
        else:
            parts = [read(first + row * size, first + (row + 1) * size) for row in rows]
        header[tensor]["shape"][0] = len(rows)
        header[tensor]["data_offsets"] = [len(content), len(content) + size * len(rows)]
        content += b"".join(parts)
    header["__metadata__"]["adapter_bank"] = json.dumps(table)
    text = json.dumps(header).encode()
    with open(os.path.join(folder, FILE_NAME), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + content)


def _read_range(place: str, start: int, end: int) -> bytes:
    """Some bytes of a file, or of one on the Hub."""
    if not place.startswith("http"):
        with open(place, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    response = get_session().get(place, headers={**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"})
    hf_raise_for_status(response)
    return response.content if response.status_code == 206 else response.content[start:end]


def _repo_id(folder: str) -> str | None:
    """The repository of this name, None for a folder with a bank; a ValueError if it can be neither."""
    if os.path.isfile(os.path.join(folder, FILE_NAME)):
        return None
    repo_id = None if os.path.isdir(folder) else hub_id(folder)
    if repo_id is None:
        raise ValueError(f"There is no {FILE_NAME} in {folder}. `AdapterBank.save(folder)` writes one.")
    return repo_id


def read_bank(
    folder: str, mapped: bool, skip_damaged: bool, only: Sequence[str] | None = None, revision: str | None = None
) -> tuple[Store, list[str], dict[str, Any]]:
    """Reads the file of a folder or a repository, or `only` some adapters of it: what `write_bank` got.

    `mapped`, adapters are read when they are used, and not checked.

    Raises:
        ValueError: There is no such file or adapter, or it is damaged; the message names damaged adapters. With
            `skip_damaged` they are left out, with a warning.
    """
    path, repo_id = os.path.join(folder, FILE_NAME), _repo_id(folder)
    if only is not None:
        place = path if repo_id is None else hf_hub_url(repo_id, FILE_NAME, revision=revision)
        with TemporaryDirectory() as stage:
            _copy_members(partial(_read_range, place), only, stage)
            return read_bank(stage, False, skip_damaged)
    path = path if repo_id is None else hf_hub_download(repo_id, FILE_NAME, revision=revision)
    try:
        with safe_open(path, "pt") as file:
            table = json.loads((file.metadata() or {})["adapter_bank"])
            packed, form_of, crc32 = (file.get_tensor(name) for name in ("adapters", "form_of", "crc32"))
        names, record = table["names"], table["base_layers"]
        layers = {n: PackedTucker(tuple(it["shape"]), tuple(it["ranks"])) for n, it in table["layers"].items()}
        forms: list[Form] = [{n: (tuple(ranks), basis) for n, (ranks, basis) in it.items()} for it in table["forms"]]
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r:.200}. Save or download the bank again.") from error
    width = sum([form.width() for form in layers.values()])
    fits = table["format"] == _FORMAT and packed.shape == (len(names) + 1, width) and packed.is_floating_point()
    if not fits or len(form_of) != len(packed) or len(crc32) != len(packed) or len(set(names)) < len(names):
        raise ValueError(f"{path} is damaged: its table does not fit its tensors. Save or download the bank again.")
    if mapped:
        return Store(packed, layers, forms, form_of.clone(), packed[:0].clone()), names, record
    # or all of the file stays mapped, and changes with it
    store = Store(packed.clone(), layers, forms, form_of.clone())
    # by a few rows, whose memory is used again
    finite = torch.cat([rows.isfinite().all(1) for rows in store.packed.split(64)])
    right = ((_checksums(store.packed) == crc32) & finite & (form_of >= 0) & (form_of < len(forms))).tolist()
    if not right[0]:
        raise ValueError(f"{path} is damaged: the row of the base is not zero. Save or download the bank again.")
    if all(right):
        return store, names, record
    damaged = [name for name, is_right in zip(names, right[1:], strict=True) if not is_right]
    message = f"{path} has damaged adapters: {', '.join(map(repr, damaged[:3]))} ({len(damaged)} of {len(names)})."
    if not skip_damaged:
        raise ValueError(f"{message} `skip_damaged=True` loads the others.")
    warnings.warn(f"{message} They are left out.", stacklevel=3)
    store = store.select([row for row, is_right in enumerate(right) if is_right])
    return store, [name for name in names if name not in set(damaged)], record


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
