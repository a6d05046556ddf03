"""Measures what a model costs on the device at hand (F1), by the code that serves, on synthetic steps.

A stage's computer runs steps of many shapes in turns, with all layers, with the ends alone and with nothing;
:mod:`flexpipe_serve.model.profile_fit` finds the times of the parts. Steps that mix decoding and prompts are kept
apart and tell the fit's error. Of all repeats of a step the lower quartile counts: what else runs on the machine only
ever adds.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import psutil
import torch

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.kernels.registry import get_attention_backend
from flexpipe_serve.kv.domain import DomainFolder
from flexpipe_serve.kv.stage_kv import StageKV
from flexpipe_serve.model.profile_cache import device_name, library_versions
from flexpipe_serve.model.profile_fit import MeasuredStep, fit_error, fit_times
from flexpipe_serve.model.profile_hop import measure_hop
from flexpipe_serve.model.profile_router import measure_router
from flexpipe_serve.model.profile_steps import Row, decodes, make_step, num_blocks_of, shape_of
from flexpipe_serve.model.source import ModelSpec, dtype_size, load_spec
from flexpipe_serve.pipeline.channel import Endpoint
from flexpipe_serve.pipeline.stage_types import Assignment, StageSetup
from flexpipe_serve.pipeline.step_compute import Hidden, StepComputer
from flexpipe_serve.placement.host_cache import HostCache
from flexpipe_serve.planner.profile import ModelProfile

_BLOCK_SIZE = 16
_MAX_WEIGHT_BYTES = 2 << 30
"""Of the layers that are held: more than caches hold, yet little beside a server."""
_DECODES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
_CHUNKS = (16, 32, 64, 128, 256, 384, 512)
_CONTEXTS = ((1, 2048), (4, 1024), (8, 512), (16, 512))
_CONTEXT = 16
"""Of decodes that are about something else."""
_SHARE_S = 0.3
"""Time for each kind of step."""
_MIN_REPEATS, _MAX_REPEATS = 5, 40
_NUM_RELOADS = 5
_REPRESENTATIVE = 8
"""Sequences of the step that compares kinds of layers."""

Progress = Callable[[str, float], None]
"""What is measured now, and which share of everything is done."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A step to be measured on some layers and ends."""

    rows: tuple[Row, ...]
    start: int
    stop: int
    is_first: bool = False
    is_last: bool = False


