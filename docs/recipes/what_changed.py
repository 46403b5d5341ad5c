# %% [markdown]
# # What changed in a pykan network
#
# pykan reads a formula off a trained network. We adapt a network to new data, and compare the formulas before and after
# with what the adapter says of its edges. Needs `pip install -e ".[examples]" pykan pandas`, and Python 3.12 or older
# for pykan's formulas.
#
# ## Before
#
# The old data are $\sin(\pi a) + b^2 + c$. `auto_symbolic` chooses a function for each edge and replaces the splines, so
# it gets a copy. `copy.deepcopy` refuses a pykan network that was run: make a new one, and load the weights.

# %%
import sympy
import torch
from kan import KAN, create_dataset, ex_round
from peft import get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.plotting import edge_changes, plot_network_change


torch.set_num_threads(1)  # small networks: much faster on a busy machine


def data(b_factor):
    def formula(x):
        a, b, c = x.split(1, dim=1)
        return torch.sin(torch.pi * a) + b_factor * b**2 + c

    return create_dataset(formula, n_var=3, train_num=300)


def network():
    return KAN(width=[3, 1], grid=5, auto_save=False)


def formula(kan, data):
    other = network()
    other.load_state_dict(kan.state_dict())
    other(data["train_input"])  # the values that the functions are chosen by
    other.auto_symbolic(lib=["sin", "x", "x^2"], verbose=0, weight_simple=0)
    (found,), _ = other.symbolic_formula(var=["a", "b", "c"])
    return ex_round(sympy.expand(found), 2)


old, new = data(1), data(-0.5)
kan = network()
kan.fit(old, steps=20)
print("error on the old data:", kan.evaluate(old)["test_loss"])
print("formula:", formula(kan, old))

# %% [markdown]
# ## After
#
# In the new data $b^2$ has the factor -0.5. This network is so small that the adapter is larger than what it adapts,
# which a warning says; here training all parameters would do as well. A wide network is adapted in the same lines.

# %%
model = get_peft_model(kan, LoTRAConfig(r=(1, 2, 4)))
model.fit(new, steps=20, update_grid=False)
print("error on the new data:", model.evaluate(new)["test_loss"])

# %% [markdown]
# The adapter knows which edges moved; a shift by a constant counts, too:

# %%
print(edge_changes(model))

# %% [markdown]
# The same as a picture, with names at the nodes. The nodes of a column lie at heights from 1 down to 0, and the columns
# at 0, 1, ...

# %%
figure = plot_network_change(model)
for name, height in zip("abc", (1, 0.5, 0), strict=True):
    figure.axes[0].text(-0.04, height, name, ha="right", va="center")
figure.axes[0].text(1.04, 0.5, "output", va="center")
figure

# %% [markdown]
# And the formula, of the merged network:

# %%
merged = model.merge_and_unload()
print("formula:", formula(merged, new))

# %% [markdown]
# [pykan: adapt to a second data set](../tutorials/pykan.md) has a deeper network, and its edge functions as curves.
