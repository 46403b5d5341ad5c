# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Adapt in five minutes
#
# A KAN knows one function. We adapt it to another one, look at what changed, save the change, load it, and merge it.
# Needs `pip install -e ".[examples]"` for the pictures.

# %%
import copy

import torch
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    find_kan_layers,
    model_summary,
    start_from_gradient,
    what_changed,
)
from peft_lotra.kan import KAN
from peft_lotra.plotting import (
    edge_changes,
    plot_edge_functions,
    plot_network_change,
)


torch.set_num_threads(1)
torch.manual_seed(0)
STEPS = 300  # of each training


def task(x, a):
    return torch.cat(
        [torch.sin(a * torch.pi * x[:, :1]), x[:, 1:] ** 2 - a * x[:, :1]], 1
    )


def train(model, optimizer, a):
    bar = tqdm(range(STEPS), mininterval=2)
    for _ in bar:
        x = torch.rand(256, 2) * 2 - 1
        loss = torch.nn.functional.mse_loss(model(x), task(x, a))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return f"{loss.item():.1e}"


# %% [markdown]
# ## The base

# %%
kan = KAN([2, 16, 2])
print(
    "loss on the old task:",
    train(kan, torch.optim.Adam(kan.parameters(), lr=1e-2), a=1.0),
)
base = copy.deepcopy(kan)  # what a later session starts from
find_kan_layers(kan)

# %% [markdown]
# ## The adapter
#
# The base is frozen. Only core and factors are trained, at 3e-2, where LoRA would have 2e-4. They start in the
# directions that the gradient of the new task has, from a few hundred samples; the model still equals its base.

# %%
model = get_peft_model(kan, LoTRAConfig(r=(4, 2, 4)))
x = torch.rand(256, 2) * 2 - 1
start_from_gradient(
    model, lambda: torch.nn.functional.mse_loss(model(x), task(x, 1.4))
)
optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2)
print("loss on the new task:", train(model, optimizer, a=1.4))
model_summary(model)

# %% [markdown]
# The edge functions whose change has the largest effect, before and after. The marks at the bottom are the inputs:

# %%
plot_edge_functions(model, "layers.0", x=x, inputs=["a", "b"])

# %% [markdown]
# The network as a whole, each edge in the color of what its change adds to the output:

# %%
plot_network_change(model, x, inputs=["a", "b"], outputs=["u", "v"])

# %% [markdown]
# The same as a list, the largest effect first:

# %%
edge_changes(model, x)

# %% [markdown]
# How much of the change is a shift, a linear function, or a sum of functions of one input:

# %%
what_changed(model, x, names=["a", "b"])

# %% [markdown]
# ## Save, load, merge

# %%
model.save_pretrained("adapter")
model = PeftModel.from_pretrained(base, "adapter")
x = torch.rand(1000, 2) * 2 - 1
adapted = model(x).detach()
deployed = model.merge_and_unload()  # a plain KAN, with no trace of the adapter
print(
    type(deployed).__name__,
    "largest difference to the adapted model:",
    (deployed(x) - adapted).abs().max().item(),
)
