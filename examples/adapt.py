# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Attach an adapter to a trained KAN, train it, save, load and merge it.

    python examples/adapt.py  # ten seconds on one core

Writes the adapter to examples/output/adapter.
"""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Adam, Optimizer

from peft_lotra import LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.kan import KAN


def task(x: Tensor, a: float) -> Tensor:
    return ((a * torch.pi * x[:, :1]).sin() + x[:, 1:] ** 2).exp() / 2 - 1


def train(model: nn.Module, optimizer: Optimizer, a: float) -> None:
    for _ in range(500):
        x = torch.rand(256, 2) * 2 - 1
        optimizer.zero_grad()
        mse_loss(model(x), task(x, a)).backward()
        optimizer.step()


torch.set_num_threads(1)  # more threads slow down networks this small
torch.manual_seed(0)
x = torch.rand(2000, 2) * 2 - 1
kan = KAN([2, 16, 16, 1])
train(kan, Adam(kan.parameters(), lr=1e-2), a=1.0)
print(f"base, old task: error {(kan(x) - task(x, 1.0)).std():.3f}")
print(f"base, new task: error {(kan(x) - task(x, 1.3)).std():.3f}")

model = get_peft_model(kan, LoTRAConfig(r=4))  # all KAN layers; base frozen
model.print_trainable_parameters()
start_from_gradient(model, lambda: mse_loss(model(x), task(x, 1.3)))
train(model, create_lotra_optimizer(model, Adam, lr=3e-2), a=1.3)

folder = Path(__file__).parent / "output" / "adapter"
model.save_pretrained(folder)
loaded = PeftModel.from_pretrained(model.unload(), folder)
deployed = loaded.merge_and_unload()  # a plain KAN again
print(f"merged, new task: error {(deployed(x) - task(x, 1.3)).std():.3f}")
