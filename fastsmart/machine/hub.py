"""Files from the Hugging Face hub, with one clear sentence where there is no network."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from fastsmart.errors import UserError


def cached(repository: str, name: str) -> Path | None:
    """The local path of a hub file, if this machine's hub cache holds it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def fetch(repository: str, name: str) -> Path:
    """The local path of one file of a hub repository, downloaded once into the hub's own cache.

    Raises UserError when the repository or file does not exist, or the network does not answer.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(
            f"{repository} is no file or folder here, and cannot be the name of a hub repository"
        ) from error
    if not _reachable():  # the library itself would first try again for half a minute
        path = cached(repository, name)
        if path:
            return path
        raise UserError(
            f"there is no network to fetch {repository} from the hub; give the path of a local copy instead"
        )
    try:
        return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError as error:
        raise UserError(f"cannot reach the hub for {repository}; give the path of a local copy instead") from error
    except EntryNotFoundError as error:
        raise UserError(f"{repository} on the hub has no file {name}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot fetch {name} of {repository} from the hub: {reason}") from error


def _reachable() -> bool:
    """Whether the hub's name resolves; behind a proxy nobody can tell, so yes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
