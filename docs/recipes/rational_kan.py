# %% [markdown]
# # Use plain LoRA for KAT and GR-KAN
#
# LoTRA does not apply to the Kolmogorov-Arnold Transformer (KAT). Use PEFT's LoRA, with the configuration at the end of
# this page.
#
# KAT consists of group-rational layers (GR-KAN). Each applies a rational function to every input, and then a linear
# layer. Each input i belongs to a group g(i), whose inputs share one rational function:
#
# $$y_o = \sum_i W_{oi}\, R_{g(i)}(x_i),$$
#
# $$R_g(x) = \frac{a_{g0} + a_{g1} x + \dots + a_{g5} x^5}{1 + |b_{g1} x + \dots + b_{g4} x^4|}.$$
#
# All outputs share the function $R_{g(i)}$ of an input. So there is no coefficient tensor (out, in, basis) for LoTRA to
# factorize. The matrix $W$ is an ordinary linear layer, which LoRA adapts.
#
# ## Build a small KAT
#
# The network has KAT's names for its parts: `act1`, `fc1`, `act2`, `fc2`. The LoRA configuration below also fits the
# published version, which computes the rational functions in CUDA.

# %%
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class KAT_Group(nn.Module):
    def __init__(self, groups=8):
        super().__init__()
        numerator = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        self.weight_numerator = nn.Parameter(numerator.repeat(groups, 1))
        self.weight_denominator = nn.Parameter(0.1 * torch.randn(groups, 4))

    def forward(self, x):
        groups = len(self.weight_numerator)
        grouped = x.unflatten(-1, (groups, -1)).unsqueeze(-1)
        powers = grouped ** torch.arange(6)
        above = (powers * self.weight_numerator[:, None]).sum(-1)
        below = (powers[..., 1:5] * self.weight_denominator[:, None]).sum(-1)
        return (above / (1 + below.abs())).flatten(-2)


class KAN(nn.Module):
    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.act1, self.fc1 = KAT_Group(), nn.Linear(inputs, hidden)
        self.act2, self.fc2 = KAT_Group(), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(self.act2(self.fc1(self.act1(x))))


torch.set_num_threads(1)
torch.manual_seed(0)
network = KAN(8, 64, 8)
x = torch.randn(512, 8)


def train(model, targets, lr, steps=300):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr)
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


print(f"base: {train(network, torch.sin(2 * x), lr=1e-2):.4f}")
new = torch.sin(2 * x + 0.5)
print(f"base on new data: {nn.functional.mse_loss(network(x), new):.4f}")

# %% [markdown]
# ## LoTRA refuses it
#
# LoTRA finds no layer to adapt, and the error message points to LoRA:

# %%
from peft_lotra import LoTRAConfig


try:
    get_peft_model(network, LoTRAConfig(r=4))
except ValueError as error:
    print(*str(error).split(". "), sep=".\n")

# %% [markdown]
# ## Configure LoRA
#
# Use LoRA on the linear layers. The rational functions have only 10 parameters per group, so train copies of them with
# `modules_to_save`.

# %%
config = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["fc1", "fc2"],
    modules_to_save=["act1", "act2"],
)
model = get_peft_model(network, config)
model.print_trainable_parameters()
print(f"adapted: {train(model, new, lr=1e-2):.4f}")
merged = model.merge_and_unload()

# %% [markdown]
# In a transformer you can adapt the attention too: `target_modules=["qkv", "proj", "fc1", "fc2"]`.
