"""What a decoder is made of. One spec describes every supported family; engine/models/families.py fills it in."""

from dataclasses import dataclass


class UnsupportedModel(ValueError):
    """The model asks for something the engine does not do; the message names what it does."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: `kind` as in engine/models/ropes.py, with the numbers that kind needs.

    `attention_scaling` multiplies cosine and sine (YaRN, LongRoPE); `divisors` are LongRoPE's, one per pair of a head's
    dimensions.
    """

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_scaling: float = 1.0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class MoeSpec:
    """Mixture of experts: `per_token` of `experts` SwiGLU blocks of `intermediate_size` run for every token.

    `normalize` rescales the chosen experts' weights to sum to one.
    """

    experts: int
    per_token: int
    intermediate_size: int
    normalize: bool


@dataclass(frozen=True)
class DecoderSpec:
    """Shapes and switches of one decoder-only transformer. Sizes in elements, windows in tokens.

    `max_positions` is the longest context for which the model is exact. `windows` says per layer how many tokens,
    itself included, a token sees (0: all before it); `sparse` per layer whether its MLP is the mixture `moe`. Both may
    be given empty, which means 0 and False throughout. `labels` are a classifier's, in order: it then has a `score`
    head [labels, E] and no LM head; `pad_token` is the id its pooling skips.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: RopeSpec
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    sparse: tuple[bool, ...] = ()
    moe: MoeSpec | None = None
    labels: tuple[str, ...] = ()
    pad_token: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", self.windows or (0,) * self.layers)
        object.__setattr__(self, "sparse", self.sparse or (False,) * self.layers)
        assert len(self.windows) == len(self.sparse) == self.layers, "one window and one flag per layer"

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attention_size(self) -> int:
        """Width of the attention output, all heads together."""
        return self.heads * self.head_dim
