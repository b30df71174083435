"""The engine against whole passes of the model: the same tokens, whoever shares the batch, however prompts are read."""

import json
import re

import jax
import numpy as np
import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine.compilation import forbid_compilation
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.request import EngineClosed, EngineRequest, QueueFull

from .models import CHOICES, EXPERTS, LAYERS, FullPass, make_model

CONTEXT = 256
TEXTS = ["def f(x):", "", "a", "The quick brown fox jumps over the lazy dog; " * 3, "b" * 70, "qu", "xyz", "z" * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer.vocab_size, CONTEXT)


@pytest.fixture(scope="module")
def whole(model):
    return FullPass(model)


@pytest.fixture(scope="module")
def now():
    """The time on the engine's clock, to be set."""
    return [0.0]


@pytest.fixture(scope="module")
def engine(model, tokenizer, now):
    """One for all tests, which compiles once; it has fewer pages than four long rows need."""
    config = EngineConfig(slots=4, page_size=16, num_pages=24, prefill_chunk=64, replay=True, max_queue=100)
    return Engine(Decoder.of(model), tokenizer, config, clock=lambda: now[0])


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in TEXTS]


def greedy(**given):
    return SamplingConfig(**{"temperature": 0.0, "max_new_tokens": 12} | given)


def is_idle(engine):
    metrics = engine.metrics()
    return (metrics.queued, metrics.running, metrics.pages_used) == (0, 0, 0)


def test_greedy_tokens_and_their_logprobs_are_those_of_whole_passes(engine, whole, tokenizer, prompts):
    handles = [engine.submit(EngineRequest(ids, greedy(logprobs=3))) for ids in prompts]
    for ids, handle in zip(prompts, handles, strict=True):
        (made,) = handle.result()
        assert list(made.token_ids) == whole.greedy(ids, 12, tokenizer.end_of_text)
        all_ids = [*ids, *made.token_ids]
        logprobs_TV = np.asarray(jax.nn.log_softmax(whole(all_ids)[0]))
        before = range(len(ids) - 1, len(all_ids) - 1)
        np.testing.assert_allclose(made.logprobs, [logprobs_TV[p, all_ids[p + 1]] for p in before], atol=1e-5)
        for place, top in zip(before, made.top_logprobs, strict=True):
            assert [token for token, _ in top] == np.argsort(-logprobs_TV[place], kind="stable")[:3].tolist()
            np.testing.assert_allclose([logprob for _, logprob in top], np.sort(logprobs_TV[place])[:-4:-1], atol=1e-5)
        assert made.text == tokenizer.decode(made.token_ids)
        assert made.finish_reason == ("stop" if made.token_ids[-1] == tokenizer.end_of_text else "length")
    assert len({tuple(handle.request.prompt_ids) for handle in handles}) == len(prompts)
    assert is_idle(engine)


def test_experts_of_every_token_and_scores_of_the_prompt_are_those_of_whole_passes(engine, whole, prompts):
    ids, before = prompts[3], engine.metrics()
    sampling = greedy(prompt_logprobs=True, logprobs=2)
    (made,) = engine.submit(EngineRequest(ids, sampling, with_expert_ids=True)).result()
    all_ids = [*ids, *made.token_ids]
    logits_TV, experts_TLK = whole(all_ids)
    assert made.prompt.expert_ids_TLK.shape == (len(ids), LAYERS, CHOICES)
    assert (np.sort(made.prompt.expert_ids_TLK) == np.sort(experts_TLK[: len(ids)])).all()
    assert (np.sort(made.expert_ids_TLK) == np.sort(experts_TLK[len(ids) - 1 : -1])).all()
    after, routed_TLK = engine.metrics(), experts_TLK[:-1]  # the last token is never read
    load_LE = [np.bincount(routed_TLK[:, layer].reshape(-1), minlength=EXPERTS) for layer in range(LAYERS)]
    assert (after.expert_load_LE - before.expert_load_LE == load_LE).all()
    assert after.last_distinct_experts_L.tolist() == [CHOICES] * LAYERS  # of a step with one row
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    expected = [logprobs_TV[place, ids[place + 1]] for place in range(len(ids) - 1)]
    np.testing.assert_allclose(made.prompt.logprobs, expected, atol=1e-5)
    assert [top[0][0] for top in made.prompt.top_logprobs] == logprobs_TV[: len(ids) - 1].argmax(-1).tolist()


