# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Describe a KAN layer of your own, and adapt it.

python examples/own_kind.py  # ten seconds; writes nothing
"""

import torch
from peft import get_peft_model
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    find_kan_layers,
    register_kan_layer,
)


class WaveLayer(nn.Module):
    """y[o] = sum_ik waves[i, o, k] cos(k x[i]) + sum_i base[o, i] silu(x[i])"""

    def __init__(self, inputs: int, outputs: int, waves: int = 6) -> None:
        super().__init__()
        start = torch.randn(inputs, outputs, waves) / (inputs * waves) ** 0.5
        self.waves = nn.Parameter(start)
        self.base = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = torch.arange(1, self.waves.shape[-1] + 1)
        y = torch.einsum("bik,iok->bo", torch.cos(x[..., None] * k), self.waves)
        return y + nn.functional.silu(x) @ self.base.T


register_kan_layer(
    "waves",
    matches=WaveLayer,
    coefficients=("waves", "i o k"),
    residual=("base", "o i"),
)
torch.set_num_threads(1)  # more threads slow down networks this small
torch.manual_seed(0)
network = nn.Sequential(WaveLayer(2, 16), WaveLayer(16, 1))
print(find_kan_layers(network))

x = torch.rand(512, 2) * 2 - 1
y = torch.sin(4 * x[:, :1]) * x[:, 1:]
# compares the description with what the layer computes
model = get_peft_model(network, LoTRAConfig(r=4))
optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
for step in range(301):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.4f}")
