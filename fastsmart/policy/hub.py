"""Files from the Hugging Face hub, with one clear sentence where there is no network."""

from __future__ import annotations

from pathlib import Path

from fastsmart.errors import UserError


def fetch(repository: str, name: str) -> Path:
    """The local path of one file of a hub repository, downloaded once into the hub's own cache.

    Raises UserError when the repository or file does not exist, or the network does not answer.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError as error:
        raise UserError(f"cannot reach the hub for {repository}; give the path of a local folder instead") from error
    except EntryNotFoundError as error:
        raise UserError(f"{repository} on the hub has no file {name}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot fetch {name} of {repository} from the hub: {reason}") from error
