# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""DistributedDataParallel over two processes."""

import json

from behaving import python


WORKER = """
import json, os
import torch, torch.distributed as dist
from behaving import X, net
from peft import PeftModel, get_peft_model
from peft_lotra import LoTRAConfig, create_lotra_optimizer
from torch.nn.parallel import DistributedDataParallel

rank = int(os.fork() == 0)  # both share the imports
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=rank, world_size=2)

def train(x, wrap, steps=3):
    torch.manual_seed(5)
    model = get_peft_model(net().double(), LoTRAConfig(r=2, init_weights=False))
    run = wrap(model)
    optimizer = create_lotra_optimizer(model, torch.optim.SGD, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        run(x).square().mean().backward()
        optimizer.step()
    return model

x = X.double()
model = train(x[rank::2], DistributedDataParallel)
start, whole = (train(x, lambda model: model, steps).state_dict() for steps in (0, 3))
apart = max((t - whole[name]).abs().max().item() for name, t in model.state_dict().items())
moved = [name for name, t in model.state_dict().items() if not torch.equal(t, start[name])]
if rank == 0:
    model.save_pretrained("adapter")
dist.barrier()
loaded = (PeftModel.from_pretrained(net().double(), "adapter")(x) - model(x)).abs().max().item()
json.dump([apart, loaded, moved], open(f"{rank}.json", "w"))
dist.destroy_process_group()
if rank == 0:
    os.wait()
"""


def test_as_one_process_with_the_whole_batch(tmp_path):
    python(WORKER, tmp_path)
    for rank in (0, 1):
        apart, loaded, moved = json.loads((tmp_path / f"{rank}.json").read_text())
        assert apart < 1e-12 and loaded < 1e-12
        assert len(moved) == 8 and all("lotra_" in name for name in moved)
