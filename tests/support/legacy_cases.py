# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The adapters of `tests/legacy`: the base models that `make.py` adapted, and how it adapted them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stand_ins import FAMILIES, FastKANLayer
from torch import Tensor, nn

from peft_lotra import slim
from peft_lotra.kan import KAN, KANConfig, KANModel, SlimKAN


# the file that each folder has beside those of PEFT
IO = "outputs.safetensors"
# what the base models are made from: a state dict, or a folder of transformers
BASE, PRETRAINED = "base.safetensors", "base"


class WithHead(nn.Module):
    """A KAN layer and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = FastKANLayer(3, 4, num_grids=4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kan(x))


def stack(family: str) -> nn.Module:
    return nn.Sequential(FAMILIES[family](3, 4), FAMILIES[family](4, 2))


def pykan() -> nn.Module:
    from kan import KAN as MultKAN

    return MultKAN(width=[3, 4, 2], grid=4, k=3, auto_save=False, device="cpu")


def kan() -> nn.Module:
    return KAN([3, 4, 2])


@dataclass(frozen=True)
class Case:
    """A base model in any state, and the arguments of `LoTRAConfig`."""

    base: Callable[[], nn.Module]
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def blank(self) -> nn.Module:
        return self.base().to(self.dtype).eval()


CASES: dict[str, Case] = {
    "kan": Case(kan),
    "kan_model": Case(lambda: KANModel(KANConfig(widths=(3, 4, 2), problem_type="regression"))),
    "slim_kan": Case(lambda: SlimKAN([3, 4, 2], ranks=(2, 2, 2))),
    "slim_foreign": Case(lambda: slim(stack("efficient-kan"), ranks=(2, 2, 2))),
    "pykan": Case(pykan),
    "efficient_kan": Case(lambda: stack("efficient-kan")),
    "inkan": Case(lambda: stack("inkan")),
    "flashkan": Case(lambda: stack("flashkan")),
    "fast_kan": Case(lambda: stack("fast-kan")),
    "modules_to_save": Case(WithHead, {"modules_to_save": ["head"]}),
    "no_residual": Case(kan, {"adapt_residual": False}),
    "patterns": Case(kan, {"rank_pattern": {"layers.0": (1, 2, 3)}, "alpha_pattern": {"layers.1": 0.5}}),
    "gradient": Case(kan, {"init_weights": "gradient"}),
    "bfloat16": Case(kan, dtype=torch.bfloat16),
}


def saved_base(name: str, folder: Path) -> nn.Module:
    """The base model of a case, as its folder has it."""
    if (folder / name / PRETRAINED).exists():
        return KANModel.from_pretrained(folder / name / PRETRAINED).eval()
    model = CASES[name].blank()
    model.load_state_dict(load_file(folder / name / BASE))
    return model
