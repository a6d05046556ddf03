"""The configuration, checked at the edge: ``args`` need a restart, ``user_config`` changes live.

Unknown keys are refused with the nearest known one; every field is described.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import combinations
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from flexpipe_serve.errors import ConfigError

_Size = Annotated[ByteSize, Field(gt=0)]
_ONE, _BY_NAME = "a size", "sizes by name"
_SizeOrSizes = Annotated[
    Annotated[_Size, Tag(_ONE)] | Annotated[dict[str, _Size], Field(min_length=1), Tag(_BY_NAME)],
    # Told apart beforehand, so that an error is about the form that was meant.
    Discriminator(lambda value: _BY_NAME if isinstance(value, dict) else _ONE),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                    known = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(cls.model_fields)}."
                    raise ValueError(f"unknown key {key!r}; {known}")
        return data


class ModelConfig(_Strict):
    """Which model, and how its weights are held."""

    source: str = Field("demo", description="'demo', a folder with a Hugging Face checkpoint, or a hub id.")
    name: str | None = Field(None, description="The model's name over HTTP; the source's last part by default.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and KV. 'auto': float32 on the CPU, bfloat16 on CUDA."
    )
    max_model_len: int | None = Field(
        None, ge=2, description="Longest prompt plus output, in tokens; the model's own limit by default."
    )


class KVConfig(_Strict):
    """The paged KV cache."""

    block_size: int | None = Field(
        None,
        ge=1,
        description="Tokens in a block. By default what the attention backend likes: 16, or 256 for flash_attn.",
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Upper limit on the cache's size in tokens; the memory budget alone by default."
    )
    prefix_cache: bool = Field(True, description="Reuse the KV of common beginnings.")
    domain: Literal["node", "stage"] = Field(
        "node",
        description="Who can map a layer's KV: all stages of a node, so that a layer moves between them without a copy,"
        " or each stage alone, so that stages of one machine have separate budgets and copy what moves.",
    )


class SchedulerArgs(_Strict):
    """Continuous batching."""

    max_num_seqs: int = Field(64, ge=1, description="Sequences decoded at once.")
    steps_in_flight: int | None = Field(
        None,
        ge=1,
        description="Steps computed at once by different stages. By default as many as they have devices: GPUs, or"
        " nodes where they compute on CPUs.",
    )
    max_num_batched_tokens: int = Field(
        512, ge=1, description="Token budget of a step: longer prompts are computed in chunks of at most this."
    )


class StageCpus(_Strict):
    """CPU cores of one stage."""

    cores: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="Numbers of the cores that the stage's process is kept on; one thread for each."
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Below 1 a slower device is emulated: after each step the stage rests, so that it computes for this"
        " share of the time.",
    )

    @field_validator("cores")
    @classmethod
    def _sorted(cls, cores: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(cores)))


class ServeArgs(_Strict):
    """``args`` of the application: a change restarts it."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="The model.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="'auto': CUDA where there is one.")
    memory_budget: _SizeOrSizes | None = Field(
        None,
        description="Memory for weights, KV and processes in one domain (a node's RAM, one GPU, or with kv.domain stage"
        " one stage), such as '4GiB'; or a size for each domain by its name, such as {stage-0: 1GiB, stage-1: 600MiB}."
        " What is not given: 60 % of what is free on a CPU, 90 % of what is free on a GPU.",
    )
    host_cache: ByteSize | None = Field(
        None,
        ge=0,
        description="Shared memory of each node for weights of the model, ready to be copied into a stage that gets a"
        " layer, such as '2GiB'; beside memory_budget. 0: none. By default what the model takes; never more than a"
        " quarter of the free memory.",
    )
    kv: KVConfig = Field(default_factory=KVConfig, description="The KV cache.")
    attention: Literal["auto", "torch", "native", "flash_attn"] = Field(
        "auto",
        description="Attention kernels. 'auto': flash_attn on CUDA where installed, native on a CPU with a C++ compiler"
        " (float32), else torch.",
    )
    scheduler: SchedulerArgs = Field(default_factory=SchedulerArgs, description="Batching.")
    api_keys: tuple[str, ...] = Field(
        (),
        description="Accepted bearer tokens; empty: no authentication. 'env:NAME' takes the key from the environment.",
    )
    stage_cpus: dict[str, StageCpus] = Field(
        default_factory=dict,
        description="Cores of single stages, such as {stage-0: {cores: [0]}, stage-1: {cores: [1], share: 0.5}}. Like"
        " devices of their own, they work at the same time. Stages not named share all cores of the node.",
    )
    orphan_timeout_s: float = Field(
        30.0, ge=5.0, description="Stages end themselves when no Router has spoken to them for this long."
    )

    @field_validator("stage_cpus")
    @classmethod
    def _whole_sets_of_cores(cls, stage_cpus: dict[str, StageCpus]) -> dict[str, StageCpus]:
        for (one, mine), (other, theirs) in combinations(stage_cpus.items(), 2):
            common = sorted(set(mine.cores) & set(theirs.cores))
            if common and mine.cores != theirs.cores:
                raise ValueError(
                    f"{one} has the cores {list(mine.cores)} and {other} {list(theirs.cores)}, and core {common[0]} is"
                    " in both; give them the same cores or none in common."
                )
        return stage_cpus


