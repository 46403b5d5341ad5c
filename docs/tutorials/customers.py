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
# # efficient-kan: five customers on one base
#
# A classifier of efficient-kan layers (here qkan's copy of them) reads digits. Five customers have scanners of their
# own, so each gets an adapter. They are served in one batch, exchanged in place, and exported. Needs
# `pip install -e ".[examples]" qkan`, and for the export `onnxscript onnxruntime`. (efficient-kan itself is not on
# PyPI.)

# %%
import warnings

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from qkan.kan import KANLinear
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from tqdm.auto import tqdm

from peft_lotra import LoTRAConfig, create_lotra_optimizer, hotswap_adapter, model_summary, preprocess_lotra


warnings.filterwarnings("ignore", category=FutureWarning)  # of the exporter
torch.set_num_threads(1)
torch.manual_seed(0)
STEPS = 60
ANGLES = {"anna": -40, "ben": -20, "cleo": 20, "dora": 40, "emil": 180}  # how each customer's scanner turns the page


def network():
    return torch.nn.Sequential(KANLinear(64, 32), KANLinear(32, 10))


def train(model, optimizer, x, y, steps):
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model, x):
    return f"{100 * (model(x).argmax(1) == y[TEST]).float().mean():.1f} %"


images, labels = load_digits(return_X_y=True)
images, y = images.reshape(-1, 8, 8), torch.tensor(labels)
order = torch.tensor(np.random.default_rng(0).permutation(len(y)))
TEST, FEW, SEEN = order[:500], order[500:700], order[500:]


def scans(angle):
    turned = rotate(images, angle, axes=(1, 2), reshape=False, order=1).clip(0, 16)
    return torch.tensor(turned / 8 - 1, dtype=torch.float32).flatten(1)


# %% [markdown]
# ## The base

# %%
base = network()
train(base, torch.optim.Adam(base.parameters(), lr=5e-3), scans(0)[SEEN], y[SEEN], 3 * STEPS)
torch.save(base.state_dict(), "base.pt")
print("upright scans:", accuracy(base, scans(0)[TEST]))
print({name: accuracy(base, scans(angle)[TEST]) for name, angle in ANGLES.items()})

# %% [markdown]
# ## An adapter for each customer
#
# 200 labels each. The start from the gradient fits: a trained network meets new data for its task.

# %%
for name, angle in tqdm(ANGLES.items()):
    kan = network()
    kan.load_state_dict(torch.load("base.pt"))
    x = scans(angle)
    config = LoTRAConfig(r=(8, 8, 4), init_weights="gradient")
    preprocess_lotra(kan, config, lambda: torch.nn.functional.cross_entropy(kan(x[FEW]), y[FEW]).backward())
    model = get_peft_model(kan, config, adapter_name=name)
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2, policy={"core": 0.03, "factor_out": 0.5})
    train(model, optimizer, x[FEW], y[FEW], STEPS)
    print(name, accuracy(model, x[TEST]))
    model.save_pretrained("customers")  # customers/anna, customers/ben, ...

# %% [markdown]
# One repository of the Hub holds them all: see [Hub](../../hub/#customers-of-one-base).
#
# ## One batch for all

# %%
kan = network()
kan.load_state_dict(torch.load("base.pt"))
names = list(ANGLES)
model = PeftModel.from_pretrained(kan, "customers/anna", adapter_name="anna").eval()
for name in names[1:]:
    model.load_adapter(f"customers/{name}", adapter_name=name)
x = torch.cat([scans(angle)[TEST][:20] for angle in ANGLES.values()])
with torch.no_grad():
    mixed = model(x, adapter_names=[name for name in names for _ in range(20)])
right = (mixed.argmax(1) == y[TEST][:20].repeat(5)).float().mean()
print(f"the mixed batch: {100 * right:.1f} %")
model_summary(model)

# %% [markdown]
# ## Exchange in place
#
# `hotswap_adapter` writes other weights into an adapter; a compiled model is not compiled again.

# %%
model.set_adapter("anna")
hotswap_adapter(model, "customers/emil", adapter_name="anna")
print("emil's scans by the slot of anna:", accuracy(model, scans(180)[TEST]))

# %% [markdown]
# ## Export
#
# Merged, it is the base's own graph, and exports to ONNX as the base does.

# %%
merged = model.merge_and_unload()
torch.onnx.export(merged, (x[:2],), "emil.onnx", dynamo=True, verbose=False)

import onnxruntime


session = onnxruntime.InferenceSession("emil.onnx")
(found,) = session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})
print("largest difference in ONNX:", float(np.abs(found - merged(x[:2]).detach().numpy()).max()))
