# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A trained KAN learns a changed task by an adapter of a few kilobytes.

Attach, train, save, load, merge.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import mse_loss
from torch.optim import Adam, Optimizer

from peft_lotra import LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.kan import KAN


def task(x: torch.Tensor, a: float) -> torch.Tensor:
    return ((a * torch.pi * x[:, :1]).sin() + x[:, 1:] ** 2).exp() / 2 - 1


def train(model: torch.nn.Module, optimizer: Optimizer, a: float) -> None:
    for _ in range(500):
        x = torch.rand(256, 2) * 2 - 1
        optimizer.zero_grad()
        mse_loss(model(x), task(x, a)).backward()
        optimizer.step()


NOTES = """Needs nothing beside the package; takes ten seconds on one core;
writes the adapter to --output."""
parser = argparse.ArgumentParser(
    usage=argparse.SUPPRESS, description=__doc__, epilog=NOTES
)
folder = Path(__file__).parent / "output" / "adapter"
parser.add_argument("--output", type=Path, default=folder)
output = parser.parse_args().output
try:
    output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output).close()
except OSError as error:
    parser.error(f"--output {output}: {error.strerror}")
torch.set_num_threads(1)  # more threads slow down networks this small
torch.manual_seed(0)
x = torch.rand(2000, 2) * 2 - 1
kan = KAN([2, 16, 16, 1])
train(kan, Adam(kan.parameters(), lr=1e-2), a=1.0)
print(
    f"base, old task {(kan(x) - task(x, 1.0)).std():.3f}, "
    f"new task {(kan(x) - task(x, 1.3)).std():.3f}"
)
# all KAN layers get an adapter; the base is frozen
model = get_peft_model(kan, LoTRAConfig(r=4))
model.print_trainable_parameters()
start_from_gradient(model, lambda: mse_loss(model(x), task(x, 1.3)))
train(model, create_lotra_optimizer(model, Adam, lr=3e-2), a=1.3)
model.save_pretrained(output)
loaded = PeftModel.from_pretrained(model.unload(), output)
deployed = loaded.merge_and_unload()  # a plain KAN again
print(
    f"adapted and merged, new task {(deployed(x) - task(x, 1.3)).std():.3f}; "
    f"the adapter is in {output}"
)
