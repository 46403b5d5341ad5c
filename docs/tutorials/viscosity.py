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
# # A viscosity from noisy data
#
# Burgers' equation, `u_t + u u_x = v u_xx`, makes a front of a sine wave; the viscosity `v` decides how steep it gets.
# We measure `u` at 200 places, with noise, and look for `v`. A family of adapters holds the solutions for all `v` from
# 0.03 to 0.15. It is fitted once, and finds the viscosity of any data in milliseconds, with a standard error. The code
# down to *Further* is one script, which runs for half a minute.
#
# ## The family
#
# `solution_of` gives the initial and boundary values, which are then exact: `u = -sin(pi x)` at `t = 0`, and 0 at both
# ends. It gets the viscosity, too, for problems where they depend on it. The base is trained at `v = 0.07`.

# %%
import numpy as np
import torch

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN, jet
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.pde import HardConstraint


torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


def start(x):
    return -torch.sin(torch.pi * x[:, :1])


def distance(x):
    return x[:, 1:] * (1 - x[:, :1] ** 2)


def solution_of(network, v):
    return HardConstraint(network, distance, lift=start)


def equation(u, x, v):
    value, (u_x, u_t), (u_xx, _) = jet(u, x)
    return u_t + value * u_x - v * u_xx


draw = torch.quasirandom.SobolEngine(2, scramble=True, seed=0)
points = draw.draw(1200, dtype=torch.float64)
points = torch.stack([2 * points[:, 0] - 1, points[:, 1]], dim=1)


def terms_of(v):
    return [(equation, (points, torch.full_like(points[:, :1], v)))]


base = KAN([2, 8, 8, 1], 8)
trained = LevenbergMarquardt(solution_of(base, 0.07))
trained.fit(terms_of(0.07), steps=40, progress=False)

family = ParametricAdapter(base, terms_of, solution_of=solution_of, log=True)
members = np.geomspace(0.03, 0.15, 7).tolist()
print(family.fit(members, progress=False))

# %% [markdown]
# ## The data
#
# Burgers' equation has an exact solution (Cole and Hopf), which we measure at `v = 0.05`, with errors of 0.05.


# %%
def exact(x, v):
    nodes, weights = np.polynomial.hermite.hermgauss(80)
    t = x[:, 1:].clamp(min=1e-9)
    y = np.pi * (x[:, :1] - torch.sqrt(4 * v * t) * torch.from_numpy(nodes))
    density = torch.exp(-torch.cos(y) / (2 * np.pi * v))
    density = density * torch.from_numpy(weights)
    return -(density * torch.sin(y)).sum(1, keepdim=True) / density.sum(
        1, keepdim=True
    )


truth = 0.05
x = torch.rand(200, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
u = exact(x, truth) + 0.05 * torch.randn(200, 1)

# %% [markdown]
# ## The viscosity
#
# `calibrate` takes the differences from the data as a function of the solution, and minimizes their squares over the
# parameter. The error is the standard error at the optimum (Laplace's approximation): 95 of 100 times the truth lies
# within twice the error.

# %%
found = family.calibrate(lambda model: model(x) - u)
print(f"v = {found.parameter:.4f} +- {found.error:.4f}")
print(f"noise {found.noise:.3f}")

# %% [markdown]
# ## Further: data, field and posterior
#
# The pictures need `pip install -e ".[examples]"`. The posterior of `v` by the data alone is drawn from the losses of
# 61 predictions, beside the normal distribution that `calibrate` returns.

# %%
import matplotlib.pyplot as plt


line, times = torch.linspace(-1, 1, 101), torch.linspace(0, 1, 51)
grid = torch.cartesian_prod(line, times)
with torch.no_grad():
    field = found.prediction(grid).view(101, 51).T
    spread = np.linspace(-4, 4, 61)
    values = found.parameter + found.error * spread
    losses = [(family.predict(v)(x) - u).square().sum().item() for v in values]
posterior = np.exp((min(losses) - np.array(losses)) / (2 * found.noise**2))

figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for axis in axes[:2]:
    axis.set(xlabel="x", ylabel="t")
colors = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}
dots = axes[0].scatter(x[:, 0], x[:, 1], c=u[:, 0], s=12, **colors)
axes[0].set(title="data", xlim=(-1, 1), ylim=(0, 1))
axes[1].imshow(
    field, extent=(-1, 1, 0, 1), origin="lower", aspect="auto", **colors
)
axes[1].set(title=f"field at v = {found.parameter:.4f}")
figure.colorbar(dots, ax=axes[1])
axes[2].plot(values, posterior, label="posterior")
axes[2].plot(values, np.exp(-(spread**2) / 2), "--", label="calibrate")
axes[2].axvline(truth, color="black", lw=1, label="truth")
axes[2].set(title="viscosity", xlabel="v", yticks=[])
axes[2].legend()

# %% [markdown]
# ## Further: does it hold?
#
# 40 draws of other noise: about 38 of the intervals must cover the truth.

# %%
covered = 0
for _ in range(40):
    data = exact(x, truth) + 0.05 * torch.randn(200, 1)
    one = family.calibrate(lambda model: model(x) - data)
    covered += abs(one.parameter - truth) < 1.96 * one.error
print(f"{covered} of 40 intervals cover the truth")

# %% [markdown]
# [Families of adapters](../parametric.md) says how members are chosen, and how far predictions are off.
