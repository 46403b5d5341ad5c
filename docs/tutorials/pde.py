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
# # A PDE from zero
#
# `-laplacian(u) + u^3 = f` on a square, values on the rim. A KAN solves it, an adapter brings it to another `f`.
# Needs `pip install -e ".[examples]"` for the pictures.

# %%
import math

import matplotlib.pyplot as plt
import torch
from peft import get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, jet
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.plotting import plot_history


torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # Levenberg-Marquardt computes in float64 anyway
STEPS, POINTS = 25, 1500

# %% [markdown]
# ## Residuals
#
# `jet` gives the value, the gradient and the Laplacian in one forward pass. A residual is a function of the model and
# of rows of data. We know the solution, so we can measure the error. Points inside are drawn anew whenever `terms` is
# called, which is before each step: points that stay can be fitted by a network that is wrong between them.


# %%
def solution(x, a):
    return torch.sin(math.pi * x[:, :1]) * torch.sin(a * math.pi * x[:, 1:])


def equation(model, x, f):
    u, _, laplacian = jet(model, x, collapse=True)
    return -laplacian + u**3 - f


def boundary(model, x, u):
    return model(x) - u


rim = torch.rand(400, 2) * 2 - 1
rim[torch.arange(400), torch.arange(400) % 2] = torch.rand(400).round() * 2 - 1


def terms(a):
    inside = torch.rand(POINTS, 2) * 2 - 1
    u = solution(inside, a)
    f = math.pi**2 * (1 + a**2) * u + u**3
    return [(equation, (inside, f), 1.0), (boundary, (rim, solution(rim, a)), 1000.0)]  # the rim must weigh more


def error(model, a):
    x = torch.rand(2000, 2) * 2 - 1
    return ((model(x) - solution(x, a)).norm() / solution(x, a).norm()).item()


# %% [markdown]
# ## The base

# %%
kan = KAN([2, 16, 16, 1])
history = LevenbergMarquardt(kan).fit(lambda step: terms(1.0), steps=STEPS)
print(f"relative error {error(kan, 1.0):.1e}; for the other f, before adapting, {error(kan, 1.2):.1e}")

# %% [markdown]
# ## A new parameter
#
# The same residuals, another `f`; the optimizer trains what requires a gradient, which is the adapter.

# %%
model = get_peft_model(kan, LoTRAConfig(r=(8, 8, 6), rank_pattern={"layers.2": (1, 4, 6)}))
model.print_trainable_parameters()
history = LevenbergMarquardt(model).fit(lambda step: terms(1.2), steps=STEPS)
print(f"relative error {error(model, 1.2):.1e}")

# %%
plot_history(history, ["equation", "rim"])

# %% [markdown]
# ## Where the error is

# %%
line = torch.linspace(-1, 1, 81)
grid = torch.cartesian_prod(line, line)
with torch.no_grad():
    fields = {"solution": solution(grid, 1.2), "adapted": model(grid)}
fields["error"] = fields["adapted"] - fields["solution"]
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axis, (name, values) in zip(axes, fields.items(), strict=True):
    picture = axis.imshow(values.view(81, 81).T, extent=(-1, 1, -1, 1), origin="lower", cmap="RdBu_r")
    axis.set(title=name, xlabel="x", ylabel="y")
    figure.colorbar(picture, ax=axis, shrink=0.7)
