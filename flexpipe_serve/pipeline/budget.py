"""How many KV blocks the stages' memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flexpipe_serve.kv.capacity import StageFootprint, max_blocks
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.stage_types import StageReport

CPU_SHARE = 0.6
"""Of the free memory of a node, taken where no budget is given."""
GPU_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class DomainUse:
    """What pipelines have of one domain."""

    budget_bytes: int = 0
    held_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class KVBudget:
    """How the number of KV blocks follows from memory."""

    budget_bytes: int | Mapping[str, int] | None
    """Of each domain, or of those named (by domain, or by the one stage that is a domain of its own); None and those
    not named: a share of what is free."""
    block_bytes: int
    """One block of one layer."""
    max_blocks: int
    """Upper limit beside the budget."""
    others: Callable[[str], DomainUse] = lambda domain: DomainUse()
    """What other pipelines of the application have of a domain."""

    def domain_bytes(self, report: StageReport, *, free_bytes: int) -> int:
        """Budget of the domain of ``report``: what other pipelines leave of it.

        Args:
            free_bytes: what would be free there without this pipeline's stages.
        """
        others = self.others(report.domain)
        free_bytes += others.held_bytes
        total = self.total_bytes(report.domain, stage=report.name, device=report.device, free_bytes=free_bytes)
        return max(0, total - others.budget_bytes)

    def total_bytes(self, domain: str, *, stage: str = "", device: str, free_bytes: int) -> int:
        """What all pipelines of the application together may take of a domain.

        Args:
            stage: whose domain it is, where it has one of its own.
            device: 'cpu', or a GPU.
            free_bytes: what would be free there without them.
        """
        given = self.budget_bytes
        if isinstance(given, Mapping):
            given = given.get(domain, given.get(stage))
        share = CPU_SHARE if device == "cpu" else GPU_SHARE
        return given if given is not None else int(share * free_bytes)


def domain_budgets(reports: Iterable[StageReport], budget: KVBudget) -> dict[str, int]:
    """Bytes by domain, as things stand; what the stages already hold is theirs to keep."""
    reports = list(reports)
    free = {r.domain: r.domain_free_bytes for r in reports}
    for report in reports:
        free[report.domain] += report.weights_bytes + report.overhead_bytes + report.kv_bytes
    return {r.domain: budget.domain_bytes(r, free_bytes=free[r.domain]) for r in reports}


def count_blocks(
    layout: Layout, reports: Mapping[str, StageReport], *, budgets: Mapping[str, int], budget: KVBudget
) -> int:
    """KV blocks that fit when the stages hold what their reports say and the KV of ``layout``.

    Args:
        reports: of all stages alive, by name; warm ones take memory too.

    Raises:
        ConfigError: not one block fits.
    """
    num_layers = {part.stage: part.stop - part.start for part in layout.slices}
    footprints = [
        StageFootprint(
            stage=name,
            domain=report.domain,
            num_layers=num_layers.get(name, 0),
            weights_bytes=report.weights_bytes,
            overhead_bytes=report.overhead_bytes,
        )
        for name, report in reports.items()
    ]
    blocks = max_blocks(footprints=footprints, budgets=budgets, block_bytes=budget.block_bytes)
    return min(blocks, budget.max_blocks)
