"""Failures of the Hugging Face Hub, of the way to it and of its cache: one error, with one message."""

import errno
import re
from typing import Any, NamedTuple

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RevisionNotFoundError

# Everything huggingface_hub raises: its bases are those of its HTTP library, OSError means no network or no disk.
HUB_ERRORS: Any = (OSError, HFValidationError, HfHubHTTPError, *HfHubHTTPError.__bases__)
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class HubError(RuntimeError):
    """Neither the Hub nor its local cache has a file."""


class Failure(NamedTuple):
    """What is known about an error of huggingface_hub."""

    status: int | None  # of HTTP, if the Hub answered
    reason: str  # one line
    disk: bool  # the cache cannot be written


def failure(error: BaseException) -> Failure:
    """Reads an error of huggingface_hub, or one that it caused."""
    cause = error.__cause__ or error
    status = getattr(getattr(error, "response", getattr(cause, "response", None)), "status_code", None)
    said = getattr(error, "server_message", None) or getattr(cause, "server_message", None) or str(cause)
    said = said.strip().partition("\n")[0].rstrip(".: ")
    said = re.sub(r"\?[^\s']*", "", said)  # signed addresses of large files give access without a token
    kind = f"{status}" if status else type(cause).__name__
    return Failure(status, f"{kind}: {said}" if said else kind, getattr(cause, "errno", None) in _OF_THE_DISK)


def hub_error(error: BaseException, hub_id: str, what: str, instead: str = "") -> HubError:
    """The error for a failed download of `what` from `hub_id`, `user/name[@revision]`.

    `instead` says how to pass files that were downloaded elsewhere.
    """
    repo, _, revision = hub_id.partition("@")
    status, reason, disk = failure(error)
    if isinstance(error, RevisionNotFoundError):
        remedy = f"It has no revision '{revision or 'main'}'. Name an existing branch, tag or commit."
    elif isinstance(error, EntryNotFoundError) and status == 404:
        remedy = "It has no model.safetensors, or the Hub did not respond: see the log above."
    elif status == 401:
        remedy = "Check the name and the token: a token in HF_TOKEN that is no longer valid is refused everywhere."
        remedy += " A private repository needs `hf auth login`, or a valid token in HF_TOKEN."
    elif status in (403, 404) or isinstance(error, HFValidationError):
        remedy = "Check the name. A private or gated repository needs `hf auth login`, or a token in HF_TOKEN."
    elif disk:
        remedy = "The cache cannot be written: free space, or set HF_HOME to a folder on another disk."
    else:
        remedy = f"Try again later. Without network, download https://huggingface.co/{repo} elsewhere and "
        remedy += f"{instead}, or " if instead else ""
        remedy += "set HF_HOME to a folder whose hub cache holds the repository."
    return HubError(
        f"Could not get the {what} of '{hub_id}' from the Hugging Face Hub or its local cache ({reason}). {remedy}"
    )
