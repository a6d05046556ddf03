"""The core of a stage: holds layers of a model and their KV, and runs its part of each step that comes. Knows no Ray;
hosts put it into an actor, a process or a thread.

This is the control side: several threads may call it, and it may load weights for seconds while steps run. The data
side, one thread, is :mod:`flexpipe_serve.pipeline.stage_loop`.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.kv.domain import DomainFolder, free_bytes, sweep_stale
from flexpipe_serve.kv.stage_kv import StageKV
from flexpipe_serve.pipeline.background import gently, in_background
from flexpipe_serve.pipeline.cache_filler import CacheFiller
from flexpipe_serve.pipeline.channel import Endpoint, Outlet
from flexpipe_serve.pipeline.compute import stage_speed
from flexpipe_serve.pipeline.inbox import Inbox, connect
from flexpipe_serve.pipeline.memory import Overhead, available_bytes, private_bytes, work_bytes
from flexpipe_serve.pipeline.stage_copies import StageCopies
from flexpipe_serve.pipeline.stage_loop import StageLoop
from flexpipe_serve.pipeline.stage_types import Assignment, StageReport, StageSetup, folder_key, stage_compute
from flexpipe_serve.pipeline.step_compute import StepComputer
from flexpipe_serve.placement.host_cache import HostCache

_SWITCH_INTERVAL_S = 0.0005
"""Of Python's threads: a step must not wait 5 ms (the default) for a thread that loads to let go."""


