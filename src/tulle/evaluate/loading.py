"""Models for evaluation: dense or compressed, from a folder or from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tulle.errors import UserError
from tulle.network import require_hub

REFERENCE = "reference"
"""The name of the bundled model, wherever a model is asked for."""


def reference_folder() -> Path:
    """The bundled reference model. Raises ``UserError`` if this installation has none."""
    folder = Path(__file__).parents[1] / "reference"
    if not (folder / "config.json").is_file():
        raise UserError("expected the bundled reference model, found none in this installation; run make reference")
    return folder


def local_folder(model: str | Path) -> Path:
    """The folder of a model: a local one, the bundled ``reference``, or a hub id (fetched, weights as safetensors only).

    Raises ``UserError`` at once if the name is no folder and the hub cannot be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    name = str(model)
    if name == REFERENCE:
        return reference_folder()
    instead = "give the path of a model folder"
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise UserError(f"expected a model folder, found {'a file' if folder.exists() else 'nothing'} at {name}; {instead}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        require_hub(f"the model {name!r}", instead)
    except HFValidationError:
        raise UserError(f"expected a model folder or a hub id, found {name!r}; {instead}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, OSError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"expected the model {name!r} on the hub, found: {first_line}; {instead}") from error


def load_model(folder: Path, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """Model in evaluation mode, and tokenizer. Raises ``UserError`` for a broken folder or unknown device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tulle.hf  # noqa: F401 (registers the packed format)
    from tulle.models.checkpoint import Checkpoint

    Checkpoint.open(folder)  # config, shards and headers, with messages of our own
    if not hasattr(torch, dtype):
        raise UserError(f"expected a dtype such as float32 or bfloat16, found {dtype!r}; try --dtype float32")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError):
        raise UserError(f"expected a device that this machine has, found {device!r}; try --device cpu") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"expected a model that transformers can load in {folder}, found: {first_line}; check the folder") from error
    return model.to(place), tokenizer
