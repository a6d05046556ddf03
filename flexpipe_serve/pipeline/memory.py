"""What a stage process takes of its domain's memory, and what is free there."""

from __future__ import annotations

import psutil
import torch

from flexpipe_serve.model.source import ModelSpec

CUDA_CONTEXT_BYTES = 512 << 20
"""Assumed for the CUDA context and libraries of one process, which torch does not count."""


def available_bytes(device: torch.device) -> int:
    """Free memory of the device's domain."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def private_bytes(device: torch.device) -> int:
    """Memory that only this process has: on a CPU its anonymous pages (not libraries, not shared KV)."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device)) + CUDA_CONTEXT_BYTES
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon line; Linux 4.5 or newer is needed.")


def work_bytes(spec: ModelSpec, *, num_tokens: int, itemsize: int) -> int:
    """Estimate of the largest step's temporary buffers: activations of one layer, and logits with their sort."""
    width = 3 * (spec.intermediate_size or 4 * spec.hidden_size) + 8 * spec.hidden_size
    activations = num_tokens * width * itemsize
    logits = 64 * spec.vocab_size * 4 * 3
    return activations + logits


class Overhead:
    """What a stage's process takes beside weights and KV, with room for its largest step.

    Steps leave some of their buffers behind. Those are in the estimate of a step already, so what counts is the least
    that was seen with weights held: a process that has computed would seem to need the room twice, and layouts that
    fitted before would be refused.

    Args:
        work_bytes: of the largest step.
    """

    def __init__(self, work_bytes: int) -> None:
        self._work_bytes = work_bytes
        self._least: int | None = None

    def bytes(self, private_bytes: int, *, weights_bytes: int) -> int:
        """As of now.

        Args:
            private_bytes: of the process.
            weights_bytes: that are part of them.
        """
        taken = max(0, private_bytes - weights_bytes)
        if not weights_bytes:
            return taken + self._work_bytes
        self._least = taken if self._least is None else min(self._least, taken)
        return max(taken, self._least + self._work_bytes)
