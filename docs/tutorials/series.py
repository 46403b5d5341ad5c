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
# # Forecast twenty series with one KAN
#
# One KAN forecasts the daily electricity load of towns. Twenty new towns have
# three months of data each. Give each of them an adapter, compare it with a
# linear model and with full fine-tuning, and serve all of them over HTTP. Run
# `pip install -e ".[examples]"` first. The script takes a minute.

# %% [markdown]
# ## Make the series
#
# The load of a day depends on the last days and on the weather. Heating starts
# below one temperature, cooling above another. Both temperatures, and all
# slopes, differ from town to town. With `bend=0`, no town heats or cools: these
# series are linear.
#
# A row has eight inputs: the loads of the seven days before, and the forecast of
# the temperature. Successive rows share six loads: their windows overlap.

# %%
import torch


torch.set_num_threads(1)  # small networks: much faster on a busy machine


def make_rows(towns, days, bend):
    def draw(low, high):
        return low + (high - low) * torch.rand(towns)

    heating, cooling = bend * draw(0.2, 0.9), bend * draw(0.0, 0.7)
    cold, warm = draw(-1, 0), draw(0, 1)
    slope, persistence, week = draw(-0.2, 0.2), draw(0.2, 0.5), draw(0.1, 0.4)
    temperature = torch.randn(towns, days + 30)
    for day in range(1, days + 30):
        temperature[:, day] += 0.8 * temperature[:, day - 1]
    temperature = temperature / 1.7
    load = 0.1 * torch.randn(towns, days + 30)
    for day in range(7, days + 30):
        now = temperature[:, day]
        load[:, day] += persistence * load[:, day - 1] + week * load[:, day - 7]
        load[:, day] += slope * now + heating * torch.relu(cold - now)
        load[:, day] += cooling * torch.relu(now - warm)
    load, temperature = load[:, 23:], temperature[:, 30:]  # after a start
    unit = 3 * load[:, :90].std(1, keepdim=True)
    load = (load - load[:, :90].mean(1, keepdim=True)) / unit
    windows = load.unfold(1, 7, 1)[:, :days]
    x = torch.cat([windows, temperature.unsqueeze(2) / 3], 2).clamp(-1, 1)
    return x, load[:, 7:].unsqueeze(2)


# %% [markdown]
# ## Train the base
#
# The base learns from a hundred other towns, with a year of data each.

# %%
from peft_lotra.kan import KAN


mse = torch.nn.functional.mse_loss


