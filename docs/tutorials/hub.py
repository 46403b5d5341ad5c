# %% [markdown]
# # Publish and load an adapter
#
# Push a base and an adapter to the Hugging Face Hub, and load both again.
#
# You need no account. The next cell starts a local stand-in for the Hub. It is in the folder tests, so it needs a clone
# installed with `pip install -e`. Run it before anything imports peft or huggingface_hub, because both remember the
# address of the Hub. To use your own account instead, skip the cell, run `hf auth login`, and replace `user` by your
# name.

# %%
import sys
from importlib.util import find_spec
from pathlib import Path


clone = Path(find_spec("peft_lotra").origin).parents[1]
sys.path.append(f"{clone}/tests/support")
from hub_server import start_hub


hub = start_hub("user")

# %%
import torch
from peft import AutoPeftModel, get_peft_model

from peft_lotra import LoTRAConfig, create_lotra_optimizer, push_to_hub
from peft_lotra.kan import KAN


torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## Push the base
#
# A `KAN` has `push_to_hub`. Other people can then load it by name.

# %%
kan = KAN([4, 32, 4])  # stands for a trained base
print(kan.push_to_hub("user/kan").commit_url)

# %% [markdown]
# ## Push the adapter
#
# `push_to_hub` uploads the adapter with a model card. The card shows the metrics you pass.

# %%
model = get_peft_model(KAN.from_pretrained("user/kan"), LoTRAConfig(r=4))
x = torch.rand(256, 4) * 2 - 1
y = torch.sin(3 * x)
optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2)
for _ in range(100):
    loss = torch.nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
commit = push_to_hub(model, "user/kan-sines", metrics={"mse": loss.item()})
print(commit.commit_url)

# %% [markdown]
# Here is the card:

# %%
from huggingface_hub import ModelCard


print(ModelCard.load("user/kan-sines").content)

# %% [markdown]
# ## Load both on another machine
#
# One call loads base and adapter. For safety, PEFT imports the class of the base only from packages that you list in
# `import_allowlist`.

# %%
loaded = AutoPeftModel.from_pretrained(
    "user/kan-sines", import_allowlist=["peft_lotra"]
)
difference = loaded(x) - model(x)
print("largest difference:", difference.abs().max().item())
