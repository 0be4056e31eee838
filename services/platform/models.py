"""Makes sure the chosen model is on this machine before anything starts."""

from pathlib import Path

from services.errors import Unavailable
from services.settings import Settings

# Weights as safetensors only: nothing here ever unpickles.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def ensure(settings: Settings) -> None:
    """Download a Hugging Face model that is not here, or only in part. Raises Unavailable when it cannot be had."""
    local = settings.model == "starter" or Path(settings.model).expanduser().is_dir()
    if not local and not _is_whole(settings):
        _download(settings.model)
    path = settings.model_path
    if not (path / "config.json").is_file():
        raise Unavailable(f"{path} holds no model: config.json is missing")
    if not any(path.glob("*.safetensors")):
        raise Unavailable(f"{path} holds no weights as safetensors, the only form Whet loads")


def _is_whole(settings: Settings) -> bool:
    try:
        return any(settings.model_path.glob("*.safetensors"))
    except ValueError:
        return False


def _download(model: str) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(model, allow_patterns=WANTED)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(
            f"the model {model!r} is neither `starter`, nor a directory, nor could it be downloaded: {error}"
        ) from None
