"""Times calls against each other: all of them in turn, round after round, so that a drift of the machine meets all."""

import math
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

_SHORTEST_S = {"cpu": 1e-2, "cuda": 2e-3}  # what is timed at once: a shorter call is repeated
_MOST_REPEATS = 1000

Name = TypeVar("Name")


def alternate(calls: Mapping[Name, Callable[[], object]], rounds: int, device: torch.device) -> dict[Name, list[float]]:
    """Seconds of each call, one figure per round.

    Each is called twice before (once to compile, once to see how long it takes), and once more right before it is
    timed: it finds memory and caches as it leaves them, not as another call did, which may have given megabytes back
    to the system that come again page by page.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = min(math.ceil(_SHORTEST_S[device.type] / _seconds(call, 1, device)), _MOST_REPEATS)
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            times[name].append(_seconds(call, repeats[name], device))
    return times


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats
