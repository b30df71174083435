"""What goes into a step, and what it tells of prompts, given to the rows that asked."""

import numpy as np

from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.decoder import DecodeReport
from gpt4moe.infer.engine.batch import Batches, record_prompts
from gpt4moe.infer.engine.draws import Drawn
from gpt4moe.infer.engine.handle import RequestHandle
from gpt4moe.infer.engine.inputs import StepShape
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.infer.engine.row import Row
from gpt4moe.infer.engine.steps import Scores, StepOut
from gpt4moe.model.moe import Choices

from .models import make_config

PROMPT, LENGTH = 6, 4  # tokens of a prompt, and of a step


def step_at(start):
    """Scores and experts of a step of one row that reads from a place on: they tell the place."""
    place_BT = start + np.arange(LENGTH, dtype=np.int32)[None]
    choices = Choices(place_BT[None, :, :, None], np.ones((1, 1, LENGTH, 1), np.float32))
    report = DecodeReport(np.zeros((1, 9), np.int32), choices)
    none_BTJ = np.zeros((1, LENGTH, 0), np.int32)
    drawn = Drawn(place_BT, np.ones(1, np.int32), np.zeros((1, LENGTH), np.float32), none_BTJ, none_BTJ + 0.0)
    return StepOut(drawn, (report,), Scores(place_BT.astype(np.float32), none_BTJ, none_BTJ + 0.0))


def test_what_is_told_of_a_prompt_ends_with_it_however_far_the_row_has_read():
    # Nothing is told before there is a whole character: a row may be several tokens behind its prompt by then, and read
    # them as it reads prompts where it had to give way.
    request = EngineRequest(range(PROMPT), SamplingConfig(prompt_logprobs=True), with_expert_ids=True)
    row = Row(RequestHandle(request, "", lambda: False), 0, 0, 9, byte_tokenizer(), now=0.0)
    row.ids += range(PROMPT)
    for start, length in ((0, 4), (4, 4), (8, 1), (9, 3)):
        row.num_read = start
        record_prompts(step_at(start), [(0, row, length)])
    report = row.prompt.report(num_cached=0)
    assert report.expert_ids_TLK[:, 0, 0].tolist() == list(range(PROMPT))
    assert list(report.logprobs) == list(range(PROMPT - 1))


def test_what_is_proposed_to_a_row_and_has_no_page_is_left_out():
    config = EngineConfig(slots=1, page_size=8, draft_tokens=3)
    row = Row(RequestHandle(EngineRequest(range(PROMPT)), "", lambda: False), 0, 0, 9, byte_tokenizer(), now=0.0)
    row.slot, row.pages, row.num_read = 0, [0], PROMPT - 1
    batches = Batches(config, make_config(64, 32))
    batches.enter(row)
    for number in (0, 2):
        inputs = batches.decode([(0, row)], StepShape("verify", 1, 1 + number, 1), {row: number}, {row: [7, 8, 9]})
        assert inputs.tokens_BT.tolist() == [[PROMPT - 1, 7, 8][: 1 + number]]
        assert inputs.valid_BT.all() and inputs.num_proposed_B.tolist() == [number]
