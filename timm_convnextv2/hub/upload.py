"""Publishing a timm folder on the Hugging Face Hub; what can be checked here is checked before the first request."""

import os
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..checkpoint.card import IMAGES, card_for_repo
from ..checkpoint.provenance import WEIGHTS, origin_of_config, training_of
from ..checkpoint.transfer import is_transfer, read_folder_config, render_folder_card
from ..models.weights import check_weights, first_not_finite

# The bases: `HTTPError` of the HTTP library that this huggingface_hub uses, and OSError (no network, no disk);
# RuntimeError: an upload of a large file that failed, with its cause
_FAULTS: Any = (OSError, RuntimeError, HfHubHTTPError, *HfHubHTTPError.__bases__)
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar")


def _check_folder_weights(folder: Path, config: dict[str, Any]) -> None:
    """The weights are those of the architecture that config.json names, tensor by tensor, and all are finite.

    Of a detector or a segmenter, which only `transfer` can build, they are finite; opening it compares them.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            bad = next((name for name in names if first_not_finite({name: file.get_tensor(name)})), None)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"'{path}' cannot be read as safetensors: it is truncated, or in another format ({e}).") from e
    if not is_transfer(config):
        try:
            model = timm.create_model(f"local-dir:{folder}", pretrained=False, device="meta")
        except Exception as e:  # whatever a constructor says to arguments that it does not know
            raise ValueError(f"'{folder / 'config.json'}' does not describe a model that can be built: {e}") from e
        what = f"'{path}' does not hold the weights of the model that config.json describes"
        check_weights(found, model.state_dict(), what, remedy="Export the model again.")
    if bad:
        raise ValueError(f"'{path}' is not published: '{bad}' has values that are not finite. Export the model again.")


def _check_licence(folder: Path, config: dict[str, Any], card: str) -> None:
    """config.json and card state the same licence, and it is the one that came with the weights."""
    stated = config.get("pretrained_cfg", {}).get("license")
    binding = training_of(config).get("inherited_license")
    if not training_of(config):  # not written by us: the published models' licence follows from their tag
        binding = origin_of_config(config).license
    if binding and stated not in (None, binding):
        raise ValueError(
            f"'{folder / 'config.json'}' states the licence {stated}, but training started from weights under "
            f"{binding}, which stays."
        )
    try:
        stated_there = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except (yaml.YAMLError, ValueError) as e:
        raise ValueError(
            f"The metadata at the head of '{folder / 'README.md'}' are not valid YAML: {e}. Correct them, or delete "
            "the file to have it written again."
        ) from e
    if (stated or binding) and stated_there != (stated or binding):
        raise ValueError(
            f"'{folder / 'README.md'}' states the licence {stated_there}, but the weights are under "
            f"{stated or binding} (config.json). Correct its line 'license:', or delete it to have it written anew."
        )


def check_folder(folder: str | os.PathLike) -> dict[str, Path | bytes]:
    """The files of a timm folder that belong on the Hub, after all checks that need no network.

    Args:
        folder: As `export_encoder`, `export_fcmae`, `export_finetuned`, `export_detector` and `export_segmenter` write
            it. Other files in it are left out.

    Returns:
        Name in the repository: the file, or its content (a README.md that the folder lacks).

    Raises:
        ValueError: No such folder, a missing or foreign `config.json`, weights that are missing, damaged or not those
            of the architecture, pickle files, or a README.md that states another licence. Names the file.
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
            f"'{folder}' holds pickle files, which can run code where they are loaded and are not published: "
            f"{', '.join(pickles)}. Move them elsewhere; the weights belong in {WEIGHTS}."
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"'{folder}' has no {WEIGHTS}. Export the model again.")
    _check_folder_weights(folder, config)
    images = [name for name in IMAGES if (folder / name).is_file()]
    readme = folder / "README.md"
    card = readme.read_text(encoding="utf-8") if readme.is_file() else render_folder_card(config, images)
    _check_licence(folder, config, card)
    files: dict[str, Path | bytes] = {name: folder / name for name in ("config.json", WEIGHTS, *images)}
    files["README.md"] = readme if readme.is_file() else card.encode()
    return files


