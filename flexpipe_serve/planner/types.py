"""What planner, simulator, placement and server say to each other."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from flexpipe_serve.planner.profile import AS_MEASURED, Curve


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What clients ask for, as seen at one moment (F8, F16)."""

    at: float
    """Seconds, on the clock of whoever watches."""
    rate: float
    """Requests a second, lately."""
    rate_gradient: float
    """Its change, requests a second each second (FlexPipe's characteristic velocity)."""
    cv: float
    """Coefficient of variation of the gaps between arrivals, in the window that the planner goes by."""
    cv_by_window: dict[str, float]
    """By window, such as ``15s``; a window with too few arrivals is left out."""
    prompt_tokens: float
    """Mean length, lately."""
    output_tokens: float
    """Mean length, lately; what still runs counts with the tokens that it has got."""
    service_cv: float = 0.0
    """Coefficient of variation of the work in a request."""
    prefix_hit_share: float = 0.0
    """Of prompt tokens found in the cache."""
    num_waiting: int = 0
    num_running: int = 0
    num_arrived: int = 0
    """In all; with few nothing can be told."""
    num_alike: int = 0
    """Of those, the ones since the rate last changed."""


class StageDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stage may stand."""

    name: str
    node: str
    compute: str
    """What computes: stages with the same one take turns, others work at the same time."""
    domain: str
    """Whose memory it takes; stages of one domain share its budget."""
    memory_bytes: int
    """Budget of the domain for weights, KV and processes."""
    overhead_bytes: int = 0
    """What a stage's process takes there beside weights and KV."""
    speed: float = 1.0
    """In units of the profiled device."""


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline as the planner sees it; and how many of its kind."""

    boundaries: tuple[int, ...]
    """First layer of each later stage; () is a single stage."""
    devices: tuple[StageDevice, ...]
    """One for each stage, in order; of several pipelines one after the other, or of the first alone where the others
    have such devices of their own."""
    num_pipelines: int = 1

    @property
    def num_stages(self) -> int:
        return len(self.boundaries) + 1


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What a split would do under a demand; times in seconds, infinite beyond its capacity."""

    ttft_s: float
    tpot_s: float
    latency_s: float
    """Of a whole request, mean."""
    max_rate: float
    """Requests a second that it can sustain."""
    utilisation: float
    """Demanded rate over ``max_rate``."""
    num_kv_tokens: int
    """Capacity."""


class SchedulerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Of each pipeline's scheduler; the defaults are the server's."""

    max_num_seqs: int = 64
    """Sequences that hold KV at the same time."""
    max_num_batched_tokens: int = 512
    """Tokens of one step."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What live steps say of the profile: how many times longer than there everything takes."""

    compute: Curve = AS_MEASURED
    """Stages, by new tokens of the step."""
    messages: Curve = AS_MEASURED
    """Hops and the Router's part, by sequences that get a token."""
    num_steps: int = 0
    """That say so."""


class Verdict(StrEnum):
    STAY = "stay"
    MOVE = "move"


class Trigger(StrEnum):
    """Why it was looked at."""

    INTERVAL = "interval"
    GRADIENT = "gradient"
    """The rate rises: before the queue does (F16)."""
    STALL = "stall"
    """Requests take longer than they should (F23)."""
    ASKED = "asked"
    """A dry run."""


class CandidateScore(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate as it was weighed."""

    split: Split
    prediction: Prediction
    score: float
    """The policy's; higher is better."""
    gain_s: float = 0.0
    """Seconds of request latency saved over the horizon, summed over its requests."""
    cost_s: float = 0.0
    """Seconds of request latency that getting there costs."""
    refused: str | None = None
    """Why it is out of the question, such as memory."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision, also to stay: the body of ``GET /flexpipe/plan``."""

    at: float
    policy: str
    trigger: Trigger
    demand: Demand
    current: CandidateScore
    candidates: tuple[CandidateScore, ...]
    """Best first."""
    verdict: Verdict
    chosen: Split | None
    """Where to go; None to stay."""
    hurry: bool = False
    """Whether to get there quickly, though those who get tokens may notice."""
    sentence: str
    """Why, with the numbers that decided."""
    decision_s: float = 0.0
    """Time it took."""
    calibration: Calibration = Calibration()
    """What predictions are corrected by, all candidates' alike."""
    refactoring_id: str | None = None
    """Of what came of it."""


class PlannerWeights(msgspec.Struct, frozen=True, kw_only=True):
    """The knobs; ``user_config.planner`` sets them."""

    horizon_s: float = 60.0
    """The gain is counted over so long."""
    margin: float = 0.1
    """The gain must exceed the cost by this share of the present latency over the horizon; by less where it lasts."""
    cool_down_s: float = 30.0
    """After a change."""
    max_stages: int = 4
    max_pipelines: int = 1


class PlannerState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a policy may look at beside the profile."""

    now: float
    demand: Demand
    current: Split
    devices: tuple[StageDevice, ...]
    """Usable ones, those in use included. A device may take several stages."""
    trigger: Trigger = Trigger.INTERVAL
    last_change_at: float | None = None
    num_kv_tokens_in_use: int = 0
    migration_bytes_per_s: float = 4e7
    limits: SchedulerLimits = SchedulerLimits()
