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
# # A thousand customers in one file
#
# A network forecasts the load of households from the hour, the temperature
# and the day of the week. Each of a thousand customers has habits of his own,
# and 56 measurements. All get an adapter: trained at once, kept in one file,
# and served in one batch. Needs `pip install -e ".[examples]"`.
#
# The code is one script, which runs for a minute.

# %% [markdown]
# ## Data and base
#
# Rows (customer, measurement, feature), features in [-1, 1]. A third of the
# measurements is held out, and a third is for the test. The base learns the
# first third of all customers together.

# %%
import torch

from peft_lotra import AdapterBank, LoTRAConfig
from peft_lotra.kan import KAN
from peft_lotra.optim import BankAdamW


torch.set_num_threads(1)  # small networks: much faster on a busy machine
torch.manual_seed(0)
customers, measurements = 1000, 168
names = [f"customer {number}" for number in range(customers)]
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

# %% [markdown]
# ## A thousand adapters, trained at once
#
# Each adapter starts from the gradient of its customer's loss, which takes 12
# milliseconds; from a random start, `bank.add(name, LoTRAConfig(r=2))`, the
# errors below end at 0.144. `ids` are the adapters of the rows by number. A
# step of `BankAdamW` changes each adapter as it would be changed alone, since
# the loss is the sum of the customers' losses. Each keeps its best values on
# the held-out rows, and stops after 5 checks without better ones.

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
            found = errors(model, held_out, ids=ids)
        losses = bank.mean_by_adapter(found, ids)
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
# ## Did it pay?
#
# The root of the mean squared error on the test rows; the noise has 0.05.

# %%
model.eval()
with torch.no_grad():
    alone = errors(model, test).view(customers, -1).mean(1).sqrt()
    adapted = errors(model, test, ids=ids).view(customers, -1).mean(1).sqrt()
print(f"base {alone.mean():.3f}, adapted {adapted.mean():.3f}")
print(f"better for {int((adapted < alone).sum())} of {customers} customers")

# %% [markdown]
# ## One file
#
# All customers in one file of safetensors, with a table of their names.

# %%
from pathlib import Path


bank.save("households")
size = Path("households/adapter_bank.safetensors").stat().st_size
print(f"{size / customers:.0f} bytes for each customer")

# %% [markdown]
# ## Served
#
# A batch has rows of any customers, and of none (`"__base__"`). The base is
# computed once for all rows.

# %%
bank.detach()
served = AdapterBank.load(base, "households").attach().eval()
with torch.no_grad():
    rows = ["customer 7", "__base__", "customer 999"]
    print(served(torch.zeros(3, 3), adapter_names=rows)[:, 0])

# %% [markdown]
# ## One customer
#
# `names=` reads some adapters and nothing of the others; with a repository in
# place of the folder (`bank.push_to_hub("user/households")`), it downloads no
# more than them. `export` writes one for `PeftModel.from_pretrained`.

# %%
one = AdapterBank.load(base, "households", names=["customer 7"])
one.export("customer 7", "customer_7")
print(one.names, sorted(path.name for path in Path("customer_7").iterdir()))

# %% [markdown]
# ## When does it pay?
#
# With enough rows of each customer, and where the base is a KAN already. [Two
# studies](../when.md#many-tasks-on-one-base) have adapters beside heads, copies,
# linear models and LoRA on an MLP.
#
# A customer who comes later is trained on a copy of the base that was made
# before `attach()`, and added while others are served; `bank.save` writes the
# file again.
#
# A server of forecasts in one page: [many adapters and
# serving](../serving.md).
