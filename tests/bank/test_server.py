# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Requests to examples/serve/fastapi_app.py: each answer is the answer of the customer's adapter."""

import asyncio
import json
import shutil
import threading
from pathlib import Path

import httpx
import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_lotra import AdapterBank, LoTRAConfig
from peft_lotra.kan import KAN


pytest.importorskip("fcntl")
ROOT = Path(__file__).parents[2]
CODE = (ROOT / "examples" / "serve" / "fastapi_app.py").read_text()


VERSIONS = 6
JSON = {"Content-Type": "application/json"}  # httpx writes no NaN
INPUTS = 64
STAYING = ["stays0", "stays1", "stays2"]


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


def test_answers_during_changes_are_those_of_versions_that_were_there(page, expected):
    x, answers = expected
    versions = {"stays0": [0, 1], "comes0": [2], "stays1": [0]}
    write_adapter("stays0", 1)
    write_adapter("comes0", 2)
    asked = [(name, row) for row in range(INPUTS) for name in versions]
    questions = [question(name, x[row].tolist()) for name, row in asked]
    changes = [("PUT", "/customers/stays0", None), ("PUT", "/customers/comes0", None)]
    changes += [("DELETE", "/customers/stays1", None)]

    responses = send_together(page, *questions[:90], *changes, *questions[90:])

    del responses[90:93]
    for (name, row), response in zip(asked, responses, strict=True):
        if response.status_code == 404:
            assert name != "stays0"
            continue
        y = torch.tensor(response.json()["y"])
        assert any(torch.allclose(y, answers[version][row], 1e-4, 1e-4) for version in versions[name])
