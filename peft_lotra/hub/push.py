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
    model: PeftModel,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload LoTRA adapter",
    create_pr: bool = False,
    selected_adapters: list[str] | None = None,
    **card: Any,
) -> CommitInfo:
    """Push the adapters of a model to the Hugging Face Hub, with a model card that says how to load them.

    The base model is not pushed. Text that a person wrote in the README.md of the repository is kept. Adapters of
    other names in the repository stay, but the card lists those that are pushed.

    Args:
        model: The model with the adapters.
        repo_id: The repository, "user/name". It is created if it does not exist.
        private: Whether a new repository is private.
        revision: The branch to commit to. It is created from the main branch if it does not exist.
        token: The access token, by default the one of `hf auth login` or HF_TOKEN.
        commit_message: The first line of the commit.
        create_pr: Whether to open a pull request instead of committing.
        selected_adapters: The names of the adapters to push, by default all. "default" goes to the root of the
            repository, each other adapter to a subfolder of its name.
        card: `base_model`, `base_code`, `metrics` and `license`, as in `write_model_card`.

    Returns:
        The commit, or the pull request.

    Raises:
        ValueError: There is no LoTRA adapter, an argument is invalid, or the repository is public despite `private`.
        HfHubHTTPError: The Hub refuses the push.

    Example:
        ```python
        push_to_hub(model, "user/kan-rotated", base_model="user/kan", metrics={"accuracy": 0.853})
        ```
    """
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=selected_adapters)
        for path in saved_adapters(folder).values():
            config = read_config(path)
            # no path of this machine
            base_model = card.get("base_model") or hub_id(config.get("base_model_name_or_path"))
            config["base_model_name_or_path"] = base_model
            text = json.dumps(config, indent=2, sort_keys=True)
            (path / CONFIG_NAME).write_text(text, encoding="utf-8")
        repo_id = fetch_card(folder, repo_id, revision, token)
        branch = None if create_pr else revision
        write_model_card(model, folder, repo_id=repo_id, revision=branch, **card)
        return upload(
            folder, repo_id, commit_message, private=private, token=token, revision=revision, create_pr=create_pr
        )


def fetch_card(
    folder: str,
    repo_id: str,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Copy the card of a repository into a folder, if there is one, and return the repository's whole name."""
    api = HfApi(token=token)
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    if revision and not api.revision_exists(repo_id, revision):
        revision = None
    if api.file_exists(repo_id, README, revision=revision):
        card = api.hf_hub_download(repo_id, README, revision=revision)
        shutil.copyfile(card, Path(folder, README))
    return repo_id


def upload(
    folder: str,
    repo_id: str,
    commit_message: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload the card, the configurations and the safetensors of a folder, with the arguments of `push_to_hub`."""
    api = HfApi(token=token)
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
