# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The files of an adapter: written so that no interruption mixes two adapters up, and checked when they are read.

The config carries digests of itself and of the tensors: files that were changed, truncated or exchanged are refused.
The digests guard against accidents only; whoever writes the files can write fitting digests too (see SECURITY.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch
from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..modules.checks import check_path
from .checkpoint import NORM_STATS, is_of_another_adapter, refuse
from .fingerprint import digest_of, hash_values


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# Far above what an adapter needs (about 100 bytes for each tensor), far below what would hurt to parse.
MAX_HEADER_BYTES = 8 << 20
MAX_CONFIG_BYTES = 8 << 20
MAX_TENSORS = 10_000  # each takes 0.06 ms to check

# The name of the new config while `save_adapter` exchanges the files.
PENDING_CONFIG = f".{CONFIG_NAME}.next"
_STAGE = ".saving"
WAIT_SECONDS = 60  # of a save for another one into the same folder

# Fields that may be edited by hand or by tools: they do not change what the adapter computes.
_NOT_DIGESTED = frozenset(
    "auto_mapping base_model_name_or_path check_base inference_mode integrity peft_type peft_version revision "
    "task_type".split()
)
_FLOATS = ("F64", "F32", "F16", "BF16")


def config_digest(values: Mapping[str, Any], defaults: Mapping[str, Any], weights: str | None) -> str:
    """The digest of a configuration and of the digest of its tensors, 32 hexadecimal digits."""
    # without defaults, so that later versions, which have more fields, read older files
    counted = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in values.items()
        if name not in _NOT_DIGESTED and value != defaults.get(name)
    }
    return digest_of([counted, weights])


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a file in one step: under another name, forced to the disk, and renamed."""
    with _put_in_place(path, "x", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def _put_in_place(path: str | os.PathLike, mode: str, **kwargs: Any) -> Iterator[IO[Any]]:
    """A new file that takes the place of another at the end, and is removed after an error."""
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    # "x" opens nothing that exists: a link of this name would lead to another file
    file = open(temporary, mode, **kwargs)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def make_own(path: str | os.PathLike) -> None:
    """Puts a copy in the place of a file that is a link, soft or hard, so that writing to it leads nowhere else.

    What is neither a file nor a folder, such as a pipe, is removed. A folder is a ValueError.
    """
    refuse_folder(path)
    try:
        info = os.lstat(path)
    except OSError:
        return
    if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
        return
    if not os.path.isfile(path):
        os.unlink(path)
        return
    with open(path, "rb") as file, _put_in_place(path, "xb") as copy:
        shutil.copyfileobj(file, copy)


def refuse_folder(path: str | os.PathLike) -> None:
    """Raises a ValueError if there is a folder where a file is to be written."""
    if os.path.isdir(path) and not os.path.islink(path):
        raise ValueError(f"{path} is a folder, where a file is to be written: move it away, or save elsewhere.")


def save_adapter(model: PeftModel, folder: str | os.PathLike, **kwargs: Any) -> None:
    """Saves adapters as `model.save_pretrained(folder)` does, but so that an interruption loses nothing.

    If the process is killed at any moment, or the disk runs full, loading from the folder gives the old adapter or the
    new one, complete. `save_pretrained`, interrupted, leaves a folder that is refused, and the old adapter is lost.
    The files are written beside, forced to the disk and renamed, tensors first. Between the two renames the new config
    lies beside the old one as `.adapter_config.json.next`, where loading looks for it.

    Args:
        model (`PeftModel`): The model.
        folder (`str`): The folder. It needs room for the old files and the new ones. Other calls that
            write to it are waited for.
        kwargs: As for `PeftModel.save_pretrained`, e.g. `selected_adapters`.

    Raises:
        ValueError: `model` is no PeftModel, `safe_serialization=False` was passed, `folder` is a file, or what
            `PeftModel.save_pretrained` raises. The folder is as it was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, save_adapter
        >>> from peft_lotra.kan import KAN
        >>> with TemporaryDirectory() as folder:
        ...     save_adapter(get_peft_model(KAN([2, 4, 1]), LoTRAConfig(r=2)), folder)
        ...     sorted(os.listdir(folder))
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    if not hasattr(model, "get_base_model"):  # an injected model has not
        raise ValueError(f"`model` is of type {type(model).__name__}, but must be a PeftModel.")
    if not kwargs.get("safe_serialization", True):
        raise ValueError("LoTRA adapters are saved as safetensors only: leave `safe_serialization` out.")
    check_path(folder, "folder")
    if os.path.isfile(folder):
        raise ValueError(f"`folder` is {folder}, which is a file. Pass a folder, which is made if there is none.")
    os.makedirs(folder, exist_ok=True)
    with _only_writer(folder):
        _save_by_stage(model, folder, os.path.join(folder, _STAGE), kwargs)


