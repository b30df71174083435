"""Which pages rows find, and which others may find of theirs."""

from gpt4moe.config.engine import EngineConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.engine.handle import RequestHandle
from gpt4moe.infer.engine.pool import PagePool
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.infer.engine.row import Row
from gpt4moe.infer.engine.schedule import Schedule


def make_row(arrival, first_token=0):
    request = EngineRequest(range(first_token, first_token + 40))
    return Row(RequestHandle(request, "", lambda: False), 0, arrival, 8, byte_tokenizer(), now=0.0)


def read_a_page(schedule, row):
    """A step that reads 16 tokens of the row's prompt, and lets others find them."""
    assert schedule.chunks(lambda rows, length: rows == 1) == [(row, 16)]
    row.num_read += 16
    schedule.publish(row)


def test_what_a_row_that_gave_way_finds_of_its_own_is_not_called_cached():
    schedule = Schedule(EngineConfig(slots=2, page_size=16), PagePool(8), chunk=16)
    first, second = make_row(0), make_row(1)
    schedule.add(first)
    assert schedule.admit() == [first]
    read_a_page(schedule, first)
    schedule.preempt(first)
    assert schedule.admit() == [first] and (first.num_shared, first.num_cached) == (16, 0)
    schedule.add(second)
    assert schedule.admit() == [second] and second.num_cached == 16
    schedule.preempt(second)  # it has read nothing yet
    read_a_page(schedule, first)
    assert schedule.admit() == [second] and second.num_cached == 32


def test_a_page_that_proposals_fill_is_found_once_they_are_the_rows_tokens():
    schedule = Schedule(EngineConfig(slots=2, page_size=16, draft_tokens=9), PagePool(8), chunk=64)
    row = make_row(0)
    schedule.add(row)
    schedule.admit()
    schedule.chunks(lambda rows, length: True)
    row.num_read = 48  # 40 tokens and 8 proposals that stand, which are added after this
    schedule.publish(row)
    assert row.num_published == 2
    row.ids += range(9)
    schedule.publish(row)
    assert row.num_published == 3


def test_a_row_that_gives_way_while_prompts_are_read_holds_no_pages():
    schedule = Schedule(EngineConfig(slots=2, page_size=16), PagePool(6), chunk=16)
    first, second = make_row(0), make_row(1, first_token=100)
    for row in (first, second):
        schedule.add(row)
    assert schedule.admit() == [first, second]
    for _ in range(2):
        for row, length in schedule.chunks(lambda rows, length: True):
            row.num_read += length
            schedule.publish(row)
    others = [schedule.pool.take(), schedule.pool.take()]  # there are no more
    assert schedule.chunks(lambda rows, length: True) == [(first, 8)]
    assert schedule.waiting == [second] and second.pages == []
    for row in (first, second):
        schedule.remove(row)
    schedule.pool.release(others)
    assert schedule.pool.num_used == 0
