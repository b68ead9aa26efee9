"""From what the user calls a model to a folder on this machine."""

from __future__ import annotations

from pathlib import Path

import tulle
from tulle.errors import UserError
from tulle.models.gguf.file import is_gguf
from tulle.network import require_hub

REFERENCE = "reference"
"""The name of the model that ships with the package."""
WANTED = ["*.json", "*.safetensors", "tokenizer*", "merges.txt", "vocab.*", "chat_template*"]


def local_folder(model: str | Path) -> Path:
    """The folder of a model given as a local path, ``reference``, or a hub id (``owner/name``).

    A hub id is taken from the local cache or fetched; without a network that fails at once. Raises ``UserError``.
    """
    name, path = str(model), Path(model)
    if name == REFERENCE:  # a folder of that name is ./reference
        return Path(tulle.__file__).parent / "reference"
    if path.is_dir() or is_gguf(path) and path.is_file():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"expected a model folder, {REFERENCE!r} or a hub id such as owner/name, found {name!r}; check the path"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except LocalEntryNotFoundError:
        require_hub(f"the model {name!r}", "give the path of a local folder")
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"expected to fetch {name!r} from the hub, found: {str(error).splitlines()[0]}") from None
