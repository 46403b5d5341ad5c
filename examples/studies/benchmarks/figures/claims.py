# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The claims of the project on speed, checked against the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from figures.tables import LINEAR, find, median


@dataclass(frozen=True)
class Claim:
    """A measured value and its upper limit; `value` maps the results to the value, or to None if it is missing."""

    text: str
    limit: float
    value: Callable[[dict], float | None]
    unit: str = "x"


def _divide(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first / second


def _step(kan: str, widths: list[int], batch: int, first: str, second: str) -> Callable[[dict], float | None]:
    """The ratio of the training steps by two methods."""

    def value(results: dict) -> float | None:
        row = find(results, "training_step", kan=kan, widths=widths, batch=batch)
        return row and _divide(median(row, first), median(row, second))

    return value


def _layer(other: str) -> Callable[[dict], float | None]:
    """Forward and backward of KANLinear divided by those of another layer, 256 -> 256, batch 4096."""

    def value(results: dict) -> float | None:
        row = find(results, "layers", width=256, batch=4096)
        return row and _divide(median(row, "KANLinear"), median(row, other))

    return value


def _parameters(results: dict) -> float | None:
    row = find(results, "training_step", kan="efficient-kan", widths=[256, 256], batch=4096)
    trainable = (row or {}).get("trainable")
    return trainable and trainable["LoTRA"] / trainable["PEFT LoRA"]


def _grid_growth(results: dict) -> float | None:
    rows = [find(results, "layers", width=256, batch=4096, grid=grid) for grid in (64, 8)]
    return None if None in rows else _divide(*(median(row, "KANLinear") for row in rows))


def _merged(results: dict) -> float | None:
    row = find(results, "serving", widths=[256, 256, 256, 256])
    return row and _divide(median(row, "inference: LoTRA, merged"), median(row, "inference: base"))


def _import(results: dict) -> float | None:
    row = find(results, "import_time")
    return row and median(row, "peft_lotra")


WIDE, LARGE = ([1024, 1024], 1024), ([256, 256], 4096)
CLAIMS = (
    Claim("LoTRA step / frozen base, 1024 -> 1024, batch 1024", 1.15, _step("own KAN", *WIDE, "LoTRA", "frozen base")),
    Claim("LoTRA step / frozen base, 256 -> 256, batch 4096", 1.25, _step("own KAN", *LARGE, "LoTRA", "frozen base")),
    Claim(
        "LoTRA step / full fine-tuning, 1024 -> 1024, batch 1024",
        0.8,
        _step("own KAN", *WIDE, "LoTRA", "full fine-tuning"),
    ),
    Claim(
        "LoTRA step / full fine-tuning, 256 -> 256, batch 4096",
        1.0,
        _step("own KAN", *LARGE, "LoTRA", "full fine-tuning"),
    ),
    Claim(
        "LoTRA step / full fine-tuning, [2, 16, 16, 1], batch 2000, second derivatives",
        1.15,
        _step("own KAN", [2, 16, 16, 1], 2000, "LoTRA", "full fine-tuning"),
    ),
    Claim(
        "LoTRA step / full fine-tuning, efficient-kan, 256 -> 256, batch 4096",
        0.35,
        _step("efficient-kan", *LARGE, "LoTRA", "full fine-tuning"),
    ),
    Claim(
        "LoTRA step / PEFT LoRA (r=4), efficient-kan, 256 -> 256, batch 4096",
        0.5,
        _step("efficient-kan", *LARGE, "LoTRA", "PEFT LoRA"),
    ),
    Claim("LoTRA parameters / PEFT LoRA (r=4), efficient-kan, 256 -> 256", 0.02, _parameters),
    Claim("KANLinear / inkan, forward and backward, 256 -> 256, batch 4096", 1.0, _layer("inkan")),
    Claim("KANLinear / flashkan, forward and backward, 256 -> 256, batch 4096", 1.0, _layer("flashkan")),
    Claim("KANLinear / efficient-kan, forward and backward, 256 -> 256, batch 4096", 0.2, _layer("efficient-kan")),
    Claim(f"KANLinear / {LINEAR}, forward and backward, 256 -> 256, batch 4096", 1.4, _layer(LINEAR)),
    Claim("KANLinear with grid 64 / grid 8, forward and backward, 256 -> 256, batch 4096", 3.0, _grid_growth),
    Claim("inference of a merged LoTRA / base, [256, 256, 256, 256], batch 1024", 1.05, _merged),
    Claim("import peft_lotra after peft", 500, _import, "ms"),
)