@contextlib.contextmanager
def _only_writer(folder: str | os.PathLike) -> Iterator[None]:
    """Waits for others that save into the folder: of two at once each removes the other's stage.

    The lock is on the folder itself, so that no file is left, and ends with the process. Windows has none.
    """
    if fcntl is None:
        yield
        return
    handle, end = os.open(folder, os.O_RDONLY), time.monotonic() + WAIT_SECONDS
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(
                        f"Another save into {folder} has been going on for {WAIT_SECONDS} s: wait until it ends, or "
                        "choose another folder."
                    ) from None
                time.sleep(0.01)
            except OSError:  # a file system without locks
                break
        yield
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # which children have too, if they were forked meanwhile
    finally:
        os.close(handle)


def _save_by_stage(model: PeftModel, folder: str | os.PathLike, stage: str, kwargs: Mapping[str, Any]) -> None:
    shutil.rmtree(stage, ignore_errors=True)  # of a save that was killed
    os.makedirs(stage)
    try:
        card = os.path.join(folder, "README.md")
        if os.path.isfile(card):
            shutil.copyfile(card, os.path.join(stage, "README.md"))  # PEFT extends the one that is there
        model.save_pretrained(stage, **kwargs)
        staged = sorted(parent for parent, _, files in os.walk(stage) if files)
        for parent in staged:
            for name in _files(parent):
                refuse_folder(os.path.normpath(os.path.join(folder, os.path.relpath(parent, stage), name)))
                _force_to_disk(os.path.join(parent, name))
        for parent in staged:
            target = os.path.normpath(os.path.join(folder, os.path.relpath(parent, stage)))
            os.makedirs(target, exist_ok=True)
            _exchange(parent, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _files(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))]


def _exchange(source: str, target: str) -> None:
    """Moves the files of a folder into another one, the config last."""
    files = _files(source)
    if CONFIG_NAME in files:
        os.replace(os.path.join(source, CONFIG_NAME), os.path.join(target, PENDING_CONFIG))
        _force_to_disk(target)
    for name in files:
        if name != CONFIG_NAME:
            os.replace(os.path.join(source, name), os.path.join(target, name))
    _force_to_disk(target)
    if CONFIG_NAME in files:
        os.replace(os.path.join(target, PENDING_CONFIG), os.path.join(target, CONFIG_NAME))
        _force_to_disk(target)


def _force_to_disk(path: str) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders, and needs it for none
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_weights(model_id: str, subfolder: str | None, hub_kwargs: Mapping[str, Any]) -> str | None:
    """The path of the tensors of a config, in a folder or downloaded from the Hub, if any; a pickle is refused."""
    folder = os.path.join(model_id, subfolder) if subfolder is not None else model_id
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    pickled = f"`{WEIGHTS_NAME}` at {folder} is a pickle, which runs code when it is loaded"
    remedy = f"Only `{SAFETENSORS_WEIGHTS_NAME}` is loaded: ask its author to save the adapter again."
    if os.path.lexists(path):  # a dangling link is a file that cannot be read
        return path
    if os.path.lexists(os.path.join(folder, WEIGHTS_NAME)):
        raise ValueError(f"{pickled}. {remedy}")
    if os.path.isdir(folder):
        return None
    try:
        return hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub_kwargs)
    except LocalEntryNotFoundError:  # of the network, which does not say that there are none
        raise
    except EntryNotFoundError:
        name = WEIGHTS_NAME if subfolder is None else f"{subfolder}/{WEIGHTS_NAME}"
        if file_exists(model_id, name, revision=hub_kwargs.get("revision"), token=hub_kwargs.get("token")):
            raise ValueError(f"{pickled}. {remedy}") from None
        return None


