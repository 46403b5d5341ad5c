# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A network with batch norms, inside of its KAN layers and between them."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from stand_ins import FastKANLayer
from torch import nn

from peft_lotra import LoTRAConfig


X = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) * 3


class NormedLayer(FastKANLayer):
    """A KAN layer with a batch norm inside, as Wav-KAN's."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.bn = nn.BatchNorm1d(out_features)

    def forward(self, x):
        return self.bn(super().forward(x))


def make(norm=nn.BatchNorm1d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(NormedLayer(3, 4), norm(4), NormedLayer(4, 2))


def adapt(model=None, adapter_name="default", **config) -> PeftModel:
    config = {"r": 2, "init_weights": False, **config}
    return get_peft_model(model or make(), LoTRAConfig(**config), adapter_name=adapter_name)