def train(model, optimizer, x, y, steps):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        mse(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()


def make_base(bend):
    x, y = make_rows(100, 365, bend)
    base = KAN([8, 16, 1])
    adam = torch.optim.Adam(base.parameters(), lr=1e-2)
    train(base, adam, x.flatten(0, 1), y.flatten(0, 1), 1000)
    return base


torch.manual_seed(0)
base = make_base(bend=1)
torch.save(base.state_dict(), "base.pt")  # for a server, before it is adapted
x, y = make_rows(20, 180, bend=1)
x_train, y_train = x[:, :90], y[:, :90]
x_test, y_test = x[:, 90:], y[:, 90:]

# %% [markdown]
# ## Ask `fit_adapter` about one town
#
# `fit_adapter` compares the base, a linear path and an adapter by held-out rows.
# The windows overlap, so a row in the training data would give away its
# neighbors. `blocked=True` holds out blocks of successive days instead of single
# days.

# %%
import copy

from peft_lotra import fit_adapter


report = fit_adapter(
    copy.deepcopy(base),
    (x_train[0], y_train[0]),
    mse,
    blocked=True,
    progress=False,
)
print(report)

# %% [markdown]
# ## Use the result for the other towns
#
# `report.model` is an adapted `LinearPath`: $y = s \cdot \text{network}(x) + Wx +
# b$. Its configuration makes the adapters of the other towns. `start_from_data`
# fits the path and starts the adapter, and 100 steps train it. This trains one
# model for a town; `fit_adapter` trains eleven, to compare them.

# %%
from peft import get_peft_model

from peft_lotra import (
    AdapterBank,
    LinearPath,
    create_lotra_optimizer,
    start_from_data,
)


config = report.model.peft_config["default"]  # r=("full", "full", 1)


def adapt(base, x, y):
    model = get_peft_model(LinearPath(copy.deepcopy(base)), config)
    start_from_data(model, x, y, mse)
    path = copy.deepcopy(model)
    train(model, create_lotra_optimizer(model, torch.optim.Adam), x, y, 100)
    return path, model


adapted = [adapt(base, *rows) for rows in zip(x_train, y_train, strict=True)]

# %% [markdown]
# ## Compare at equal effort
#
# The linear model of scikit-learn chooses its ridge penalty itself. Full
# fine-tuning takes 100 steps on the same rows. We try four learning rates, and
# keep the one with the least *test* error, which favors this rival. The other
# models saw no test data.
#
# The table shows root mean squared errors, and for how many towns each model is
# the best.

# %%
from sklearn.linear_model import RidgeCV


def fit_linear(x, y):
    ridge = RidgeCV([10.0**power for power in range(-3, 4)]).fit(x, y[:, 0])
    model = torch.nn.Linear(8, 1)
    model.weight.data = torch.tensor(ridge.coef_).float()[None]
    model.bias.data = torch.tensor([ridge.intercept_]).float()
    return model


def fit_copy(base, x, y, lr):
    model = copy.deepcopy(base)
    train(model, torch.optim.Adam(model.parameters(), lr=lr), x, y, 100)
    return model


def test_errors(models, x, y):
    with torch.no_grad():
        squares = [
            (model(rows) - targets).square().mean()
            for model, rows, targets in zip(models, x, y, strict=True)
        ]
    return torch.stack(squares).sqrt()


def compare(base, x, y, adapted):
    training = [*zip(x[:, :90], y[:, :90], strict=True)]
    test = x[:, 90:], y[:, 90:]
    linear_models = [fit_linear(*rows) for rows in training]
    errors = {
        "base": test_errors([base] * len(x), *test),
        "linear model": test_errors(linear_models, *test),
        "linear path": test_errors([path for path, _ in adapted], *test),
        "adapter on the path": test_errors(
            [last for _, last in adapted], *test
        ),
    }
    full = []
    for lr in (3e-4, 1e-3, 3e-3, 1e-2):
        copies = [fit_copy(base, *rows, lr) for rows in training]
        full.append(test_errors(copies, *test))
    errors["full fine-tuning"] = min(full, key=torch.mean)

    best = torch.stack([*errors.values()]).argmin(0)
    for number, (name, of_towns) in enumerate(errors.items()):
        count = int((best == number).sum())
        print(f"{name:20} {of_towns.mean().item():.3f}  best for {count:2}")


compare(base, x, y, adapted)

# %% [markdown]
# The base has learned that load bends with the temperature, so it helps. Now the
# same for towns without heating and cooling:

# %%
linear_base = make_base(bend=0)
x_linear, y_linear = make_rows(20, 180, bend=0)
linear_adapted = [
    adapt(linear_base, *rows)
    for rows in zip(x_linear[:, :90], y_linear[:, :90], strict=True)
]
compare(linear_base, x_linear, y_linear, linear_adapted)

# %% [markdown]
# ## When do adapters pay?
#
# * **Adapters pay** if the base has learned what a linear model cannot express,
#   and each series differs a little from it. Here, the bends move.
# * **A linear model is enough** if the series are linear. There the path is as
#   good, because it contains a linear model; the adapter adds only noise.
# * **The path alone** is the safe choice with few rows. It takes 40 bytes here.
# * **Keep the base** if a series has data of one season only: see [the
#   benchmark](../when.md#with-few-labels-fit-a-linear-path-first). These towns
#   have no seasons.
#
# Always fit the linear model first. It takes a second for all series.
# [A study](../when.md#many-tasks-share-one-base) compares more methods on 300
# households and on 145 industries.

# %% [markdown]
# ## Serve all towns over HTTP
#
# Put the adapters with their paths into one bank, and save it. A server answers
# with the adapter that a request names:

# %%
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


bank = AdapterBank(LinearPath(base))
for town, (_, adapter) in enumerate(adapted):
    bank.add(f"town_{town}", adapter)
bank.save("towns")
served = AdapterBank.load(LinearPath(base), "towns").attach().eval()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers["Content-Length"])
        request = json.loads(self.rfile.read(length))
        rows = torch.tensor([request["x"]])
        with torch.no_grad():
            forecast = served(rows, adapter_names=[request["town"]]).item()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"load": round(forecast, 3)}).encode())

    def log_message(self, *args):
        """Keep the output short."""


server = ThreadingHTTPServer(("localhost", 0), Handler)  # 0: any free port
Thread(target=server.serve_forever, daemon=True).start()

# %% [markdown]
# Ask it for the first forecast of the test. In a shell, this is
# `curl localhost:PORT -d '{"town": "town_3", "x": [...]}'`:

# %%
from urllib.request import urlopen


body = json.dumps({"town": "town_3", "x": x_test[3, 0].tolist()})
url = f"http://localhost:{server.server_port}"
with urlopen(url, data=body.encode()) as response:
    print(response.read().decode(), f"measured: {y_test[3, 0].item():.3f}")
server.shutdown()

# %% [markdown]
# For a new town, train its adapter and call `bank.add`, which also takes the
# `report.model` of a `fit_adapter`, whatever was chosen.
#
# This server checks nothing, and runs one row at a time. [Many adapters and
# serving](../serving.md#run-a-web-server) has one to copy that collects requests
# in batches, checks them, and takes new adapters while it runs.
