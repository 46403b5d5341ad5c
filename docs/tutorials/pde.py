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
# # Solve a PDE from scratch
#
# Solve a PDE with a KAN, then adapt the solution to another value of the parameter `v`. The equation is
# `u_t = v u_xx - u^3 + f` for `x` in [-1, 1] and `t` in [0, 2]. `u` is 0 at both ends of `x`, and `sin(pi x)` at the
# start.
#
# We choose `f = s^3` with `s = exp(-v pi^2 t) sin(pi x)`. Then `s` is the exact solution, and we can measure the error.
# The code writes `f` as `solution(x, v) ** 3`. The base solves the equation for `v = 0.1`, and the adapter for
# `v = 0.15`.
#
# You need only the [package](../index.md), which also installs PyTorch and PEFT. The code up to the sections called
# *Further* runs for a minute.
#
# ## State the problem
#
# `solve` needs two things: the residual of the equation, and the conditions. It writes the solution as
# `lift + distance * network`. Where `distance` is zero, the solution equals `lift` exactly.
# [`jet`](../glossary.md#jet) computes the value, the first and the second derivatives in one forward pass. Here
# `du[1]` is the first derivative along the second input, `t`, and `d2u[0]` the second derivative along the first, `x`.

# %%
import torch
from peft import get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, jet
from peft_lotra.pde import BoxDistance, box_points, solve


torch.set_num_threads(1)
low, high = (-1, 0), (1, 2)
# zero at both ends of x (input 0), and at the start of t (input 1)
distance = BoxDistance(low, high, sides=[(0, "low"), (0, "high"), (1, "low")])


def start(x):
    return torch.sin(torch.pi * x[:, :1])


def solution(x, v):
    return torch.exp(-v * torch.pi**2 * x[:, 1:]) * start(x)


def solved(v, steps, **options):
    def equation(model, x):
        u, du, d2u = jet(model, x)
        return du[1] - v * d2u[0] + u**3 - solution(x, v) ** 3

    return solve(
        equation,
        low,
        high,
        distance=distance,
        lift=start,
        steps=steps,
        **options,
    )


def error(model, v):
    x = box_points(low, high, 2000)
    return ((model(x) - solution(x, v)).norm() / solution(x, v).norm()).item()


# %% [markdown]
# ## Solve it for v = 0.1
#
# Without `network`, `solve` builds one: a layer of splines, followed by tanh layers. We pass a KAN, because an adapter
# can change only KAN layers. Splines of order 5 have smooth second derivatives, and `norm="tanh"` keeps the inputs of
# each layer on its grid. Without `steps`, `solve` trains for a minute.

# %%
torch.manual_seed(0)
kan = KAN([2, 8, 8, 1], grid_size=8, spline_order=5, norm="tanh")
base = solved(0.1, steps=25, network=kan)
print(base)
print(f"v = 0.1: relative error {error(base.model, 0.1):.1e}")
print(f"v = 0.15, before adapting: {error(base.model, 0.15):.1e}")

# %% [markdown]
# `solve` trains on new points in each step. The last line of the report gives the root mean square of the residual at
# points that were never used in training. If you do not know the solution, this residual is your guide, but [a small
# residual does not prove a small error](../pde.md#what-to-do-about-warnings).
#
# In the phase `coarse`, the splines have 8 intervals, as we asked. Then `solve` doubles the number of intervals, and in
# the phase `fine`, the network has 1,936 parameters. `loss` is the mean square of the residual at the last training
# points, and `held out` at points that were never used in training. `parameter` is empty without a
# [continuation](../pde.md#set-the-options). [PDEs](../pde.md#solve-one-equation) explains `ended by` and `network`.
#
# ## Adapt it to v = 0.15
#
# Train an adapter if you want to store many solutions. For a single new value, a [warm
# start](../pde.md#move-to-another-parameter-value) of all parameters is more accurate.
#
# Attach an adapter to the network `base.model.kan`; `base.model` also holds the conditions. `solve` trains only the
# parameters that require a gradient, here the adapter, and leaves the grids of an adapted network as they are. A rank
# larger than its mode, such as 4 for the one output of the last layer, is lowered to the size of the mode.

# %%
config = LoTRAConfig(r=(4, 4, 8))
network = get_peft_model(base.model.kan, config)
network.print_trainable_parameters()
adapted = solved(0.15, steps=25, network=network)
print(f"v = 0.15, adapted: relative error {error(adapted.model, 0.15):.1e}")

# %% [markdown]
# The adapter has fewer than half as many parameters as the base, and lowers the error about a thousandfold.
#
# ## Further: plot the training
#
# The pictures need `pip install -e ".[examples]"`. On the right is the damping of
# [Levenberg-Marquardt](../glossary.md#levenberg-marquardt): the lower the damping, the longer the steps.

# %%
from peft_lotra.plotting import plot_history


plot_history(adapted.history)

# %% [markdown]
# ## Further: plot the error
#
# The right panel shows the error. Its largest absolute value is 2.7e-4, at `x = 0.1` and `t = 1.8`. Where the
# conditions hold exactly, at both ends of `x` and at the start, the error is zero.

# %%
import matplotlib.pyplot as plt


line, times = (
    torch.linspace(-1, 1, 81).double(),
    torch.linspace(0, 2, 81).double(),
)
grid = torch.cartesian_prod(line, times)
with torch.no_grad():
    fields = {"solution": solution(grid, 0.15), "adapted": adapted.model(grid)}
fields["error"] = fields["adapted"] - fields["solution"]
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axis, (name, values) in zip(axes, fields.items(), strict=True):
    field, most = values.view(81, 81).T, values.abs().max()
    picture = axis.imshow(
        field,
        "RdBu_r",
        extent=(-1, 1, 0, 2),
        aspect="auto",
        origin="lower",
        vmin=-most,
        vmax=most,
    )
    # dashed below zero
    axis.contour(line, times, field, 5, colors="black", linewidths=0.7)
    axis.set(title=name, xlabel="x", ylabel="t")
    figure.colorbar(picture, ax=axis, shrink=0.7)

# %% [markdown]
# ## Further: what to read next
#
# [PDEs](../pde.md) explains conditions, unknown constants, shapes, continuation for shocks and thin layers, and the
# parts of `solve`. [Results on PDEs](../pde_results.md) compares networks: an MLP is often more accurate than a KAN
# with splines in every layer.
