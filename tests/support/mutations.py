# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Damaged adapter files: each file is refused, or loads with the output of the sound file.

The tests run 300 mutations. Ten thousand of them, with a report:

    PYTHONPATH=. python tests/support/mutations.py --count 10000 --output examples/results/fuzz_files.json
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from helpers import adapt
from peft import PeftModel
from torch import nn

from peft_lotra.kan import KAN


FILES = ("adapter_model.safetensors", "adapter_config.json")


class Model(nn.Module):
    """Two KAN layers and a head that is saved in full."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kan = KAN([3, 4, 3])
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.kan(x))


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


def run(count: int, seed: int = 0, folder: Path | None = None) -> dict:
    """Tries `count` damaged folders.

    Returns:
        The report: counts of refused and harmless mutations by kind, the wrong results, the longest time of a load,
        and the growth of the peak memory of the process.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        good, other, bad = (Path(folder or temporary) / name for name in ("good", "other", "bad"))
        for index, path in enumerate((good, other)):
            torch.manual_seed(index)
            adapt(
                Model(), r=2, alpha=1.5, modules_to_save=["head"], rank_pattern={"layers.0": (1, 2, 3)}
            ).save_pretrained(path)
        contents = {path: {name: (path / name).read_bytes() for name in FILES} for path in (good, other)}
        shutil.copytree(good, bad)
        x = torch.rand(5, 3) * 1.8 - 0.9
        with torch.no_grad():
            expected, bare = PeftModel.from_pretrained(Model(), good)(x), Model()(x)
        assert not torch.equal(expected, bare)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcomes, errors, wrong, slowest = Counter(), Counter(), [], 0.0
        for index in range(count):
            damaged = dict(contents[good])
            names = [rng.choice(FILES)] if rng.random() < 0.9 else FILES
            kinds = []
            for name in names:
                kind, damaged[name] = mutate(damaged[name], rng, contents[other][name])
                kinds.append(kind)
            for name in FILES:
                (bad / name).write_bytes(damaged[name])
            model = Model()
            started = time.perf_counter()
            try:
                with warnings.catch_warnings(record=True) as caught, torch.no_grad():
                    warnings.simplefilter("always")
                    y = PeftModel.from_pretrained(model, bad)(x)
            except Exception as error:
                outcome = "refused"
                errors[type(error).__name__] += 1
                with torch.no_grad():
                    if not torch.equal(model(x), bare) or any("lotra" in name for name, _ in model.named_parameters()):
                        wrong.append(
                            {"index": index, "kinds": kinds, "what": "the model was changed by a failed load"}
                        )
            else:
                outcome = "equal output"
                if not torch.equal(y, expected):
                    wrong.append({"index": index, "kinds": kinds, "what": "another output", "warned": len(caught)})
            slowest = max(slowest, time.perf_counter() - started)
            for name, kind in zip(names, kinds, strict=True):
                outcomes[f"{name.split('.')[0].removeprefix('adapter_')}, {kind}: {outcome}"] += 1
    return {
        "mutations": count,
        "seed": seed,
        "refused": sum(errors.values()),
        "equal output": count - sum(errors.values()),
        "wrong": wrong,
        "errors": dict(errors.most_common()),
        "outcomes": dict(sorted(outcomes.items())),
        "slowest load, seconds": round(slowest, 3),
        "growth of the peak memory, MiB": round(
            (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024, 1
        ),
        "peak memory, MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    report = run(arguments.count, arguments.seed)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "outcomes"}, indent=2))
