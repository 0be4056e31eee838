"""Encoders as transformers computes them: safetensors only, no code from the model's directory.

Suffixes: B prompts of a batch, T tokens of the longest, E hidden size, L labels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError

from engine.models.encoder_spec import CLASSIFIER, EncoderSpec
from engine.models.spec import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Weights that belong to parts which are not run: language-model and next-sentence heads, poolers, position numbers.
UNUSED = ("cls.", "lm_head.", "vocab_", "head.", "decoder.")
UNUSED_PARTS = ("pooler.", "position_ids")


class Prompt(NamedTuple):
    """Token ids; from `pair_start` on (0: never) they belong to the second segment."""

    token_ids: Sequence[int]
    pair_start: int = 0


class Encoder:
    """One encoder with or without a classification head. Stateless between batches."""

    def __init__(self, spec: EncoderSpec, directory: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self._model = _load(spec, directory, dtype).to(device).eval()
        self._body = self._model.base_model

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return sum(int(parameter.numel()) for parameter in self._model.parameters())

    @torch.inference_mode()
    def hidden(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """The last layer's states, [tokens, E] for each prompt."""
        hidden_BTE = self._body(**self._batch(prompts)).last_hidden_state
        return [states_TE[: len(prompt.token_ids)] for states_TE, prompt in zip(hidden_BTE, prompts, strict=True)]

    @torch.inference_mode()
    def scores(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Raw scores [B, L] of the classification head, fp32."""
        assert self.spec.labels, "asked only of models with a head"
        scores_BL: torch.Tensor = self._model(**self._batch(prompts)).logits
        return scores_BL.float()

    def _batch(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Padded on the right to the longest prompt."""
        shape = len(prompts), max(len(prompt.token_ids) for prompt in prompts)
        ids_BT = torch.full(shape, self.spec.pad_id, dtype=torch.long)
        mask_BT, types_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            length = len(prompt.token_ids)
            ids_BT[row, :length] = torch.tensor(prompt.token_ids)
            mask_BT[row, :length] = 1
            if prompt.pair_start:
                types_BT[row, prompt.pair_start : length] = 1
        given = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if self.spec.segments > 1:
            given["token_type_ids"] = types_BT
        return {name: tensor.to(self.device) for name, tensor in given.items()}


def _load(spec: EncoderSpec, directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Read the weights, and insist that every one the model runs with was there."""
    # Two seconds and 200 MB that engines of decoders do without.
    import transformers

    kind: Any = getattr(transformers, spec.runs)
    poolers = {"add_pooling_layer": False} if spec.runs == "BertModel" or "RobertaModel" in spec.runs else {}
    try:
        model, report = kind.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **poolers
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UnsupportedModel(f"{directory} cannot be loaded as {spec.runs} from safetensors: {error}") from error
    if report["missing_keys"]:
        raise UnsupportedModel(f"{directory}: weight {min(report['missing_keys'])} is missing")
    left = sorted(name for name in report["unexpected_keys"] if not _unused(name, spec))
    if left:
        raise UnsupportedModel(f"{directory}: weights not understood: {', '.join(left[:5])}")
    return model


def _unused(name: str, spec: EncoderSpec) -> bool:
    if any(part in name for part in UNUSED_PARTS):
        return True
    return not spec.runs.endswith(CLASSIFIER) and name.startswith(UNUSED)