class LayoutConfig(_Strict):
    """The pipeline's split. One of the two."""

    stages: int | None = Field(None, ge=1, description="Number of stages, with layers split evenly.")
    boundaries: tuple[int, ...] | None = Field(None, description="First layer of each later stage, e.g. [10, 20].")

    @model_validator(mode="after")
    def _one_of_two(self) -> LayoutConfig:
        if (self.stages is None) == (self.boundaries is None):
            raise ValueError("give either 'stages' or 'boundaries'.")
        return self


class LimitsConfig(_Strict):
    """What the HTTP side accepts."""

    max_waiting: int = Field(256, ge=1, description="Sequences waiting for their first step; more get a 429.")
    max_body: ByteSize = Field(ByteSize(8 << 20), description="Largest request body, such as '8MiB'.")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Longest prompt; what the model and the KV can hold by default."
    )


class RefactorConfig(_Strict):
    """How much a refactoring may take from those who wait for tokens."""

    max_bytes_per_s: _Size = Field(
        ByteSize(40_000_000), description="Limit of copying KV from a stage to another, such as '40MB'."
    )


class PlannerConfig(_Strict):
    """When the server changes its own pipeline."""

    mode: Literal["off", "observe", "on"] = Field(
        "off",
        description="'observe' records what 'on' would do. GET /flexpipe/plan answers in every mode. Switched on, the"
        " planner goes by what it sees from then on; switched off, the split is the configured one again.",
    )
    policy: Literal["gated", "flexpipe"] = Field(
        "gated",
        description="'gated': predicted gain against predicted cost. 'flexpipe': the scores of the FlexPipe paper.",
    )
    interval_s: float = Field(1.0, ge=0.1, description="Between decisions.")
    horizon_s: float = Field(60.0, gt=0, description="The gain of a change is counted over so long.")
    margin: float = Field(
        0.1, ge=0, description="The gain must exceed the cost by this share of the latency over the horizon."
    )
    cool_down_s: float = Field(30.0, ge=0, description="After a change, before the next.")
    max_stages: int = Field(4, ge=1, description="Largest granularity to consider.")
    max_pipelines: int = Field(1, ge=1, description="Most pipelines to serve with at once.")
    give_back_after_s: float = Field(
        300.0, ge=0, description="A change to fewer nodes waits until nothing has needed the others for so long."
    )
    always_on_share: float = Field(
        0.3, ge=0, le=1, description="Of the most nodes needed at once within a day, which is never given back."
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _words_of_yaml(cls, mode: object) -> object:
        """An unquoted ``on`` or ``off`` is a boolean in YAML 1.1."""
        return ("on" if mode else "off") if isinstance(mode, bool) else mode


class UserConfig(_Strict):
    """``user_config`` of the Router deployment: ``serve deploy`` applies a change to the running replica."""

    layout: LayoutConfig = Field(
        default_factory=lambda: LayoutConfig(stages=2),
        description="The split. It is brought about when it changes here; one that was asked for otherwise stays.",
    )
    pipelines: int = Field(
        1,
        ge=1,
        le=64,
        description="How many pipelines serve the model at once, each with this layout; they share the memory budgets.",
    )
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="Admission limits.")
    refactor: RefactorConfig = Field(default_factory=RefactorConfig, description="Limits of refactorings.")
    planner: PlannerConfig = Field(default_factory=PlannerConfig, description="Changes that nobody asks for.")
    warm_stages: int = Field(
        0,
        ge=0,
        description="Empty stages kept ready, so that a refactoring to more stages waits for no process to start."
        " Each costs the memory of a process.",
    )


_Config = TypeVar("_Config", bound=_Strict)
_ALTERNATIVES = ("layout",)
"""Sections whose keys exclude each other: given anew, nothing of the former stays."""


def parse(kind: type[_Config], data: dict[str, Any] | None) -> _Config:
    """Validate a mapping from YAML. Raises ConfigError naming each bad key, its path and the remedy."""
    try:
        return kind.model_validate(data or {})
    except ValidationError as error:
        lines = []
        for item in error.errors():
            path = ".".join(str(part) for part in item["loc"] if part not in (_ONE, _BY_NAME)) or kind.__name__
            lines.append(f"{path}: {item['msg'].removeprefix('Value error, ')}")
        raise ConfigError("configuration: " + "; ".join(lines)) from None


def merge(former: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some of its keys changed; neither is checked.

    Args:
        former: the one before.
        changes: sections with the keys that change, the others stay; None: the default. A layout is given as a whole.
    """
    merged = dict(former)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key not in _ALTERNATIVES:
            value = merge(merged[key], value)
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged
