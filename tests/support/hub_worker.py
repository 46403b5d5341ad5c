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


X = torch.linspace(-0.9, 0.9, 15).view(5, 3)
WIDTHS = (3, 8, 2)
PLAIN = """
import torch
from peft_lotra.kan import KAN

torch.manual_seed(3)
base = KAN([3, 8, 2])
"""


def output(model) -> list:
    with torch.no_grad():
        found = model(X)
    return getattr(found, "logits", found).tolist()


def head(repo: str, revision: str = "main") -> str | None:
    refs = HfApi().list_repo_refs(repo).branches
    return next((ref.target_commit for ref in refs if ref.name == revision), None)


def error_of(function, *args, **kwargs) -> list[str]:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def snippets(repo: str, revision: str | None = None) -> list[str]:
    """The Python of a card, as it was pushed."""
    text = Path(hf_hub_download(repo, "README.md", revision=revision)).read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def runnable(found: list[str]) -> list[str]:
    """Those that this version of PEFT can run."""
    import peft

    return found if peft.__version__ >= "0.20" else [text for text in found if "import_allowlist" not in text]


def run(snippet: str) -> list:
    """What the model of a snippet puts out, run as it stands."""
    namespace = {"__name__": "snippet"}
    exec(compile(snippet, "README.md", "exec"), namespace)
    return output(namespace["model"])


def adapted(base, seed: int, **kwargs):
    from peft import get_peft_model

    from peft_lotra import LoTRAConfig

    torch.manual_seed(seed)
    return get_peft_model(base, LoTRAConfig(r=2, init_weights=False), **kwargs).eval()


