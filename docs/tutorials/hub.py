# %% [markdown]
# # Publish and load
#
# Base and adapter go to the Hugging Face Hub and come back. This notebook talks to a stand-in for the Hub that the
# tests of the package bring along, so it needs no account, but a clone that is installed by `pip install -e`. Run the
# next cell before anything imports peft or huggingface_hub, which remember the address of the Hub. To use your own
# account, log in by `hf auth login` and leave the cell out.

# %%
import sys
from importlib.util import find_spec
from pathlib import Path


clone = Path(find_spec("peft_lotra").origin).parents[1]
sys.path.append(f"{clone}/tests/support")
from hub_server import start_hub


hub = start_hub("user")

# %%
import warnings

import torch
from peft import AutoPeftModel, get_peft_model

from peft_lotra import LoTRAConfig, create_lotra_optimizer, push_to_hub
from peft_lotra.kan import KANConfig, KANModel


warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The base
#
# A `KANModel` is a transformers model: it has `push_to_hub`, and others load it by its name.

# %%
kan = KANModel(KANConfig(widths=[4, 32, 4]))
print(kan.push_to_hub("user/kan").commit_url)

# %% [markdown]
# ## The adapter
#
# Adapter and model card go up together. Metrics that you give stand in the card.

# %%
model = get_peft_model(KANModel.from_pretrained("user/kan"), LoTRAConfig(r=4))
x = torch.rand(256, 4) * 2 - 1
y = torch.sin(3 * x)
optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2)
for _ in range(100):
    loss = torch.nn.functional.mse_loss(model(x).logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
commit = push_to_hub(model, "user/kan-sines", metrics={"mse": loss.item()})
print(commit.commit_url)

# %% [markdown]
# The card:

# %%
from huggingface_hub import ModelCard


print(ModelCard.load("user/kan-sines").content)

# %% [markdown]
# ## Load it, somewhere else
#
# Base and adapter in one call. PEFT imports the class of the base only from packages that it is told to trust.

# %%
loaded = AutoPeftModel.from_pretrained(
    "user/kan-sines", import_allowlist=["peft_lotra"]
)
difference = loaded(x).logits - model(x).logits
print("largest difference:", difference.abs().max().item())
