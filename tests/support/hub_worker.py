# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The clients of `tests/hub/test_push.py`, each a process of its own: `python hub_worker.py STEP FOLDER`.

They share a folder with the test, and write what they found to `FOLDER/STEP.json`. HF_ENDPOINT is the stand-in Hub,
HF_TOKEN belongs to ann, HF_HOME is empty.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from peft import LoraConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from peft_lotra import LoTRAConfig, cli, push_to_hub, write_model_card
from peft_lotra.kan import KANConfig, KANModel


X = torch.linspace(-0.9, 0.9, 15).view(5, 3)
PLAIN = "import torch\nfrom peft_lotra.kan import KAN\n\ntorch.manual_seed(3)\nbase = KAN([3, 8, 2])"
MINE = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My adapter\n\nIt reads scans.\n"


@torch.no_grad()
def output(model) -> list:
    found = model(X)
    return getattr(found, "logits", found).tolist()


def adapted(base, seed: int, **kwargs) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(base, LoTRAConfig(r=2, init_weights=False), **kwargs).eval()


def base() -> KANModel:
    return KANModel.from_pretrained("ann/kan")


def error_of(*args, **kwargs) -> list[str]:
    try:
        push_to_hub(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def push(folder: Path) -> dict:
    outputs = {}

    def pushed(name: str, model: PeftModel, **kwargs):
        outputs[name] = output(model)
        return push_to_hub(model, f"ann/{name}", **kwargs)

    KANModel(KANConfig(widths=(3, 8, 2))).push_to_hub("ann/kan")
    public = adapted(base(), 1)
    pushed("public", public, metrics={"r2": 0.9}, tags=["digits"], commit_message="first")
    found = {"again": push_to_hub(public, "ann/public", tags=["digits"]).oid}
    second = adapted(base(), 2)
    outputs["v2"] = output(second)
    push_to_hub(second, "ann/public", revision="v2")
    found["pull request"] = push_to_hub(adapted(base(), 3), "ann/public", create_pr=True).pr_url
    pushed("private", adapted(base(), 4), private=True)
    pushed("named", adapted(base(), 5, adapter_name="named"))

    several = adapted(base(), 6)
    several.add_adapter("other", LoTRAConfig(r=(1, 2, 3), init_weights=False))
    pushed("several", several)
    push_to_hub(several, "ann/one", selected_adapters=["other"])
    several.set_adapter("other")
    outputs["other"] = output(several)

    plain = {}
    exec(PLAIN, plain)
    plain = adapted(plain["base"], 7)
    pushed("plain", plain, base_code=PLAIN)
    push_to_hub(plain, "ann/plain")  # the code stays

    # loaded from a folder of this machine, of which nobody else must hear
    base().save_pretrained(folder / "kan")
    pushed("here", adapted(KANModel.from_pretrained(folder / "kan"), 8))

    # a person wrote there before
    HfApi().create_repo("ann/kept")
    HfApi().upload_file(path_or_fileobj=MINE.encode(), path_in_repo="README.md", repo_id="ann/kept")
    pushed("kept", public)
    push_to_hub(public, "ann/kept", metrics={"r2": 0.5})

    # from a folder with the files of a training
    public.save_pretrained(folder / "adapter")
    write_model_card(public, folder / "adapter", metrics={"r2": 0.25}, license="mit")
    (folder / "adapter" / "optimizer.pt").write_bytes(b"not wanted")
    public.save_pretrained(folder / "adapter" / "checkpoint-10")
    outputs["folder"] = output(public)
    push_to_hub(folder / "adapter", "ann/folder")
    push_to_hub(folder / "adapter", "ann/kept", revision="again")

    lora = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    errors = {
        "public": error_of(public, "ann/public", private=True),
        "foreign": error_of(public, "bob/public"),
        "base_model": error_of(public, "ann/new", base_model="/home/ann/kan"),
        "metrics": error_of(public, "ann/new", metrics={"r2": float("nan")}),
        "selected": error_of(public, "ann/new", selected_adapters=["nobody"]),
        "argument": error_of(public, "ann/new", licence="mit"),
        "lora": error_of(lora, "ann/new"),
        "no model": error_of(base(), "ann/new"),
        "no adapter": error_of(folder / "kan", "ann/new"),
    }
    return {**found, "outputs": outputs, "errors": errors}


def pull(folder: Path) -> dict:
    """Everything from a clean cache; the snippets of the cards are run as they stand."""
    outputs = {}
    for name in ("public", "private", "named", "several", "plain", "folder", "kept", "v2"):
        repo, revision = ("ann/public", "v2") if name == "v2" else (f"ann/{name}", None)
        text = Path(hf_hub_download(repo, "README.md", revision=revision)).read_text()
        (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        namespace = {}
        exec(snippet, namespace)
        outputs[name] = output(namespace["model"])
    outputs["other"] = output(PeftModel.from_pretrained(base(), "ann/one", subfolder="other"))

    def command(*args: str) -> list:
        result = CliRunner().invoke(cli.app, list(args))
        return [result.exit_code, result.stdout, result.stderr]

    os.chdir(folder)
    commands = {
        "inspect": command("inspect", "ann/public", "--json"),
        "inspect named": command("inspect", "ann/named"),
        "merge": command("merge", "ann/kan", "ann/public", "merged", "--revision", "v2"),
        "missing": command("inspect", "ann/nothing"),
        "no adapter": command("inspect", "ann/kan"),
    }
    outputs["merged"] = output(KANModel.from_pretrained("merged"))
    return {"outputs": outputs, "commands": commands}


def docs(folder: Path) -> dict:
    """The python of docs/hub.md: what the model puts out, pushed and pulled."""
    text = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    train = "[p.data.add_(0.1 * torch.randn_like(p)) for p in model.parameters() if p.requires_grad]"
    os.chdir(folder)
    there, here = {"torch": torch}, {}
    pushing, pulling = re.findall(r"```python\n(.*?)```", text.split("## Share it\n")[1], re.DOTALL)[:2]
    assert "# ... train ..." in pushing
    exec(pushing.replace("# ... train ...", train), there)
    exec(pulling, here)
    x = torch.rand(4, 3)
    return {side: state["model"].eval()(x).logits.tolist() for side, state in (("pushed", there), ("pulled", here))}


if __name__ == "__main__":
    step, where = sys.argv[1], Path(sys.argv[2])
    (where / f"{step}.json").write_text(json.dumps(globals()[step](where)))
