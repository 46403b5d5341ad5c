# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Serves the adapters of a bank on Ray Serve, an adapter per request by name.

    pip install -e ".[serve]"
    BASE=base.pt BANK=bank serve run examples.serve.app:app
    curl localhost:8000 -d '{"adapter": "anna", "x": [0.1, 0.2, 0.3, 0.4]}'

`base.pt` is a network that `torch.save` wrote (it is unpickled: your own
file), `bank` a folder that `AdapterBank.save` wrote. Requests that arrive
together become one batch, whatever their adapters. All replicas on a machine
map one file. New weights for a customer reach every replica while requests
run: `reload({"anna": "folders/anna"})`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from peft_lotra import AdapterBank


@serve.deployment(max_ongoing_requests=2048)
class Customers:
    """A replica: the base once, and the bank mapped from its file."""

    def __init__(self, base: str, bank: str, needs_name: bool) -> None:
        torch.set_num_threads(1)
        network = torch.load(base, weights_only=False)
        self.bank = AdapterBank.load(network, bank, mapped=True)
        self.model = self.bank.attach().eval()
        self.width = next(
            module.in_features
            for module in network.modules()
            if hasattr(module, "in_features")
        )
        self.needs_name = needs_name

    def reconfigure(self, adapters: dict[str, str]) -> None:
        """Ray calls it on each replica with the present `user_config`."""
        for name, folder in adapters.items():
            self.bank.add(name, folder, replace=True)

    @serve.batch(max_batch_size=1024, batch_wait_timeout_s=0.002)
    async def predict(self, rows: list[tuple[str, list[float]]]) -> list:
        names, inputs = zip(*rows, strict=True)
        with torch.no_grad():
            y = self.model(torch.tensor(inputs), adapter_names=list(names))
        return y.tolist()

    async def __call__(self, request: Request) -> Any:
        try:
            body = await request.json()
            x = [float(value) for value in body["x"]]
            name = body.get("adapter", "__base__")
        except (ValueError, TypeError, KeyError, AttributeError):
            return refuse(400, 'send {"adapter": NAME, "x": [numbers]}')
        if len(x) != self.width:
            return refuse(400, f"x has {len(x)} numbers, not {self.width}")
        if "adapter" not in body and self.needs_name:
            return refuse(400, "the request names no adapter")
        if name != "__base__" and name not in self.bank:
            return refuse(404, f"there is no adapter {name!r}")
        return {"y": await self.predict((name, x))}


def refuse(status: int, error: str) -> JSONResponse:
    return JSONResponse({"error": error}, status)


def make(
    base: str,
    bank: str,
    replicas: int = 1,
    needs_name: bool = False,
    adapters: dict[str, str] | None = None,
) -> serve.Application:
    """The application; `adapters` are newer folders by name."""
    options = {"num_replicas": replicas, "user_config": adapters or {}}
    return Customers.options(**options).bind(base, bank, needs_name)


def reload(adapters: dict[str, str], **options: Any) -> None:
    """Gives all replicas new weights of these adapters, without a restart.

    `adapters` are all that are newer than the file: a replica that starts
    later reads them too.
    """
    serve.run(make(**options, adapters=adapters))


if "BASE" in os.environ:
    app = make(os.environ["BASE"], os.environ["BANK"])
