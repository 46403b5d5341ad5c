# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Real requests to examples/serve/fastapi_app.py: each answer is the answer of the customer's adapter.

LOTRA_STRESS_ROUNDS=1000 pytest tests/bank/test_server.py
"""

import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from helpers import Versions
from peft import get_peft_model
from torch.testing import assert_close

from peft_lotra import AdapterBank, LoTRAConfig
from peft_lotra.kan import KAN


pytest.importorskip("fcntl")
ROOT = Path(__file__).parents[2]
CODE = (ROOT / "examples" / "serve" / "fastapi_app.py").read_text()
ROUNDS = int(os.environ.get("LOTRA_STRESS_ROUNDS", "20"))
CLIENTS = 32
VERSIONS = 6
JSON = {"Content-Type": "application/json"}  # httpx writes no NaN
INPUTS = 64
STAYING = ["stays0", "stays1", "stays2"]
COMING = ["comes0", "comes1", "comes2"]


@pytest.fixture
def expected(tmp_path, monkeypatch):
    """Write the files that the server reads, and return the answers of each version of an adapter."""
    monkeypatch.chdir(tmp_path)
    base = KAN([4, 32, 4])
    torch.save(base.state_dict(), "base.pt")
    x = torch.rand(INPUTS, 4) * 2 - 1
    answers = []
    for version in range(VERSIONS):
        copy = KAN([4, 32, 4])
        copy.load_state_dict(base.state_dict())
        model = get_peft_model(copy, LoTRAConfig(r=1 + version % 3, init_weights=False)).eval()
        model.save_pretrained(f"versions/{version}")
        with torch.no_grad():
            answers.append(model(x))
    bank = AdapterBank(base)
    for name in STAYING:
        write_adapter(name, 0)
        bank.add(name, f"customers/{name}")
    bank.save("bank")
    return x, torch.stack(answers)


def write_adapter(name, version):
    shutil.copytree(f"versions/{version}", f"customers/{name}", dirs_exist_ok=True)


@pytest.fixture
def page(expected):
    """The names that the server's code defines, run in this process."""
    names = {"__name__": "app"}
    exec(CODE, names)
    yield names
    names["process_lock"].close()


def send_together(page, *requests):
    """Return the responses to requests (method, path, body) that arrive at the same time."""

    async def send():
        app = page["app"]
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", headers=JSON)
        async with app.router.lifespan_context(app), client:
            responses = [client.request(method, path, content=json.dumps(body)) for method, path, body in requests]
            return await asyncio.gather(*responses)

    return asyncio.run(send())


def question(name, row):
    return "POST", "/predict", {"customer": name, "x": row}


def saved_names(base):
    return AdapterBank.load(base, "bank").names


def test_one_bad_request_leaves_the_answers_of_its_batch(page, expected):
    x, answers = expected
    rows = x[:3].tolist()
    unusable = [[float("nan"), 0, 0, 0], [float("inf"), 0, 0, 0], [1e300, 0, 0, 0], [0, 0, 0]]
    requests = [question("stays0", row) for row in rows + unusable]
    requests += [question(name, rows[0]) for name in ("nobody", "__base__", "stays1")]

    responses = send_together(page, *requests)

    assert [response.status_code for response in responses] == [200] * 3 + [422] * 4 + [404] * 2 + [200]
    y = torch.tensor([responses[row].json()["y"] for row in (0, 1, 2, 9)])
    assert_close(y, answers[0][[0, 1, 2, 0]])


def test_a_pass_that_fails_is_a_500_and_the_next_one_is_answered(page, expected):
    x, answers = expected
    request = question("stays0", x[0].tolist())
    served = page["served"]

    def fail(*args, **kwargs):
        page["served"] = served
        raise RuntimeError("the first pass fails")

    page["served"] = fail
    failed = send_together(page, request, request, request)
    (response,) = send_together(page, request)

    assert [response.status_code for response in failed] == [500] * 3
    assert_close(torch.tensor(response.json()["y"]), answers[0][0])


def test_a_customer_that_is_removed_during_a_pass_is_answered(page, expected):
    x, answers = expected
    served = page["served"]
    remover = threading.Thread(target=page["remove"], args=("stays0",))

    def remove_first(*args, **kwargs):
        remover.start()
        remover.join(0.5)  # it waits for this pass
        return served(*args, **kwargs)

    page["served"] = remove_first
    (response,) = send_together(page, question("stays0", x[0].tolist()))
    remover.join()

    assert response.status_code == 200
    assert_close(torch.tensor(response.json()["y"]), answers[0][0])
    assert "stays0" not in page["bank"]


