"""How a time is taken, on a GPU, and the time of a copy of as many bytes.

A time is one call's share of a CUDA graph that makes the same call on many sets of buffers, together larger than the
L2 cache, the median of several replays; the cache is overwritten before each replay, and before the first the graph
runs for a while, so that a GPU that was idle has its clocks up. The yardstick is a Triton copy
kernel, the fastest of five tilings, that reads half of the bytes and writes the other half.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU to date
WARM_UP = 0.05  # seconds
TILINGS = ((512, 4), (1024, 4), (1024, 8), (2048, 4), (4096, 8))  # elements, warps


def sets_for(moved: int) -> int:
    """Sets of buffers for a call that moves so many bytes: 200 MB together, at least 4 and at most 128."""
    return max(4, min(128, 200_000_000 // moved + 1))


class Replays:
    """A CUDA graph of some calls, to be timed when one wants; ``calls`` have been made once before."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        torch.cuda.synchronize()
        self._count = len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._kept = [call() for call in calls]  # or the next call would get its outputs' memory

    def warm_up(self) -> None:
        started = time.perf_counter()
        while time.perf_counter() - started < WARM_UP:
            self._graph.replay()
            torch.cuda.synchronize()

    def once(self) -> float:
        """Microseconds of one call, by a single replay."""
        _flush_buffer().zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end) * 1000 / self._count)


def in_turn(every: Sequence[Replays], replays: int) -> list[float]:
    """Microseconds of one call of each, the median of that many replays, one of each in turn.

    A GPU at its power limit has the clock that what ran in the last tenth of a second leaves it, so each must follow
    what the others do, not itself.
    """
    for one in every:
        one.warm_up()
    times = [[one.once() for one in every] for _ in range(replays)]
    return [float(statistics.median(of_one)) for of_one in zip(*times, strict=True)]


def replay_time(calls: Sequence[Callable[[], Any]], replays: int = 5) -> float:
    """Microseconds of one call."""
    calls[0]()
    return in_turn([Replays(calls)], replays)[0]


@functools.cache
def copy_time(moved: int) -> float:
    """Microseconds of a copy that reads ``moved / 2`` bytes and writes as many."""
    import triton

    from fusionpasses.bench.copy_kernel import copy_kernel

    words = max(moved // 8, 1)
    make = functools.partial(torch.empty, words, dtype=torch.int32, device="cuda")
    pairs = [(make().random_(), make()) for _ in range(sets_for(moved))]

    def call(source: Tensor, target: Tensor, tile: int, warps: int) -> Callable[[], Any]:
        return lambda: copy_kernel[(triton.cdiv(words, tile),)](source, target, words, TILE=tile, num_warps=warps)

    return min(replay_time([call(s, t, *tiling) for s, t in pairs]) for tiling in TILINGS)


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
