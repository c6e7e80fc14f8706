"""One artefact's chunks on their way to their places: what is due, from where, for whom.

A chunk has up to two places, the landing area (all of its stretches) and the landing directory, and is read once
for both. All methods but `carry` and `wake` are called with the engine's lock held.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from itertools import count

from snowdrop.content.area import Area
from snowdrop.content.landing import Landing
from snowdrop.content.landread import wrong_on_disk
from snowdrop.content.placement import READ_BYTES_MAX, AreaLayout
from snowdrop.content.progress import FillState
from snowdrop.content.runs import Awaited, Outcome, Paced, Reader, Run, Ticket
from snowdrop.content.source import ChunkSource, FindBad, Tier, wrong_chunk
from snowdrop.domain.errors import CorruptContentError, IntegrityError, ReadCancelledError, SnowdropError
from snowdrop.domain.ids import DEFAULT_TENANT, TenantId
from snowdrop.domain.manifest import Manifest
from snowdrop.policy.prefetch import LATER, SMALL_RUN_BYTES, URGENT, WANTED, FetchOrder, load_order

WRONG_READS_MAX = 3
"""So often a chunk may come wrong from the last source: bytes get damaged on their way."""
_turns = count(1)


class Fill:
    """See the module. The area and the landing directory come and go; the fill stays with the artefact."""

    def __init__(
        self,
        manifest: Manifest,
        layout: AreaLayout,
        headers: list[int],
        last: ChunkSource,
        find_bad: FindBad,
    ) -> None:
        """`headers` are the chunks with the headers of the area's files; `last` is asked when no other has one."""
        self.manifest = manifest
        self.layout = layout
        self.area: Area | None = None
        self.landing: Landing | None = None
        self.is_kept = True  # whether tensor files follow to the directory
        self.siblings: tuple[ChunkSource, ...] = ()  # other artefacts, the nearest first
        self.awaited: Awaited | None = None
        self.turn = 0  # later ones have higher numbers; one waits for earlier ones only: never in a circle
        self.last = last
        self.tenant = DEFAULT_TENANT  # whose bandwidth it is
        self.readers: dict[str, Reader] = {}
        self.flights = 0
        self.completed_unix_ns = 0
        self.on_progress: Callable[[], None] = lambda: None  # called in a thread after a run
        self._headers, self._ahead = headers, frozenset(headers if len(headers) > 1 else ())
        self._order = FetchOrder(load_order(headers, layout.places))
        self.find_bad = find_bad
        self._tickets: list[Ticket] = []
        self._in_flight = bytearray(len(manifest.chunks))
        self._landing_goal = bytearray(len(manifest.chunks))
        self._wrong_reads: Counter[int] = Counter()
        self._area_error: SnowdropError | None = None
        self._paced = Paced(layout.size)
        self._wake_lock = threading.Lock()

    # --- who wants what -----------------------------------------------------------------------------------

    @property
    def is_whole_wanted(self) -> bool:
        return any(not reader.is_lazy for reader in self.readers.values())

    def serve(self, tenant: TenantId) -> None:
        """What is read from now on is read for `tenant`, unless somebody reads already."""
        if not self.is_wanted:
            self.tenant = tenant

    @property
    def is_wanted(self) -> bool:
        """Whether anybody waits for bytes. May be asked without the lock."""
        return bool(self._tickets) or bool(self.readers)

    @property
    def is_busy(self) -> bool:
        """Whether something is under way or due."""
        return self.flights > 0 or self.is_wanted

    @property
    def is_due(self) -> bool:
        """Whether a run would be taken now."""
        return self.is_wanted and self._next(whole=self.is_whole_wanted) is not None

    def attach(self, holder: str, wake: socket.socket | None, *, is_lazy: bool) -> Reader:
        """`holder` reads the area from now on. A fill that had failed is tried again."""
        if not self.readers:
            self.turn = next(_turns)
        with self._wake_lock:
            reader = self.readers.setdefault(holder, Reader(is_lazy=is_lazy))
            reader.is_lazy &= is_lazy
            if wake is not None:
                reader.wakes.append(wake)
        if self._area_error is not None:
            self._area_error = None
            self._wrong_reads.clear()
            if self.area is not None:
                self.area.set_state(FillState.FILLING)
        self._order.rewind()
        if is_lazy:
            self._order.want(self._headers)
        self._settle_area()
        return reader

    def detach(self, holder: str) -> None:
        """`holder` no longer reads; without any reader nothing new is fetched for the area."""
        with self._wake_lock:
            reader = self.readers.pop(holder, None)
            if reader is not None:
                reader.end()
        for ticket in [ticket for ticket in self._tickets if ticket.holder == holder]:
            self._end(ticket, ReadCancelledError("released while it was waited for", where=holder))
        if not self.readers:
            self._order.forget()
            for ticket in (ticket for ticket in self._tickets if ticket.place == "landing"):
                self._order.want(sorted(ticket.remaining), ticket.rank)

    def drop_wake(self, holder: str, wake: socket.socket) -> None:
        """The reader has closed its end."""
        with self._wake_lock:
            reader = self.readers.get(holder)
            if reader is not None and wake in reader.wakes:
                reader.wakes.remove(wake)
            wake.close()

    def want(self, chunks: Iterable[int]) -> None:
        """A reader waits for these, most urgent first."""
        self._order.want((chunk for chunk in chunks if chunk in self.layout.places), WANTED)

    def open_ticket(self, ticket: Ticket) -> None:
        """Ends at once if nothing is missing."""
        if ticket.place == "area":
            ticket.remaining = {chunk for chunk in ticket.remaining if not self._is_in_area(chunk)}
        else:
            ticket.remaining = {chunk for chunk in ticket.remaining if not self._is_on_disk(chunk)}
            for chunk in ticket.remaining:
                self._wrong_reads.pop(chunk, None)
        if ticket.place == "area" and ticket.remaining and self._area_error is not None:
            ticket.error = self._area_error  # it failed before anybody waited for it
        if not ticket.remaining or ticket.error is not None:
            ticket.on_end()
            return
        self._tickets.append(ticket)
        if ticket.place == "landing":
            for chunk in ticket.remaining:
                self._landing_goal[chunk] = 1
            self._order.want(sorted(ticket.remaining), ticket.rank)

    def close_ticket(self, ticket: Ticket) -> None:
        """Nobody waits any more; what only this ticket wanted is not fetched."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self._renew_goals(ticket.remaining)

    # --- what is next -------------------------------------------------------------------------------------

    def next_run(self, has_room: Callable[[Tier, int, int], bool], origin_bytes_max: int) -> Run | None:
        """Takes the next run, from the last source of `origin_bytes_max` at most or one chunk.

        `has_room` says whether one more, of so many bytes at most, may be read from a tier for this fill.
        """
        if not self.is_wanted:
            return None
        whole = self.is_whole_wanted
        chunk = self._next(whole=whole)
        if chunk is None:
            return None
        source = self._source_of(chunk)
        limit, spare = READ_BYTES_MAX, 1
        if source.tier == "origin":
            limit, spare = self._paced.next(origin_bytes_max)
        if not has_room(source.tier, limit, spare):
            limit = SMALL_RUN_BYTES
            if self.manifest.chunks[chunk].plain_bytes > limit or not has_room(source.tier, limit, 1):
                return None
        run = self._run_from(chunk, source, limit, whole=whole)
        self._in_flight[run.first : run.first + run.count] = b"\1" * run.count
        self.flights += 1
        self._paced.began(run)
        return run

    def _run_from(self, chunk: int, source: ChunkSource, bytes_max: int, *, whole: bool) -> Run:
        chunks = self.manifest.chunks
        area = self.area if self._needs_area(chunk) else None
        at = self.layout.whole.get(chunk, -1) if area is not None else -1
        end, length = chunk + 1, chunks[chunk].plain_bytes
        while (
            end < len(chunks)
            and length + chunks[end].plain_bytes <= bytes_max
            and self._is_due(end)
            and (end in self._ahead or chunk not in self._ahead)  # what goes ahead takes nothing along
            and (whole or self._order.is_wanted(end))
            and self._source_of(end) is source
            and (self.area if self._needs_area(end) else None) is area
            and (area is None or self.layout.whole.get(end, -1) == (-1 if at < 0 else at + length))
        ):
            length += chunks[end].plain_bytes
            end += 1
        return Run(source, chunk, end - chunk, length, area, at)

    def _next(self, *, whole: bool) -> int | None:
        chunk = self._order.next(self._is_due, whole=whole)
        if chunk is None and self.awaited is not None:
            self._order.want(self.awaited.no_longer(), LATER)
            chunk = self._order.next(self._is_due, whole=whole)
        return chunk

    def _is_due(self, chunk: int) -> bool:
        if self._in_flight[chunk]:
            return False
        if self._landing_goal[chunk]:
            return True
        return self._needs_area(chunk) and not (self.awaited is not None and self.awaited.holds_up(chunk))

    def will_bring(self, chunk: int) -> bool:
        """Whether the area is about to get this chunk in any case."""
        return self.is_whole_wanted and self._needs_area(chunk)

    def _needs_area(self, chunk: int) -> bool:
        area = self.area
        if area is None or self._area_error is not None or not self.readers:
            return False
        return chunk in self.layout.places and not area.is_filled(chunk)

    def _is_in_area(self, chunk: int) -> bool:
        # One that is still in flight may be there, but is not booked yet: whose bytes they were is not known.
        return self.area is not None and self.area.is_filled(chunk) and not self._in_flight[chunk]

    def _is_on_disk(self, chunk: int) -> bool:
        return self.landing is not None and self.landing.is_verified(chunk) and not self._in_flight[chunk]

    def _source_of(self, chunk: int) -> ChunkSource:
        """The nearest that has it."""
        return next(source for source in self.sources() if source is self.last or source.holds(chunk))

    def sources(self) -> Iterator[ChunkSource]:
        """The nearest first; all but the last may lack a chunk."""
        yield from (source for source in (self.landing, self.area, *self.siblings) if source is not None)
        yield self.last

    # --- carrying a run, without the lock -----------------------------------------------------------------

    def carry(self, run: Run, scratch: Callable[[int], memoryview]) -> Outcome:
        """Reads and verifies a run, and puts what is right into its places."""
        with run.area.use() if run.area is not None else nullcontext():
            return self._carry(run, scratch)

    def _carry(self, run: Run, scratch: Callable[[int], memoryview]) -> Outcome:
        in_place = run.area_offset >= 0
        found = run.area.window(run.area_offset, run.length) if run.area is not None and in_place else None
        view = scratch(run.length) if found is None else found
        try:
            run.source.read(run.first, run.count, view)
            outcome = Outcome(self._wrong_of(run, view))
        except SnowdropError as error:
            outcome = Outcome(list(range(run.first, run.first + run.count)), error)
        self.set_aside(run, outcome.bad)
        done = 0
        for chunk in range(run.first, run.first + run.count):
            size = self.manifest.chunks[chunk].plain_bytes
            if chunk not in outcome.bad:
                lies_at = run.area_offset + done if in_place else -1
                self._deliver(run, chunk, view[done : done + size], lies_at, outcome)
            done += size
        return outcome

    def _wrong_of(self, run: Run, view: memoryview) -> list[int]:
        if self.landing is not None and run.source is self.landing:
            return wrong_on_disk(self.landing, self.find_bad, run.first, run.count, view)
        return self.find_bad(run.first, run.count, view)

    def set_aside(self, run: Run, bad: list[int]) -> None:
        """The run's source is not asked for these any more; the last one may be."""
        for chunk in bad if run.source is not self.last else ():
            with suppress(SnowdropError):  # a disk that cannot even note it
                run.source.quarantine(chunk)

    def _deliver(self, run: Run, chunk: int, data: memoryview, lies_at: int, outcome: Outcome) -> None:
        if run.area is not None:
            run.area.scatter(chunk, data, lies_at)
            run.area.mark(chunk)
        landing = self.landing
        if landing is None:
            return
        try:
            if run.source is landing:
                landing.confirm(chunk, data)
                return
            if self.is_kept:
                landing.learn(chunk, data)
            if self._landing_goal[chunk] or run.area is None:  # asked for, or read for somebody who gave up
                landing.write(chunk, data)
        except SnowdropError as error:
            outcome.landing_error = error

    def wake(self) -> None:
        """Tells every reader that there is more to see. Never blocks: a full socket wakes its reader anyway."""
        with self._wake_lock:
            for reader in self.readers.values():
                reader.wake()

    # --- afterwards ---------------------------------------------------------------------------------------

    def finish(self, run: Run, outcome: Outcome) -> None:
        """Books a run that `carry` has carried."""
        self.flights -= 1
        self._paced.ended(run)
        self._in_flight[run.first : run.first + run.count] = bytes(run.count)
        bad = set(outcome.bad)
        good = [chunk for chunk in range(run.first, run.first + run.count) if chunk not in bad]
        for chunk in good:
            self._credit(run, chunk)
            self._tell(chunk)
        if outcome.landing_error is not None:
            self._fail_landing(set(good), outcome.landing_error)
        if bad:
            self._try_again(run, sorted(bad), outcome.error)
        # The order has passed them while they were under way, but somebody wants them in another place since.
        self._order.want((at for at in good if self._landing_goal[at] or self._needs_area(at)), URGENT)
        self._settle_area()

    def _try_again(self, run: Run, bad: list[int], error: SnowdropError | None) -> None:
        if run.source is not self.last or isinstance(error, ReadCancelledError):
            self._order.want(bad, URGENT)
            return
        if error is None or isinstance(error, CorruptContentError | IntegrityError):
            self._wrong_reads.update(bad)
            if all(self._wrong_reads[chunk] < WRONG_READS_MAX for chunk in bad):
                self._order.want(bad, URGENT)
                return
            worst = max(bad, key=lambda chunk: self._wrong_reads[chunk])
            error = error or wrong_chunk(self.manifest, worst)
        self._fail_landing(set(bad), error)
        if any(self._needs_area(chunk) for chunk in bad):
            self._fail_area(error)

    def _credit(self, run: Run, chunk: int) -> None:
        """To whom the bytes are put down: one waiting for the directory, or the reader that came first."""
        size = self.manifest.chunks[chunk].plain_bytes
        if run.area is None:
            for ticket in self._tickets:
                if ticket.place == "landing" and chunk in ticket.remaining:
                    ticket.given[run.source.tier] += size
                    return
            return
        readers = sorted(self.readers.values(), key=lambda reader: reader.is_lazy)
        if readers:
            readers[0].given[run.source.tier] += size

    def _tell(self, chunk: int) -> None:
        in_area, on_disk = self._is_in_area(chunk), self._is_on_disk(chunk)
        for ticket in list(self._tickets):
            if chunk in ticket.remaining and (in_area if ticket.place == "area" else on_disk):
                ticket.remaining.discard(chunk)
                if not ticket.remaining:
                    self._end(ticket)
        if on_disk:
            self._landing_goal[chunk] = 0

    def _end(self, ticket: Ticket, error: SnowdropError | None = None) -> None:
        ticket.error = error
        self._tickets.remove(ticket)
        ticket.on_end()

    def _fail_area(self, error: SnowdropError) -> None:
        self._area_error = error
        if self.area is not None:
            self.area.set_state(FillState.FAILED, error.body())
        for ticket in [ticket for ticket in self._tickets if ticket.place == "area"]:
            self._end(ticket, error)

    def _fail_landing(self, chunks: set[int], error: SnowdropError) -> None:
        for ticket in [ticket for ticket in self._tickets if ticket.place == "landing"]:
            if not chunks.isdisjoint(ticket.remaining):
                self._end(ticket, error)
                self._renew_goals(ticket.remaining)

    def _renew_goals(self, chunks: Iterable[int]) -> None:
        still = {chunk for ticket in self._tickets if ticket.place == "landing" for chunk in ticket.remaining}
        for chunk in chunks:
            self._landing_goal[chunk] = chunk in still

    def _settle_area(self) -> None:
        area = self.area
        if area is not None and area.is_complete and area.progress.state is not FillState.COMPLETE:
            area.set_state(FillState.COMPLETE)
            self.completed_unix_ns = time.time_ns()
