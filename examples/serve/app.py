# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Serve the adapters of a bank on Ray Serve, an adapter per request by name.

    pip install -e ".[serve]"
    BASE=network.pt BANK=bank serve run examples.serve.app:app
    curl localhost:8000 -d '{"adapter": "anna", "x": [0.1, 0.2, 0.3, 0.4]}'

docs/scale.md writes both files. `network.pt` is a whole network that
`torch.save` wrote (it is unpickled: load only your own file), `bank` a folder
that `AdapterBank.save` wrote. Requests that arrive
together become one batch, whatever their adapters. Each replica holds the
bank in memory. New weights for a customer reach every replica while requests
run: `reload({"anna": "folders/anna"})`. None instead of a folder removes an
adapter: its requests get status 404, the others of the batch are answered.
"""

from __future__ import annotations

import os
from threading import Lock
from typing import Any

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from peft_lotra import AdapterBank


@serve.deployment(max_ongoing_requests=2048)
class Customers:
    """A replica: the base once, and the bank."""

    def __init__(self, base: str, bank: str, needs_name: bool) -> None:
        torch.set_num_threads(1)
        network = torch.load(base, weights_only=False)
        self.bank = AdapterBank.load(network, bank)
        self.model = self.bank.attach().eval()
        self.pass_lock = Lock()  # no adapter is removed during a pass
        self.width = next(
            module.in_features
            for module in network.modules()
            if hasattr(module, "in_features")
        )
        self.needs_name = needs_name

    def reconfigure(self, adapters: dict[str, str | None]) -> None:
        """Ray calls it on each replica with the present `user_config`."""
        for name, folder in adapters.items():
            if folder is not None:
                self.bank.add(name, folder, replace=True)
            elif name in self.bank:
                with self.pass_lock:
                    self.bank.remove(name)

    @serve.batch(max_batch_size=1024, batch_wait_timeout_s=0.002)
    async def predict(self, rows: list[tuple[str, list[float]]]) -> list:
        """Answer each row; refuse those of adapters that were removed."""
        names, inputs = zip(*rows, strict=True)
        x = torch.tensor(inputs)
        with self.pass_lock, torch.no_grad():
            served = [
                name if name in self.bank else "__base__" for name in names
            ]
            y = self.model(x, adapter_names=served)
        is_finite = torch.cat([x, y], dim=1).isfinite().all(dim=1)
        answers: list[Any] = []
        for row, name in enumerate(names):
            if name != served[row]:
                answers.append(refuse(404, f"there is no adapter {name!r}"))
            elif not is_finite[row]:
                answers.append(refuse(400, "x is not finite, or too large"))
            else:
                answers.append({"y": y[row].tolist()})
        return answers

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
        return await self.predict((name, x))


def refuse(status: int, error: str) -> JSONResponse:
    return JSONResponse({"error": error}, status)


def make(
    base: str,
    bank: str,
    replicas: int = 1,
    needs_name: bool = False,
    adapters: dict[str, str | None] | None = None,
) -> serve.Application:
    """The application; `adapters` are newer folders by name, None to remove."""
    options = {"num_replicas": replicas, "user_config": adapters or {}}
    return Customers.options(**options).bind(base, bank, needs_name)


def reload(adapters: dict[str, str | None], **options: Any) -> None:
    """Give all replicas new weights of these adapters, without a restart.

    `adapters` are all that are newer than the file, None for those that are
    removed: a replica that starts later reads them too.
    """
    serve.run(make(**options, adapters=adapters))


if "BASE" in os.environ:
    app = make(os.environ["BASE"], os.environ["BANK"])
