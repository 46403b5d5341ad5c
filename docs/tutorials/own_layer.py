# %% [markdown]
# # Your own layer
#
# A KAN layer that no library has: what is found of it without help, a description in five lines, and how to check it.

# %%
import torch
from peft import get_peft_model
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    check_kan_layer,
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
# ## What is found without help
#
# A layer that computes sums of functions of one input each is recognized by what it computes (`generic`).

# %%
find_kan_layers(network)

# %% [markdown]
# ## Describe it
#
# The patterns are einops': which axis of the parameter is out (`o`), in (`i`), basis (`k`).

# %%
register_kan_layer(
    "waves",
    matches=WaveLayer,
    coefficients=("waves", "i o k"),
    residual=("base", "o i"),
)
find_kan_layers(network)

# %% [markdown]
# ## Check it
#
# The description is compared with what the layer computes.

# %%
check_kan_layer(network[0], torch.rand(8, 2))

# %% [markdown]
# ## Adapt it
#
# Others load the adapter without your registration: files hold the description.

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