def test_a_change_is_saved_before_it_is_answered(page):
    base = KAN([4, 32, 4])
    base.load_state_dict(torch.load("base.pt"))
    write_adapter("comes0", 1)

    (added,) = send_together(page, ("PUT", "/customers/comes0", None))
    names_with_it = saved_names(base)
    (removed,) = send_together(page, ("DELETE", "/customers/comes0", None))

    assert added.status_code == removed.status_code == 204
    assert names_with_it == [*STAYING, "comes0"]
    assert saved_names(base) == STAYING


def test_the_list_of_customers_follows_the_changes(page):
    write_adapter("comes0", 1)
    lists = []

    for request in (("PUT", "/customers/comes0", None), ("DELETE", "/customers/stays1", None)):
        send_together(page, request)
        (response,) = send_together(page, ("GET", "/customers", None))
        lists.append(response.json()["customers"])

    assert lists == [["stays0", "stays1", "stays2", "comes0"], ["stays0", "stays2", "comes0"]]


def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(page):
    model = get_peft_model(KAN([4, 32, 4]), LoTRAConfig(r=1))
    model.save_pretrained("customers/comes0")  # of another base

    (response,) = send_together(page, ("PUT", "/customers/comes0", None))

    assert response.status_code == 422
    assert "comes0" in response.json()["detail"]
    assert "base" in response.json()["detail"]
    assert page["bank"].names == STAYING


@pytest.mark.parametrize("name", ["..%2Fversions%2F0", "..", "versions/0", "a.b", "nobody", "a" * 65])
def test_only_folders_of_customers_are_read(page, name):
    (response,) = send_together(page, ("PUT", f"/customers/{name}", None))

    assert response.status_code in (404, 422)
    assert page["bank"].names == STAYING


def test_a_second_worker_on_the_same_bank_is_refused(page):
    second = {"__name__": "app"}

    with pytest.raises(BlockingIOError):
        exec(CODE, second)

    second["process_lock"].close()


@pytest.fixture
def server(expected):
    """The address of the server behind uvicorn in a separate process, and this process."""
    Path("app.py").write_text(CODE)
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", "0", "--no-access-log"]
    log = Path("log.txt")
    with log.open("w") as file:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        while (address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield address[0], process
    finally:
        process.kill()
        process.wait()
        print(log.read_text()[-5000:])


async def use_server(address, x, answers):
    """Send requests while customers come, change and go; return their versions at the end and the statuses."""
    versions = Versions()
    for name in STAYING:
        with versions.change(name, 0):
            pass
    statuses = []

    async def ask(client):
        for _ in range(ROUNDS):
            name = random.choice([*STAYING, *COMING, "nobody"])
            row = random.randrange(INPUTS)
            body = json.dumps({"customer": name, "x": x[row].tolist()})
            if random.random() < 0.01:
                try:
                    await asyncio.wait_for(client.post("/predict", content=body), 0.001)
                except TimeoutError:
                    continue
            begin = time.monotonic()
            response = await client.post("/predict", content=body)
            statuses.append(response.status_code)
            visible = versions.visible(name, begin)
            if response.status_code == 404:
                assert None in visible, f"{name} was there all the time"
                continue
            assert response.status_code == 200, response.text
            y = torch.tensor(response.json()["y"])
            possible = [answers[version][row] for version in visible if version is not None]
            assert any(torch.allclose(y, other, 1e-4, 1e-4) for other in possible), (name, row, y, visible)

    async def change(client, names, questions):
        present = dict.fromkeys(names, names is STAYING)
        while not questions.done():
            name = random.choice(names)
            if names is COMING and present[name] and random.random() < 0.5:
                with versions.change(name, None):
                    response = await client.delete(f"/customers/{name}")
                present[name] = False
            else:
                version = random.randrange(VERSIONS)
                write_adapter(name, version)
                with versions.change(name, version):
                    response = await client.put(f"/customers/{name}")
                present[name] = True
            assert response.status_code == 204, response.text
            await asyncio.sleep(0.01)

    async with httpx.AsyncClient(base_url=address, timeout=None, headers=JSON) as client:
        questions = asyncio.gather(*(ask(client) for _ in range(CLIENTS)))
        await asyncio.gather(questions, change(client, STAYING, questions), change(client, COMING, questions))
    return versions.now(), statuses


@pytest.mark.slow
def test_each_answer_is_that_of_a_version_that_was_there(server, expected):
    x, answers = expected
    address, process = server

    versions, statuses = asyncio.run(use_server(address, x, answers))
    shutil.copytree("bank", "saved")  # what a crash would leave
    process.terminate()
    process.wait()

    assert set(statuses) == {200, 404}
    base = KAN([4, 32, 4])
    base.load_state_dict(torch.load("base.pt"))
    for folder in ("saved", "bank"):
        bank = AdapterBank.load(base, folder)
        assert set(bank.names) == set(versions)
        model = bank.attach().eval()
        with torch.no_grad():
            for name, version in versions.items():
                assert_close(model(x, adapter_names=[name] * INPUTS), answers[version])
        bank.detach()
