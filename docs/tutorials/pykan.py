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
# # pykan: fit, adapt, look, merge, formula
#
# A [pykan](https://github.com/KindXiaoming/pykan) network is adapted by its own `fit`. Needs
# `pip install -e ".[examples]" pykan pandas` (pykan does not declare what it imports). pykan's formulas need Python
# 3.12 or older: with a newer Python the last cell leaves its formula out.

# %%
import os
import sys
import warnings


os.environ["TQDM_DISABLE"] = "1"  # pykan's bars would fill the page

import torch
from kan import KAN, create_dataset
from peft import get_peft_model

from peft_lotra import LoTRAConfig, find_kan_layers, model_summary
from peft_lotra.plotting import plot_edge_functions


warnings.filterwarnings("ignore", module="kan")
torch.set_num_threads(1)
torch.manual_seed(0)
STEPS = 20


@torch.no_grad()
def loss_of(network, dataset):
    return float((network(dataset["test_input"]) - dataset["test_label"]).square().mean().sqrt())


# %% [markdown]
# ## Fit

# %%
old = create_dataset(lambda x: torch.exp(torch.sin(torch.pi * x[:, [0]]) + x[:, [1]] ** 2) / 3, n_var=2, train_num=300)
new = create_dataset(lambda x: torch.exp(torch.sin(torch.pi * x[:, [0]]) - x[:, [1]] ** 2) / 3, n_var=2, train_num=300)
network = KAN(width=[2, 5, 1], grid=5, k=3, seed=0, auto_save=False)
network.fit(old, opt="LBFGS", steps=STEPS, log=STEPS)
print(f"old task {loss_of(network, old):.4f}, new task {loss_of(network, new):.4f}")
find_kan_layers(network)

# %% [markdown]
# ## Adapt
#
# `get_peft_model` puts the adapter into pykan's own layers, so pykan's `fit` trains it. `update_grid=False`, since a
# grid that moves would change what the adapter means. The last layer is small: lower ranks do.

# %%
model = get_peft_model(network, LoTRAConfig(r=(3, 2, 3), rank_pattern={"act_fun.1": (1, 2, 2)}))
pykan = model.get_base_model()
pykan.fit(new, opt="LBFGS", steps=STEPS, log=STEPS, update_grid=False)
print(f"adapted, new task {loss_of(pykan, new):.4f}")
model_summary(model)

# %% [markdown]
# ## What changed

# %%
plot_edge_functions(model, "act_fun.0")

# %% [markdown]
# ## Merge, and the formula
#
# While adapted, `prune`, `refine` and other calls that rebuild the network raise. After the merge it is pykan's
# network again, and everything works, its symbolic functions too.

# %%
merged = model.merge_and_unload()
print(type(merged).__name__, f"new task {loss_of(merged, new):.4f}")
if sys.version_info < (3, 13):
    merged.fix_symbolic(0, 1, 0, "x^2", verbose=False)
    print("edge (0, 1, 0) is now", merged.symbolic_fun[0].funs_name[0][1])
else:
    print("pykan's formulas need Python 3.12 or older: pykan 0.2.8 assigns local variables by exec")