def push(folder: Path) -> dict:
    from peft import LoraConfig, get_peft_model

    from peft_lotra import LoTRAConfig, push_to_hub, write_model_card
    from peft_lotra.hub import push
    from peft_lotra.kan import KANConfig, KANModel

    found = {"outputs": {}, "errors": {}, "heads": {}}
    torch.manual_seed(0)
    for name, private in (("kan", False), ("private-kan", True)):
        KANModel(KANConfig(widths=WIDTHS, problem_type="regression")).push_to_hub(f"ann/{name}", private=private)
        found["outputs"][name] = output(KANModel.from_pretrained(f"ann/{name}"))
    KANModel(KANConfig(widths=(3, 6, 2))).push_to_hub("ann/other-kan")

    def base():
        return KANModel.from_pretrained("ann/kan")

    def pushed(name: str, model, repo: str, **kwargs) -> None:
        found["outputs"][name] = output(model)
        found["heads"][name] = push_to_hub(model, repo, **kwargs).oid

    public = adapted(base(), 1)
    pushed("public", public, "ann/public", metrics={"r2": 0.9}, tags=["digits"], commit_message="first")
    # unchanged: no second commit
    found["again"] = push_to_hub(public, "ann/public", tags=["digits"]).oid
    pushed("v2", adapted(base(), 2), "ann/public", revision="v2")
    found["pull request"] = push_to_hub(adapted(base(), 3), "ann/public", create_pr=True).pr_url
    pushed("private", adapted(KANModel.from_pretrained("ann/private-kan"), 4), "ann/private", private=True)

    several = adapted(base(), 5)
    torch.manual_seed(6)
    several.add_adapter("other", LoTRAConfig(r=(1, 2, 3), init_weights=False))
    pushed("several", several, "ann/several")
    several.set_adapter("other")
    found["outputs"]["other"] = output(several)
    pushed("named", adapted(base(), 7, adapter_name="named"), "ann/named")

    namespace = {}
    exec(PLAIN, namespace)
    pushed("plain", adapted(namespace["base"], 8), "ann/plain", base_code=PLAIN)

    # loaded from a folder of this machine, of which nobody else must hear
    base().save_pretrained(folder / "kan")
    here = adapted(KANModel.from_pretrained(folder / "kan"), 9)
    pushed("here", here, "ann/here")
    pushed("here, based", here, "ann/based", base_model="ann/kan")

    # a person wrote there before
    text = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My adapter\n\nIt reads scans.\n"
    HfApi().create_repo("ann/kept")
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="ann/kept")
    pushed("kept", public, "ann/kept")
    other = adapted(base(), 12)
    other.save_pretrained(folder / "generated")
    # neither PEFT's unfilled template nor our part alone replaces what the person wrote
    push_to_hub(folder / "generated", "ann/kept")
    write_model_card(other, folder / "generated", metrics={"r2": 0.5}, base_code=PLAIN.replace("base =", "other ="))
    push_to_hub(folder / "generated", "ann/kept", revision="generated")
    push_to_hub(public, "ann/kept")

    # from a folder that has what a training leaves there
    public.save_pretrained(folder / "adapter")
    (folder / "adapter" / "optimizer.pt").write_bytes(b"not wanted")
    found["outputs"]["from a folder"] = found["outputs"]["public"]
    push_to_hub(folder / "adapter", "ann/from-folder")

    # What must not work, and must change nothing. "ann/lora" and "ann/broken" exist for that.
    lora = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(folder / "lora")
    HfApi().create_repo("ann/lora")
    HfApi().upload_folder(repo_id="ann/lora", folder_path=folder / "lora", ignore_patterns="README.md")
    HfApi().create_repo("ann/broken")
    broken = b"---\ntags: [mine\n---\n# Mine\n"
    (folder / "broken").write_bytes(broken)  # HfApi would not push it

    def commits_meanwhile(*args, **kwargs):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="ann/contested")
        write_card(*args, **kwargs)

    attempts = {
        "wrong token": ("ann/public", {"token": "hf_wrong"}),
        "foreign": ("bob/public", {}),
        "lora": ("ann/lora", {}),
        "public": ("ann/public", {"private": True}),
        "invalid base": ("ann/public", {"base_model": "/home/ann/kan"}),
        "invalid metrics": ("ann/public", {"metrics": {"r2": float("nan")}}),
        "request for a branch": ("ann/public", {"create_pr": True, "revision": "v2"}),
        "unknown adapter": ("ann/public", {"selected_adapters": ["nobody"]}),
    }
    before = {repo: head(repo) for repo in ("ann/public", "ann/lora")}
    other = adapted(base(), 10)
    for name, (repo, kwargs) in attempts.items():
        found["errors"][name] = error_of(push_to_hub, other, repo, **kwargs)
    found["errors"]["other method"] = error_of(push_to_hub, lora, "ann/public")
    found["errors"]["no model"] = error_of(push_to_hub, base(), "ann/public")
    found["errors"]["unknown adapter of a folder"] = error_of(
        push_to_hub, folder / "adapter", "ann/public", selected_adapters=["nobody"]
    )
    found["errors"]["no adapter"] = error_of(push_to_hub, folder / "kan", "ann/public")
    found["errors"]["lora folder"] = error_of(push_to_hub, folder / "lora", "ann/public")
    token = os.environ.pop("HF_TOKEN")
    found["errors"]["not logged in"] = error_of(push_to_hub, other, "ann/public")
    os.environ["HF_TOKEN"] = token
    found["unchanged"] = before == {repo: head(repo) for repo in before}

    push_to_hub(public, "ann/contested")
    write_card, push.write_model_card = push.write_model_card, commits_meanwhile
    found["errors"]["contested"] = error_of(push_to_hub, other, "ann/contested")
    push.write_model_card = write_card

    # another user may not write, but may ask
    os.environ["HF_TOKEN"] = "hf_user"
    found["errors"]["of ann"] = error_of(push_to_hub, other, "ann/public")
    found["request of another"] = push_to_hub(other, "ann/public", create_pr=True).pr_url
    found["readme"] = readme(folder)
    return found


def readme(folder: Path) -> dict:
    """The section of docs/hub.md about sharing, line by line."""
    from typer.testing import CliRunner

    from peft_lotra import cli

    text = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    section = text.split("## Share it\n")[1].split("\n## ")[0]
    pushing, pulling = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert "# ... train ..." in pushing

    @torch.no_grad()
    def train(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)

    namespace = {"train": train}
    exec(pushing.replace("# ... train ...", "train(model)"), namespace)
    found = {"pushed": output(namespace["model"])}
    found["pulled"] = run(pulling) if runnable([pulling]) else found["pushed"]
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (folder / "readme").mkdir()
    os.chdir(folder / "readme")
    arguments = [command.removeprefix("peft-lotra ").split() for command in commands.splitlines()]
    results = [CliRunner().invoke(cli.app, command) for command in arguments]
    found["customers"] = customers(text)
    return {**found, "codes": [result.exit_code for result in results], "output": [r.output for r in results]}


def customers(text: str) -> dict[str, list]:
    """The section of docs/hub.md about several adapters of one base: each one's outputs, pushed and pulled."""
    section = text.split("## Customers of one base\n")[1].split("\n## ")[0]
    pushing, pulling = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    train = "[p.data.add_(0.1 * torch.randn_like(p)) for p in model.parameters() if p.requires_grad]"
    assert "    # ... train ..." in pushing
    there, here = {}, {}
    exec(pushing.replace("# ... train ...", train), there)
    exec(pulling, here)
    x, found = torch.rand(4, 4), {}
    for name in ("anna", "ben"):
        for model in (there["model"], here["model"]):
            model.set_adapter(name)
        found[name] = [model(x).tolist() for model in (there["model"], here["model"])]
    return found


