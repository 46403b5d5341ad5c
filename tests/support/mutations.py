# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Damaged adapter files: each file is refused, or loads with the output of the sound file.

The tests run 200 mutations. Ten thousand of them, with a table and a report:

    PYTHONPATH=. python tests/support/mutations.py --count 10000 --output examples/studies/results/fuzz_files.json
"""

from __future__ import annotations

import random
from functools import cache

from doors import Case, main
from hostile import CONFIG, WEIGHTS
from subjects import SUBJECTS, expected_output, sound_files
from torch import Tensor


FILES = (WEIGHTS, CONFIG)


def mutate(content: bytes, rng: random.Random, other: bytes) -> tuple[str, bytes]:
    """A random kind of damage: the name of the kind, and the damaged content."""
    data = bytearray(content)
    start = rng.randrange(len(data))
    # damage near the front, where the lengths and names are, as often as anywhere
    start = rng.randrange(min(64, len(data))) if rng.random() < 0.3 else start
    end = min(len(data), start + 1 + int(rng.expovariate(0.1)))
    kind = rng.choice(
        ["bit", "byte", "bytes", "delete", "insert", "repeat", "truncate", "zero", "swap", "digit", "splice"]
    )
    if kind == "bit":
        data[start] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[start] = rng.randrange(256)
    elif kind == "bytes":
        data[start:end] = rng.randbytes(end - start)
    elif kind == "delete":
        del data[start:end]
    elif kind == "insert":
        data[start:start] = rng.randbytes(end - start)
    elif kind == "repeat":
        data[start:start] = data[start:end]
    elif kind == "truncate":
        del data[start:]
    elif kind == "zero":
        data[start:end] = bytes(end - start)
    elif kind == "swap":
        position = rng.randrange(len(data))
        data[start], data[position] = data[position], data[start]
    elif kind == "digit":  # another number in a JSON text, which stays well formed
        digits = [i for i, byte in enumerate(data) if chr(byte).isdigit() and i < 5000]
        if digits:
            data[rng.choice(digits)] = ord(rng.choice("0123456789"))
    else:  # the end of another adapter's file
        data[start:] = other[start:]
    return kind, bytes(data)


@cache
def _originals(subject: str) -> list[tuple[dict[str, bytes], Tensor]]:
    """Two sound adapters, with what they compute."""
    return [(files, expected_output(subject, files)) for files in (sound_files(subject, seed) for seed in (0, 1))]


def generate(rng: random.Random) -> Case:
    """A sound adapter with one damaged file, or with two."""
    subject = rng.choice(list(SUBJECTS))
    (good, expected), (other, of_other) = _originals(subject)
    files, kinds = dict(good), []
    for name in [rng.choice(FILES)] if rng.random() < 0.9 else FILES:
        kind, files[name] = mutate(good[name], rng, other[name])
        kinds.append(f"{name.split('.')[0].removeprefix('adapter_')}, {kind}")
    # spliced from the front on, both files are those of the other adapter
    return Case(kinds, files, of_other if files == other else expected, subject)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], generate)
