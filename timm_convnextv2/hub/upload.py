"""Publishes a timm folder on the Hugging Face Hub, after all checks that need no network."""

import os
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_session, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..checkpoint.card import card_for_repo, images_in
from ..checkpoint.provenance import WEIGHTS, origin_of_config, training_of
from ..checkpoint.task_folder import is_task, read_folder_config, render_folder_card
from ..hub_errors import HUB_ERRORS, failure
from ..models.weights import check_weights, first_not_finite

_FAULTS: Any = (*HUB_ERRORS, RuntimeError)  # RuntimeError: the upload of a large file failed, with its cause
_SILENCE = 60.0  # seconds without an answer; a commit of large files takes the Hub a while
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar")


def _check_folder_weights(folder: Path, config: dict[str, Any]) -> None:
    """Refuses weights that are not finite or do not fit the architecture in config.json.

    Weights of detectors and segmenters, which only `transfer` can build, are compared when they are opened.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            bad = next((name for name in names if first_not_finite({name: file.get_tensor(name)})), None)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"'{path}' cannot be read as safetensors: it is truncated or in another format ({e}).") from e
    if not is_task(config):
        try:
            model = timm.create_model(f"local-dir:{folder}", pretrained=False, device="meta")
        except Exception as e:  # constructors raise anything for unknown arguments
            raise ValueError(f"'{folder / 'config.json'}' does not describe a model that can be built: {e}") from e
        what = f"'{path}' does not hold the weights of the model that config.json describes"
        check_weights(found, model.state_dict(), what, remedy="Export the model again.")
    if bad:
        raise ValueError(f"'{path}' is not published: '{bad}' has values that are not finite. Export the model again.")


def _check_licence(folder: Path, config: dict[str, Any], card: str) -> None:
    """Refuses a licence that differs between config.json and card, or from the inherited one."""
    stated, training = config.get("pretrained_cfg", {}).get("license"), training_of(config)
    # without `training`, this package did not write it, and the tag of a published model implies the licence
    binding = training.get("inherited_license") if training else origin_of_config(config).license
    if binding and stated not in (None, binding):
        raise ValueError(
            f"'{folder / 'config.json'}' states the licence {stated}, but training started from weights under "
            f"{binding}, which still applies."
        )
    try:
        stated_there = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except (yaml.YAMLError, ValueError) as e:
        raise ValueError(
            f"The head of '{folder / 'README.md'}' is not valid YAML: {e}. Correct it, or delete the file, which is "
            "then written again."
        ) from e
    if (stated or binding) and stated_there != (stated or binding):
        raise ValueError(
            f"'{folder / 'README.md'}' states the licence {stated_there}, but the weights are under "
            f"{stated or binding} (config.json). Correct the line 'license:', or delete the file to have it rewritten."
        )


def check_folder(folder: str | os.PathLike) -> tuple[list[str], str]:
    """Checks an exported folder; returns the names of its files for the Hub, and the text of its README.md.

    A README.md that it lacks is made from config.json.

    Raises:
        ValueError: No such folder, a missing or foreign `config.json`, weights that are missing, corrupt or do not fit
            the architecture, pickle files, or a README.md that states another licence. Names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is not a folder." if folder.exists() else f"Folder '{folder}' does not exist.")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if (folder / "args.yaml").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"'{folder}' is the folder of a training run, not a timm folder: publish its encoder/ or model/, or let "
            "`timm-convnextv2 publish` export it."
        )
    config = read_folder_config(folder)
    if pickles:
        raise ValueError(
            f"'{folder}' holds pickle files, which can run code when loaded and are not published: "
            f"{', '.join(pickles)}. Move them elsewhere; the weights belong in {WEIGHTS}."
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"'{folder}' has no {WEIGHTS}. Export the model again.")
    _check_folder_weights(folder, config)
    images, readme = images_in(folder), folder / "README.md"
    card = readme.read_text(encoding="utf-8") if readme.is_file() else render_folder_card(config, images)
    _check_licence(folder, config, card)
    return ["config.json", WEIGHTS, *images], card


