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
# # Serve a thousand customers from one file
#
# Forecast the electricity load of a thousand households. They share one base,
# and each customer gets an adapter for their habits. Train all adapters at
# once, keep them in one file, and serve them in one batch. Run
# `pip install -e ".[examples]"` first. The script takes a minute.

# %% [markdown]
# ## Make the data and the base
#
# The inputs are the hour, the temperature, and the day of the week, scaled to
# [-1, 1]. `x` has the shape (customer, measurement, feature). Each customer has
# 56 measurements for training, 56 for early stopping, and 56 for the test. The
# base trains on all customers together.

# %%
import torch

from peft_lotra import AdapterBank, BankAdamW, LoTRAConfig
from peft_lotra.kan import KAN


torch.set_num_threads(1)  # small networks: much faster on a busy machine
torch.manual_seed(0)
customers, measurements = 1000, 168
names = [f"customer_{number}" for number in range(customers)]
x = torch.rand(customers, measurements, 3) * 2 - 1
hour, temperature, weekday = x.unbind(2)
peak, heating, weekend = torch.rand(3, customers, 1)
load = torch.exp(-8 * (hour - peak) ** 2)
load = load + heating * torch.relu(-temperature)
load = load + 0.5 * weekend * (weekday > 0.4)
y = load + 0.05 * torch.randn(customers, measurements)
train, held_out, test = slice(0, 56), slice(56, 112), slice(112, 168)


def errors(model, part, **rows):
    predictions = model(x[:, part].flatten(0, 1), **rows)[:, 0]
    return (predictions - y[:, part].flatten()).square()


base = KAN([3, 16, 1])
adam = torch.optim.Adam(base.parameters(), lr=1e-2)
for _ in range(100):
    adam.zero_grad()
    errors(base, train).mean().backward()
    adam.step()
torch.save(base.state_dict(), "base.pt")  # for a server, before `attach`

# %% [markdown]
# ## Train a thousand adapters at once
#
# Start each adapter from the gradient of its customer's loss, which takes 12
# milliseconds. (A random start, `bank.add(name, LoTRAConfig(r=2))`, ends at an
# error of 0.144 in the test below.)
#
# `ids` names the adapter of each sample. The loss is the sum of the customers'
# losses, so `BankAdamW` updates each adapter as if it were trained separately.
# `keep_best` keeps the values with the lowest held-out loss, and stops an
# adapter after 5 checks without a better one.

# %%
import copy

from peft import get_peft_model

from peft_lotra import start_from_gradient


def loss_of(network, number):
    predictions = network(x[number, train])[:, 0]
    return (predictions - y[number, train]).square().mean()


bank = AdapterBank(base)
for number, name in enumerate(names):
    one = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    start_from_gradient(one, lambda: loss_of(one, number))
    bank.add(name, one)
model = bank.attach()
ids = bank.ids(names).repeat_interleave(56)

optimizer = BankAdamW(bank, lr=3e-2)
for step in range(100):
    if step % 5 == 0:
        with torch.no_grad():
            held_out_errors = errors(model, held_out, ids=ids)
        losses = bank.mean_by_adapter(held_out_errors, ids)
        active = optimizer.keep_best(losses, patience=5)
        if not active.any():
            break
    losses = bank.mean_by_adapter(errors(model, train, ids=ids), ids)
    optimizer.zero_grad()
    losses.nansum().backward()
    optimizer.step()
optimizer.finish()
print(f"{step + 1} steps, {int(active.sum())} customers still trained")

# %% [markdown]
# ## Are the forecasts better?
#
# Compare root mean squared errors on the test. The noise in the data is 0.05.

# %%
model.eval()
with torch.no_grad():
    before = errors(model, test).view(customers, -1).mean(1).sqrt()
    after = errors(model, test, ids=ids).view(customers, -1).mean(1).sqrt()
print(f"base {before.mean():.3f}, adapted {after.mean():.3f}")
print(f"better for {int((after < before).sum())} of {customers} customers")

# %% [markdown]
# ## Save all in one file
#
# The bank is one safetensors file with a table of the names.

# %%
from pathlib import Path


bank.save("households")
size = Path("households/adapter_bank.safetensors").stat().st_size
print(f"{size / customers:.0f} bytes for each customer")

# %% [markdown]
# ## Serve all in one batch
#
# Name the customer of each sample. `"__base__"` stands for no adapter. The
# base runs once for the whole batch.

# %%
bank.detach()
served = AdapterBank.load(base, "households").attach().eval()
with torch.no_grad():
    rows = ["customer_7", "__base__", "customer_999"]
    print(served(torch.zeros(3, 3), adapter_names=rows)[:, 0])

# %% [markdown]
# ## Take out one customer
#
# `AdapterBank.load(..., names=[...])` keeps only the named adapters. `export`
# writes an adapter as a folder for `PeftModel.from_pretrained`.

# %%
one = AdapterBank.load(base, "households", names=["customer_7"])
one.export("customer_7", "customer_7")
print(one.names, sorted(path.name for path in Path("customer_7").iterdir()))

# %% [markdown]
# ## What next?
#
# * **Is a bank worth it for you?** Yes, if your base is a KAN and each
#   customer has enough data. [A study](../when.md#many-tasks-share-one-base)
#   compares banks with heads, copies, linear models, and LoRA on an MLP.
# * **A new customer?** Train on a copy of the base that you made before
#   `attach()`. Call `bank.add` while others are served, then `bank.save`.
# * **A web server?** [Many adapters and serving](../serving.md#run-a-web-server) has one
#   to copy. It reads `base.pt`.
