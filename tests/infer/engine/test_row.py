"""What a row tells that ends before its time."""

import pytest

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.engine.handle import RequestHandle
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.infer.engine.row import NewToken, Row


@pytest.mark.parametrize(("reason", "error"), [("cancelled", None), ("deadline", None), ("error", "out of memory")])
def test_what_was_held_back_is_told_at_the_end(reason, error):
    """What might have become a stop text, and half a character, with the tokens that are behind."""
    tokenizer = byte_tokenizer()
    sampling = SamplingConfig(stop=("the end",), logprobs=0)
    row = Row(RequestHandle(EngineRequest([0], sampling), "", lambda: False), 0, 0, 90, tokenizer, now=0.0)
    ids = [*tokenizer.encode("well, the e"), tokenizer.encode("é")[0]]
    chunks = [row.add(NewToken(token, logprob=-1.0), now=1.0) for token in ids]
    assert "".join(chunk.text for chunk in chunks if chunk is not None) == "well, "
    last = row.end(reason, error)
    assert (last.text, last.finish_reason, last.error) == ("the e\ufffd", reason, error)
    assert last.token_ids == tuple(ids[6:]) and last.logprobs == (-1.0,) * 6
    assert row.finish_reason == reason
