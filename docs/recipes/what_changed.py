# %% [markdown]
# # Write what changed as a formula
#
# New data have changed your network. This recipe shows which edges changed and which
# inputs act together. Then it looks for a formula of the change.
# You need `pip install -e ".[examples]" sympy`, and for the last example `pykan pandas`.
#
# ## See what changed
#
# A KAN learns `sin(pi x0) + x1^2`. In the new data, the sine has grown by 30 %, and a
# product of the inputs is added:

# %%
import numpy as np
import torch
from peft import get_peft_model

from peft_lotra import LoTRAConfig, what_changed
from peft_lotra.kan import KAN
from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.plotting import plot_edge_functions


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


def train(model, x, y):
    terms = [(lambda model, x, y: model(x) - y, (x, y))]
    LevenbergMarquardt(model).fit(terms, 60, tolerance=1e-4, progress=False)


x = torch.rand(1000, 2) * 2 - 1
sine, square = torch.sin(torch.pi * x[:, :1]), x[:, 1:] ** 2
kan = KAN([2, 5, 1])
train(kan, x, sine + square)
y = 1.3 * sine + square + 0.4 * x[:, :1] * x[:, 1:]
change = (y - kan(x)).detach().numpy()[:, 0]  # before `kan` gets its adapter
model = get_peft_model(kan, LoTRAConfig(r=(5, 2, 4)))
train(model, x, y)
print(what_changed(model, x))
plot_edge_functions(model, "layers.0", x=x, inputs=["$x_0$", "$x_1$"])

# %% [markdown]
# `what_changed` divides the change into parts. The row of an input shows how much worse
# the fit becomes without this input. Here, 30 % of the change is not a sum of functions
# of single inputs: inputs 0 and 1 act together.
#
# The rows of the edges, and the picture, show the edges with the largest effect. They
# describe what the trained adapter did. The changes of several edges can cancel: here, the first
# edge has an effect of 0.359, but the whole change has a root mean square of 0.243.
# Edges can have large shares even if the change does not depend on their input. Here,
# input 1 matters only in the product (30 %). Yet its edges have the larger shares in
# the first layer.
#
# To ask which inputs matter, use `what_changed(model, x, targets)`. It compares the new
# data with the base, whatever the adapter did.
#
# ## Find a formula for the change
#
# `change` is the difference between the new data and the base, so you need no adapter
# here. Copy [find_formula.py](../../docs/recipes/find_formula.py) next to your script. Its
# function `find_formula` finds a sum of these terms:
#
# * at most one term $a\,g(x_i)$ for each input, with $g$ from a library,
# * products of two inputs,
# * a constant.
#
# It works in four steps:
#
# 1. Each $g$ has up to two constants, as in $\sin(b (x - c))$. Try values of both, and
#    refine the best two pairs.
# 2. For each pair, fit the multipliers $a$ by least squares. Until the functions of
#    the other terms are chosen, use polynomials for them.
# 3. Choose the function with the best BIC (Bayesian information criterion). Treat a
#    misfit below 1 % as 1 %. Use twice the usual penalty for each constant, since the
#    errors of the base are no independent noise.
# 4. Drop terms below 1 % of the change. Skip terms that one row dominates, such as
#    $1/(x - c)$ with $c$ close to that row.
#
# It refuses a formula with a misfit above 5 %. It also refuses a formula if polynomials
# fit the change clearly better, by more than 0.7 %. Numbers are printed with three digits,
# and constants that do not matter are left out.

# %%
from find_formula import find_formula


print(find_formula(x.numpy(), change))

# %% [markdown]
# ## Find the formula of a saved adapter
#
# The file is also a script. It needs the base, the adapter, and a CSV file with the names
# of the inputs in its first line:

# %%
import subprocess
import sys

import find_formula as script


model.save_pretrained("adapter")
model.unload().save_pretrained("kan")
np.savetxt("x.csv", x, delimiter=",", header="angle,load", comments="")
command = [sys.executable, script.__file__, "kan", "adapter", "x.csv"]
print(subprocess.run(command, capture_output=True, text=True).stdout)

# %% [markdown]
# In a shell, this is `python find_formula.py kan adapter x.csv`. For a base that is no
# `peft_lotra.kan.KAN`, write a function that returns it, say `build` in my_networks.py, and
# pass `my_networks:build` instead of `kan`. For pykan, it may return `KAN.loadckpt("kan")`,
# after `kan.saveckpt("kan")` has saved the base before it was adapted.
#
# A formula is only as accurate as the adapter. If the script refuses, train the adapter for
# more steps, or call `find_formula` with the new data minus the base, as above.
#
# ## Find a change inside of the network
#
# Let a network have two layers, a single hidden unit and one output: $y = h(u(x))$.
# Sensor $x_2$ drifts by $d$: $y = h(u(x) + d(x_2))$. At the output, this change has no
# simple formula. `find_inside` finds $d$:
#
# 1. An adapter of the first layer learns $u + d$ roughly.
# 2. Let $f$ be the present estimate of $d$. The difference $y - h(u + f)$ is about
#    $h'\,(d - f)$. Fit a better formula $f$ from this. Two such (Gauss-Newton) steps
#    suffice.


