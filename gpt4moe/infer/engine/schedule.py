"""Which rows run, which of them reads a chunk of its prompt next, and who gives way when pages run short.

In: rows. Out: what the next step is to do. Nothing here touches the device.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

from gpt4moe.config.engine import EngineConfig
from gpt4moe.infer.engine.pool import PagePool
from gpt4moe.infer.engine.row import Row


class Schedule:
    """`waiting` rows in the order in which they will be served, `running` ones in the order in which they came in.

    Where the engine is deterministic a row comes in only if its pages suffice to its end, so that none has to give way:
    what is read again after that would be read in other company of tokens, and rounded otherwise.
    """

    def __init__(self, config: EngineConfig, pool: PagePool, chunk: int):
        self.config, self.pool, self.chunk = config, pool, chunk
        self.waiting: list[Row] = []
        self.running: list[Row] = []
        self.preemptions = 0
        self._free_slots = list(range(config.slots - 1, -1, -1))

    def add(self, row: Row) -> None:
        """One more row that waits."""
        bisect.insort(self.waiting, row, key=lambda row: row.priority)

    def remove(self, row: Row) -> None:
        """Takes out a row that has ended; its slot and its pages are free at once."""
        if row.slot is None:
            self.waiting.remove(row)
        else:
            self._take_out(row)

    def admit(self) -> list[Row]:
        """Gives free slots to the rows that wait, as long as pages last; returns them."""
        admitted = []
        while self.waiting and self._free_slots:
            row = self.waiting[0]
            self._share(row)
            if self.running and self.pool.num_available < self._wanted() + self._needs(row):
                self._let_go(row)
                break
            row.slot = self._free_slots.pop()
            self.running.append(self.waiting.pop(0))
            admitted.append(row)
        return admitted

    def chunks(self, fits: Callable[[int, int], bool]) -> list[tuple[Row, int]]:
        """The rows whose prompts are read in this step, and how many tokens of each, with pages for them.

        The row that came first, and others as far as there is a shape of so many rows and tokens, which `fits` says.
        """
        chosen, longest = [], 0
        for row in [row for row in self.running if row.num_unread > 1]:
            if row.slot is None:  # it has given way to a row before it
                continue
            self._share(row)  # with a row that has been read since this one came in
            if row.num_unread == 1:
                continue
            length = min(row.num_unread, self.chunk)
            if chosen and not fits(len(chosen) + 1, max(longest, length)):
                break
            if self.grow(row, row.num_read + length):
                chosen.append((row, length))
                longest = max(longest, length)
        return [(row, length) for row, length in chosen if row.slot is not None]

    def decoding(self) -> list[Row]:
        """The rows that draw a token in this step, with pages for it."""
        for row in [row for row in self.running if row.num_unread == 1]:
            if row.slot is not None:
                self.grow(row, row.num_read + 1)
        return [row for row in self.running if row.num_unread == 1]

    def grow_for(self, num_proposed: dict[Row, int]) -> dict[Row, int]:
        """Gives rows pages for what is proposed to them; returns how many proposals have a place: nobody gives way."""
        size, placed = self.config.page_size, {}
        for row, number in num_proposed.items():
            while (row.num_read + 1 + number) > len(row.pages) * size and (page := self.pool.take()) is not None:
                row.pages.append(page)
            placed[row] = min(number, len(row.pages) * size - row.num_read - 1)
        return placed

    def grow(self, row: Row, num_tokens: int) -> bool:
        """Gives a row pages for so many tokens, if need be those of the youngest; False where it is that one."""
        while len(row.pages) * self.config.page_size < num_tokens:
            page = self.pool.take()
            if page is not None:
                row.pages.append(page)
                continue
            youngest = max(self.running, key=lambda row: row.priority)
            self.preempt(youngest)
            if youngest is row:
                return False
        return True

    def preempt(self, row: Row) -> None:
        """Sends a row back to where it waited, with its tokens and without its pages."""
        row.give_way()
        self._take_out(row)
        self.add(row)
        self.preemptions += 1

    def publish(self, row: Row) -> None:
        """Lets other rows find the pages that a row has filled."""
        # Proposals that stand are read before they are among the row's tokens: a page has its name one step later.
        full = min(row.num_read, len(row.ids)) // self.config.page_size
        if not self.pool.sharing or not row.shares or full <= row.num_published:
            return
        names = row.names(self.config.page_size)
        for page in range(row.num_published, full):
            self.pool.publish(row.pages[page], names[page])
        row.num_published = full

    def _share(self, row: Row) -> None:
        """Gives a row the pages that hold what it would read next; one token is left to read.

        Whole chunks where the engine is deterministic, so that the row's own are those it would read alone.
        """
        size = self.config.page_size
        if not self.pool.sharing or row.reads_alone or row.num_read != len(row.pages) * size:
            return
        pages = self.pool.share(row.names(size)[len(row.pages) : (len(row.ids) - 1) // size])
        unit = max(self.chunk // size, 1) if self.config.deterministic else 1
        whole = max((len(row.pages) + len(pages)) // unit * unit - len(row.pages), 0)
        self.pool.release(pages[whole:])
        row.pages += pages[:whole]
        row.num_read = len(row.pages) * size
        row.num_shared += whole * size
        row.num_published = max(row.num_published, len(row.pages))

    def _wanted(self) -> int:
        """Pages that the rows that run will take, to the end of their prompts and a page more, or to their own end."""
        return sum(self._needs(row) for row in self.running)

    def _needs(self, row: Row) -> int:
        size = self.config.page_size
        last = row.num_prompt + row.max_new - 1
        tokens = last if self.config.deterministic else min(len(row.ids) + size, last)
        return max(-(-tokens // size) - len(row.pages), 0)

    def _take_out(self, row: Row) -> None:
        self.running.remove(row)
        self._free_slots.append(row.slot)
        row.slot = None
        self._let_go(row)

    def _let_go(self, row: Row) -> None:
        self.pool.release(row.pages)
        row.pages, row.num_read, row.num_shared, row.num_published = [], 0, 0, 0
