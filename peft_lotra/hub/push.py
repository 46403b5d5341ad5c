# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The push of adapters to the Hugging Face Hub: one commit, with the model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..tuner.registration import NAME
from .base_code import check_base_code, check_base_model, hub_id
from .card import README, combine_cards, load_card, write_model_card, written_code
from .contents import adapter_folders, is_checkpoint, peft_type_of, read_adapter


def push_to_hub(
    model: PeftModel | str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    tags: Iterable[str] = (),
    create_pr: bool = False,
    base_model: str | None = None,
    base_code: str | None = None,
    metrics: dict[str, float] | dict[str, dict[str, float]] | list[EvalResult] | None = None,
    license: str | None = None,
    selected_adapters: list[str] | None = None,
) -> CommitInfo:
    """Pushes the adapters of a model to the Hugging Face Hub, with a model card that says how to load them.

    The push is one commit: an error leaves the repository unchanged, or a new one empty. The base model is not pushed.
    Text that a person wrote in README.md is kept, as by `write_model_card`. Adapters of other names in the repository
    stay, and the card lists them. `model.push_to_hub(repo_id)` is the same.

    Args:
        model: The model with the adapters, or a folder that `save_pretrained` wrote.
        repo_id: The repository, "user/name". It is created if it does not exist.
        private: Whether a new repository is private.
        revision: The branch to commit to. It is created from the main branch if it does not exist.
        token: The access token, by default the one of `hf auth login` or HF_TOKEN.
        commit_message: The first line of the commit.
        tags: Tags besides "lotra", "kan" and "peft-plugin".
        create_pr: Whether to open a pull request instead of committing.
        base_model, base_code, metrics, license: As in `write_model_card`.
        selected_adapters: The names of the adapters to push, by default all. "default" goes to the root of the
            repository, each other adapter to a subfolder of its name.

    Returns:
        The commit, or the pull request.

    Raises:
        ValueError: An adapter is not of LoTRA, or the folder contains none; the repository contains an adapter of
            another method, a README.md with broken front matter, or is public in spite of `private`; an argument is
            invalid.
        LocalTokenNotFoundError: No token is known.
        HfHubHTTPError: The Hub refuses the push.

    Example:
        ```python
        push_to_hub(model, "user/kan-rotated", base_model="user/kan", metrics={"accuracy": 0.853})
        ```
    """
    if isinstance(model, PeftModel):
        _check_lotra(model, selected_adapters)
        save = partial(_save_model, model, selected_adapters)
    elif isinstance(model, (str, os.PathLike)):
        save = partial(_save_files, Path(model), _check_folder(Path(model), selected_adapters))
    else:
        raise ValueError(f"`model` is a {type(model).__name__}, expected a PeftModel or the folder of an adapter.")
    check_base_model(base_model)
    check_base_code(base_code)
    target = _Target(repo_id, private, revision, token, create_pr)
    with _explained(target.repo_id), TemporaryDirectory() as name:
        folder = Path(name)
        target.look()
        save(folder)
        for path in adapter_folders(folder).values():
            target.check_adapter((path / CONFIG_NAME).relative_to(folder).as_posix())
            _set_base(path / CONFIG_NAME, base_model)
        here = load_card(folder / README)
        card = combine_cards(here, target.load_card())
        if card is not None:
            card.save(folder / README)
        others = target.copy_other_adapters(folder)
        write_model_card(
            model if isinstance(model, PeftModel) else None,
            folder,
            repo_id=target.repo_id,
            revision=None if create_pr else revision,
            base_model=base_model,
            base_code=base_code or (None if base_model else written_code(here)),
            tags=tags,
            metrics=metrics,
            license=license,
        )
        for path in others:  # which are there, and stay as they are
            path.unlink()
        return target.commit(folder, commit_message)


def _selected(names: list[str] | None, present: Iterable[str], owner: str) -> list[str]:
    names = list(present) if names is None else names
    if not names or not set(names) <= set(present):
        raise ValueError(f"`selected_adapters` is {names}, {owner} has {list(present)}.")
    return names


def _check_lotra(model: PeftModel, selected_adapters: list[str] | None) -> None:
    names = _selected(selected_adapters, model.peft_config, "the model")
    kinds = ((name, model.peft_config[name].peft_type) for name in names)
    others = {name: getattr(kind, "value", kind) for name, kind in kinds if kind != NAME}
    if others:
        raise ValueError(f"Adapters of other methods are not pushed here: {others}. Use `selected_adapters`.")


def _check_folder(folder: Path, selected_adapters: list[str] | None) -> list[Path]:
    saved = adapter_folders(folder)
    if not saved:
        raise ValueError(f"{folder} is no adapter: it has no {CONFIG_NAME}.")
    adapters = [saved[name] for name in _selected(selected_adapters, saved, str(folder))]
    for path in adapters:
        read_adapter(path)
    load_card(folder / README)
    return adapters


def _save_model(model: PeftModel, selected_adapters: list[str] | None, folder: Path) -> None:
    model.save_pretrained(str(folder), selected_adapters=selected_adapters)
    (folder / README).unlink()  # the card by PEFT, which would replace the card of the repository


