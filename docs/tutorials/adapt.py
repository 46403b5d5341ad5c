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
# # Adapt a KAN in five minutes
#
# Train a KAN on one function, adapt it to another one, and look at the changed edges. Then save, load, and merge the
# adapter. The pictures need `pip install -e ".[examples]"`, run in the clone.

# %%
import copy

import torch
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    find_kan_layers,
    start_from_gradient,
    what_changed,
)
from peft_lotra.kan import KAN
from peft_lotra.plotting import plot_edge_functions


torch.set_num_threads(1)
torch.manual_seed(0)
STEPS = 300  # for each training run


def task(x, scale):  # 1 for the old task, 1.4 for the new one
    return torch.cat(
        [
            torch.sin(scale * torch.pi * x[:, :1]),
            x[:, 1:] ** 2 - scale * x[:, :1],
        ],
        1,
    )


def train(model, optimizer, scale):
    bar = tqdm(range(STEPS), mininterval=2)
    for _ in bar:
        x = torch.rand(256, 2) * 2 - 1
        loss = torch.nn.functional.mse_loss(model(x), task(x, scale))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return f"{loss.item():.1e}"


# %% [markdown]
# ## Train the base
#
# The base is a KAN with 2 inputs, 16 hidden units, and 2 outputs:

# %%
kan = KAN([2, 16, 2])
print(
    "loss on the old task:",
    train(kan, torch.optim.Adam(kan.parameters(), lr=1e-2), scale=1.0),
)
base = copy.deepcopy(kan)  # stands for a base that is loaded from a file
find_kan_layers(kan)

# %% [markdown]
# ## Train an adapter
#
# Attach an adapter, which freezes the base. `r=(4, 2, 4)` sets its ranks for outputs, inputs, and basis functions. A
# rank is at most the size of its mode, as the table below shows. `start_from_gradient` points the adapter along the
# directions of steepest descent of the new task's loss. The outputs do not change yet. Use a learning rate of 1e-2 to
# 3e-2, about a hundred times the usual rate for LoRA.

# %%
model = get_peft_model(kan, LoTRAConfig(r=(4, 2, 4)))
x = torch.rand(256, 2) * 2 - 1
start_from_gradient(
    model, lambda: torch.nn.functional.mse_loss(model(x), task(x, 1.4))
)
optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2)
print("loss on the new task:", train(model, optimizer, scale=1.4))
model.print_trainable_parameters()
find_kan_layers(model)

# %% [markdown]
# The saved file has these 216 parameters, 0.9 kB, and a header of about 1 kB.
#
# ## See what changed
#
# Each edge of a KAN is a function of one input. In the first layer, plot the edges whose changes matter most, before
# and after. The marks at the bottom show where the data lie:

# %%
plot_edge_functions(model, "layers.0", x=x, inputs=["a", "b"])

# %% [markdown]
# Split the change of the outputs into a shift, a linear part, a sum of functions of one input, and a rest that depends
# on inputs acting together. The row of an input shows how much worse the fit becomes without this input. It counts
# linear functions too, so it can exceed `additive`. The rows of the edges begin with the largest effect: the
# contribution of an edge's change to the outputs of the network, a root mean square over the samples and all outputs.
# The share of an edge is its effect squared, divided by the sum over all edges:

# %%
what_changed(model, x, names=["a", "b"])

# %% [markdown]
# ## Save, load, and merge
#
# Save the adapter without the base, and load it onto a copy of the base. Merging turns the adapted network into a plain
# KAN:

# %%
model.save_pretrained("adapter")
model = PeftModel.from_pretrained(base, "adapter")
x = torch.rand(1000, 2) * 2 - 1
adapted = model(x).detach()
deployed = model.merge_and_unload()  # the class of the base again
print(
    type(deployed).__name__,
    "largest difference to the adapted model:",
    (deployed(x) - adapted).abs().max().item(),
)
