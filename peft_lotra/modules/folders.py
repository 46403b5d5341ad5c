# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Files of a folder that are replaced together: written next to the old ones, then moved. Damaged files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# on the same disk as the folder; huggingface_hub does not upload .cache/huggingface
_WORK_FOLDER = os.path.join(".cache", "huggingface", "peft_lotra")
STAGE = os.path.join(_WORK_FOLDER, "files")  # complete files before they are moved


@contextmanager
def replacing_files(folder: str | os.PathLike, *copied: str) -> Iterator[str]:
    """Yield an empty folder whose files replace the files of `folder` at the end; other files there stay.

    An error changes nothing. After a killed process each file is old or new, and the next save finishes its moves.
    Saves into one folder wait for each other. Files are moved in descending order of names: tensors, configurations,
    cards.

    Args:
        folder: The folder, which is created if it does not exist.
        copied: Names of files of `folder` to copy into the yielded folder, if they exist.

    Raises:
        NotADirectoryError: `folder` is a file.
    """
    folder = os.fspath(folder)
    if not isinstance(folder, str) or os.path.isfile(folder):
        raise NotADirectoryError(f"`folder` is {folder!r:.100}, but must be a folder; it need not exist.")
    is_new = not os.path.isdir(folder)
    try:
        with _locked(folder):
            stage = os.path.join(folder, STAGE)
            draft = os.path.join(folder, _WORK_FOLDER, "draft")
            # leftovers of a killed save: a running one would hold the lock
            if not _is_outdated(stage, folder):
                _move_files(stage, folder)
            shutil.rmtree(stage, ignore_errors=True)
            shutil.rmtree(draft, ignore_errors=True)
            os.mkdir(draft)
            try:
                for name in copied:
                    source = os.path.join(folder, name)
                    with suppress(FileNotFoundError):
                        shutil.copyfile(source, os.path.join(draft, name))
                yield draft
                _flush_files(draft)
                # if the moves are interrupted, loading finds the configuration in the stage
                os.rename(draft, stage)
                _move_files(stage, folder)
                shutil.rmtree(stage, ignore_errors=True)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except BaseException:
        if is_new:
            with suppress(OSError):  # it has files, or does not exist
                os.rmdir(folder)
        raise


def _flush_files(draft: str) -> None:
    """Write all files to the disk."""
    for parent, _, names in os.walk(draft):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb+") as file:  # Windows cannot flush a file that is only read
                os.fsync(file.fileno())


def _move_files(stage: str, folder: str) -> None:
    """Move all files of the stage to the folder."""
    for source, target in _list_moves(stage, folder):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(source, target)


def _is_outdated(stage: str, folder: str) -> bool:
    """Return whether another program has written one of the files since they were staged."""
    for source, target in _list_moves(stage, folder):
        with suppress(FileNotFoundError):
            if os.path.getmtime(target) > os.path.getmtime(source):
                return True
    return False


def _list_moves(stage: str, folder: str) -> list[tuple[str, str]]:
    """Return the source and the target of each file of the stage."""
    moves = []
    for parent, _, names in os.walk(stage):
        subfolder = os.path.relpath(parent, stage)
        target_folder = os.path.normpath(os.path.join(folder, subfolder))
        for name in sorted(names, reverse=True):
            source = os.path.join(parent, name)
            target = os.path.join(target_folder, name)
            moves.append((source, target))
    return moves


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Wait until no other thread or process saves into a folder, and remove the file of the lock at the end."""
    work_folder = os.path.join(folder, _WORK_FOLDER)
    path = os.path.join(work_folder, "lock")
    file = _acquire(path)
    try:
        yield
    finally:
        # removed before the release, so that a save that waits sees that the file is no longer the lock
        with suppress(OSError):  # Windows keeps files that are open
            os.unlink(path)
        file.close()
        for _ in range(3):
            with suppress(OSError):  # not empty
                os.rmdir(work_folder)
            work_folder = os.path.dirname(work_folder)


def _acquire(path: str) -> IO[bytes]:
    """Wait for a lock, and return its open file."""
    for _ in range(1000):
        # another save may remove the folder or the file meanwhile; if it does so during `makedirs`, that raises
        # FileExistsError
        with suppress(FileNotFoundError, FileExistsError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = open(path, "wb")
            _wait_for(file)
            own_status = os.fstat(file.fileno())
            with suppress(FileNotFoundError):
                if os.path.samestat(own_status, os.stat(path)):
                    return file
            file.close()
    raise FileNotFoundError(f"{path} cannot be created, or is removed again and again.")


def _wait_for(file: IO[bytes]) -> None:
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        return
    import msvcrt  # noqa: I001

    while True:
        try:
            return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError:  # after ten seconds
            continue


@contextmanager
def naming_damage(path: str | os.PathLike) -> Iterator[None]:
    """Turn all errors that an altered or truncated file causes into one that names the file.

    Errors of the disk and of the network are raised unchanged.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error!r:.200}. Save or download the file again.") from error