# %%
from find_formula import find_inside


x = torch.rand(1000, 3) * 2 - 1
u = (torch.sin(2 * x[:, :1]) + x[:, 1:2] ** 2 + x[:, 2:]) / 2
kan = KAN([3, 1, 1], grid_size=24, grid_range=(-3, 3))  # room for u + d
train(kan, x, torch.exp(u))
y = torch.exp(u + 0.2 * torch.tanh(3 * x[:, 2:]))
print("output:", find_formula(x.numpy(), *(y - kan(x)).detach().T.numpy()))
print("u:", find_formula(x.numpy(), *kan.layers[0](x).detach().T.numpy()))
print("d:", find_inside(kan, x, y))

# %% [markdown]
# The hidden unit has its own scale. In the data, $x_2$ has the factor 0.5; in the
# network, it has 0.768. So the factor of tanh is 0.307 × 0.5 / 0.768 = 0.2, as planted.
#
# ## Real data
#
# The perimeter of a cell follows from its radius, compactness and smoothness. A base
# learns this from one half of scikit-learn's breast cancer data. In the other half, we
# let the gauge of the perimeter drift with the radius, by 0.5 tanh(3 radius):

# %%
from sklearn.datasets import load_breast_cancer


names = ["radius", "compactness", "smoothness", "perimeter"]
cells = load_breast_cancer(as_frame=True).data
cells = np.log(cells[[f"mean {name}" for name in names]].to_numpy())
cells = torch.tensor(2 * (cells - cells.min(0)) / np.ptp(cells, 0) - 1)
old, new = cells[::2], cells[1::2]
kan = KAN([3, 1], grid_size=2)
train(kan, old[:, :3], old[:, 3:])

x = new[:, :3]
y = new[:, 3:] + 0.5 * torch.tanh(3 * x[:, :1])
print(what_changed(kan, x, y, names[:3]))
print(find_formula(x.numpy(), *(y - kan(x)).detach().T.numpy()))
model = get_peft_model(kan, LoTRAConfig(r=(1, 2, 4)))
train(model, x, y)
for edge in what_changed(model, x).edges:
    print(f"{names[edge.input]}: effect {edge.effect:.3g}")

# %% [markdown]
# The radius is found, and the formula too. The first table says only 66 %, because the
# inputs are correlated: functions of the others can replace a part. The misfit is the
# noise of the measurements. Without the drift, the recipe finds nothing:

# %%
with model.disable_adapter():
    print(find_formula(x.numpy(), *(new[:, 3:] - kan(x)).detach().T.numpy()))

# %% [markdown]
# ## A pykan network
#
# These are the data of [the pykan page](../tutorials/pykan.md): $e^{\sin(\pi a) + b^2} / 3$ changes to
# $e^{\sin(\pi a) - b^2} / 3$. This change is no sum of terms, so the recipe refuses it. The change of the logarithm is
# a single term. Try the logarithm if your outputs are positive:

# %%
import kan as pykan


torch.set_default_dtype(torch.float32)


def data(sign):
    def formula(x):
        return (
            torch.exp(torch.sin(torch.pi * x[:, :1]) + sign * x[:, 1:] ** 2) / 3
        )

    return pykan.create_dataset(formula, train_num=300)


old, new = data(1), data(-1)
network = pykan.KAN(width=[2, 5, 1], grid=5, auto_save=False)
network.fit(old, steps=20)
x, y = new["train_input"], new["train_label"]
before = network(x).detach().clamp(min=0.01)
for name, change in (
    ("output", y - before),
    ("logarithm", torch.log(y / before)),
):
    formula = find_formula(x.double().numpy(), *change.double().T.numpy())
    print(f"{name}: {formula}")

# %% [markdown]
# ## How often the recipe succeeds
#
# In [a study](../../examples/studies/results/formulas.md), the recipe finds 100 of 100
# planted changes at the output, and 99 of 100 inside. It refuses the other one, and all
# 150 changes without a formula. On the cells above, it finds 47 of 50 planted functions,
# seven with a constant that is off by more than 2 %. It refuses two, and takes one square
# root for a logarithm.
