# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""neuralforecast's KAN, trained on early years of a series, adapted to later ones.

    pip install -e ".[examples,heavy]"
    python examples/studies/forecast_neuralforecast.py  # about half a minute, no network

The series are the monthly airline passengers of 1949 to 1960, which come with neuralforecast. Its KAN learns the years
to 1954; LoTRA adapts it, inside neuralforecast's own `fit`, to those from 1955 to 1959; both forecast 1960.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import logging

import matplotlib
import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import KAN
from neuralforecast.utils import AirPassengersDF
from peft import get_peft_model
from rich.console import Console
from study_tools import files

from peft_lotra import LoTRAConfig, model_summary


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


HORIZON, EARLY = 12, 72  # months


def make_kan(steps: int) -> KAN:
    return KAN(
        h=HORIZON,
        input_size=2 * HORIZON,
        hidden_size=32,
        max_steps=steps,
        scaler_type="standard",
        random_seed=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.Parser(
        __doc__,
        takes="half a minute on two cores",
        writes="forecast_neuralforecast.json, .png, and the adapter",
        folder=command_line.OUTPUT,
        needs="examples,heavy",
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of each training (default: 200)")
    args = parser.parse_args(arguments)
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)

    series = AirPassengersDF[["unique_id", "ds", "y"]]
    known, truth = series[:-HORIZON], series.y.to_numpy()[-HORIZON:]
    forecaster = NeuralForecast(models=[make_kan(args.steps)], freq="ME")
    forecaster.fit(series[:EARLY])
    forecasts = {"base": forecaster.predict(known)["KAN"].to_numpy()}

    network = forecaster.models[0]
    frozen = copy.deepcopy(network.state_dict())
    model = get_peft_model(network, LoTRAConfig(r=2))  # replaces the layers inside the forecaster's network
    forecaster.fit(known[EARLY - 2 * HORIZON :])  # includes the two years that are the inputs of the first forecasts
    forecasts["LoTRA"] = forecaster.predict(known)["KAN"].to_numpy()
    summary = model_summary(model)
    model.save_pretrained(args.output / "neuralforecast")
    merged = model.merge_and_unload()
    forecasts["merged"] = forecaster.predict(known)["KAN"].to_numpy()

    console = Console(width=110)
    console.print(summary)
    errors = {name: float(np.abs(forecast - truth).mean()) for name, forecast in forecasts.items()}
    moved = [name for name, value in merged.state_dict().items() if not value.equal(frozen[name])]
    results = {"mean absolute error": errors, "merged parameters": moved}
    files.write(args.output / "forecast_neuralforecast.json", results)
    for name, error in errors.items():
        console.print(f"{name}: mean absolute error {error:.1f} thousand passengers")

    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    axis.plot(series.ds, series.y, color="black", linewidth=1, label="passengers")
    for name, color in (("base", "tab:red"), ("LoTRA", "tab:green")):
        axis.plot(series.ds[-HORIZON:], forecasts[name], color=color, label=f"{name}: {errors[name]:.1f}")
    axis.axvspan(series.ds.iloc[0], series.ds.iloc[EARLY - 1], color="0.93", label="years of the base")
    axis.set(xlim=(pd.Timestamp("1952-01-31"), series.ds.iloc[-1]), ylabel="thousand passengers in a month")
    axis.legend(title="mean absolute error", loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output / "forecast_neuralforecast.png", dpi=110)
    console.print(f"picture: {args.output / 'forecast_neuralforecast.png'}")


if __name__ == "__main__":
    main()