def test_replayed_experts_are_taken_and_change_the_text_and_their_own_change_nothing(engine, prompts):
    ids = prompts[4]
    (made,) = engine.submit(EngineRequest(ids, greedy(), with_expert_ids=True)).result()
    routed = np.concatenate([made.prompt.expert_ids_TLK, made.expert_ids_TLK[1:]])
    given = {"with_expert_ids": True}
    (same,) = engine.submit(EngineRequest(ids, greedy(), replay_ids_TLK=routed, **given)).result()
    assert same.token_ids == made.token_ids
    moved = (routed + 1) % EXPERTS
    (other,) = engine.submit(EngineRequest(ids, greedy(), replay_ids_TLK=moved, **given)).result()
    assert other.token_ids != made.token_ids
    with pytest.raises(CallerError, match="replay_ids_TLK='list' must be a numpy array of integers"):
        engine.submit(EngineRequest(ids, greedy(), replay_ids_TLK=moved.tolist()))
    taken = np.concatenate([other.prompt.expert_ids_TLK, other.expert_ids_TLK[1:]])
    assert (np.sort(taken) == np.sort(moved[: len(taken)])).all()
    (again,) = engine.submit(EngineRequest(ids, greedy())).result()  # and nobody finds the pages of the forced ones
    assert again.token_ids == made.token_ids


def test_a_prompt_that_begins_as_another_is_not_read_again(engine, whole, tokenizer, prompts):
    ids = [*prompts[3][:100], *tokenizer.encode("!?")]
    expected = whole.greedy(ids, 12, tokenizer.end_of_text)
    engine.submit(EngineRequest(prompts[3], greedy())).result()
    before = engine.metrics()
    first, second = (engine.submit(EngineRequest(ids, greedy())).result()[0] for _ in range(2))
    assert list(first.token_ids) == list(second.token_ids) == expected
    after = engine.metrics()
    assert after.cached_prompt_tokens - before.cached_prompt_tokens == 96 + 96  # six full pages, each time
    assert is_idle(engine) and after.pages_cached > 0


def test_n_continuations_differ_and_are_those_of_their_draws(engine, prompts):
    sampling = SamplingConfig(temperature=1.5, max_new_tokens=8, seed=3, n=3)
    made = engine.submit(EngineRequest(prompts[0], sampling)).result()
    assert len({one.token_ids for one in made}) == 3
    single = SamplingConfig(temperature=1.5, max_new_tokens=8, seed=3)
    alone = [engine.submit(EngineRequest(prompts[0], single, draw=draw)).result()[0].token_ids for draw in range(3)]
    assert [one.token_ids for one in made] == alone


def test_an_engine_needs_a_tokenizer_and_room_for_a_prompt_and_a_token(model, tokenizer):
    decoder = Decoder.of(model)
    with pytest.raises(CallerError, match="tokenizer=None is missing"):
        Engine(decoder, None)
    for given, said in (({"max_length": 1}, "max_length=1 must have room"), ({"draft_tokens": 256}, "must be below")):
        with pytest.raises(CallerError, match=said):
            Engine(decoder, tokenizer, EngineConfig(**given))


def test_a_draw_beyond_what_a_key_counts_is_refused(prompts):
    with pytest.raises(CallerError, match="draw=2147483647 plus n must be at most"):
        EngineRequest(prompts[0], greedy(n=2), draw=2**31 - 1)


