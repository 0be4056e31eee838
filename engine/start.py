"""Which engine a model directory needs."""

from collections.abc import Callable

from engine.config import EngineConfig
from engine.core import Engine
from engine.encoding import EncoderEngine
from engine.models.encoder_spec import read_encoder_spec


def make_engine(config: EngineConfig, wake: Callable[[], None] = lambda: None) -> Engine | EncoderEngine:
    """An engine for `config.model`. Raises UnsupportedModel, or ValueError for settings that do not fit it."""
    encoder = read_encoder_spec(config.model)
    return Engine(config, wake) if encoder is None else EncoderEngine(config, encoder)
