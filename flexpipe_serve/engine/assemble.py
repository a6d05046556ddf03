"""From a configuration to an engine: resolves the model, and what depends on the device."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from flexpipe_serve.config import LayoutConfig, LimitsConfig, ServeArgs, StageCpus
from flexpipe_serve.engine.client import ModelCard
from flexpipe_serve.engine.engine import Engine, OnLost
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.model.source import ModelSpec, load_spec, resolve_source
from flexpipe_serve.model.tokenizer import ModelTokenizer
from flexpipe_serve.pipeline.budget import DomainUse, KVBudget
from flexpipe_serve.pipeline.channel import CurveKeys
from flexpipe_serve.pipeline.layout import Layout, even_boundaries, make_layout, stage_prefix
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import StageHost, StageSetup
from flexpipe_serve.placement.placements import Placements
from flexpipe_serve.refactor.feasibility import ModelWeights

CPU_BLOCK_SIZE = 16
FLASH_BLOCK_SIZE = 256


def model_name(args: ServeArgs) -> str:
    """The model's name over HTTP."""
    if args.model.name:
        return args.model.name
    return "smollm2-135m-instruct" if args.model.source == "demo" else Path(args.model.source).name


def layout_of(config: LayoutConfig, *, num_layers: int) -> Layout:
    """The layout that a configuration asks for. Raises ConfigError where the model cannot be cut like that."""
    if config.boundaries is not None:
        return make_layout(num_layers=num_layers, boundaries=config.boundaries)
    assert config.stages is not None
    return make_layout(
        num_layers=num_layers, boundaries=even_boundaries(num_layers=num_layers, num_stages=config.stages)
    )


@dataclass(frozen=True, kw_only=True)
class EngineMaker:
    """Makes the engines of an application's pipelines, not started yet; all serve the same model."""

    spec: ModelSpec
    model: ModelCard
    tokenizer: ModelTokenizer
    weights: ModelWeights
    host: StageHost
    setup: StageSetup
    budget: KVBudget
    scheduler_config: SchedulerConfig
    max_depth: int | None
    stage_cpus: Mapping[str, StageCpus]
    num_cores: int
    placements: Placements = field(default_factory=Placements)
    """Of all the pipelines that it makes."""

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.spec.num_layers

    @property
    def block_size(self) -> int:
        """Tokens in a KV block."""
        return self.setup.block_size

    def make(
        self,
        number: int,
        *,
        metrics: EngineMetrics,
        arrivals: Iterator[int] | None = None,
        others: Callable[[str], DomainUse] = lambda domain: DomainUse(),
        on_down: Callable[[], None] = lambda: None,
    ) -> Engine:
        """The engine of pipeline ``number``. ``others`` as of KVBudget, ``arrivals`` and ``on_down`` as of Engine."""
        setup = self.setup
        if number:  # its KV is its own, so it has folders of its own
            setup = replace(setup, domain_key=f"{setup.domain_key}/{stage_prefix(number)}")

        def make_pipeline(on_lost: OnLost) -> Pipeline:
            return Pipeline(
                self.host,
                setup=setup,
                budget=replace(self.budget, others=others),
                max_depth=self.max_depth,
                stage_cpus=self.stage_cpus,
                on_lost=on_lost,
                keys=setup.keys,
            )

        return Engine(
            make_pipeline,
            number=number,
            model=self.model,
            tokenizer=self.tokenizer,
            scheduler_config=self.scheduler_config,
            block_size=self.block_size,
            metrics=metrics,
            weights=self.weights,
            num_cores=self.num_cores,
            placements=self.placements,
            sign_of_life_s=min(2.0, setup.orphan_timeout_s / 5),
            arrivals=arrivals,
            on_down=on_down,
        )


def make_engine_maker(
    args: ServeArgs,
    *,
    host: StageHost,
    domain_key: str,
    device: str,
    num_cores: int,
    limits: LimitsConfig,
    keys: CurveKeys | None = None,
) -> EngineMaker:
    """What makes the engines that ``args`` describe.

    Args:
        host: where stages run.
        domain_key: names the application on its nodes.
        device: 'cpu' or 'cuda'.
        keys: for tcp between nodes; without, stages are reached on this node only.

    Raises:
        ConfigError, UnsupportedModelError: what cannot be served, and why.
    """
    if args.stage_cpus and device != "cpu":
        raise ConfigError(f"stage_cpus is for stages that compute on CPUs, but the device is {device!r}; leave it out.")
    path = resolve_source(args.model.source)
    spec = load_spec(path, max_model_len=args.model.max_model_len)
    dtype = args.model.dtype if args.model.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    attention = _attention(args.attention, device)
    block_size = args.kv.block_size or (FLASH_BLOCK_SIZE if attention == "flash_attn" else CPU_BLOCK_SIZE)
    block_bytes = block_size * spec.kv_bytes_per_token(dtype)
    setup = StageSetup(
        name="",
        domain_key=domain_key,
        model_path=str(path),
        max_model_len=spec.max_model_len,
        dtype=dtype,
        device=device,
        attention=attention,
        block_size=block_size,
        max_blocks=psutil.virtual_memory().total // block_bytes,
        num_work_tokens=args.scheduler.max_num_batched_tokens,
        orphan_timeout_s=args.orphan_timeout_s,
        private_kv=args.kv.domain == "stage",
        host_cache_key=domain_key,
        host_cache_bytes=None if args.host_cache is None else int(args.host_cache),
        keys=keys,
    )
    budget = KVBudget(
        budget_bytes=_plain(args.memory_budget),
        block_bytes=block_bytes,
        max_blocks=setup.max_blocks if args.kv.max_tokens is None else -(-args.kv.max_tokens // block_size),
    )
    return EngineMaker(
        spec=spec,
        model=ModelCard(
            name=model_name(args),
            created=int(time.time()),
            max_model_len=spec.max_model_len,
            vocab_size=spec.vocab_size,
            eos_token_ids=spec.eos_token_ids,
        ),
        tokenizer=ModelTokenizer(path),
        weights=ModelWeights(
            layers=tuple(spec.layer_bytes(layer, dtype) for layer in range(spec.num_layers)),
            embedding=spec.embedding_bytes(dtype),
            head=spec.head_bytes(dtype),
        ),
        host=host,
        setup=setup,
        budget=budget,
        scheduler_config=SchedulerConfig(
            max_num_seqs=args.scheduler.max_num_seqs,
            max_num_batched_tokens=args.scheduler.max_num_batched_tokens,
            max_waiting=limits.max_waiting,
            max_model_len=spec.max_model_len,
            prefix_cache=args.kv.prefix_cache,
        ),
        max_depth=args.scheduler.steps_in_flight,
        stage_cpus=args.stage_cpus,
        num_cores=num_cores,
    )


def _plain(sizes: int | Mapping[str, int] | None) -> int | dict[str, int] | None:
    """Numbers without pydantic's classes, which not every encoder knows."""
    if isinstance(sizes, Mapping):
        return {name: int(size) for name, size in sizes.items()}
    return None if sizes is None else int(sizes)


def _attention(name: str, device: str) -> str:
    if name == "flash_attn" and device != "cuda":
        raise ConfigError(f"attention is 'flash_attn', but the device is {device!r}; use 'auto' or 'torch'.")
    if name == "auto" and device == "cuda":
        return "flash_attn" if importlib.util.find_spec("flash_attn") else "torch"
    return name  # 'auto' on a CPU: the stage knows whether its kernels can be compiled