def files_to_push(folder: str | os.PathLike, repo_id: str, revision: str | None = None) -> dict[str, Path | bytes]:
    """`check_folder`, with the card naming the repository: exactly what `push_to_hub` sends."""
    files = check_folder(folder)
    card = files["README.md"]
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    files["README.md"] = card_for_repo(text, repo_id, revision).encode()
    return files


class _WrongVisibility(RuntimeError):
    """The repository is public and should be private, or the reverse."""


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    """One message for what the Hub or the network answered."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = (getattr(error, "server_message", None) or str(error)).strip().partition("\n")[0].rstrip(".")
    where = f"'{repo_id}'" + (f" (revision '{revision}')" if revision else "")
    if status == 401:
        return (
            f"The Hugging Face Hub did not accept the token for {where} (401: {said}). Log in again with "
            "`hf auth login`, or set HF_TOKEN to a token with write access."
        )
    if status == 403:
        return (
            f"No permission to write to {where} on the Hugging Face Hub (403: {said}). Publish under your own user "
            "name or an organisation that you may write to, with a token that has write access."
        )
    if status == 404:
        return (
            f"The Hugging Face Hub does not know {where} (404: {said}). Check the user or organisation name, and that "
            "the repository was not deleted meanwhile."
        )
    if status is not None:
        return f"The Hugging Face Hub refused {where} ({status}: {said})."
    return (
        f"The Hugging Face Hub could not be reached to publish {where} ({type(error).__name__}: {said}). Check the "
        "network and HF_ENDPOINT, then call again: what was uploaded is not uploaded twice."
    )


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

    Sends `config.json`, `model.safetensors`, `README.md` and the images of the card, and nothing else that lies in
    the folder. The card's code is changed to load from the Hub. Files that the repository has already stay or are
    replaced, in one commit.

    Args:
        folder: As `export_encoder`, `export_fcmae`, `export_finetuned`, `export_detector` and `export_segmenter` write
            it.
        repo_id: `user/name`; it is made if needed.
        private: Whether the repository is private. None: as it is, a new one as the account's default is.
        revision: Branch to write to; made from the main branch if needed.
        commit_message: Title of the commit.
        token: Access token; None uses the one of `hf auth login` or HF_TOKEN.

    Returns:
        Address of the commit.

    Raises:
        ValueError: A folder that is not an export (see `check_folder`), or a repository name that cannot be one.
        RuntimeError: No or no accepted token, no permission, HF_HUB_OFFLINE is set, the Hub cannot be reached or
            refuses; or the repository exists and is not private although that was asked for, or the reverse.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise ValueError(f"'{repo_id}' cannot be the name of a repository, user/name was expected: {e}") from e
    files = files_to_push(folder, repo_id, revision)
    api = HfApi(token=_token(repo_id, token), library_name="timm_convnextv2")
    try:
        full_id = _open_repo(api, repo_id, private, revision)
        if full_id != repo_id:  # the name alone was given: the card needs the user's
            files = files_to_push(folder, full_id, revision)
        commit = api.create_commit(
            full_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=commit_message or f"Model from timm_convnextv2: {Path(folder).resolve().name}",
            revision=revision,
        )
    except _WrongVisibility:
        raise
    except _FAULTS as e:
        raise RuntimeError(_explain(e, repo_id, revision)) from e
    return commit.commit_url


def _token(repo_id: str, token: str | None) -> str:
    """The access token to publish with."""
    if is_offline_mode():
        raise RuntimeError(f"HF_HUB_OFFLINE is set, so '{repo_id}' cannot be published. Unset it, then call again.")
    token = token or get_token()
    if not token:
        raise RuntimeError(
            f"Publishing '{repo_id}' needs an access token of the Hugging Face Hub: `hf auth login`, or set HF_TOKEN."
        )
    return token


def _open_repo(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Makes repository and branch if needed; returns the repository's full name."""
    full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private is not None and bool(api.repo_info(full_id).private) != private:
        raise _WrongVisibility(
            f"'{full_id}' exists and is {'public' if private else 'private'}; nothing was sent. Change its "
            "visibility in its settings on the Hub, or publish under another name."
        )
    if revision not in (None, "main"):
        api.create_branch(full_id, branch=revision, exist_ok=True)
    return full_id
