# %% [markdown]
# # Adapt U-KAN and its head
#
# U-KAN segments images. If a new scanner or stain changes the images, adapt U-KAN's KAN layers. Also train a copy of
# the head. With the authors' network, write:
#
# ```python3
# model = UKAN(num_classes=1)  # from their archs.py, with its weights
# config = LoTRAConfig(r=4, modules_to_save=["final"])
# model = get_peft_model(model, config)
# ```
#
# `modules_to_save` trains a copy of the head, and saves it in the file of the adapter.
#
# Run `pip install qkan` first. This page runs in seconds with a small network of the same parts: an encoder, a
# tokenized block of efficient-kan layers (from `qkan`), a decoder, and the head `final`. Between its KAN layers, the
# block has a convolution and a batch norm.

# %%
import copy

import torch
from peft import PeftModel, get_peft_model
from qkan.kan import KANLinear
from torch import nn

from peft_lotra import LoTRAConfig


class TokenizedKAN(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = KANLinear(width, width), KANLinear(width, width)
        self.between = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.BatchNorm2d(width),
        )

    def forward(self, x):
        rows = self.norm(x.movedim(1, -1)).flatten(0, 2)  # images x tokens
        tokens = self.fc1(rows)
        y = self.between(tokens.view(len(x), *x.shape[2:], -1).movedim(-1, 1))
        y = self.fc2(torch.relu(y).movedim(1, -1).flatten(0, 2))
        return x + y.view(len(x), *x.shape[2:], -1).movedim(-1, 1)


class SmallUKAN(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 5, 4, 2), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.kan = TokenizedKAN(width)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(width, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.final = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        return self.final(self.decoder(self.kan(self.encoder(x))))


# %% [markdown]
# The task is to find a disc. In the images of the base, the disc is brighter than the background. In the new images it is
# darker, and there are only sixteen of them.


# %%
def images(count, sign, seed, size=32):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(count, 2, 1, 1, generator=generator) * 16 + 8
    line = torch.arange(size)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))
    masks = ((grid - centers).square().sum(1, keepdim=True) < 36).float()
    noise = torch.randn(masks.shape, generator=generator)
    return sign * masks + 0.3 * noise, masks


def dice(model, x, masks):
    model.eval()
    with torch.no_grad():
        found = (model(x) > 0).float()
    return (2 * (found * masks).sum() / (found.sum() + masks.sum())).item()


def train(model, x, masks, steps, lr):
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr
    )
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(
            model(x), masks
        ).backward()
        optimizer.step()


torch.manual_seed(0)
base = SmallUKAN()
train(base, *images(32, 1, seed=0), steps=80, lr=1e-2)
other, unseen = images(16, -1, seed=1), images(32, -1, seed=2)
print(
    f"base: {dice(base, *images(32, 1, seed=3)):.2f} on its own images, "
    f"{dice(base, *unseen):.2f} on the others"
)

# %% [markdown]
# Compare two trainings: an adapter and the head, or all parameters of the KAN layers and the head:

# %%
start = copy.deepcopy(base)
model = get_peft_model(base, LoTRAConfig(r=4, modules_to_save=["final"]))
train(model, *other, steps=80, lr=1e-2)

full = copy.deepcopy(start)
for name, parameter in full.named_parameters():
    parameter.requires_grad = name.startswith(("kan.fc", "final."))
train(full, *other, steps=80, lr=1e-2)

for name, network in (
    ("LoTRA and head", model),
    ("KAN layers and head in full", full),
):
    size = sum(p.numel() for p in network.parameters() if p.requires_grad)
    print(f"{name}: {size} parameters, {dice(network, *unseen):.2f}")
assert dice(model, *unseen) > dice(start, *unseen) + 0.3

# %% [markdown]
# To train a batch norm, name it in `modules_to_save`. Here all batch norms are frozen, with their statistics. So the
# file holds everything that changed, and the base stays as it was:

# %%
model.save_pretrained("darker-discs")
loaded = PeftModel.from_pretrained(copy.deepcopy(start), "darker-discs").eval()
torch.testing.assert_close(loaded(unseen[0]), model.eval()(unseen[0]))
with loaded.disable_adapter():
    torch.testing.assert_close(loaded(unseen[0]), start.eval()(unseen[0]))