def test_stop_texts_and_ids_end_a_continuation(engine, tokenizer, prompts):
    (whole_text,) = engine.submit(EngineRequest(prompts[0], greedy(max_new_tokens=24))).result()
    tokens = whole_text.token_ids
    stop = whole_text.text[3:5]
    (made,) = engine.submit(EngineRequest(prompts[0], greedy(max_new_tokens=24, stop=(stop,)))).result()
    assert (made.text, made.finish_reason) == (whole_text.text[: whole_text.text.find(stop)], "stop")
    (made,) = engine.submit(EngineRequest(prompts[0], greedy(max_new_tokens=24, stop_ids=(tokens[5],)))).result()
    assert made.token_ids == tokens[: tokens.index(tokens[5]) + 1] and made.finish_reason == "stop"


def test_penalties_and_bias_change_what_is_drawn(engine, prompts):
    (plain,) = engine.submit(EngineRequest(prompts[6], greedy())).result()
    once = {"logit_bias": ((77, 1000.0),)}  # drawn every time, unless a penalty forbids it
    (made,) = engine.submit(EngineRequest(prompts[6], greedy(**once))).result()
    assert set(made.token_ids) == {77}
    (made,) = engine.submit(EngineRequest(prompts[6], greedy(**once, presence_penalty=2000.0))).result()
    assert made.token_ids[0] == 77 and made.token_ids.count(77) == 1
    (made,) = engine.submit(EngineRequest(prompts[6], greedy(**once, frequency_penalty=400.0))).result()
    assert made.token_ids.count(77) == 3
    prompt = [*prompts[6], 77]
    (made,) = engine.submit(EngineRequest(prompt, greedy(**once, repetition_penalty=1e6))).result()
    assert 77 not in made.token_ids
    (again,) = engine.submit(EngineRequest(prompts[6], greedy())).result()
    assert again.token_ids == plain.token_ids  # the slot has forgotten them


def test_a_json_schema_is_followed_by_greedy_and_by_wild_rows_beside_free_ones(engine, prompts):
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    words = {"type": "array", "items": {"enum": ["ab", "c"]}, "maxItems": 3}
    needed = {"required": ["n", "words"], "additionalProperties": False}
    schema = json.dumps({"type": "object", "properties": {"n": number, "words": words}} | needed)
    free = engine.submit(EngineRequest(prompts[0], greedy()))
    settings = [{"temperature": 0.0}, {"temperature": 3.0, "n": 3, "seed": 2}]
    asked = [SamplingConfig(**given, json_schema=schema, max_new_tokens=80) for given in settings]
    for handle in [engine.submit(EngineRequest(prompts[0], sampling)) for sampling in asked]:
        for made in handle.result():
            assert made.finish_reason == "stop"
            value = json.loads(made.text)
            assert set(value) == {"n", "words"} and 0 <= value["n"] <= 99 and set(value["words"]) <= {"ab", "c"}
    assert free.result()[0].token_ids == engine.submit(EngineRequest(prompts[0], greedy())).result()[0].token_ids
    for bad, said in (
        ('{"type": "foo"}', "Invalid type: foo"),
        ('{"$ref": "#"}', "nothing can begin"),
    ):  # of itself alone
        with pytest.raises(CallerError, match=rf"(?i)json_schema='.*' cannot be followed: .*{said}"):
            engine.submit(EngineRequest(prompts[0], SamplingConfig(json_schema=bad)))


def test_rows_that_give_way_for_want_of_pages_go_on_where_they_were(engine, whole, prompts):
    before = engine.metrics()
    sampling, rows = greedy(max_new_tokens=90, ignore_end_of_text=True), (0, 5, 6, 7)
    made = [handle.result()[0] for handle in [engine.submit(EngineRequest(prompts[row], sampling)) for row in rows]]
    after = engine.metrics()
    assert after.preemptions > before.preemptions and after.queue_wait.count == before.queue_wait.count + len(rows)
    assert [list(one.token_ids) for one in made] == [whole.greedy(prompts[row], 90, None) for row in rows]
    assert is_idle(engine)


