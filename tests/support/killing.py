# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Interrupts a function at a chosen file operation, in a separate process."""

from __future__ import annotations

import builtins
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import peft.peft_model
import safetensors.torch


# audit events that precede a file operation; their first argument is the path
_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}


def count_steps(work: Callable[[], None], folder: Path) -> list[str]:
    """The paths below `folder` of the file operations of `work`, which runs in a separate process."""
    reader, writer = os.pipe()
    assert _run(-1, work, folder, "kill", writer) == 0
    with os.fdopen(reader) as file:
        return file.read().splitlines()


def interrupted_at(step: int, work: Callable[[], None], folder: Path, how: str) -> None:
    """Runs `work` in a separate process, which is killed before file operation `step` below `folder`. If the operation
    writes the tensors, the process is killed after half of the bytes.

    Args:
        how (`str`): `"kill"`, or `"full"` to raise the error of a full disk instead, which `work` may handle.
    """
    assert _run(step, work, folder, how) in ({9} if how == "kill" else {0, 28})


def _run(step: int, work: Callable[[], None], folder: Path, how: str, writer: int | None = None) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _child(step, work, folder, how, writer)
        finally:
            os._exit(1)
    if writer is not None:
        os.close(writer)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child(step: int, work: Callable[[], None], folder: Path, how: str, writer: int | None) -> None:
    paths: list[str] = []

    def at_step(path: str | os.PathLike) -> None:
        paths.append(str(path))
        if len(paths) == step + 1:
            if how == "kill":
                os._exit(9)
            raise OSError(28, "No space left on device")

    def hook(event: str, arguments: tuple) -> None:
        if event in _EVENTS and isinstance(arguments[0], (str, os.PathLike)):
            if str(arguments[0]).startswith(str(folder)):
                at_step(arguments[1] if event == "os.rename" else arguments[0])

    def fsync(handle: int, really: Callable = os.fsync) -> None:
        at_step(os.readlink(f"/proc/self/fd/{handle}"))
        really(handle)

    def save_file(tensors: dict, path: str, metadata: dict) -> None:
        content = safetensors.torch.save(tensors, metadata)
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            at_step(path)
            file.write(content[len(content) // 2 :])

    def opened(path, mode="r", *args, really: Callable = builtins.open, **kwargs):
        file = really(path, mode, *args, **kwargs)
        if "w" in mode and str(path).startswith(str(folder)):
            at_step(path)  # the file exists and is still empty
        return file

    os.fsync, peft.peft_model.safe_save_file, builtins.open = fsync, save_file, opened
    sys.addaudithook(hook)
    try:
        work()
    except OSError as error:
        os._exit(28 if error.errno == 28 else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    if writer is not None:
        os.write(writer, "\n".join(paths).encode())
    os._exit(0)