def profile_model(
    path: Path, *, dtype: str, device: str, num_threads: int, on_progress: Progress = lambda what, share: None
) -> ModelProfile:
    """Measure the model in folder ``path``: about half a minute for a small one.

    Args:
        dtype: of weights and KV: float32, bfloat16 or float16.
        device: 'cpu' or 'cuda'.
        num_threads: CPU threads of a step.

    Raises:
        ConfigError: dtype, device or model cannot be served.
        EngineUnavailableError: the processes that measure a hop do not answer.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("the device is 'cuda', but torch finds no CUDA device; measure on 'cpu'.")
    spec = load_spec(path)
    on_progress("loading", 0.0)
    setup = make_setup(spec, dtype=dtype, device=device)
    with ProbedStage(spec, setup, num_threads=num_threads) as stage:
        on_progress("steps", 0.1)
        probes, held_out = make_probes(spec, num_layers=stage.num_layers)
        others = OtherWork()
        seconds = measure_alternately(
            stage, [*probes, *held_out], on_progress=lambda share: on_progress("steps", 0.1 + 0.65 * share)
        )
        others_share = others.share()
        layer_scale = stage.measure_kinds()
        layer_bytes, embedding_bytes, head_bytes = stage.weight_bytes()
        load_bytes_per_s, cached_load_bytes_per_s = stage.measure_loading()
    fitted = [_measured(probe, seconds[probe]) for probe in probes]
    times = fit_times(fitted, layer_scale=layer_scale)
    on_progress("hops between processes", 0.75)
    hop_s = measure_hop(setup, num_layers=stage.num_layers, vocab_size=spec.vocab_size, num_threads=num_threads)
    on_progress("the Router", 0.95)
    step_s = measure_router(path, max_model_len=spec.max_model_len)
    profile = ModelProfile(
        model=path.name,
        dtype=dtype,
        device=device_name(device),
        num_threads=num_threads,
        versions=library_versions(),
        layer=times.layer,
        layer_scale=layer_scale,
        context_token_s=times.context_token_s,
        pair_s=times.pair_s,
        embedding=times.embedding,
        head=times.head,
        stage_s=times.stage_s,
        hop_s=hop_s,
        step_s=step_s + hop_s,  # of the result
        layer_bytes=layer_bytes,
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        kv_bytes_per_token=spec.kv_bytes_per_token(dtype),
        activation_bytes_per_token=spec.hidden_size * dtype_size(dtype),
        load_bytes_per_s=load_bytes_per_s,
        cached_load_bytes_per_s=cached_load_bytes_per_s,
        others_share=others_share,
    )
    held = msgspec.structs.replace(profile, layer_scale=layer_scale[: stage.num_layers])
    error = fit_error(held, [_measured(probe, seconds[probe]) for probe in held_out])
    on_progress("done", 1.0)
    return msgspec.structs.replace(profile, num_measured=error.num_steps, error_mean=error.mean, error_max=error.max)


def make_probes(spec: ModelSpec, *, num_layers: int) -> tuple[list[Probe], list[Probe]]:
    """The steps to be fitted, and those to be held out, for a stage of layers 0 to ``num_layers``. The last of those
    counts as the model's last."""
    limit = spec.max_model_len

    def decoding(num_seqs: int, context: int = _CONTEXT) -> tuple[Row, ...]:
        return decodes(num_seqs, context=min(context, limit - 1))

    def prompt(num_new: int, *, after: int = 0) -> tuple[Row, ...]:
        """A chunk; of several prompts where the model is too short for one."""
        after = min(after, limit // 2)
        room = limit - after
        return (*(Row(after, room),) * (num_new // room), *((Row(after, num_new % room),) if num_new % room else ()))

    shapes = [
        *(decoding(num) for num in _DECODES),
        *(prompt(num) for num in _CHUNKS),
        *(decoding(num, context) for num, context in _CONTEXTS),
        prompt(128, after=1024),
    ]
    probes = [Probe(rows=rows, start=0, stop=num_layers) for rows in shapes]
    probes += [Probe(rows=decoding(num), start=0, stop=0) for num in (1, 8, 16)]
    probes += [Probe(rows=rows, start=0, stop=0, is_first=True) for rows in (decoding(1), prompt(64), prompt(512))]
    probes += [Probe(rows=decoding(num), start=0, stop=0, is_last=True) for num in (1, 2, 4, 8, 16, 32, 64)]
    half = num_layers // 2
    whole, first, last = (0, num_layers), (0, half), (half, num_layers)
    mixed = [
        (whole, decoding(1, 300)),
        (whole, decoding(6, 150)),
        (whole, decoding(20, 200)),
        (whole, prompt(100)),
        (whole, decoding(8, 200) + prompt(120)),
        (first, decoding(10, 400)),
        (first, prompt(200, after=150)),
        (first, decoding(3, 60) + prompt(40)),
        (last, decoding(3, 700)),
        (last, decoding(40, 64)),
        (last, decoding(16, 128) + prompt(300)),
        (last, prompt(90) * 3),
    ]
    held_out = [
        Probe(rows=rows, start=start, stop=stop, is_first=start == 0, is_last=stop == num_layers)
        for (start, stop), rows in mixed
    ]
    return probes, held_out


class OtherWork:
    """How much of the machine's cores other processes take, from now on."""

    def __init__(self) -> None:
        self._since = self._look()

    def share(self) -> float:
        """Since it was made; 0 to 1."""
        at, idle, own = (now - then for now, then in zip(self._look(), self._since, strict=True))
        cores = at * (psutil.cpu_count() or 1)
        return min(1.0, max(0.0, cores - idle - own) / cores)

    @staticmethod
    def _look() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        return time.monotonic(), times.idle + times.iowait, time.process_time()


class ProbedStage:
    """A stage without a loop: its computer, some layers from the first one on, both ends, and KV."""

    def __init__(self, spec: ModelSpec, setup: StageSetup, *, num_threads: int) -> None:
        self._spec = spec
        self._num_threads = num_threads
        self.num_layers = num_held_layers(spec, setup.dtype)
        self._block_size = setup.block_size
        self._computer = StepComputer(setup)
        self._folder = DomainFolder(setup.domain_key)
        self.folder = self._folder.path
        self._kv = StageKV(
            self._folder,
            shape=self._computer.block_shape,
            max_blocks=setup.max_blocks,
            device=self._computer.device,
            stage=None,
        )

    def __enter__(self) -> ProbedStage:
        kinds = _kinds(self._spec)
        layers = sorted({*range(self.num_layers), *kinds.values()})
        probes, held_out = make_probes(self._spec, num_layers=self.num_layers)
        num_blocks = max(num_blocks_of(probe.rows, block_size=self._block_size) for probe in (*probes, *held_out))
        try:
            self._kv.resize(num_blocks, between=_nothing)
            self._kv.open(layers, between=_nothing)
            self._computer.model.load(layers, embedding=True, head=True)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        self._computer.model.keep(())
        self._kv.clear()
        self._folder.close()

    def run(self, probe: Probe) -> float:
        """Seconds of one step."""
        batch = make_step(
            probe.rows,
            block_size=self._block_size,
            vocab_size=self._spec.vocab_size,
            num_threads=self._num_threads,
        )
        assignment = Assignment(
            epoch=1,
            start=probe.start,
            stop=probe.stop,
            is_first=probe.is_first,
            is_last=probe.is_last,
            next=Endpoint(node="", ipc=""),
        )
        given = None
        if not probe.is_first:
            shape = (batch.header.num_tokens, self._spec.hidden_size)
            given = Hidden(tensor=torch.randn(shape).to(self._computer.device, self._computer.dtype))
        if self._computer.device.type == "cuda":
            torch.cuda.synchronize(self._computer.device)
        started = time.perf_counter()
        # Ends with a copy to the host, so a GPU is done then too.
        num_blocks = self._kv.num_blocks
        step = self._computer.prepare(batch, num_blocks=num_blocks)
        self._computer.run(assignment, step, given, kv=self._kv, num_blocks=num_blocks, held_seconds=0.0)
        return time.perf_counter() - started

    def weight_bytes(self) -> tuple[tuple[int, ...], int, int]:
        """Of each layer, of the embedding and of the head, as they are held. A layer that is not is taken to be like
        another one with as many weights."""
        sizes, kinds = self._computer.model.sizes, _kinds(self._spec)
        layers = (sizes.layers.get(i, sizes.layers[kinds[num]]) for i, num in enumerate(self._spec.layer_elements))
        return tuple(layers), sizes.embedding, sizes.head

    def measure_loading(self) -> tuple[float, float | None]:
        """Bytes a second of having a layer ready, from the system's page cache and from the host cache; None where that
        has no room. The stage holds nothing but a layer afterwards."""
        model = self._computer.model
        model.keep([0])
        from_disk = self._reload_rate()
        cache = HostCache(self.folder, key=model.weights_key)
        model.use_cache(cache)
        model.fill_cache(between=_nothing)
        return from_disk, self._reload_rate() if cache.use().num_parts else None

    def _reload_rate(self) -> float:
        model = self._computer.model
        num_bytes = model.sizes.total
        rates = []
        for _ in range(_NUM_RELOADS):
            model.keep(())
            started = time.perf_counter()
            model.load([0])
            rates.append(num_bytes / (time.perf_counter() - started))
        return float(np.quantile(rates, 0.75))

    def measure_kinds(self) -> tuple[float, ...]:
        """Time of each layer in units of the first one's. Layers with as many weights are taken for equal."""
        kinds = _kinds(self._spec)
        if len(kinds) == 1:
            return (1.0,) * self._spec.num_layers
        rows = decodes(_REPRESENTATIVE, context=_CONTEXT)
        nothing = Probe(rows=rows, start=0, stop=0)
        probes = {num: replace(nothing, start=layer, stop=layer + 1) for num, layer in kinds.items()}
        seconds = measure_alternately(self, [nothing, *probes.values()])
        taken = {num: seconds[probe] - seconds[nothing] for num, probe in probes.items()}
        unit = taken[self._spec.layer_elements[0]]
        return tuple(taken[num] / unit for num in self._spec.layer_elements)


def measure_alternately(
    stage: ProbedStage, probes: Sequence[Probe], *, on_progress: Callable[[float], None] = lambda share: None
) -> dict[Probe, float]:
    """Typical seconds of each step. All take turns in changing order, until each has had its share of time."""
    seconds: dict[Probe, list[float]] = {probe: [] for probe in probes}
    pending = list(dict.fromkeys(probes))
    for probe in pending:
        stage.run(probe)  # the first time it touches new memory
    order = random.Random(0)
    while pending:
        on_progress(1.0 - len(pending) / len(seconds))
        order.shuffle(pending)
        for probe in pending:
            seconds[probe].append(stage.run(probe))
        pending = [probe for probe in pending if not _is_enough(seconds[probe])]
    return {probe: float(np.quantile(taken, 0.25)) for probe, taken in seconds.items()}


def _is_enough(seconds: Sequence[float]) -> bool:
    return len(seconds) >= _MAX_REPEATS or (len(seconds) >= _MIN_REPEATS and sum(seconds) >= _SHARE_S)


def _measured(probe: Probe, seconds: float) -> MeasuredStep:
    return MeasuredStep(
        start=probe.start,
        stop=probe.stop,
        is_first=probe.is_first,
        is_last=probe.is_last,
        shape=shape_of(probe.rows),
        seconds=seconds,
    )


def make_setup(spec: ModelSpec, *, dtype: str, device: str) -> StageSetup:
    """Of the stages that are measured."""
    backend = get_attention_backend("auto", device=torch.device(device), dtype=getattr(torch, dtype))
    return StageSetup(
        name="profile",
        domain_key=uuid.uuid4().hex,
        model_path=str(spec.path),
        max_model_len=spec.max_model_len,
        dtype=dtype,
        device=device,
        attention="auto",
        block_size=max(_BLOCK_SIZE, backend.block_size_multiple),
        max_blocks=1 << 16,
        num_work_tokens=max(_CHUNKS),
        orphan_timeout_s=600.0,
    )


def num_held_layers(spec: ModelSpec, dtype: str) -> int:
    """How many layers from the first one on that are measured together: enough not to fit into caches."""
    total = 0
    for layer in range(spec.num_layers):
        total += spec.layer_bytes(layer, dtype)
        if total > _MAX_WEIGHT_BYTES:
            return max(layer, min(2, spec.num_layers))
    return spec.num_layers


def _kinds(spec: ModelSpec) -> dict[int, int]:
    """The first layer with so many weights, by their number."""
    return {num: spec.layer_elements.index(num) for num in spec.layer_elements}


def _nothing() -> None:
    pass
