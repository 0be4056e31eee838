"""The whole engine on a GPU against transformers in fp32."""

import torch

from engine.messages import Sampling
from tests.engine.conftest import EngineMaker, ModelMaker, reference, reference_logits

PROMPTS = [[1, *range(10, 10 + length)] for length in (3, 40, 17, 90)]
GREEDY = Sampling(max_tokens=24, seed=0, temperature=0.0)
# A token that bf16 prefers may be this much worse in fp32: logits of the tiny model are of order 10.
MARGIN = 0.3


def test_fp32_decodes_the_same_greedy_tokens_as_transformers(make_model: ModelMaker, make_engine: EngineMaker) -> None:
    directory = make_model()
    engine = make_engine(directory, device="cuda", precision="fp32")
    model = reference(directory)
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert answer.token_ids == expected[0, len(prompt) :].tolist()


def test_bf16_with_graphs_only_takes_tokens_that_fp32_finds_about_as_good(
    make_model: ModelMaker, make_engine: EngineMaker
) -> None:
    directory = make_model()
    engine = make_engine(directory, device="cuda", precision="bf16", kv_tokens=8192)
    assert engine.core.forward.kernels == "torch, CUDA graphs"
    model = reference(directory)
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
        assert len(answer.token_ids) == 24
        logits_TV = reference_logits(model, prompt + answer.token_ids)[len(prompt) - 1 : -1]
        taken_T = logits_TV.gather(1, torch.tensor(answer.token_ids)[:, None]).squeeze(1)
        assert (logits_TV.amax(-1) - taken_T).max() < MARGIN
