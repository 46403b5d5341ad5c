# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Files of a folder that are replaced together: written beside the old ones, then moved. Files that are damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from .checks import check_path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# inside of the folder, so on the same disk; huggingface_hub never uploads what lies in .cache/huggingface
_PLACE = os.path.join(".cache", "huggingface", "peft_lotra")
STAGE = os.path.join(_PLACE, "files")  # where files are before they are moved


@contextmanager
def replacing_files(folder: str | os.PathLike, *copied: str) -> Iterator[str]:
    """Yield an empty folder whose files replace those of `folder` at the end; other files there stay.

    An error changes nothing. A killed process leaves each file old or new, and the next save finishes what it left.
    Saves into one folder wait for each other. Tensors are moved before configurations, and these before cards: names
    in falling order.

    Args:
        folder: The folder, which is made if there is none.
        copied: Names of files of `folder` that are copied into the yielded one, if they are there.

    Raises:
        ValueError: `folder` is a file.
    """
    check_path(folder, "folder")
    folder = os.fspath(folder)
    if os.path.isfile(folder):
        raise ValueError(f"`folder` is {folder}, which is a file. Pass a folder, which is made if there is none.")
    is_new = not os.path.isdir(folder)

    try:
        with _locked(folder):
            stage, draft = os.path.join(folder, STAGE), os.path.join(folder, _PLACE, "draft")
            # leftovers of a killed save, since a living one would hold the lock
            if not _is_outdated(stage, folder):
                _move_files(stage, folder)
            shutil.rmtree(stage, ignore_errors=True)
            shutil.rmtree(draft, ignore_errors=True)
            os.mkdir(draft)
            try:
                for name in copied:
                    with suppress(FileNotFoundError):
                        shutil.copyfile(os.path.join(folder, name), os.path.join(draft, name))
                yield draft
                _flush_files(draft)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise

            # what is interrupted from here on leaves its stage, where loading looks for a configuration
            os.rename(draft, stage)
            _move_files(stage, folder)
            shutil.rmtree(stage, ignore_errors=True)
    except BaseException:
        if is_new:
            with suppress(OSError):  # it has files, or could not be made
                os.rmdir(folder)
        raise


def _flush_files(draft: str) -> None:
    """Write all files to the disk."""
    for place, _, names in os.walk(draft):
        for name in names:
            with open(os.path.join(place, name), "rb+") as file:  # Windows cannot flush a file that is only read
                os.fsync(file.fileno())


def _move_files(stage: str, folder: str) -> None:
    """Move all files of the stage to the folder."""
    for source, target in _list_moves(stage, folder):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(source, target)


def _is_outdated(stage: str, folder: str) -> bool:
    """Return whether another program has written one of the files since they were staged."""
    pairs = [pair for pair in _list_moves(stage, folder) if os.path.exists(pair[1])]
    return any(os.path.getmtime(target) > os.path.getmtime(source) for source, target in pairs)


def _list_moves(stage: str, folder: str) -> list[tuple[str, str]]:
    """Return from where to where each file of the stage is moved."""
    moves = []
    for place, _, names in os.walk(stage):
        target = os.path.normpath(os.path.join(folder, os.path.relpath(place, stage)))
        for name in sorted(names, reverse=True):
            moves.append((os.path.join(place, name), os.path.join(target, name)))
    return moves


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Wait until no other thread or process saves into a folder, and remove the file of the lock at the end."""
    place = os.path.join(folder, _PLACE)
    path = os.path.join(place, "lock")
    file = _acquire(path)
    try:
        yield
    finally:
        # removed before it is released, so that who waits for it can see that it is no longer the lock
        with suppress(OSError):  # Windows keeps files that are open
            os.unlink(path)
        file.close()
        for empty in (place, os.path.dirname(place), os.path.dirname(os.path.dirname(place))):
            with suppress(OSError):
                os.rmdir(empty)


def _acquire(path: str) -> IO[bytes]:
    """Return the open file of a lock once it belongs to this call."""
    for _ in range(1000):
        # another save that ends may remove the folder of the lock, or the file that this one waits for; `makedirs`
        # calls a folder that is removed while it looks at it an existing file
        with suppress(FileNotFoundError, FileExistsError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = open(path, "wb")
            _wait_for(file)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file
            file.close()
    raise FileNotFoundError(f"{path} cannot be made, or is removed again and again.")


def _wait_for(file: IO[bytes]) -> None:
    if fcntl is not None:
        with suppress(OSError):  # file systems without locks: saves at the same time are then the user's to avoid
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

    Errors of the disk and of the network stay as they are.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error!r:.200}. Save or download the file again.") from error