def test_drawn_rows_that_give_way_go_on_with_their_draws_and_with_what_penalties_remember(engine, prompts):
    asked = {"max_new_tokens": 90, "ignore_end_of_text": True, "temperature": 0.8}
    penalties = {"presence_penalty": 1.0, "frequency_penalty": 0.5}
    requests = [
        EngineRequest(prompts[row], SamplingConfig(seed=row, **asked, **(penalties if row % 2 else {})))
        for row in (0, 5, 6, 7)
    ]
    alone = [engine.submit(request).result()[0].token_ids for request in requests]
    before = engine.metrics().preemptions
    for order in (requests, requests[::-1]):  # the last of them gives way
        handles = {request: engine.submit(request) for request in order}
        assert [handles[request].result()[0].token_ids for request in requests] == alone
    assert engine.metrics().preemptions >= before + 2
    assert is_idle(engine)


def test_a_continuation_goes_to_the_last_place_of_the_context(engine, whole, tokenizer):
    ids = [tokenizer.end_of_text, *tokenizer.encode("ab, " * 64)]
    for length in (CONTEXT - 1, CONTEXT - 3):
        (made,) = engine.submit(EngineRequest(ids[:length], greedy(ignore_end_of_text=True))).result()
        assert made.finish_reason == "length" and len(made.token_ids) == CONTEXT - length
        assert list(made.token_ids) == whole.greedy(ids[:length], CONTEXT - length, None)


def test_nothing_is_compiled_while_serving_once_it_is_warm(engine, prompts):
    told = []
    seconds = engine.warm_up(told.append)
    assert len(seconds) == 8 and "decode, rows=4 tokens=1 pages=8" in seconds
    settings = [
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 4, "logprobs": 2},
        {"repetition_penalty": 1.2, "presence_penalty": 0.1, "logit_bias": ((7, 1.0),), "prompt_logprobs": True},
        {"n": 3, "max_new_tokens": 40},
    ]
    with forbid_compilation():
        for ids in prompts:
            for given in settings:
                engine.submit(EngineRequest(ids, SamplingConfig(**{"max_new_tokens": 9} | given), with_expert_ids=True))
        while engine.step():
            pass
    assert engine.metrics().late_compilations == 0
    with pytest.raises(AssertionError, match="1 programs were compiled"), forbid_compilation():
        jax.jit(lambda x: x * 17.25)(np.float32(2.0))


def test_no_program_copies_the_pages_or_what_is_remembered_of_the_slots(engine):
    engine.warm_up()
    kept = ("f32[24,16,1,8]", "s32[4,272]")  # pages of a layer, counts of the tokens of each slot
    for shape in engine.shapes:
        lines = engine.programs.text(shape).splitlines()
        assert all(any(array in line for line in lines) for array in kept)
        copies = [line for line in lines if re.search(r"= \(?(\w+\[[\d,]*\])\S* copy(-start)?\(", line)]
        assert not [line for line in copies if any(f"= {array}" in line for array in kept)], shape


def test_cancelled_requests_leave_at_the_next_step(engine, prompts):
    handles = [engine.submit(EngineRequest(ids, greedy(max_new_tokens=100))) for ids in prompts]
    for _ in range(6):
        engine.step()
    assert engine.metrics().running == 4
    for handle in handles:
        handle.cancel()
    engine.step()
    assert is_idle(engine)
    assert {chunk.finish_reason for handle in handles for chunk in handle} <= {None, "cancelled", "stop"}


