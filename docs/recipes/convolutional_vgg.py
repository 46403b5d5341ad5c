# %% [markdown]
# # Adapt a VGG of convolutional KANs
#
# Adapt a VGG from torch-conv-kan:
#
# ```python3
# # vggkagn is in torch-conv-kan
# model = vggkagn(3, 10, groups=1, degree=3, vgg_type="VGG11")
# config = LoTRAConfig(r=(8, 8, 4, 4), modules_to_save=["classifier"])
# model = get_peft_model(model, config)
# ```
#
# The layers of torch-conv-kan (KAGN, KALN, KACN, FastKAN, wavelets) are recognized, in one to three dimensions and with
# groups. ResNet, DenseNet, and U-Net work the same way. You do not have to register them.
#
# The coefficients of a convolution have four [modes](../glossary.md#mode): out, in, basis, and kernel. Pass one rank
# for all modes, four ranks, or three. With three ranks, the kernel mode stays full
# ([more](../convolutions.md#convolutions-have-four-ranks)).
#
# This page runs with a small network that needs no download. Run `pip install -e ".[examples]"` first. Its layer has
# the parameter names of a KAGN convolution: `poly_weights`, `base_conv`, and `beta_weights`. The package recognizes the
# layer by these names.

# %%
import copy

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import nn

from peft_lotra import LoTRAConfig, find_kan_layers


class GramConv2d(nn.Module):
    def __init__(self, inputs, outputs, degree=3):
        super().__init__()
        self.degree = degree
        weights = torch.randn(1, outputs, (degree + 1) * inputs, 3, 3)
        self.poly_weights = nn.Parameter(weights / (6 * inputs**0.5))
        base = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.base_conv = nn.ModuleList([base])
        self.beta_weights = nn.Parameter(torch.zeros(degree + 1))
        self.layer_norm = nn.InstanceNorm2d(outputs, affine=True)

    def forward(self, x):
        t = torch.tanh(x)
        grams = [torch.ones_like(t), t]
        for _ in range(self.degree - 1):
            beta = 0.25 + self.beta_weights[len(grams)]
            grams.append(t * grams[-1] - beta * grams[-2])
        basis = F.silu(torch.cat(grams, 1))
        y = F.conv2d(basis, self.poly_weights[0], padding=1)
        return F.silu(self.layer_norm(y + self.base_conv[0](F.silu(x))))


def make_vgg():
    torch.manual_seed(0)
    first, second, pool = GramConv2d(1, 8), GramConv2d(8, 16), nn.MaxPool2d(2)
    head = nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(first, pool, second, pool, *head)


print(find_kan_layers(make_vgg()))

# %% [markdown]
# The base learns digits. The adapter learns the same digits, turned by a right angle and inverted:

# %%
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
labels = torch.tensor(digits.target)
shifted = -x.rot90(1, (2, 3))
known, held_out = slice(0, 1000), slice(1000, None)


def train(model, x, labels, steps, lr):
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr
    )
    for step in range(steps):
        rows = torch.arange(step * 100, step * 100 + 100) % len(x)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
    model.eval()


def accuracy(model, x):
    with torch.no_grad():
        return (
            (model(x[held_out]).argmax(1) == labels[held_out])
            .float()
            .mean()
            .item()
        )


base = make_vgg()
train(base, x[known], labels[known], steps=60, lr=1e-2)
start = copy.deepcopy(base)
model = get_peft_model(base, LoTRAConfig(r=(6, 6, 4, 4), modules_to_save=["5"]))
train(model, shifted[known], labels[known], steps=60, lr=1e-2)
print(f"base: {accuracy(start, x):.2f}")
print(f"turned and inverted digits: {accuracy(start, shifted):.2f}")
print(f"with an adapter: {accuracy(model, shifted):.2f}")
assert accuracy(model, shifted) > accuracy(start, shifted) + 0.3

# %% [markdown]
# Save, load, and merge. The merged network has the classes, keys, and speed of the base:

# %%
model.save_pretrained("turned")
loaded = PeftModel.from_pretrained(copy.deepcopy(start), "turned").eval()
merged = loaded.merge_and_unload()
torch.testing.assert_close(
    merged(shifted[held_out]), model(shifted[held_out]), rtol=1e-4, atol=1e-4
)
assert list(merged.state_dict()) == list(start.state_dict())

# %% [markdown]
# PEFT's LoRA can adapt the `nn.Conv2d` inside such a layer too. Here the only `nn.Conv2d` is the [base
# branch](../glossary.md#base-branch), so LoRA adapts nothing else. In a `spline_conv`, LoRA does not separate inputs
# from basis functions. [The comparison](../comparison.md#lotra-and-lora-are-equally-accurate-on-convolutions) shows
# LoTRA and LoRA at equal sizes.