def check_size(config: str) -> None:
    """Raises a ValueError if a local file is too long for a config."""
    if os.path.isfile(config) and os.path.getsize(config) > MAX_CONFIG_BYTES:
        raise ValueError(f"{config} has more than the {MAX_CONFIG_BYTES:,} bytes that a config may have.")


@contextlib.contextmanager
def open_weights(path: str) -> Iterator[Any]:
    """An open file of tensors (`safetensors.safe_open`), of which the header was checked.

    Raises:
        ValueError: No file, a damaged one, or one with a longer header or more tensors than an adapter needs.
    """
    problem = f"{path} cannot be loaded: "
    size = os.path.getsize(path)
    if not os.path.isfile(path):  # a pipe would wait for someone who writes into it
        raise ValueError(f"{problem}it is no file.")
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"{problem}its header claims to have {header:,} bytes, of a file of {size:,}; at most "
            f"{MAX_HEADER_BYTES:,} are read. It is damaged, or no safetensors file."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if (count := len(file.keys())) > MAX_TENSORS:
                raise ValueError(f"{problem}it has {count:,} tensors; at most {MAX_TENSORS:,} are read.")
            yield file
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{problem}{error}. It is damaged, or no safetensors file.") from error


def keep_own_tensors(path: str) -> None:
    """Replaces a file that PEFT 0.19 wrote, with the tensors of all adapters, by one with its own adapter's alone."""
    with open_weights(path) as file:
        own = [name for name in file.keys() if not is_of_another_adapter(name)]
        if len(own) == len(file.keys()):
            return
        tensors, metadata = {name: file.get_tensor(name) for name in own}, file.metadata()
    with _put_in_place(path, "xb") as copy:
        copy.write(save(tensors, metadata))


def read_weights(path: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """Checks a file of tensors, and returns the shapes by name and the digest of all contents.

    Raises:
        ValueError: As `open_weights`; or components are not floating, or values not finite.
    """
    with open_weights(path) as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        wrong = [
            f"{name} is of type {slices[name].get_dtype()}, not one of {', '.join(_FLOATS)}"
            for name in shapes
            if ".lotra_" in name and slices[name].get_dtype() not in _FLOATS and not name.endswith(NORM_STATS[2])
        ]
        digest = hashlib.blake2b(digest_size=16)
        for name in shapes if not wrong else ():
            tensor = file.get_tensor(name)
            digest.update(hash_values({name: tensor}).encode())
            if not torch.isfinite(tensor.float() if tensor.is_floating_point() else tensor).all():
                wrong.append(f"{name} has values that are not finite")
    refuse(f"{path} cannot be loaded: ", wrong)
    return shapes, digest.hexdigest()


def differ(tensor: torch.Tensor, expected: torch.Tensor, new: str = "the checkpoint", old: str = "the model") -> str:
    """How a tensor of a file has another shape than that of the model, or a dtype of another kind; empty if not."""
    if tensor.shape != expected.shape:
        return f"{tuple(tensor.shape)} in {new}, {tuple(expected.shape)} in {old}"
    if _kind(tensor.dtype) != _kind(expected.dtype):
        return f"{tensor.dtype} in {new}, {expected.dtype} in {old}"
    return ""


def _kind(dtype: torch.dtype) -> tuple[bool, ...]:
    is_float = dtype.is_floating_point
    return is_float, is_float and dtype.itemsize < 2, dtype.is_complex, dtype == torch.bool