def test_a_fault_of_the_device_ends_what_runs_and_nothing_else(engine, whole, prompts):
    long = greedy(max_new_tokens=30, ignore_end_of_text=True)
    running = [engine.submit(EngineRequest(prompts[row], long)) for row in range(4)]
    waiting = engine.submit(EngineRequest(prompts[4], greedy(ignore_end_of_text=True)))
    engine.step()
    for leaf in jax.tree.leaves(engine.programs.held):
        leaf.delete()
    ended = [handle.result()[0] for handle in running]
    assert {one.finish_reason for one in ended} == {"error"} and all("deleted" in one.error for one in ended)
    assert list(waiting.result()[0].token_ids) == whole.greedy(prompts[4], 12, None)
    assert is_idle(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_cannot_go_on_leaves_nobody_waiting(model, tokenizer, prompts, monkeypatch):
    """There is no room for new pages after a fault: what runs and what waits is told, and nothing more is taken."""
    engine = Engine(Decoder.of(model), tokenizer, EngineConfig(slots=1, page_size=16, prefill_chunk=64))

    def no_room():
        raise MemoryError("no room for pages")

    monkeypatch.setattr(engine.programs, "reset", no_room)
    for leaf in jax.tree.leaves(engine.programs.held):
        leaf.delete()
    handles = [engine.submit(EngineRequest(prompts[0], greedy())) for _ in range(3)]
    assert engine.accepting and engine.fault is None
    engine.run_in_thread()
    ended = [handle.result()[0] for handle in handles]
    assert [one.finish_reason for one in ended] == ["error"] * 3
    assert "deleted" in ended[0].error and all("no room for pages" in one.error for one in ended[1:])
    assert is_idle(engine) and not engine.accepting and "no room for pages" in engine.fault
    with pytest.raises(EngineClosed, match="no room for pages"):
        engine.submit(EngineRequest(prompts[0], greedy()))
    engine.close()


def test_deadlines_count_from_submission_and_priorities_come_first(engine, now, prompts):
    endless = greedy(max_new_tokens=50, ignore_end_of_text=True)
    late = [engine.submit(EngineRequest(prompts[0], endless, deadline_seconds=5.0)) for _ in range(4)]
    engine.step()
    now[0] += 4.0
    engine.step()
    assert engine.metrics().running == 4
    now[0] += 2.0
    some, order = greedy(max_new_tokens=2), []
    waiting = {p: [engine.submit(EngineRequest(prompts[2], some, priority=p)) for _ in range(4)] for p in (0, 1)}
    while engine.step():
        order += [p for p, handles in waiting.items() if all(h.done for h in handles) and p not in order]
    assert {handle.result()[0].finish_reason for handle in late} == {"deadline"}
    assert order == [1, 0]


def test_a_request_that_waits_is_counted_by_how_long_and_ended_where_it_waits(engine, now, prompts):
    endless = greedy(max_new_tokens=60, ignore_end_of_text=True)
    running = [engine.submit(EngineRequest(prompts[5], endless)) for _ in range(4)]
    engine.step()
    late = engine.submit(EngineRequest(prompts[0], greedy(), deadline_seconds=5.0))
    patient = engine.submit(EngineRequest(prompts[0], greedy(max_new_tokens=2)))
    now[0] += 4.0
    engine.step()
    assert not late.done and engine.metrics().queued == 2
    now[0] += 2.0
    engine.step()
    assert late.done and (engine.metrics().queued, engine.metrics().running) == (1, 4)
    (made,) = late.result()
    assert (made.finish_reason, made.token_ids, made.text) == ("deadline", (), "")
    before = engine.metrics().queue_wait
    running[0].cancel()
    assert len(patient.result()[0].token_ids) == 2
    after = engine.metrics().queue_wait
    assert (after.count, after.total_seconds) == (before.count + 1, pytest.approx(before.total_seconds + 6))
    for handle in running:
        handle.cancel()
    engine.step()
    assert is_idle(engine)


def test_a_full_queue_refuses_with_a_time_and_a_draining_engine_takes_none(engine, prompts):
    many = SamplingConfig(max_new_tokens=1, n=50)
    taken = [engine.submit(EngineRequest(prompts[0], many)) for _ in range(2)]
    with pytest.raises(QueueFull) as refused:
        engine.submit(EngineRequest(prompts[0], many))
    assert refused.value.retry_after_seconds >= 1 and engine.metrics().rejected == 1
    engine.run_in_thread()
    engine.drain()
    assert all(handle.done for handle in taken)
    with pytest.raises(EngineClosed):
        engine.submit(EngineRequest(prompts[0], greedy()))
    engine.close()
