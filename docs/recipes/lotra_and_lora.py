# %% [markdown]
# # Use LoTRA and LoRA on one model
#
# This page adapts a network of convolutions with a KAN head. When the images change, the features of the convolutions
# must change too, and an adapter on the head is not enough. So LoTRA adapts the head, and LoRA the convolutions. Run
# `pip install -e ".[examples]"` first.
#
# ## Train the base
#
# We train it to classify scikit-learn's digits.

# %%
import copy

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from sklearn.datasets import load_digits
from torch import nn

from peft_lotra import LoTRAConfig, create_lotra_optimizer
from peft_lotra.kan import KAN


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 16),
            nn.Tanh(),  # into [-1, 1], the grid of the splines
        )
        self.kan = KAN([16, 10])

    def forward(self, x):
        return self.kan(self.features(x))


torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images).float()[:, None] / 8 - 1
y = torch.tensor(digits.target)


def train(model, optimizer, x, steps=200):
    for step in range(steps):
        rows = torch.arange(step * 100, step * 100 + 100) % 500
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def report(name, model, x):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    right = (model(x[500:]).argmax(1) == y[500:]).double().mean()
    print(f"{name}: {right:.1%} right, {trained:,} trainable parameters")


base = Net()
train(base, torch.optim.Adam(base.parameters(), lr=3e-3), x)
report("digits", base, x)

# %% [markdown]
# ## The images change
#
# They are turned by a right angle and inverted. For comparison, we train only LoTRA on the head, and then all
# parameters:

# %%
new = -x.rot90(1, (2, 3))
report("base on the new images", base, new)

head = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=(8, 8, 6)))
train(head, create_lotra_optimizer(head, torch.optim.Adam, lr=2e-2), new)
report("LoTRA on the head", head, new)

full = copy.deepcopy(base)
train(full, torch.optim.Adam(full.parameters(), lr=3e-3), new)
report("all parameters", full, new)

# %% [markdown]
# An adapter on the head is not enough for a published network either. From FashionMNIST to MNIST, LoTRA on its KAN head
# raises the accuracy from 11.6 to 44 %. Training all parameters raises it to 87 % (one run each).
#
# ## Attach both adapters
#
# Attach LoTRA first, then LoRA **under another name**. PEFT warns that the model has a second method; ignore it. Both
# adapters are active and trained. LoRA also gets the rate `lr`, unless you pass `other_lr`. Too high a rate ruins the
# features: with `other_lr=4e-2`, the accuracy was 10 % in three of four runs, as by guessing.

# %%
model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=(8, 8, 6)))
lora = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["features.0", "features.3", "features.7"],
)
inject_adapter_in_model(lora, model.get_base_model(), adapter_name="features")
train(model, create_lotra_optimizer(model, torch.optim.Adam, lr=2e-2), new)
report("LoTRA on the head, LoRA on the features", model, new)

# %% [markdown]
# To train all parameters of a layer, name it in the `modules_to_save` of LoRA, not of LoTRA. PEFT keeps only the
# `modules_to_save` of the last injected adapter active.
#
# ## Save and load both
#
# One call saves both: LoTRA into the folder, LoRA into a subfolder. One call loads both. Both calls work for every PEFT
# method that `inject_adapter_in_model` accepts. `load_adapters` also takes a Hub repository. To train further, pass
# `is_trainable=True`.
#
# PyTorch's fast path for `nn.TransformerEncoderLayer` ignores LoRA in evaluation mode: it reads the frozen weights.
# If you adapt such layers, call `torch.backends.mha.set_fastpath_enabled(False)` before you evaluate.

# %%
from peft_lotra import load_adapters


model.save_pretrained("digits")
loaded = load_adapters(copy.deepcopy(base), "digits")
print("as saved:", torch.equal(loaded(new), model.eval()(new)))

# %% [markdown]
# ## Merge both
#
# One call merges both. The result is a plain `Net` again, without adapter layers.

# %%
outputs = loaded(new[500:])
merged = loaded.merge_and_unload()
print(type(merged).__name__, type(merged.features[0]).__name__)
difference = (merged(new[500:]) - outputs).abs().max().item()
print(f"largest difference: {difference:.0e}")
