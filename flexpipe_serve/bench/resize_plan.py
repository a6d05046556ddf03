"""Budgets, layouts and requests of the resize experiment: pure, seeded."""

from dataclasses import dataclass

import numpy as np

from flexpipe_serve.bench.arrivals import Arrival, gamma_arrivals
from flexpipe_serve.engine.status import ServerStatus
from flexpipe_serve.errors import ConfigError

_SLACK_BYTES = 4 << 20
"""For what a process takes beyond what it took when it was looked at."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What two stages were seen to take, under load.

    Args:
        boundary: first layer of the second stage.
        num_layers: of the model.
        weights_bytes: of each stage.
        overhead_bytes: of each stage's process.
        layer_bytes: weights of one layer.
        block_bytes: one KV block of one layer.
        block_size: tokens in a block.
    """

    boundary: int
    num_layers: int
    weights_bytes: tuple[int, int]
    overhead_bytes: tuple[int, int]
    layer_bytes: int
    block_bytes: int
    block_size: int

    @classmethod
    def of(cls, status: ServerStatus, *, layer_bytes: int) -> "Profile":
        """From ``GET /flexpipe/status`` of a pipeline of two stages.

        Raises:
            ConfigError: it has another number of stages.
        """
        stages, kv = status.stages, status.kv
        if len(stages) != 2:
            raise ConfigError(f"the pipeline has {len(stages)} stages; the experiment is about two")
        first, second = stages
        return cls(
            boundary=second.layers[0],
            num_layers=status.layout.num_layers,
            weights_bytes=(first.weights_bytes, second.weights_bytes),
            overhead_bytes=(first.overhead_bytes, second.overhead_bytes),
            layer_bytes=layer_bytes,
            block_bytes=first.kv_bytes // (kv.num_blocks * first.num_layers),
            block_size=kv.block_size,
        )

    def fixed_bytes(self, stage: int, boundary: int) -> int:
        """What a stage takes beside KV when the second one begins at ``boundary``."""
        moved = (boundary - self.boundary) * self.layer_bytes
        return self.weights_bytes[stage] + self.overhead_bytes[stage] + (moved if stage == 0 else -moved)


@dataclass(frozen=True, slots=True)
class ResizePlan:
    """The two layouts, and budgets that make the first one hold little KV.

    Args:
        old: first layer of the second stage, before.
        new: the same, after.
        budgets: bytes of the two stages.
        old_blocks: KV capacity that the second stage's budget leaves before.
        new_blocks: the same, after.
    """

    old: int
    new: int
    budgets: tuple[int, int]
    old_blocks: int
    new_blocks: int


def plan_resize(profile: Profile, *, old: int, num_blocks: int, growth: float) -> ResizePlan:
    """Budgets under which the second stage, with the layers from ``old`` on, holds just ``num_blocks``; and the nearest
    boundary that leaves it few enough layers for ``growth`` times as many.

    The first stage's budget is the one that does not limit, neither after the change nor during it. It holds no layer
    during it that it does not keep, and the second one none that it had not before: so nothing has to shrink.

    Raises:
        ConfigError: no boundary leaves room for that many.
    """
    layers = profile.num_layers

    def second_bytes(boundary: int, blocks: int) -> int:
        return profile.fixed_bytes(1, boundary) + (layers - boundary) * profile.block_bytes * blocks

    small = second_bytes(old, num_blocks) + _SLACK_BYTES
    for new in range(old + 1, layers):
        room = small - _SLACK_BYTES - profile.fixed_bytes(1, new)
        blocks = room // ((layers - new) * profile.block_bytes)
        if blocks >= growth * num_blocks:
            large = profile.fixed_bytes(0, new) + new * profile.block_bytes * int(1.1 * blocks) + 2 * _SLACK_BYTES
            return ResizePlan(old, new, (large, small), num_blocks, blocks)
    raise ConfigError(
        f"with {layers - old} layers and {num_blocks} blocks the second stage has no room for {growth:g} times as many"
        " wherever the pipeline is cut; ask for a smaller --growth"
    )


def stepped_arrivals(
    *,
    low_rate: float,
    high_rate: float,
    low_s: float,
    high_s: float,
    cv: float,
    prompt_tokens: tuple[int, int],
    num_output_tokens: int,
    seed: int,
) -> list[Arrival]:
    """Requests at one rate for ``low_s`` seconds, then at another for ``high_s``; the same for the same seed.

    Args:
        low_rate: requests a second.
        high_rate: requests a second.
        low_s: length of the first part.
        high_s: length of the second part.
        cv: of the gaps: 1 is Poisson.
        prompt_tokens: shortest and longest prompt; lengths are uniform.
        num_output_tokens: of each.
        seed: of arrivals and lengths.
    """
    parts = ((low_rate, low_s, 0.0), (high_rate, high_s, low_s))
    times: list[float] = []
    for index, (rate, seconds, start_s) in enumerate(parts):
        # Far more than will be used: of the sum of the gaps only the beginning is.
        num_requests = int(4 * rate * seconds * (1 + cv)) + 20
        part = gamma_arrivals(
            num_requests, rate=rate, cv=cv, num_prompt_tokens=1, num_output_tokens=1, seed=(seed, index)
        )
        times += [start_s + arrival.at_s for arrival in part if arrival.at_s < seconds]
    shortest, longest = prompt_tokens
    lengths = np.random.default_rng([seed, 2]).integers(shortest, longest + 1, len(times))
    return [Arrival(at_s, int(length), num_output_tokens) for at_s, length in zip(times, lengths, strict=True)]
