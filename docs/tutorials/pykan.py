# %% [markdown]
# # Adapt a pykan network to a second data set
#
# Fit a [pykan](https://github.com/KindXiaoming/pykan) network to one data set, and adapt it to a second one. Pictures
# show which edges changed. Run `pip install -e ".[examples]" pykan pandas` first: pykan imports pandas without
# installing it. The export at the end also needs `pip install onnx onnxscript onnxruntime`. The code up to the sections
# called *Further* takes half a minute.
#
# ## Fit the first data set
#
# As always in pykan, a data set is a dict of `train_input`, `train_label`, `test_input`, and `test_label`.

# %%
import torch
from kan import KAN, create_dataset
from peft import get_peft_model

from peft_lotra import LoTRAConfig, what_changed
from peft_lotra.plotting import plot_edge_functions


torch.set_num_threads(1)  # small networks run faster with one thread


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
# ## Adapt to the second data set
#
# Attach an adapter, and train it with pykan's own `fit`, which uses L-BFGS and needs no learning rate. Pass
# `update_grid=False`, because the adapter is an update of coefficients on the present [grid](../glossary.md#grid), and
# would be wrong on another one. The last layer has only one output, so lower ranks are enough there.
#
# The base does not change, so you keep the old fit and the new one. If you want a second network, call `kan.copy()` before
# you attach the adapter: `copy.deepcopy` fails on a pykan network that has run. `kan.copy()` leaves three files in the
# working folder, which you can delete: `copy_temp_cache_data`, `copy_temp_config.yml`, and `copy_temp_state`.

# %%
config = LoTRAConfig(r=(3, 2, 3), rank_pattern={"act_fun.1": (1, 2, 2)})
model = get_peft_model(kan, config)
model.fit(new, steps=20, update_grid=False)
print("new data, adapted:", model.evaluate(new)["test_loss"])

# %% [markdown]
# Training all parameters for 20 steps gives an error of about 0.001 instead of 0.01, but overwrites the old fit. If you
# need only the new fit, train all parameters.
#
# ## See what changed
#
# In the first layer, plot the edges whose changes matter most, before and after. The marks at the bottom show where the
# data lie:

# %%
x = new["train_input"]
edges = plot_edge_functions(model, "act_fun.0", x=x, inputs=["a", "b"])
edges.savefig("edges.png")
edges

# %% [markdown]
# Split the change of the output into a shift, a linear part, a sum of functions of one input, and the rest, such as
# functions of two inputs together. `what_changed` fits splines of its own, from coarse to fine; they are not the
# splines of the network. The row of an input shows how much worse the fit becomes without this input. These rows need
# not add up to 100 %.
#
# The rows of the edges describe what the trained adapter did. The effect of an edge is the root mean square of what its
# change adds to the output, without the mean. Its share is the effect squared, divided by the sum over all edges. The
# changes of several edges can cancel, so an effect can be larger than the whole change. An edge can have a large share
# even if the whole change does not depend on its input. To ask which inputs matter, read the rows above.
#
# With targets, `what_changed(model, x, targets)` measures the change that the data ask for: targets minus base. To
# write the change as a formula, use [the recipe](../recipes/what_changed.md): for these data, it finds $-2 b^2$ in the
# logarithm. It is also a script that [runs on a saved
# adapter](../recipes/what_changed.md#find-the-formula-of-a-saved-adapter).

# %%
what_changed(model, x, names=["a", "b"])

# %% [markdown]
# With two inputs, all of `rest` depends on both together. The row below `rest` shows the part that coarse functions of
# both inputs explain. All of `rest` needs hidden units that combine the inputs, and this network has five of them. The
# last line says that the finest of the fitted splines had the smallest error.
#
# ## Further: which layers are adapted
#
# List the layers that were recognized, with the ranks of the adapter in each layer.

# %%
from peft_lotra import find_kan_layers


find_kan_layers(model)

# %% [markdown]
# ## Further: merge, and make an edge symbolic
#
# While an adapter is attached, calls that rebuild the network, such as `prune` and `refine`, raise an error. After a
# merge, the network is a plain pykan network again, and everything works, including symbolic functions. As an example,
# replace the function of one edge by a square. pykan's formulas need Python 3.12 or older. On a newer Python, this cell
# skips the square.

# %%
import sys


merged = model.merge_and_unload()
print(type(merged).__name__, "on new data:", merged.evaluate(new)["test_loss"])
if sys.version_info < (3, 13):
    merged.fix_symbolic(0, 1, 0, "x^2", verbose=False)
    print("edge (0, 1, 0) is now", merged.symbolic_fun[0].funs_name[0][1])
else:
    print("pykan's formulas need Python 3.12 or older")

# %% [markdown]
# ## Further: export to ONNX
#
# Export the merged network, with any number of rows, and run it without torch. `save_act = False` stops pykan from
# keeping the activations of each call, which an export cannot do.

# %%
import onnxruntime


merged.save_act = False
rows = torch.export.Dim("rows")
torch.onnx.export(
    merged,
    (x,),
    "kan.onnx",
    dynamo=True,
    verbose=False,
    dynamic_shapes=({0: rows},),
)
session = onnxruntime.InferenceSession("kan.onnx")
name = session.get_inputs()[0].name
(y,) = session.run(None, {name: x[:7].numpy()})
error = (torch.tensor(y) - merged(x[:7])).abs().max().item()
assert error < 1e-5
print("ONNX gives the same outputs, to within 1e-5")