class Stage:
    """One stage. Call :meth:`run` in a thread of its own; :meth:`close` ends it.

    It starts empty but warm: imports, kernels and the choice of the linear maps are done, with the lowest priority.
    """

    def __init__(self, setup: StageSetup, *, node: str | None = None) -> None:
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self.setup = setup
        self.node = node or socket.gethostname()
        self.computer = in_background(lambda: StepComputer(setup))
        self._device = self.computer.device
        self._model = self.computer.model
        sweep_stale()
        self._folder = DomainFolder(folder_key(setup.domain_key, self.node))
        self._inbox = Inbox(setup.name, folder=self._folder.path, node=self.node, keys=setup.keys)
        self._kv = StageKV(
            self._folder,
            shape=self.computer.block_shape,
            max_blocks=setup.max_blocks,
            device=self._device,
            stage=setup.name if setup.private_kv else None,
        )
        self._cache_folder = self._folder
        self._cache = None if setup.host_cache_bytes == 0 else self._join_cache()
        self._filler = CacheFiller(self._model, folder=self._folder.path)
        self._stopping = threading.Event()
        self._copies = StageCopies(stage=setup.name, kv=self._kv, connect=self._connect)
        self._loop = StageLoop(
            name=setup.name,
            inbox=self._inbox,
            computer=self.computer,
            kv=self._kv,
            copies=self._copies,
            stopping=self._stopping,
        )
        self._overhead = Overhead(
            work_bytes(self.computer.spec, num_tokens=setup.num_work_tokens, itemsize=self.computer.dtype.itemsize)
        )
        self._changing = threading.Lock()
        """Held by the one call that changes what the stage holds."""
        self._assignments: dict[int, Assignment] = {}
        """Of all epochs whose steps are taken."""
        self._is_void = threading.Event()
        """Set by a fresh start for the ``prepare`` that has the lock: it shall give up."""
        self._released: set[int] = set()
        self._last_epoch = 0

    def prepare(self, assignment: Assignment, *, num_blocks: int, fresh: bool) -> StageReport:
        """See StageHandle.prepare.

        Raises:
            KVMemoryError: the KV's memory cannot be had.
            UnsupportedModelError, ConfigError: the weights cannot be loaded.
            EngineUnavailableError: the epoch was released meanwhile, or the stage ends.
        """
        if fresh:
            self._is_void.set()
        with self._changing:
            self._is_void.clear()
            self._last_epoch = max(self._last_epoch, assignment.epoch)
            self._check_wanted(assignment.epoch)
            if fresh:
                self._loop.call(self._loop.drop_all_routes)
                self._loop.worker.forget_all()
                self._assignments = {}
                self._kv.clear()
                self._keep([assignment])
                self._hold(assignment, num_blocks, pace=lambda: None)
            elif assignment.hurry:
                in_background(lambda: self._hold(assignment, num_blocks, pace=lambda: None))
            else:
                gently(lambda pace: self._hold(assignment, num_blocks, pace=pace), folder=self._folder.path)
            outlet = self._connect(assignment.next)
            self._loop.call(lambda: self._loop.add_route(assignment, outlet))
            self._assignments[assignment.epoch] = assignment
        self._filler.fill()
        return self.report()

    def resize_kv(self, num_blocks: int, *, fresh: bool = False) -> None:
        """See StageHandle.resize_kv.

        Raises:
            KVMemoryError: the memory cannot be had; all is as before.
        """
        with self._changing:
            if self._device.type != "cpu":  # the tensors are made anew, so no step may run
                self._loop.call(lambda: self._kv.resize(num_blocks, between=lambda: None))
            elif fresh:
                in_background(lambda: self._kv.resize(num_blocks, between=lambda: None))
            else:
                gently(lambda pace: self._kv.resize(num_blocks, between=pace), folder=self._folder.path)

    def wait_copied(self, epoch: int, *, through_step: int, timeout_s: float) -> None:
        """See StageHandle.wait_copied.

        Raises:
            CopyError: the KV did not come.
        """
        self._copies.wait(epoch, through_step=through_step, timeout_s=timeout_s)

    def release(self, epoch: int) -> StageReport:
        """See StageHandle.release. A ``prepare`` of that epoch that still runs gives up."""
        self._released.add(epoch)
        with self._changing:
            self._loop.call(lambda: self._loop.drop_route(epoch))
            self._loop.worker.forget(epoch)
            self._assignments.pop(epoch, None)
            kept = list(self._assignments.values())
            gently(lambda pace: self._keep(kept, pace=pace), folder=self._folder.path)
        return self.report()

    def report(self) -> StageReport:
        """The state now; also while the stage is loading."""
        setup, newest = self.setup, max(self._assignments, default=0)
        held = self._assignments.get(newest)
        sizes = self._model.sizes
        snapshot_bytes, patch_bytes = self._copies.num_bytes(self._last_epoch)
        on_cpu = self._device.type == "cpu"
        domain = self.node if on_cpu else f"{self.node}/{self._device}"
        free = available_bytes(self._device)
        cache = None if self._cache is None else self._cache.use()
        if on_cpu:
            # The cache keeps to a share of the free memory that no budget reaches: it does not count as taken.
            free = min(free, free_bytes(self._folder.path)) + (cache.used_bytes if cache else 0)
        return StageReport(
            name=setup.name,
            setup=setup,
            pid=os.getpid(),
            node=self.node,
            device=str(self._device),
            compute=stage_compute(setup, node=self.node, device=str(self._device)),
            speed=stage_speed(setup),
            domain=f"{domain}/{setup.name}" if setup.private_kv else domain,
            domain_free_bytes=free,
            endpoint=self._inbox.endpoint,
            epoch=self._last_epoch,
            start=held.start if held else 0,
            stop=held.stop if held else 0,
            weight_sizes=sizes,
            overhead_bytes=self._overhead.bytes(private_bytes(self._device), weights_bytes=sizes.total),
            kv_bytes=self._kv.committed_bytes,
            num_blocks=self._kv.num_blocks,
            num_steps=self._loop.num_steps,
            busy_seconds=self._loop.busy_seconds,
            copied_bytes=snapshot_bytes + patch_bytes,
            patch_bytes=patch_bytes,
            host_cache=cache,
        )

    def run(self) -> None:
        """Take steps until :meth:`close`."""
        self._loop.run()
        self._filler.close()
        with self._changing:  # what still loads has given up
            self._inbox.close()
            self._kv.clear()
            self._folder.close()
            self._cache_folder.close()

    def close(self) -> None:
        """End the data loop and let go of everything; the last stage of the domain removes the shared memory."""
        self._stopping.set()
        self._inbox.wake()

    def _hold(self, assignment: Assignment, num_blocks: int, *, pace: Callable[[], None]) -> None:
        """Have the assignment's weights and KV. Goes on where it was, when ``pace`` interrupted it."""

        def between() -> None:
            self._check_wanted(assignment.epoch)
            pace()

        if num_blocks != self._kv.num_blocks:
            self._kv.resize(num_blocks, between=between)
        self._kv.open(assignment.layers, between=between)
        self._model.load(assignment.layers, embedding=assignment.is_first, head=assignment.is_last, between=between)

    def _check_wanted(self, epoch: int) -> None:
        if self._stopping.is_set() or self._is_void.is_set() or epoch in self._released:
            raise EngineUnavailableError(f"stage {self.setup.name!r} gave up loading: epoch {epoch} was released.")

    def _keep(self, assignments: list[Assignment], *, pace: Callable[[], None] = lambda: None) -> None:
        """Give up what none of ``assignments`` needs; KV a layer at a time, for much memory that goes at once is felt.
        Weights are little beside it, and each time steps have to touch their work buffers anew."""
        layers = {layer for assignment in assignments for layer in assignment.layers}
        held = set(self._kv)
        for layer in sorted(held - layers):
            held.discard(layer)
            self._kv.keep(held)
            if not self._stopping.is_set():
                pace()
        self._model.keep(
            layers,
            embedding=any(assignment.is_first for assignment in assignments),
            head=any(assignment.is_last for assignment in assignments),
        )
        self._kv.keep(layers)
        self._folder.sweep_segments()

    def _join_cache(self) -> HostCache:
        if self.setup.host_cache_key not in ("", self.setup.domain_key):
            self._cache_folder = DomainFolder(folder_key(self.setup.host_cache_key, self.node))
        cache = HostCache(self._cache_folder.path, key=self._model.weights_key, max_bytes=self.setup.host_cache_bytes)
        self._model.use_cache(cache)
        return cache

    def _connect(self, endpoint: Endpoint) -> Outlet:
        return connect(endpoint, node=self.node, keys=self.setup.keys)
