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
# # Serve five customers on one efficient-kan base
#
# A classifier of efficient-kan layers reads digits. Five customers have different scanners, so each gets an adapter.
# One batch serves all five, and one repository on the Hub holds them. Install `pip install -e ".[examples]" qkan`: qkan
# ships efficient-kan's layers, which are not on PyPI themselves.
#
# The code above *Further* takes half a minute. You need no account. In docs/tutorials of a clone, this command starts a
# local server in place of the Hub, and runs the script with it:
#
#     python PATH/TO/THE/CLONE/tests/support/hub_server.py customers.py
#
# To use your account, run `hf auth login`, replace `user` by your name, and run `python customers.py`. In a notebook, the
# first cell of [Publish and load](hub.md) starts the stand-in.

# %% [markdown]
# ## Train the base
#
# The base learns upright scans. The first 500 are for testing.

# %%
from functools import partial

import torch
from huggingface_hub import upload_file
from peft import get_peft_model
from qkan.kan import KANLinear
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from sklearn.utils import shuffle

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    push_to_hub,
    start_from_gradient,
)


torch.set_num_threads(1)  # small networks: much faster on a busy machine
torch.manual_seed(0)
images, y = shuffle(*load_digits(return_X_y=True), random_state=0)
images, y = images.reshape(-1, 8, 8), torch.tensor(y)


def scans(angle):
    turned = rotate(images, angle, axes=(1, 2), reshape=False, order=1)
    return torch.tensor(turned / 8 - 1).float().flatten(1)


def loss_of(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x), y)


def train(model, optimizer, x, y):
    for _ in range(80):
        loss = loss_of(model, (x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


kan = torch.nn.Sequential(KANLinear(64, 32), KANLinear(32, 10))
adam = torch.optim.Adam(kan.parameters(), lr=1e-2)
train(kan, adam, scans(0)[500:], y[500:])
torch.save(kan.state_dict(), "base.pt")

# %% [markdown]
# ## Train one adapter per customer
#
# Each scanner turns the page by an angle. Each customer has 200 labels. `set_adapter` selects the adapter to train, and
# `start_from_gradient` starts it with what the labels ask for.

# %%
angles = {"anna": -40, "ben": -20, "cleo": 20, "dora": 40, "emil": 180}
config = LoTRAConfig(r=(8, 8, 4))
model = get_peft_model(kan, config, adapter_name="anna")
for name, angle in angles.items():
    if name != "anna":
        model.add_adapter(name, config)
    model.set_adapter(name)
    labeled = scans(angle)[500:700], y[500:700]
    start_from_gradient(model, partial(loss_of, model), [labeled])
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=2e-2)
    train(model, optimizer, *labeled)

# %% [markdown]
# ## Serve all in one batch
#
# Take 500 test scans from each customer, and name the adapter of each sample. Print the accuracy per customer:

# %%
model.eval()
x = torch.cat([scans(angle)[:500] for angle in angles.values()])
rows = [name for name in angles for _ in range(500)]
right = model(x, adapter_names=rows).argmax(1) == y[:500].repeat(5)
print(right.view(5, 500).double().mean(1))

# %% [markdown]
# ## Push to the Hub
#
# One push uploads all adapters, each into a folder with its name, and a model card. The card shows `base_code`, which
# builds the base. Upload the weights of the base as a file.

# %%
repo = "user/customers"
code = f"""
import torch
from huggingface_hub import hf_hub_download
from qkan.kan import KANLinear

base = torch.nn.Sequential(KANLinear(64, 32), KANLinear(32, 10))
base.load_state_dict(torch.load(hf_hub_download("{repo}", "base.pt")))
"""
push_to_hub(model, repo, base_code=code)
url = upload_file(
    path_or_fileobj="base.pt", path_in_repo="base.pt", repo_id=repo
)
print(url)

# %% [markdown]
# ## Further: load them on another machine
#
# Run the code of the base, then load the adapters from their folders. `"__base__"` stands for no adapter, and shows the
# accuracy of the base on these scans.

# %%
from huggingface_hub import list_repo_files
from peft import PeftModel


print(*list_repo_files(repo), sep="\n")
scope = {}
exec(code, scope)
served = PeftModel.from_pretrained(
    scope["base"], repo, subfolder="anna", adapter_name="anna"
)
for name in list(angles)[1:]:
    served.load_adapter(repo, subfolder=name, adapter_name=name)
served.eval()
difference = served(x, adapter_names=rows) - model(x, adapter_names=rows)
print("largest difference:", difference.abs().max().item())
labels = y[:500].repeat(5)
right = served(x, adapter_names=["__base__"] * 2500).argmax(1) == labels
print("without adapters:", right.view(5, 500).double().mean(1))

# %% [markdown]
# ## Further: replace an adapter
#
# `hotswap_adapter` writes new weights into a loaded adapter. If you compiled the model, it need not be compiled again.

# %%
from peft_lotra import hotswap_adapter


served.set_adapter("anna")
hotswap_adapter(served, repo, subfolder="emil", adapter_name="anna")
right = served(scans(180)[:500]).argmax(1) == y[:500]
print("emil's scans, in the place of anna:", right.double().mean().item())

# %% [markdown]
# ## Further: export to ONNX
#
# A merged model has the class of the base, and exports like it. Run `pip install onnxscript onnxruntime` first.

# %%
import warnings

import onnxruntime


warnings.filterwarnings("ignore", category=FutureWarning)  # of the exporter
merged = served.merge_and_unload()
batch = {0: torch.export.Dim("batch")}  # any number of rows
torch.onnx.export(
    merged,
    (x[:2],),
    "emil.onnx",
    dynamo=True,
    dynamic_shapes=(batch,),
    verbose=False,
)
session = onnxruntime.InferenceSession("emil.onnx")
(found,) = session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})
print(
    "largest difference in ONNX:",
    (torch.tensor(found) - merged(x[:2])).abs().max().item(),
)
