# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Requests to examples/serve/app.py: how many, how fast, how many wrong.

    python examples/serve/load_test.py  # five minutes on two cores
    python examples/serve/load_test.py --quick  # half a minute

Serves 1, 100 and 10,000 adapters of a KAN [4, 32, 32, 1] by one replica and
by two, and sends requests over HTTP, each for an adapter drawn at random.
Each answer is compared with that of the same bank in this process. In the
last run, 20,000 requests over 1,000 adapters, a replica is killed, and one
customer's adapter replaced and another's removed meanwhile. Writes serve.json
and .md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import ray
import torch
from peft import get_peft_model, get_peft_model_state_dict
from ray import serve

from peft_lotra import AdapterBank, LoTRAConfig
from peft_lotra.kan import KAN


sys.path.insert(0, str(Path(__file__).parents[2]))  # `examples`
from examples.serve.app import make, reload  # noqa: E402


RESULTS = Path(__file__).parents[1] / "studies" / "results"
URL = "http://127.0.0.1:8000/"
AT_ONCE = 64  # requests that wait for an answer


def make_bank(folder: str, adapters: int) -> AdapterBank:
    """Write a base and a bank into a folder."""
    torch.manual_seed(0)
    base = KAN([4, 32, 32, 1])
    torch.save(base, f"{folder}/base.pt")
    config = LoTRAConfig(r=2, init_weights=False)
    model = get_peft_model(base, config)
    state, bank = get_peft_model_state_dict(model), AdapterBank(model)
    for place in range(adapters):
        drawn = {k: 0.3 * torch.randn_like(v) for k, v in state.items()}
        bank.add(f"customer {place}", drawn)
    bank.save(f"{folder}/bank")
    return bank


@torch.no_grad()
def make_requests(bank: AdapterBank, count: int) -> list[tuple]:
    """(name, input, expected output) of each request."""
    names = random.choices(bank.names, k=count)
    x = 2 * torch.rand(count, 4) - 1
    served = bank.attach().eval()
    y = served(x, adapter_names=names)
    bank.detach()
    return list(zip(names, x.tolist(), y.tolist(), strict=True))


def is_right(answer: httpx.Response, expected: list[float] | None) -> bool:
    """Compare an answer with the output that is expected, None for a 404."""
    if expected is None:
        return answer.status_code == 404
    y = answer.json().get("y", [float("nan")])
    pairs = zip(y, expected, strict=True)
    return all(abs(a - b) < 1e-4 * (1 + abs(b)) for a, b in pairs)


async def send(
    requests: list[tuple], meanwhile=None, leaving: str | None = None
) -> dict[str, float]:
    """Send all requests, AT_ONCE at a time; count and time them.

    The adapter `leaving` is removed meanwhile: a 404 for it is right, too.
    """
    seconds, wrong, again = [], [], 0
    pending = iter(enumerate(requests))
    limits = httpx.Limits(max_connections=AT_ONCE)

    async def worker(client: httpx.AsyncClient) -> None:
        nonlocal again
        for place, (name, x, expected) in pending:
            if meanwhile is not None:
                await meanwhile(place)
            start = time.perf_counter()
            for _ in range(50):  # as a client does: once more after a 5xx
                try:
                    body = {"adapter": name, "x": x}
                    answer = await client.post(URL, json=body)
                    if answer.status_code < 500:
                        break
                except httpx.TransportError:
                    pass
                again += 1
                await asyncio.sleep(0.05)
            seconds.append(time.perf_counter() - start)
            if not is_right(answer, expected):
                if name != leaving or not is_right(answer, None):
                    wrong.append(name)

    start = time.perf_counter()
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        await asyncio.gather(*(worker(client) for _ in range(AT_ONCE)))
    passed = time.perf_counter() - start
    percentiles = statistics.quantiles(seconds, n=100)
    return {
        "requests": len(seconds),
        "sent again": again,
        "wrong": len(wrong),
        "requests / s": len(seconds) / passed,
        "p50 ms": 1e3 * percentiles[49],
        "p99 ms": 1e3 * percentiles[98],
    }


