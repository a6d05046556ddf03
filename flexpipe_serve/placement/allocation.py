"""What the allocator is asked and what it answers: plain data."""

from __future__ import annotations

import msgspec


class StageDemand(msgspec.Struct, frozen=True, kw_only=True):
    """A stage that needs a device. Demands of one pipeline are given in the order of its stages."""

    name: str
    """Unique among the demands, such as ``p0/stage-1``."""
    model: str
    pipeline: str = "p0"
    memory_bytes: int
    """Weights, KV and the process: all that it will take of its domain."""
    rate: float = 1.0
    """Requests a second that it sustains on a device of speed 1 (T of Eq 6, mu of Eq 12)."""
    cv: float = 1.0
    """Of the gaps between the model's requests (Eq 9)."""
    setup_s: float = 0.0
    """From now until it serves on a device where it does not stand yet (S of Eq 12)."""


class AllocationWeights(msgspec.Struct, frozen=True, kw_only=True):
    """What the terms of the score count against each other. The paper gives no values; these are ours."""

    throughput: float = 1.0
    """Eq 6: for a stage on the fastest device; less as the device is slower."""
    sharing: float = 0.1
    """Eq 9's gamma0: for a stage that shares its device, with no burstiness."""
    sharing_per_cv2: float = 0.1
    """Eq 9's alpha."""
    fit: float = 1.0
    """Memory left over on the devices taken, in units of the largest device: small holes are filled before whole
    devices are broken. By simulation on a fragmented cluster: at half of it, a tenth fewer pipelines find room."""
    congestion: float = 0.2
    """For one marker on a stage's own device, see the resource graph."""
    affinity: float = 0.2
    """For one unit of Eq 13."""
    hop: float = 0.05
    """From a stage to the next for each level between them: 0 inside a node, 1 in a rack, 2 in a zone, 3 beyond."""
    stay: float = 0.5
    """For a stage that stays where it stands: nothing is loaded or copied."""

    def gamma(self, cv: float) -> float:
        """Eq 9, ``gamma0 (1 + alpha CV^2)``: what sharing a device costs a stage."""
        return self.sharing * (1 + self.sharing_per_cv2 * cv * cv)


class ScoreTerms(msgspec.Struct, frozen=True, kw_only=True):
    """The score's parts, weights included, summed over all stages; costs are negative."""

    throughput: float
    sharing: float
    fit: float
    congestion: float
    affinity: float
    hop: float
    stay: float

    @property
    def total(self) -> float:
        """What the allocator maximises."""
        return self.throughput + self.sharing + self.fit + self.congestion + self.affinity + self.hop + self.stay


class Deadline(msgspec.Struct, frozen=True, kw_only=True):
    """Eq 12: so much is to be served by then."""

    at: float
    """T, in seconds on the caller's clock."""
    num_due: float
    """Requests to be served until then (r)."""


class Allocation(msgspec.Struct, frozen=True, kw_only=True):
    """Where the stages go."""

    devices: tuple[str, ...]
    """The device of each demand, in their order."""
    terms: ScoreTerms
    is_exact: bool
    """No allocation scores better: all were looked at."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The stages find no room."""

    reason: str
    """The numbers seen, the limit and the remedy, in a sentence."""
    num_stages: int
    num_placed: int
    """The most that found room together in the attempts made; all, where only the deadline refuses."""
    needed_bytes: int
    """Of all stages."""
    free_bytes: int
    """Of all usable devices."""
    is_proven: bool
    """False: the search gave up; there may be a way."""
