# %% [markdown]
# # pykan: adapt to a second data set
#
# A [pykan](https://github.com/KindXiaoming/pykan) network fits one data set. An adapter fits a second one, and
# pictures show which edges changed. Needs `pip install -e ".[examples]" pykan pandas` (pykan does not declare what it
# imports). The code down to *Further* is one script, which runs for half a
# minute.
#
# ## Fit
#
# A data set is a dict of `train_input`, `train_label`, `test_input` and `test_label`. `fit` and `evaluate` are those
# of pykan.

# %%
import torch
from kan import KAN, create_dataset
from peft import get_peft_model

from peft_lotra import LoTRAConfig, what_changed
from peft_lotra.plotting import (
    edge_changes,
    plot_edge_functions,
    plot_network_change,
)


torch.set_num_threads(1)  # small networks: much faster on a busy machine


def data(sign):
    def formula(x):
        a, b = x[:, [0]], x[:, [1]]
        return torch.exp(torch.sin(torch.pi * a) + sign * b**2) / 3

    return create_dataset(formula, train_num=300)


old, new = data(1), data(-1)
kan = KAN(width=[2, 5, 1], grid=5, auto_save=False)
kan.fit(old, steps=20)
print("old data:", kan.evaluate(old)["test_loss"])
print("new data, before adapting:", kan.evaluate(new)["test_loss"])

# %% [markdown]
# ## Adapt
#
# The adapter goes into pykan's layers, so `fit` trains it. `update_grid=False` is needed: a grid that moves would
# change what the adapter means. The last layer has one output, so lower ranks do. The base is kept, and serves both
# data sets; where it need not be, training all parameters ends lower (about 0.001 in these 20 steps). After pykan's
# `prune()`, for which `auto_save=False` is left out, the default rank of the basis may be 1: pass a higher one.

# %%
config = LoTRAConfig(r=(3, 2, 3), rank_pattern={"act_fun.1": (1, 2, 2)})
model = get_peft_model(kan, config)
model.fit(new, steps=20, update_grid=False)
print("new data, adapted:", model.evaluate(new)["test_loss"])

# %% [markdown]
# ## What changed
#
# For each input of the first layer, the edge function whose change has the largest effect, before and after. The
# functions are drawn where there are data, which the marks at the bottom show:

# %%
x = new["train_input"]
edges = plot_edge_functions(model, "act_fun.0", x=x, inputs=["a", "b"])
edges.savefig("edges.png")
edges

# %% [markdown]
# Each edge in the color of what its change adds to the output of the network, and the same as a list. A change by a
# constant is told apart: it is the *shift*.

# %%
network = plot_network_change(model, x, inputs=["a", "b"], outputs=["y"])
network.savefig("network.png")
print(edge_changes(model, x))
network

# %% [markdown]
# How much of the change of the outputs is a shift, a linear function, or a sum of functions of one input:

# %%
what_changed(model, x, names=["a", "b"])

# %% [markdown]
# ## Further: what is adapted
#
# The layers of the network that are recognized, and what the adapter has in each.

# %%
from peft_lotra import find_kan_layers, model_summary


find_kan_layers(model)

# %%
model_summary(model)

# %% [markdown]
# ## Further: merge, and the formula
#
# While adapted, `prune`, `refine` and other calls that rebuild the network raise. After the merge it is pykan's
# network again, and everything works, its symbolic functions too. pykan's formulas need Python 3.12 or older: with a
# newer Python this cell leaves its formula out.

# %%
import sys


merged = model.merge_and_unload()
print(type(merged).__name__, "on new data:", merged.evaluate(new)["test_loss"])
if sys.version_info < (3, 13):
    merged.fix_symbolic(0, 1, 0, "x^2", verbose=False)
    print("edge (0, 1, 0) is now", merged.symbolic_fun[0].funs_name[0][1])
else:
    print("pykan's formulas need Python 3.12 or older")
