# %% [markdown]
# # Adapt your own layer
#
# You wrote a KAN layer that no library has. See whether it is recognized, describe it in one call, and adapt it.
# In a script instead of a notebook, put `print(...)` around the calls whose result is shown.

# %%
import torch
from peft import get_peft_model
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    find_kan_layers,
    register_kan_layer,
)


torch.set_num_threads(1)
torch.manual_seed(0)


class WaveLayer(nn.Module):
    """The sum of waves[i, o, k] cos(k x[i]) and base[o, i] silu(x[i])."""

    def __init__(self, inputs, outputs, waves=6):
        super().__init__()
        waves = torch.randn(inputs, outputs, waves) / (inputs * waves) ** 0.5
        self.waves = nn.Parameter(waves)
        self.base = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x):
        waves = torch.arange(1, self.waves.shape[-1] + 1)
        basis = torch.cos(x[..., None] * waves)
        y = torch.einsum("bik,iok->bo", basis, self.waves)
        return y + nn.functional.silu(x) @ self.base.T


network = nn.Sequential(WaveLayer(2, 16), WaveLayer(16, 3))

# %% [markdown]
# ## Is it recognized?
#
# Usually yes. A layer that computes a sum of functions of one input each is recognized as `generic`:

# %%
find_kan_layers(network)

# %% [markdown]
# ## Describe it
#
# A description gives your layer a name. With `basis` and `activation`, which we leave out here, it can also
# [make the layer faster](../kans.md#add-your-own-layer). Name each parameter and its axes, as in einops: outputs (`o`),
# inputs (`i`), basis functions (`k`). `residual` names the weight of the [base branch](../glossary.md#base-branch), here
# the weight that multiplies silu(x).

# %%
register_kan_layer(
    "waves",
    matches=WaveLayer,
    coefficients=("waves", "i o k"),
    residual=("base", "o i"),
)
find_kan_layers(network)

# %% [markdown]
# ## Adapt it
#
# `get_peft_model` compares the description with the gradients of the layer, and raises an error if they show another
# order of the axes. The saved file contains the description. Others need your layer class, but not your
# `register_kan_layer` call.

# %%
x = torch.rand(256, 2) * 2 - 1
y = torch.cat([torch.sin(4 * x[:, :1]) * x[:, 1:], x[:, :1], x[:, 1:] ** 2], 1)
model = get_peft_model(network, LoTRAConfig(r=4))
optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
for step in range(201):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss:.4f}")
model.save_pretrained("waves")
