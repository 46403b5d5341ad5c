# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Which versions of a name may be seen while other threads or requests change it."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Change:
    version: Any  # None: the name was removed
    begin: float
    end: float = math.inf


class Versions:
    """The changes of each name. One thread changes a name, any thread may ask."""

    def __init__(self) -> None:
        self._changes: dict[str, list[Change]] = defaultdict(list)

    @contextmanager
    def change(self, name: str, version: Any) -> Iterator[None]:
        """Record the change to a version that the body makes; to None if it removes the name."""
        change = Change(version, time.monotonic())
        self._changes[name].append(change)
        yield
        change.end = time.monotonic()

    def visible(self, name: str, since: float) -> set[Any]:
        """Return the versions that were visible at some time between `since` and now, None for no version."""
        versions = set()
        for change in reversed(self._changes[name]):
            versions.add(change.version)
            if change.end < since:
                return versions
        return versions | {None}

    def now(self) -> dict[str, Any]:
        """Return the version of each name that is present, while nothing is changed."""
        versions = {name: changes[-1].version for name, changes in self._changes.items() if changes}
        return {name: version for name, version in versions.items() if version is not None}
