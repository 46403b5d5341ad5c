# %% [markdown]
# # Train one adapter per series in neuralforecast
#
# Forecast many time series with one base, and give each series an adapter. Train the adapters with neuralforecast's own
# `fit`. RMoK is a mixture of KAN layers: wavelets, Taylor polynomials, and Jacobi polynomials. Run
# `pip install neuralforecast` first.

# %%
import logging

import numpy as np
import torch
from neuralforecast import NeuralForecast
from neuralforecast.models import RMoK
from neuralforecast.utils import AirPassengersPanel
from peft import get_peft_model

from peft_lotra import LoTRAConfig, find_kan_layers


for name in ("lightning.pytorch", "pytorch_lightning"):
    logging.getLogger(name).setLevel(logging.ERROR)

HORIZON = 12
panel = AirPassengersPanel[["unique_id", "ds", "y"]]
series = {
    name: rows.reset_index(drop=True)
    for name, rows in panel.groupby("unique_id")
}
network = RMoK(
    h=HORIZON,
    input_size=2 * HORIZON,
    n_series=1,  # a window holds one series
    max_steps=100,
    scaler_type="standard",
    random_seed=1,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
forecaster = NeuralForecast(models=[network], freq="ME")
forecaster.fit(series["Airline1"][:-HORIZON])
network = forecaster.models[0]
print(find_kan_layers(network))

# %% [markdown]
# The notes list further parameters, which are not adapted.
#
# Add an adapter for each series. `get_peft_model` replaces the layers inside the forecaster's network. From then on,
# `fit` trains the active adapter and nothing else.


# %%
def forecast(rows):
    return forecaster.predict(rows[:-HORIZON])["RMoK"].to_numpy()


def error(rows):
    return np.abs(forecast(rows) - rows.y.to_numpy()[-HORIZON:]).mean()


before = {name: error(rows) for name, rows in series.items()}
frozen = {name: value.clone() for name, value in network.state_dict().items()}
first, *others = series
model = get_peft_model(network, LoTRAConfig(r=2), adapter_name=first)
for name in others:
    model.add_adapter(name, LoTRAConfig(r=2))
after = {}
for name, rows in series.items():
    model.set_adapter(name)
    forecaster.fit(rows[:-HORIZON])
    after[name] = error(rows)
    print(
        f"{name}: mean absolute error {before[name]:.1f} of the base, "
        f"{after[name]:.1f} with its adapter"
    )
assert forecaster.models[0] is network

# %% [markdown]
# Forecast each series with its adapter, in any order. Without an adapter, the base gives the same forecasts as before:

# %%
for name, rows in series.items():
    model.set_adapter(name)
    assert np.isclose(error(rows), after[name])
with model.disable_adapter():
    assert np.isclose(error(series[first]), before[first])

model.save_pretrained("airlines")  # a folder for each adapter
restored = model.unload()
assert all(
    torch.equal(value, frozen[name])
    for name, value in restored.state_dict().items()
)

# %% [markdown]
# `neuralforecast.models.KAN` works the same way.
