# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Groups of processes for tests of `torch.distributed`."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


SUPPORT = Path(__file__).parent


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_group(worker, world, folder):
    """Run a script, by its path from tests/support, in `world` processes; return what each wrote to its argument."""
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
    env |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1]), env.get("PYTHONPATH", "")])
    processes = []
    try:
        for rank in range(world):
            command = [sys.executable, str(SUPPORT / worker), str(folder / f"{rank}.json")]
            with open(folder / f"{rank}.log", "w") as log:
                processes.append(
                    subprocess.Popen(command, env={**env, "RANK": str(rank)}, stdout=log, stderr=subprocess.STDOUT)
                )
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"{rank}.log").read_text()[-3000:] for rank in range(world)]
    assert codes == [0] * world, "\n".join(logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def run_worker(function):
    """In such a process: writes what a function of its rank and of their number returns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=20))
    result = function(dist.get_rank(), dist.get_world_size())
    Path(sys.argv[1]).write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # skips the end of the interpreter, where the threads of gloo sometimes abort
