"""Makes sure the chosen model is on this machine before anything starts."""

from services.errors import Unavailable
from services.settings import Settings

# Weights as safetensors only: nothing here ever unpickles.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def ensure(settings: Settings) -> None:
    """Download a Hugging Face model that is not here yet. Raises Unavailable when it cannot be had."""
    try:
        path = settings.model_path
    except ValueError:
        _download(settings.model)
        path = settings.model_path
    if not (path / "config.json").is_file():
        raise Unavailable(f"{path} holds no model: config.json is missing")


def _download(model: str) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(model, allow_patterns=WANTED)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(
            f"the model {model!r} is neither `starter`, nor a directory, nor could it be downloaded: {error}"
        ) from None
