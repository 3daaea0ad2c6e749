"""Continuous batching: assigns sequences to rows and schedules prefills."""

from collections import deque
from collections.abc import Collection, Iterable

from lmchat.generation.cached_attention import Chunk
from lmchat.generation.decode_state import StepOutput
from lmchat.generation.kv_pool import KVPool, MemoryBudget
from lmchat.generation.prefix_cache import PrefixCache
from lmchat.generation.runner import Runner
from lmchat.generation.sequence import Sequence, SharedPrompt

CHUNK_TOKENS = 256
"""Prompts are prefilled in chunks that end at multiples of this, independent of other sequences."""

PREFILL_TOKENS = 4096
"""Tokens of prompts that are prefilled at a time while nothing decodes."""


class Scheduler:
    """Admits waiting sequences to rows as soon as rows are free, first come, first served.

    Running sequences are in rows 0, 1, …, which are also their slots in the KV pool. The row of a sequence is frozen
    during its prefill. When a sequence ends, the last one moves into its row.
    """

    def __init__(self, runner: Runner, max_rows: int, budget: MemoryBudget, prefixes: PrefixCache) -> None:
        self.runner = runner
        self.max_rows = max_rows
        self.budget = budget
        self.prefixes = prefixes
        self.waiting: deque[Sequence | SharedPrompt] = deque()
        self.running: list[Sequence] = []
        self.shared: list[SharedPrompt] = []

    @property
    def num_waiting(self) -> int:
        """Number of sequences that are not running yet."""
        units = (*self.waiting, *self.shared)
        return sum(len(unit.waiting) if isinstance(unit, SharedPrompt) else 1 for unit in units)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Adds sequences to the queue; those with equal prompts share them."""
        by_prompt: dict[tuple[int, ...], list[Sequence]] = {}
        for sequence in sequences:
            by_prompt.setdefault(sequence.prompt, []).append(sequence)
        for prompt, sharing in by_prompt.items():
            shared = len(sharing) > 1 and len(prompt) > 1
            self.waiting.extend([SharedPrompt(prompt, sharing)] if shared else sharing)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Removes sequences, whether waiting or running."""
        removed = set(sequences)
        self.waiting = deque(unit for unit in self.waiting if unit not in removed)
        for unit in (*self.waiting, *self.shared):
            if isinstance(unit, SharedPrompt):
                unit.waiting = deque(each for each in unit.waiting if each not in removed)
        self.waiting = deque(unit for unit in self.waiting if isinstance(unit, Sequence) or unit.waiting)
        self.free_rows(removed)

    def clear(self) -> None:
        """Removes all sequences, and frees all slots."""
        self.waiting.clear()
        self.running.clear()
        self.shared.clear()
        self.prefixes.clear()
        self.runner.release()

    def prepare(self) -> None:
        """Admits sequences that fit and prefills prompts, so that at least one sequence can decode."""
        self._admit()
        while self.running or self.shared:
            decodes = any(sequence.is_prefilled for sequence in self.running)
            self._prefill(CHUNK_TOKENS if decodes else PREFILL_TOKENS)
            self._admit()
            if any(sequence.is_prefilled for sequence in self.running):
                return

    def decode(self) -> tuple[list[Sequence], StepOutput]:
        """Decodes all rows for a few steps. Returns their sequences and tokens."""
        # Rows that only fill up a bucket write to their slots too.
        self.prefixes.vacate(len(self.running), self.runner.bucket(len(self.running)))
        members: dict[SharedPrompt, list[int]] = {shared: [] for shared in self.shared}
        for row, sequence in enumerate(self.running):
            if sequence.shared:
                members[sequence.shared].append(row)
        while members and not next(reversed(members.values())):
            members.popitem()  # prompts in the last slots that only wait are not read
        return list(self.running), self.runner.decode(self.running, members)

    def resume(self, sequence: Sequence, forced: list[int]) -> None:
        """Resumes a sequence after a calculator call."""
        self.runner.state.resume(self.running.index(sequence), forced)

    def free_rows(self, sequences: Collection[Sequence]) -> None:
        """Frees the rows of those sequences that are running."""
        for row in reversed(range(len(self.running))):
            if self.running[row] in sequences:
                self._free(row)
        self._drop_unused_prompts()

    # -----------------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while len(self.running) < self.max_rows and (sequence := self._next()) is not None:
            self._start(sequence)

    def _next(self) -> Sequence | None:
        """Removes the next sequence that can start from its queue and returns it."""
        for shared in self.shared:
            if shared.waiting and shared.is_prefilled:
                if not self._has_room(len(self.running) + 1, shared.waiting[0].slot_tokens):
                    return None
                return shared.waiting.popleft()
        reserved = len(self.running) + sum(len(shared.waiting) for shared in self.shared)
        while self.waiting and reserved < self.max_rows:
            unit = self.waiting[0]
            if isinstance(unit, Sequence):
                if not self._has_room(reserved + 1, unit.slot_tokens):
                    return None
                self.waiting.popleft()
                return unit
            if not self._has_prompt_room(len(unit.prompt) - 1):
                return None
            self.waiting.popleft()
            self.shared.append(unit)
            reserved += len(unit.waiting)
        return None

    def _has_room(self, rows: int, wanted: int) -> bool:
        """Enlarges the pool to ``rows`` rows of ``wanted`` tokens; False if there is not enough memory now."""
        pool = self.runner.pool
        capacity = max(wanted, pool.capacity)
        affordable = min(self.max_rows, self.budget.slots(capacity))
        if affordable < rows:
            if self.running or self.shared:
                return False
            pool.release()
            self.prefixes.clear()
            capacity = wanted
            affordable = min(self.max_rows, self.budget.slots(capacity))
        if capacity > pool.capacity or rows > pool.num_slots:
            num_slots = self._num_slots(pool, rows, affordable)
            self.prefixes.drop_from(num_slots)
            self.runner.resize(pool, num_slots, capacity)
        return True

    def _has_prompt_room(self, tokens: int) -> bool:
        """Makes room for one more shared prompt."""
        prompts, count = self.runner.prompts, len(self.shared) + 1
        if not self.shared and self._max_prompts(tokens) >= 2 * self._max_prompts(prompts.capacity):
            prompts.release()  # few slots are left of a time with longer prompts
        if tokens > prompts.capacity or count > prompts.num_slots:
            limit = self._max_prompts(max(tokens, prompts.capacity))
            if count > limit:
                return False
            self.runner.resize(prompts, self._num_slots(prompts, count, limit), tokens)
        return True

    def _max_prompts(self, capacity: int) -> int:
        """Maximum number of shared prompts of ``capacity`` tokens at a time; at least one, which fits alone."""
        return max(1, min(self.max_rows // 2, self.budget.prompt_slots(max(1, capacity))))

    def _num_slots(self, pool: KVPool, needed: int, limit: int) -> int:
        """The new number of slots. On a CPU memory is used once written; a GPU gets those needed, and some to spare."""
        if self.runner.device.type == "cpu":
            return limit
        return min(limit, pool.num_slots if needed <= pool.num_slots else max(8, 2 * pool.num_slots, needed))

    def _start(self, sequence: Sequence) -> None:
        """Assigns the next row to the sequence, and loads the cached prefix of its prompt."""
        row = len(self.running)
        if sequence.shared:
            self.prefixes.vacate(row, row + 1)
            sequence.prefilled = len(sequence.prompt) - 1
        else:
            sequence.prefilled, sequence.inherited = self.prefixes.load(sequence.prompt[:-1], row, self.running)
        self.running.append(sequence)
        self.runner.state.set(row, sequence)

    def _prefill(self, max_tokens: int) -> None:
        """Prefills the next chunk of each incomplete prompt, about ``max_tokens`` tokens in total."""
        chunks: list[Chunk] = []
        ids: list[int] = []
        pool, prompts = self.runner.pool, self.runner.prompts
        slots: Iterable[tuple[KVPool, int, Sequence | SharedPrompt]] = (
            *((prompts, slot, shared) for slot, shared in enumerate(self.shared)),
            *((pool, row, sequence) for row, sequence in enumerate(self.running)),
        )
        for where, slot, unit in slots:
            if not unit.is_prefilled and len(ids) < max_tokens:
                start = unit.prefilled
                unit.prefilled = min(len(unit.prompt) - 1, (start // CHUNK_TOKENS + 1) * CHUNK_TOKENS)
                chunks.append(Chunk(where, slot, start, unit.prefilled - start))
                ids += unit.prompt[start : unit.prefilled]
        if chunks:
            self.runner.prefill(chunks, ids)
        for chunk in chunks:
            if chunk.pool is pool:
                self.runner.state.set(chunk.slot, self.running[chunk.slot])

    def _free(self, row: int) -> None:
        """Removes the sequence from its row; the last row moves there."""
        runner, last = self.runner, len(self.running) - 1
        sequence, moved = self.running[row], self.running[last]
        if not sequence.shared and sequence.is_prefilled:
            held = sequence.num_own
            if row != last:
                runner.pool.swap(row, last, max(held, moved.num_own + 1))
            self.prefixes.add(last, (*sequence.prompt, *sequence.completion.ids)[:held], sequence.written)
        elif row != last:
            runner.pool.copy(last, row, moved.num_own + 1)
        if row != last:
            runner.state.move(last, row)
            self.running[row] = moved
        self.running.pop()

    def _drop_unused_prompts(self) -> None:
        """Frees the slots of shared prompts without sequences; the last prompts move there."""
        used = {sequence.shared for sequence in self.running}
        for slot in reversed(range(len(self.shared))):
            shared = self.shared[slot]
            if shared not in used and not shared.waiting:
                moved = self.shared.pop()
                if moved is not shared:
                    self.runner.prompts.copy(len(self.shared), slot, moved.prefilled)
                    self.shared[slot] = moved
