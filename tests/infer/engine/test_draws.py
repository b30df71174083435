"""What is reported of tokens: the model's own distribution, whatever bends the one that they are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.engine import draws

VOCAB, TOP, PLACES = 40, 3, 2
SETTINGS = [
    SamplingConfig(temperature=0.3, logprobs=TOP),
    SamplingConfig(top_k=2, logprobs=TOP, logit_bias=((3, 100.0),)),
    SamplingConfig(temperature=0.0, logprobs=TOP, repetition_penalty=5.0, presence_penalty=9.0),
    SamplingConfig(temperature=2.0, logprobs=TOP, frequency_penalty=2.0),
    SamplingConfig(min_p=0.5, logprobs=TOP),  # a mask of allowed tokens besides
]
ROWS = len(SETTINGS)
LOGITS_BTV = np.random.default_rng(0).normal(size=(ROWS, PLACES, VOCAB)).astype(np.float32) * 2
CONSTRAINED = [False] * (ROWS - 1) + [True]
ALLOWED_BW = np.array([[0, 0]] * (ROWS - 1) + [[0b1110, 0]], np.uint32)


def slots():
    """The memory of rows whose prompts are all tokens below 20 and which have drawn some of them already."""
    memory = draws.init_memory(ROWS, VOCAB)
    for slot, sampling in enumerate(SETTINGS):
        memory = draws.remember(memory, slot, draws.row_memory(sampling, tuple(range(20)), [1, 1, 2], VOCAB))
    return memory


@pytest.mark.parametrize("judging", [False, True], ids=["drawn", "judged"])
def test_logprobs_are_of_the_models_own_distribution(judging):
    settings = draws.row_settings(SETTINGS, [0] * ROWS, [3] * ROWS, CONSTRAINED, VOCAB)
    asked = draws.Asked(settings, jnp.arange(ROWS), jnp.ones(ROWS, bool), jnp.asarray(ALLOWED_BW))

    @jax.jit
    def run(logits_BTV, asked, memory):
        if not judging:
            return draws.draw_rows(logits_BTV[:, 0], asked, memory, TOP)[0]
        proposed = draws.Proposed(jnp.full((ROWS, PLACES), 3), jnp.array([1, 1] + [0] * (ROWS - 2)), None)
        return draws.judge_rows(logits_BTV, proposed, asked, memory, TOP)[0]

    drawn = run(LOGITS_BTV, asked, slots())
    logprobs_BTV = np.asarray(jax.nn.log_softmax(LOGITS_BTV))
    ids_BT, num_B = np.asarray(drawn.ids_BT), np.asarray(drawn.num_B)
    assert ids_BT[1, : num_B[1]].tolist() == [3] * (1 + judging) and ids_BT[-1, 0] in (1, 2, 3)
    for row in range(ROWS):
        for place in range(num_B[row]):
            own_V = logprobs_BTV[row, place]
            np.testing.assert_allclose(drawn.logprobs_BT[row, place], own_V[ids_BT[row, place]], atol=1e-5)
            likeliest = np.argsort(-own_V)[:TOP]
            assert drawn.top_ids_BTJ[row, place].tolist() == likeliest.tolist()
            np.testing.assert_allclose(drawn.top_logprobs_BTJ[row, place], own_V[likeliest], atol=1e-5)