def _save_files(origin: Path, adapters: list[Path], folder: Path) -> None:
    """Copies the files of the adapters and the card, but no other files of a training."""
    for path in adapters:
        copy = folder / path.relative_to(origin)
        copy.mkdir(exist_ok=True)
        for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            shutil.copyfile(path / file, copy / file)
    if (origin / README).is_file():
        shutil.copyfile(origin / README, folder / README)


def _is_lotra(config: Path) -> bool:
    try:
        return peft_type_of(config) == NAME
    except ValueError:  # broken
        return False


@dataclass
class _Target:
    """The destination of a push, and its present state."""

    repo_id: str
    private: bool | None
    revision: str | None
    token: str | None
    create_pr: bool
    # set by `look`: whether the branch exists, the last commit if the repository exists, and the files of the commit
    has_branch: bool = False
    head: str | None = None
    files: frozenset[str] = frozenset()
    api: HfApi = field(init=False)

    def __post_init__(self) -> None:
        if self.create_pr and self.revision not in (None, "main"):
            raise ValueError(f"A pull request is made for the main branch, `revision` is {self.revision!r}.")
        if not (self.token or get_token()) or self.token is False:
            raise LocalTokenNotFoundError(
                "Not logged in to the Hugging Face Hub. Run `hf auth login`, set HF_TOKEN, or pass `token`."
            )
        self.api = HfApi(token=self.token)
        if "/" not in self.repo_id:
            self.repo_id = f"{self.api.whoami()['name']}/{self.repo_id}"

    def look(self) -> None:
        try:
            try:
                info = self.api.model_info(self.repo_id, revision=self.revision)
                self.has_branch = True
            except RevisionNotFoundError:
                info = self.api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            return
        if self.private and info.private is False:
            raise ValueError(
                f"`private=True`, but {self.repo_id} exists and is public. Make it private first "
                "(`HfApi().update_repo_settings`), or push to another repository."
            )
        self.head = info.sha
        self.files = frozenset(self.api.list_repo_files(self.repo_id, revision=self.head))

    def download(self, file: str) -> Path:
        return Path(hf_hub_download(self.repo_id, file, revision=self.head, token=self.token))

    def load_card(self) -> ModelCard | None:
        if README not in self.files:
            return None
        return load_card(self.download(README), f"{README} in {self.repo_id}")

    def copy_other_adapters(self, folder: Path) -> list[Path]:
        """Copies the adapters of the repository that a push leaves as they are, for the card; returns their files."""
        candidates = []
        for config in sorted(file for file in self.files if PurePosixPath(file).name == CONFIG_NAME):
            place = PurePosixPath(config).parent
            weights = (place / SAFETENSORS_WEIGHTS_NAME).as_posix()
            here = len(place.parts) <= 1 and not is_checkpoint(place.name) and weights in self.files
            if here and not (folder / config).exists():
                candidates.append((config, weights))
        found = self.download_all([config for config, _ in candidates])
        ours = [pair for pair in candidates if _is_lotra(found[pair[0]])]
        found |= self.download_all([weights for _, weights in ours])
        copied = []
        for pair in ours:
            with suppress(ValueError):  # a broken one: no subject of this card
                read_adapter(found[pair[0]].parent)
                (folder / pair[0]).parent.mkdir(exist_ok=True)
                copied += [Path(shutil.copyfile(found[file], folder / file)) for file in pair]
        return copied

    def download_all(self, files: list[str]) -> dict[str, Path]:
        """Where these files are, which are downloaded side by side."""
        if not files:
            return {}
        patterns = [escape(file) for file in files]
        folder = Path(snapshot_download(self.repo_id, revision=self.head, token=self.token, allow_patterns=patterns))
        # it returns what it has where the Hub does not answer
        return {file: folder / file if (folder / file).is_file() else self.download(file) for file in files}

    def check_adapter(self, config_file: str) -> None:
        """Raises a ValueError if the repository has an adapter of another method at this path."""
        if config_file not in self.files:
            return
        peft_type = peft_type_of(self.download(config_file))
        if peft_type != NAME:
            raise ValueError(
                f"{self.repo_id} holds a {peft_type} adapter in {config_file}, which a {NAME} adapter would replace. "
                "Push to another repository or `revision`, or delete that one first."
            )

    def commit(self, folder: Path, message: str | None) -> CommitInfo:
        if self.head is None:
            self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        if self.revision and not self.has_branch:
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        # upload_folder may make several commits; `parent_commit` makes commits by others in the meantime an error
        return self.api.create_commit(
            self.repo_id,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files],
            commit_message=message or "Upload LoTRA adapter",
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=self.head,
        )


def _set_base(path: Path, base_model: str | None) -> None:
    """Writes the base model into the configuration of an adapter, and removes the name of a local folder."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model or hub_id(config.get("base_model_name_or_path"))
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Adds the remedy to the errors of the Hub."""
    try:
        yield
    except HfHubHTTPError as error:
        remedies = {
            401: "The Hub does not accept the token: log in again (`hf auth login`).",
            403: f"The token may not write to {repo_id}: it needs the right to write.",
            412: f"{repo_id} was changed during the push, and nothing was pushed: try again.",
        }
        if remedy := remedies.get(error.response.status_code):
            error.append_to_message(f"\n{remedy}")
        raise
