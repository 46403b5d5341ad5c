# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The push of adapters to the Hugging Face Hub, with the model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME

from .base_code import hub_id
from .card import README, write_model_card
from .contents import read_config, saved_adapters


def push_to_hub(
    thing: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload LoTRA adapters",
    create_pr: bool = False,
    **options: Any,
) -> CommitInfo:
    """Push the adapters of a model, a bank or a family to the Hugging Face Hub, with a card on how to load them.

    The base model is not pushed. Text that a person wrote in the README.md of the repository is kept. Adapters of
    other names in the repository stay, but the card lists those that are pushed.

    Args:
        thing: A `PeftModel`, an `AdapterBank` or a `ParametricAdapter`.
        repo_id: The repository, "user/name". It is created if it does not exist.
        private: Whether a new repository is private.
        revision: The branch to commit to. It is created from the main branch if it does not exist.
        token: The access token, by default the one of `hf auth login` or HF_TOKEN.
        commit_message: The first line of the commit.
        create_pr: Whether to open a pull request instead of committing.
        options: For the card of a model or a bank, `base_model` and `base_code`, as in `write_model_card`; of a model
            also `tags`, `metrics` and `license`, and `selected_adapters`, the names of the adapters to push, by
            default all. "default" goes to the root of the repository, each other adapter to a subfolder of its name.

    Returns:
        The commit, or the pull request.

    Raises:
        ValueError: There is no LoTRA adapter, an argument is invalid, or the repository is public despite `private`.
            A bank holds only some adapters of this repository, or has values that are not finite.
        HfHubHTTPError: The Hub refuses the push.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, push_to_hub
        >>> from peft_lotra.kan import KAN
        >>> base = KAN([2, 8, 1])
        >>> commit = base.push_to_hub("user/kan")
        >>> model = get_peft_model(base, LoTRAConfig())
        >>> commit = push_to_hub(model, "user/kan-rotated", base_model="user/kan", metrics={"accuracy": 0.853})
        >>> commit.commit_message
        'Upload LoTRA adapters'
    """
    api = HfApi(token=token)
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    with TemporaryDirectory() as folder:
        if isinstance(thing, PeftModel):
            _save_adapters(thing, folder, options.pop("selected_adapters", None), options.get("base_model"))
            _fetch_card(api, repo_id, revision, folder)  # in place of PEFT's
            write_model_card(thing, folder, repo_id=repo_id, revision=None if create_pr else revision, **options)
        else:
            _fetch_card(api, repo_id, revision, folder)
            thing._write_for_hub(folder, repo_id, **options)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"`private=True`, but {repo_id} exists and is public. Make it private first.")
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[README, f"*{CONFIG_NAME}", "*.safetensors"],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def _fetch_card(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    folder: str,
) -> None:
    """Copy the card of a repository into a folder, if there is one."""
    if revision and not api.revision_exists(repo_id, revision):
        revision = None
    if api.file_exists(repo_id, README, revision=revision):
        card = api.hf_hub_download(repo_id, README, revision=revision)
        shutil.copyfile(card, Path(folder, README))


def _save_adapters(
    model: PeftModel,
    folder: str,
    names: list[str] | None,
    base_model: str | None,
) -> None:
    """Save the adapters of a model, whose configurations name no path of this machine."""
    model.save_pretrained(folder, selected_adapters=names)
    for path in saved_adapters(folder).values():
        config = read_config(path)
        config["base_model_name_or_path"] = base_model or hub_id(config.get("base_model_name_or_path"))
        text = json.dumps(config, indent=2, sort_keys=True)
        (path / CONFIG_NAME).write_text(text, encoding="utf-8")
