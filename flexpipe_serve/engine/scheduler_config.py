"""What a scheduler is told and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

from flexpipe_serve.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one pipeline's scheduler.

    Raises:
        ConfigError: a limit out of range.
    """

    max_num_seqs: int
    """Sequences that hold KV at the same time."""
    max_num_batched_tokens: int
    """Tokens of one step; longer prompts are computed in chunks."""
    max_waiting: int
    """Sequences that may wait for one of the ``max_num_seqs`` places."""
    max_model_len: int
    """Prompt and output tokens of one sequence."""
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_num_seqs", 1), ("max_waiting", 0), ("max_model_len", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs "
                f"({self.max_num_seqs}): decodes could fill every step and prompts never start. "
                "Raise the one or lower the other."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Gauges, and counters (``num_preemptions`` and below) since the start."""

    num_running: int
    """Sequences that hold KV."""
    num_waiting: int
    num_steps_in_flight: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_used_blocks: int
    num_preemptions: int
    num_prompt_tokens: int
    """Prompt tokens of the sequences admitted so far."""
    num_prefix_hit_tokens: int
    """How many of those the prefix cache had."""
