# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Data parallelism over one and two processes on the CPU, see `distributed_worker.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).parents[1] / "support" / "distributed_worker.py"
NETWORKS = ("own", "efficient-kan")

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module", params=[1, 2], ids=["world-1", "world-2"])
def ranks(request, tmp_path_factory):
    """What each of the processes of a group found; one group runs everything, since most of its time are imports."""
    folder, world = tmp_path_factory.mktemp("group"), request.param
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    env |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(WORKER.parent), str(WORKER.parents[2]), env.get("PYTHONPATH", "")])
    processes = []
    try:
        for rank in range(world):
            command = [sys.executable, str(WORKER), str(folder / f"{rank}.json")]
            with open(folder / f"{rank}.log", "w") as log:
                processes.append(
                    subprocess.Popen(command, env={**env, "RANK": str(rank)}, stdout=log, stderr=subprocess.STDOUT)
                )
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"{rank}.log").read_text()[-3000:] for rank in range(world)]
    assert codes == [0] * world, "\n".join(logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp-layers", "fsdp2", "fsdp2-layers"])
@pytest.mark.parametrize("network", NETWORKS)
class TestKinds:
    def test_outputs_and_gradients_are_those_of_the_plain_model(self, ranks, network, kind):
        for rank in ranks:
            found = rank["results"][f"{network} {kind}"]
            assert found["output"] < 1e-6 and found["gradients"] < 1e-6
            assert found["gradients are zero"] == []

    def test_a_step_moves_the_adapters_alone(self, ranks, network, kind):
        for rank in ranks:
            found = rank["results"][f"{network} {kind}"]
            assert found["frozen parameters moved"] == [] and found["trained parameters not moved"] == []
            assert found["state"] < 1e-6

    def test_the_gathered_adapter_is_that_of_the_plain_model(self, ranks, network, kind):
        for rank in ranks:
            found = rank["results"][f"{network} {kind}"]
            assert found["saved"] < 1e-6 and found["loaded"] < 1e-6


@pytest.mark.parametrize("kind", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("network", NETWORKS)
def test_sharding_the_base_layer_alone_is_refused(ranks, network, kind):
    for rank in ranks:
        error, message = rank["wrong"][f"{network} {kind}"]
        assert error == "RuntimeError" and "Shard the LoTRALayer" in message