def kill_a_replica() -> None:
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if "SERVE_REPLICA" in actor["name"] and "Customers" in actor["name"]:
            ray.kill(ray.get_actor(**actor), no_restart=False)
            return
    raise RuntimeError("there is no replica to kill")


def measure(adapters: int, replicas: int, count: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        bank = make_bank(folder, adapters)
        app = make(f"{folder}/base.pt", f"{folder}/bank", replicas)
        serve.run(app)
        asyncio.run(send(make_requests(bank, AT_ONCE)))  # warm up
        found = asyncio.run(send(make_requests(bank, count)))
        serve.delete("default")
    return {"adapters": adapters, "replicas": replicas, **found}


def measure_accident(adapters: int, count: int) -> dict:
    """A replica is killed, and then adapters change, while requests run.

    The answers of the replaced adapter are compared with its new weights
    after the reload, and left out before. After it the removed adapter gets
    nothing but 404.
    """
    with tempfile.TemporaryDirectory() as folder:
        bank = make_bank(folder, adapters)
        place = {"base": f"{folder}/base.pt", "bank": f"{folder}/bank"}
        serve.run(make(**place, replicas=2))
        moved, source, removed = bank.names[:3]
        newer = f"{folder}/newer"
        changes = {moved: newer, removed: None}
        rows = [row for row in make_requests(bank, count) if row[0] != moved]
        bank.export(source, newer)
        done = set()

        async def meanwhile(number: int) -> None:
            if number >= count // 3 and "killed" not in done:
                done.add("killed")
                await asyncio.to_thread(kill_a_replica)
            if number >= count * 2 // 3 and "reloaded" not in done:
                done.add("reloaded")
                options = {**place, "replicas": 2}
                await asyncio.to_thread(reload, changes, **options)

        found = asyncio.run(send(rows, meanwhile, leaving=removed))
        bank.add(moved, newer, replace=True)
        after = [r for r in make_requests(bank, 20 * adapters) if r[0] == moved]
        after += [(removed, x, None) for _, x, _ in after]
        found["wrong after the reload"] = asyncio.run(send(after))["wrong"]
        serve.delete("default")
    assert done == {"killed", "reloaded"}
    return {"adapters": adapters, "replicas": 2, **found}


def table(results: dict) -> str:
    rows = [*results["runs"], results["accident"]]
    columns = list(results["runs"][0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "--:|" * len(columns)]
    for row in rows:
        cells = (f"{row[column]:,.0f}" for column in columns)
        lines.append("| " + " | ".join(cells) + " |")
    late = results["accident"]["wrong after the reload"]
    lines += [
        "",
        "In the last line a replica is killed after a third of the requests,",
        "and an adapter replaced after two thirds; of its answers afterwards",
        f"{late} were wrong. {AT_ONCE} requests wait at a time.",
        f"{results['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="few requests")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    quick = args.quick
    count, sizes = (200, (1, 20)) if quick else (4000, (1, 100, 10_000))
    folder = args.output or (Path(tempfile.mkdtemp()) if quick else RESULTS)
    random.seed(0)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    root = str(Path(__file__).parents[2])
    environment = {"env_vars": {"PYTHONPATH": root}}
    # actors without whole cores, so that two replicas fit two cores
    ray.init(num_cpus=8, log_to_driver=False, runtime_env=environment)
    runs = [measure(n, k, count) for n in sizes for k in (1, 2)]
    many = (50, 600) if quick else (1000, 20_000)
    load = f"load {os.getloadavg()[0]:.1f}"
    machine = f"{os.cpu_count()} cores, {load}, ray {ray.__version__}"
    accident = measure_accident(*many)
    results = {"machine": machine, "runs": runs, "accident": accident}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "serve.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(results))
    print(table(results))
    ray.shutdown()


if __name__ == "__main__":
    main()
