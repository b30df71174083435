"""Pages: who uses them, who finds them again, and that none is ever lost."""

import collections

import numpy as np

from gpt4moe.infer.engine.pool import PagePool, page_names


def test_a_story_of_two_prompts_that_begin_alike():
    pool = PagePool(4)
    first = page_names([1, 2, 3, 4, 5], page_size=2)
    assert len(first) == 2  # the fifth token fills no page
    pages = [pool.take() for _ in range(3)]
    for page, name in zip(pages, first, strict=False):
        pool.publish(page, name)
    other = page_names([1, 2, 9, 9], page_size=2)
    shared = pool.share(other)
    assert shared == pages[:1]
    pool.release(pages)
    assert (pool.num_used, pool.num_cached, pool.num_available) == (1, 1, 3)
    again = pool.share(first)
    assert again == pages[:2]
    pool.release(again)
    pool.release(shared)
    assert (pool.num_used, pool.num_cached, pool.num_available) == (0, 2, 4)


def test_the_longest_unused_page_makes_room_and_the_end_of_a_prompt_before_its_beginning():
    pool = PagePool(3)
    names = page_names([1, 2, 3], page_size=1)
    pages = [pool.take() for _ in names]
    for page, name in zip(pages, names, strict=True):
        pool.publish(page, name)
    assert pool.take() is None
    pool.release(pages)
    assert pool.take() == pages[-1]
    assert pool.share(names) == pages[:2]


def test_names_tell_what_stands_before_and_which_pictures():
    alike = page_names([7, 7, 7, 7], page_size=2)
    assert alike[0] != alike[1]
    assert page_names([7, 7, 5, 5], page_size=2)[0] == alike[0]
    assert page_names([7, 7, 7, 7, 7], page_size=2, known=alike[:1]) == alike[1:]
    seen = page_names([7, 7, 7, 7, 7, 7], page_size=2, seen=[(3, b"cat")])
    assert seen[0] == alike[0]
    others = (alike, page_names([7] * 6, 2, seen=[(3, b"dog")]), page_names([7] * 6, 2))
    assert all(seen[page] != other[page] for other in others for page in range(1, len(other)))


def test_a_pool_without_sharing_finds_nothing_again():
    pool = PagePool(2, sharing=False)
    page, names = pool.take(), page_names([1], page_size=1)
    pool.publish(page, names[0])
    pool.release([page])
    assert pool.share(names) == [] and pool.num_cached == 0


def test_no_page_is_lost_or_used_twice_whatever_happens():
    """Random rows begin, grow, publish and end; a record of their own says who holds what."""
    for seed in range(20):
        generator = np.random.default_rng(seed)
        pool, rows, held = PagePool(int(generator.integers(1, 24))), [], {}
        for _ in range(400):
            _act(generator, pool, rows, held)
            users = collections.Counter(page for _, pages, _ in rows for page in pages)
            assert pool.num_used == len(users)
            assert pool.num_used + pool.num_available == pool.num_pages
            for tokens, pages, _ in rows:  # what a row was given holds what the row would have written
                assert all(held[page] == tuple(tokens[: place + 1]) for place, page in enumerate(pages))
        for _, pages, _ in rows:
            pool.release(pages)
        assert (pool.num_used, pool.num_available) == (0, pool.num_pages)
        taken = {pool.take() for _ in range(pool.num_pages)}
        assert taken == set(range(pool.num_pages)) and pool.take() is None


def _act(generator, pool, rows, held):
    """One random act; a page holds one token, and `held` says after which tokens it was written."""
    act = generator.integers(0, 4)
    if act == 0:
        tokens = generator.integers(0, 2, 8).tolist()
        names = page_names(tokens, page_size=1)
        rows.append((tokens, pool.share(names), names))
    elif rows and act == 1:
        _, pages, _ = rows.pop(generator.integers(len(rows)))
        pool.release(pages)
    elif rows:
        tokens, pages, names = rows[generator.integers(len(rows))]
        page = pool.take() if len(pages) < len(tokens) else None
        if page is not None:
            pages.append(page)
            held[page] = tuple(tokens[: len(pages)])
            if generator.integers(2):
                pool.publish(page, names[len(pages) - 1])
