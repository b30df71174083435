"""Which pages rows find, which others may find of theirs, and who waits for whom."""

import numpy as np

from gpt4moe.config.engine import EngineConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.engine.handle import RequestHandle
from gpt4moe.infer.engine.pool import PagePool
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.infer.engine.row import Row
from gpt4moe.infer.engine.schedule import Schedule


def make_row(arrival, first_token=0, max_new=8, **given):
    request = EngineRequest(range(first_token, first_token + 40), **given)
    return Row(RequestHandle(request, "", lambda: False), 0, arrival, max_new, byte_tokenizer(), now=0.0)


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


def read_prompts(schedule):
    """Steps that read the prompts of all rows that run and draw a token after each, and let others find them."""
    while chosen := schedule.chunks(lambda rows, length: True):
        for row, length in chosen:
            row.num_read += length
            schedule.publish(row)
            row.ids += [7] * (row.num_unread == 0)


def test_a_row_whose_experts_are_forced_neither_finds_pages_nor_lets_others_find_its_own():
    forced_TLK = np.zeros((40, 1, 1), np.int32)
    schedule = Schedule(EngineConfig(slots=3, page_size=16, replay=True), PagePool(12), chunk=64)
    forced, free, forced_too = (
        make_row(0, replay_ids_TLK=forced_TLK),
        make_row(1),
        make_row(2, replay_ids_TLK=forced_TLK),
    )
    for row in (forced, free, forced_too):
        schedule.add(row)
        assert schedule.admit() == [row] and row.pages == []
        read_prompts(schedule)
    assert (forced.num_published, free.num_published, forced_too.num_published) == (0, 2, 0)
    pages = [page for row in (forced, free, forced_too) for page in row.pages]
    assert len(pages) == len(set(pages)) == 9


def test_a_row_that_gives_way_waits_where_it_waited_before():
    schedule = Schedule(EngineConfig(slots=2, page_size=16), PagePool(12), chunk=16)
    urgent, first, second, third = make_row(3, priority=1), make_row(0), make_row(1), make_row(2)
    for row in (third, second, first):
        schedule.add(row)
    assert schedule.admit() == [first, second]
    schedule.add(urgent)
    assert schedule.waiting == [urgent, third]
    schedule.preempt(second)
    assert schedule.waiting == [urgent, second, third] and schedule.preemptions == 1


def draw_to_the_end(schedule):
    """Steps that draw a token for every row that runs, until each has ended or given way."""
    while rows := schedule.decoding():
        for row in rows:
            row.num_read += 1
            row.ids.append(7)
            if row.num_new == row.max_new:
                schedule.remove(row)


def test_where_deterministic_a_row_comes_in_only_if_none_will_have_to_give_way():
    """40 tokens and 60 more take seven pages of 16 in the end, three of them when the row comes in."""
    for deterministic, together in ((True, 1), (False, 2)):
        schedule = Schedule(EngineConfig(slots=2, page_size=16, deterministic=deterministic), PagePool(12), chunk=64)
        rows = [make_row(arrival, first_token=100 * arrival, max_new=60) for arrival in range(2)]
        for row in rows:
            schedule.add(row)
        assert schedule.admit() == rows[:together]
        read_prompts(schedule)
        draw_to_the_end(schedule)
        assert schedule.preemptions == together - 1 and schedule.waiting == rows[1:]
        assert schedule.admit() == rows[1:]
