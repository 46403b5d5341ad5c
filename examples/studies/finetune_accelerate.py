# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One training loop for one process, several, or a sharded model: LoTRA with accelerate.

Shown in docs/scale.md.

That page has the commands. All of them give the same losses (to 1e-5; rounding differs): a batch of 64 rows is split
between the processes. In several processes, DistributedDataParallel averages the gradients. With `--fsdp2`, the
parameters of base and adapter are sharded (`fully_shard`), each adapted layer by itself. The script does the sharding
itself, since `--use_fsdp` of accelerate skips it on CPUs.

The task is that of the quickstart: scikit-learn's handwritten digits, and a network that was trained on them learns to
read them rotated by 30 degrees, from 384 labels. Writes the losses, the accuracy and the adapter, as whole tensors.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from peft import PeftModel, get_peft_model
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from study_tools import files
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from peft_lotra import LoTRAConfig, LoTRALayer, create_lotra_optimizer, find_kan_layers
from peft_lotra.kan import KAN


WIDTHS = [64, 32, 10]
BATCH = 64  # the rows of all processes together
LABELS = 384
TEST = 597


def load_scans() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Plain digits for the base; rotated ones to adapt to, and to test on."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, y = images.reshape(-1, 8, 8)[order.numpy()], torch.tensor(labels)[order]
    rotated = rotate(images, 30, axes=(1, 2), reshape=False, order=1)
    plain, rotated = (torch.tensor(x / 8 - 1, dtype=torch.float32).flatten(1) for x in (images, rotated))
    few = slice(TEST, TEST + LABELS)
    return (
        TensorDataset(plain[TEST:], y[TEST:]),
        TensorDataset(rotated[few], y[few]),
        TensorDataset(rotated[:TEST], y[:TEST]),
    )


def train_base(data: TensorDataset, steps: int) -> KAN:
    """The network to adapt. All processes use one seed and build the same network."""
    kan = KAN(WIDTHS)
    optimizer = torch.optim.AdamW(kan.parameters(), lr=5e-3)
    x, y = data.tensors
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(kan(x[rows]), y[rows]).backward()
        optimizer.step()
    return kan


def checkpoint_layers(model: nn.Module) -> None:
    """Let each adapted layer compute its activations again in the backward pass instead of keeping them."""
    for layer in model.modules():
        if isinstance(layer, LoTRALayer):
            forward = layer.forward
            layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)


def shard(model: nn.Module) -> None:
    """Shards each adapted layer, with base layer and adapters, as one unit, and the remaining modules as another."""
    for layer in list(model.modules()):
        if isinstance(layer, LoTRALayer):
            fully_shard(layer)
    fully_shard(model)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="half a minute on two cores",
        writes="results.json and the adapter",
        folder=command_line.OUTPUT / "accelerate",
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the 384 labels (default: 10)")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate (default: 5e-3)")
    parser.add_argument("--fsdp2", action="store_true", help="shard the parameters")
    parser.add_argument("--gradient-accumulation", type=int, default=1, metavar="N", help="batches in a step")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="trade time for memory")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args()

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=args.gradient_accumulation,
        mixed_precision="bf16" if args.bf16 else "no",
        # a batch is split between the processes; its rows do not depend on the number of processes
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    if BATCH % accelerator.num_processes:
        parser.error(f"A batch of {BATCH} rows cannot be split evenly between {accelerator.num_processes} processes.")
    set_seed(0)
    plain, few, test = load_scans()
    kan = train_base(plain, steps=300)
    base = copy.deepcopy(kan)
    adapter = model = get_peft_model(kan, LoTRAConfig(r=(8, 8, 4)))  # the first name stays, the second is wrapped
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    if args.fsdp2:
        shard(model.to(accelerator.device))
    if args.compile:
        model = torch.compile(model)
    optimizer = create_lotra_optimizer(adapter, torch.optim.AdamW, lr=args.lr, weight_decay=0.0)
    loader = DataLoader(few, batch_size=BATCH, shuffle=True, drop_last=True)
    loader, optimizer = accelerator.prepare(loader, optimizer)
    if not args.fsdp2:  # prevents a second wrapper, DistributedDataParallel
        model = accelerator.prepare(model)

    losses = []
    model.train()
    bar = tqdm(total=args.epochs * len(loader), unit="batch", ncols=100, disable=not accelerator.is_main_process)
    for _ in range(args.epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            bar.update()
    bar.close()

    model.eval()
    x = test.tensors[0].to(accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        logits = model(x).float().cpu()
    accuracy = 100 * (logits.argmax(1) == test.tensors[1]).float().mean().item()
    # whole tensors; every process must take part
    state = get_model_state_dict(adapter, options=StateDictOptions(full_state_dict=True))
    if accelerator.is_main_process:
        adapter.save_pretrained(args.output, state_dict=state)
        reloaded = PeftModel.from_pretrained(base, args.output).to(accelerator.device).eval()
        with torch.no_grad(), accelerator.autocast():  # as above: in bfloat16, outputs differ from float32 by 0.07
            difference = (reloaded(x).float().cpu() - logits).abs().max().item()
        kind = "fully_shard" if args.fsdp2 else accelerator.distributed_type.value
        results = {"processes": accelerator.num_processes, "kind": kind, "losses": losses, "accuracy": accuracy}
        files.replace(args.output / "results.json", results)
        print(find_kan_layers(reloaded))
        print(f"{accelerator.num_processes} process(es), {kind}: loss {losses[0]:.6f} to {losses[-1]:.6f}, ", end="")
        print(f"accuracy on rotated digits {accuracy:.1f} %")
        print(f"reloaded from {args.output}: largest difference of an output {difference:.1e}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
