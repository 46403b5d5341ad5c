# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Serve the adapters of a bank over HTTP, from one process: a script to copy.

    pip install fastapi uvicorn
    uvicorn fastapi_app:app --limit-concurrency 1000

Run it in a folder with `base.pt` (the weights of the base), `bank` (saved by
`AdapterBank.save`), and `customers` (one folder per new adapter).
"""

import asyncio
import fcntl
import logging
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Lock
from typing import Annotated

import torch
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field, StringConstraints

from peft_lotra import AdapterBank
from peft_lotra.kan import KAN


# no slash and no dot, or a name could lead out of `customers`
Name = Annotated[str, StringConstraints(pattern=r"^[\w-]{1,64}$")]


class Request(BaseModel):
    customer: Name
    x: list[float] = Field(min_length=4, max_length=4)


base = KAN([4, 32, 4])
base.load_state_dict(torch.load("base.pt"))
# a second process fails here: its `save` would undo changes of the first
process_lock = open("bank/lock", "w")
fcntl.flock(process_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
bank = AdapterBank.load(base, "bank")
served = bank.attach().eval()
customers = Path("customers").resolve()
change_lock = Lock()  # each change is saved before the next one
# keeps adapters from being removed after `answer` has checked the names
pass_lock = Lock()


def answer(requests):
    """Return an answer to each request, or the exception to raise for it."""
    x = torch.tensor([request.x for request in requests])
    with pass_lock, torch.inference_mode():
        names = [request.customer for request in requests]
        names = [name if name in bank else "__base__" for name in names]
        y = served(x, adapter_names=names)
    is_finite = torch.cat([x, y], dim=1).isfinite().all(dim=1)
    answers = []
    for row, name in enumerate(names):
        if name == "__base__":
            answers.append(HTTPException(404, "there is no such customer"))
        elif not is_finite[row]:
            answers.append(HTTPException(422, "`x` is not finite or too large"))
        else:
            answers.append({"y": y[row].tolist()})
    return answers


async def answer_batches(waiting):
    while True:
        batch = [await waiting.get()]
        await asyncio.sleep(0.002)  # more requests join the batch
        while len(batch) < 1000 and not waiting.empty():
            batch.append(waiting.get_nowait())
        requests, futures = zip(*batch, strict=True)
        try:
            answers = await asyncio.to_thread(answer, requests)
        except Exception:
            logging.exception("a batch failed")
            answers = [HTTPException(500, "the batch failed")] * len(batch)
        for future, result in zip(futures, answers, strict=True):
            if not future.cancelled():
                future.set_result(result)


@asynccontextmanager
async def lifespan(app):
    app.state.waiting = asyncio.Queue()
    task = asyncio.create_task(answer_batches(app.state.waiting))
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/predict")
async def predict(request: Request):
    future = asyncio.get_running_loop().create_future()
    app.state.waiting.put_nowait((request, future))
    result = await future
    if isinstance(result, HTTPException):
        raise result
    return result


@app.get("/customers")
def list_customers():
    return {"customers": bank.names}


@app.put("/customers/{name}", status_code=204)
def add(name: Name):
    if not (customers / name).is_dir():
        raise HTTPException(404, f"there is no folder customers/{name}")
    with change_lock:
        try:
            bank.add(name, customers / name, replace=True)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        bank.save("bank")


@app.delete("/customers/{name}", status_code=204)
def remove(name: Name):
    with change_lock:
        is_there = name in bank
        if is_there:
            with pass_lock:
                bank.remove(name)
        # even if the adapter is gone: an earlier save may have failed
        bank.save("bank")
    if not is_there:
        raise HTTPException(404, "there is no such customer")
