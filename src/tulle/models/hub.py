"""From what the user calls a model to a folder or file on this machine."""

from __future__ import annotations

from pathlib import Path

import tulle
from tulle.errors import UserError
from tulle.models.adapter import WEIGHTS, is_adapter
from tulle.models.gguf.file import is_gguf
from tulle.models.source import INDEX, SINGLE, read_json
from tulle.network import require_hub

REFERENCE = "reference"
"""The name of the model that ships with the package."""
WANTED = ["*.json", "*.safetensors", "tokenizer*", "merges.txt", "vocab.*", "chat_template*", "*.jinja"]
NOT_WANTED = ["consolidated*", "original/*", "onnx/*", "gguf/*"]
"""The same weights again, in other forms."""


def local_folder(model: str | Path) -> Path:
    """The folder of a model given as a local path, ``reference``, or a hub id (``owner/name``).

    A hub id is taken from the local cache if that holds its weights, or fetched; without a network that fails at once.
    Raises ``UserError``.
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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    what = f"the model {name!r}"
    try:
        # Whatever of the model is there: its tokenizer alone may have been fetched.
        cached = Path(snapshot_download(name, local_files_only=True))
        lacking = missing_weights(cached)
        if lacking is None:
            return cached
        what = f"the weights of {name!r} ({lacking} is missing in the hub's cache)"
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise UserError(f"expected a hub id such as owner/name, found {name!r}; check the path") from None
    require_hub(what, "give the path of a local folder")
    try:
        fetched = Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=NOT_WANTED))
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"expected to fetch {name!r} from the hub, found: {str(error).splitlines()[0]}") from None
    lacking = missing_weights(fetched)
    if lacking is not None:
        raise UserError(
            f"expected {name!r} to hold weights as safetensors on the hub, found no {lacking} there; if it holds "
            "*.bin, download the repository and convert it: tulle export FOLDER --to dense -o NEW"
        )
    return fetched


def missing_weights(folder: Path) -> str | None:
    """The file that a folder lacks for being a model, or an adapter; None where it is whole."""
    if is_adapter(folder):
        return None if (folder / WEIGHTS).is_file() else WEIGHTS
    if not (folder / "config.json").is_file():
        return "config.json"
    if (folder / SINGLE).is_file():
        return None
    if not (folder / INDEX).is_file():
        return SINGLE
    shards = read_json(folder / INDEX, "a shard index").get("weight_map")
    names = sorted({str(file) for file in shards.values()}) if isinstance(shards, dict) else []
    return next((file for file in names if not (folder / file).is_file()), None if names else INDEX)
