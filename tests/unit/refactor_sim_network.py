"""Channels of the simulated world: first in, first out each, and no order between them."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

Channel = tuple[str, str, str]
"""(from, to, lane)."""


class InvariantError(AssertionError):
    """An invariant does not hold."""


class Network:
    """Messages under way. Which channel delivers next is drawn by the seed; so every delay is possible."""

    def __init__(self, rng: Random, *, slow_lane: str) -> None:
        self._rng = rng
        self._slow_lane = slow_lane
        self._queues: dict[Channel, deque[Any]] = {}
        self._busy: list[Channel] = []
        self._place: dict[Channel, int] = {}
        self._slow: tuple[str, int] = ("", 0)
        self.faults: dict[str, int] = {}
        """Messages to be lost or repeated: kind of fault -> how many more."""
        self.num_lost = 0

    def send(self, source: str, target: str, lane: str, *message: Any) -> None:
        if self.faults and lane == "copy":
            if self._strikes(f"lose {message[0]}"):
                self.num_lost += 1
                return
            if self._strikes(f"repeat {message[0]}"):
                self._put((source, target, lane), message)
        self._put((source, target, lane), message)

    def slow_down(self, lane: str, num_deliveries: int) -> None:
        """Deliver nothing on this lane for a while, as long as there is anything else."""
        self._slow = (lane, num_deliveries)

    def deliver(self) -> tuple[Channel, Any] | None:
        """Take a message off some channel; None if there is none."""
        if not self._busy:
            return None
        channel = self._rng.choice(self._busy)
        if channel[2] == self._slow_lane and self._rng.random() < 0.8:
            channel = self._rng.choice(self._busy)
        lane, num = self._slow
        if num:
            self._slow = (lane, num - 1)
            others = [c for c in self._busy if c[2] != lane]
            channel = self._rng.choice(others) if others else channel
        queue = self._queues[channel]
        message = queue.popleft()
        if not queue:
            self._forget(channel)
        return channel, message

    def take_all(self, channel: Channel) -> list[Any]:
        """Everything that is under way on one channel."""
        queue = self._queues.get(channel)
        if not queue:
            return []
        messages = list(queue)
        queue.clear()
        self._forget(channel)
        return messages

    def cut(self, node: str) -> None:
        """The node is gone: what was on its way to it is lost, and of what it sent last some."""
        for channel in [c for c in self._busy if node in c[:2]]:
            queue = self._queues[channel]
            num_kept = self._rng.randint(0, len(queue)) if channel[0] == node else 0
            while len(queue) > num_kept:
                queue.pop()
            if not queue:
                self._forget(channel)

    def _strikes(self, fault: str) -> bool:
        if self.faults.get(fault, 0):
            self.faults[fault] -= 1
            return True
        return False

    def _put(self, channel: Channel, message: Any) -> None:
        queue = self._queues.setdefault(channel, deque())
        if not queue:
            self._place[channel] = len(self._busy)
            self._busy.append(channel)
        queue.append(message)

    def _forget(self, channel: Channel) -> None:
        place, last = self._place.pop(channel), self._busy.pop()
        if last != channel:
            self._busy[place] = last
            self._place[last] = place