def files_to_push(folder: str | os.PathLike, repo_id: str, revision: str | None = None) -> dict[str, Path | bytes]:
    """`check_folder`, with the repository's name in the card: exactly the files that `push_to_hub` sends."""
    names, card = check_folder(folder)
    files: dict[str, Path | bytes] = {name: Path(folder) / name for name in names}
    return files | {"README.md": card_for_repo(card, repo_id, revision).encode()}


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    """The message for an error of the Hub or the network."""
    status, reason, _ = failure(error)
    where = f"'{repo_id}'" + (f" (revision '{revision}')" if revision else "")
    if status is None:
        return (
            f"The Hugging Face Hub could not be reached to publish {where} ({reason}). Check the "
            "network and HF_ENDPOINT, then call again: uploaded files are not sent twice."
        )
    remedy = {
        401: "The token was not accepted. Log in again with `hf auth login`, or set HF_TOKEN to a token with write "
        "access.",
        403: "No permission to write. Publish under your own user name or an organisation of yours, with a token that "
        "has write access.",
        404: "Check the user or organisation name, and that the repository still exists.",
    }.get(status, "")
    return f"The Hugging Face Hub refused {where} ({reason}). {remedy}".rstrip()


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Publishes a timm folder as a model on the Hugging Face Hub.

    Sends only `config.json`, `model.safetensors`, `README.md` and the images of the card, in one commit. The card's
    code is changed to load from the Hub.

    Args:
        folder: Written by an export function of this package.
        repo_id: `user/name`; created if needed.
        private: Visibility of the repository; None keeps it, or uses the account's default for a new one.
        revision: Branch to write to; created from the main branch if needed.
        token: Access token; by default that of `hf auth login` or HF_TOKEN.

    Returns the address of the commit.

    Raises:
        ValueError: The folder is not an export (see `check_folder`), the repository's name is invalid, or it exists
            with the other visibility.
        RuntimeError: The token is missing or not accepted, there is no permission, HF_HUB_OFFLINE is set, or the Hub
            cannot be reached or refuses.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise ValueError(f"'{repo_id}' cannot be the name of a repository, expected user/name: {e}") from e
    files = files_to_push(folder, repo_id, revision)
    api = HfApi(token=_token(repo_id, token), library_name="timm_convnextv2")
    try:
        client: Any = get_session()
        if all(seconds is None for seconds in client.timeout.as_dict().values()):  # huggingface_hub would wait for ever
            client.timeout = max(_SILENCE, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        full_id = _open_repo(api, repo_id, private, revision)
        if full_id != repo_id:  # a name without a user: the card needs both
            files = files_to_push(folder, full_id, revision)
        commit = api.create_commit(
            full_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=commit_message or f"Model from timm_convnextv2: {Path(folder).resolve().name}",
            revision=revision,
        )
    except _FAULTS as e:
        raise RuntimeError(_explain(e, repo_id, revision)) from e
    return commit.commit_url


def _token(repo_id: str, token: str | None) -> str:
    """The access token to publish with."""
    if constants.HF_HUB_OFFLINE:  # `is_offline_mode` is in newer releases only
        raise RuntimeError(f"HF_HUB_OFFLINE is set, so '{repo_id}' cannot be published. Unset it, then call again.")
    token = token or get_token()
    if not token:
        raise RuntimeError(
            f"Publishing '{repo_id}' needs an access token of the Hugging Face Hub: `hf auth login`, or set HF_TOKEN."
        )
    return token


def _open_repo(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Creates repository and branch if needed; returns the repository's full name."""
    full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private is not None and bool(api.repo_info(full_id).private) != private:
        raise ValueError(
            f"'{full_id}' exists and is {'public' if private else 'private'}; nothing was sent. Change its "
            "visibility in its settings on the Hub, or publish under another name."
        )
    if revision not in (None, "main"):
        api.create_branch(full_id, branch=revision, exist_ok=True)
    return full_id