def interrupted(folder: Path) -> dict:
    """The server goes when the tensors are there, and the commit is not."""
    from peft_lotra import push_to_hub
    from peft_lotra.kan import KANModel

    model = adapted(KANModel.from_pretrained("ann/kan"), 11)
    broken = error_of(push_to_hub, model, "ann/broken")
    return {"broken": broken, "interrupted": error_of(push_to_hub, model, "ann/public")}


def pull(folder: Path) -> dict:
    """Everything from a clean cache."""
    found = {"outputs": {}, "errors": {}, "cli": {}}
    # the snippets first, since they have to import what they need
    assert "peft" not in sys.modules and "peft_lotra" not in sys.modules
    found["outputs"]["public: snippet 0"] = run(snippets("ann/public")[0])
    assert "peft_lotra" in sys.modules
    for name in ("public", "private", "several", "named", "plain", "from-folder", "kept", "based"):
        for number, snippet in enumerate(runnable(snippets(f"ann/{name}"))):
            found["outputs"][f"{name.replace('-', ' a ')}: snippet {number}"] = run(snippet)
    for number, snippet in enumerate(runnable(snippets("ann/public", "v2"))):
        found["outputs"][f"v2: snippet {number}"] = run(snippet)
    run(*snippets("ann/here"))

    from peft import AutoPeftModel, PeftModel
    from typer.testing import CliRunner

    from peft_lotra import cli
    from peft_lotra.kan import KANModel

    def base():
        return KANModel.from_pretrained("ann/kan")

    def load(repo: str, **kwargs):
        return PeftModel.from_pretrained(base(), repo, **kwargs)

    found["outputs"]["kan: model"] = output(base())
    found["outputs"]["private-kan: model"] = output(KANModel.from_pretrained("ann/private-kan"))
    found["outputs"]["public: model"] = output(load("ann/public"))
    found["outputs"]["v2: model"] = output(load("ann/public", revision="v2"))
    found["outputs"]["other: model"] = output(load("ann/several", subfolder="other"))

    wrong_base = KANModel.from_pretrained("ann/other-kan")
    before = {name: tensor.clone() for name, tensor in wrong_base.state_dict().items()}
    found["errors"]["other base"] = error_of(PeftModel.from_pretrained, wrong_base, "ann/public")
    after = wrong_base.state_dict()
    found["base unchanged"] = list(before) == list(after) and all(torch.equal(after[k], before[k]) for k in before)
    found["errors"]["anonymous"] = error_of(load, "ann/private", token=False)
    found["errors"]["wrong token"] = error_of(load, "ann/private", token="hf_wrong")
    found["errors"]["missing"] = error_of(load, "ann/nothing")
    found["errors"]["allowlist"] = error_of(AutoPeftModel.from_pretrained, "ann/public")

    def command(*args: str) -> dict:
        result = CliRunner().invoke(cli.app, list(args))
        return {"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}

    os.chdir(folder)
    found["cli"]["inspect"] = command("inspect", "ann/public", "--json")
    found["cli"]["inspect other"] = command("inspect", "ann/several", "--subfolder", "other")
    found["cli"]["inspect named"] = command("inspect", "ann/named")
    found["cli"]["merge"] = command("merge", "ann/kan", "ann/public", "merged", "--revision", "v2")
    found["outputs"]["v2: merged"] = output(KANModel.from_pretrained("merged"))
    # merged and extracted again, at full rank
    found["cli"]["extract"] = command("extract", "ann/kan", "merged", "extracted", "--energy", "1")
    found["outputs"]["v2: extracted"] = output(load("extracted"))
    found["cli"]["push"] = command("push", "extracted", "ann/extracted", "--private", "--tag", "mine", "--json")
    found["cli"]["push a copy"] = command("push", "ann/public", "ann/copy")
    found["outputs"]["public: copy"] = output(load("ann/copy"))
    found["cli"]["missing"] = command("inspect", "ann/nothing")
    found["cli"]["no adapter"] = command("inspect", "ann/kan")
    found["cli"]["lora"] = command("push", "ann/public", "ann/lora")
    found["cli"]["other base"] = command("merge", "ann/other-kan", "ann/public", "not-written")
    found["cli"]["no model"] = command("merge", "ann/public", "ann/public", "not-written")
    return found


if __name__ == "__main__":
    step, where = sys.argv[1], Path(sys.argv[2])
    (where / f"{step}.json").write_text(json.dumps(globals()[step](where)))
