"""transformers' own decoder layer with our paged attention inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from flexpipe_serve.errors import UnsupportedModelError
from flexpipe_serve.kernels.linear import Linear, make_linear, nothing, pack_weight
from flexpipe_serve.model.layer import StepContext
from flexpipe_serve.model.support import ExpertNames

ATTENTION_NAME = "flexpipe_paged"


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    step: StepContext,
    segment: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls; ``step`` and ``segment`` are passed through its layer untouched."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = step.attention.forward(q, k, v, kv=segment, plan=step.plan, scale=scaling)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, _paged_attention)


class _PackedLinear(nn.Module):
    """Stands where transformers' layer has an ``nn.Linear``."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(0, -2)).view(*x.shape[:-1], -1)


def prepare_weights(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    experts: ExpertNames | None,
    linear: str,
    between: Callable[[], None] = nothing,
) -> dict[str, torch.Tensor]:
    """From checkpoint tensors to the weights that GenericLayer computes with: experts stacked, linear maps packed.

    Args:
        module: the decoder layer on the meta device; used up.
        tensors: the layer's checkpoint tensors by their names within the layer.
        experts: how the checkpoint names experts; None for a dense model.
        linear: kind of the linear maps (``flexpipe_serve.kernels.linear``).
        between: called after every few milliseconds of packing; may wait, or raise to give up.

    Raises:
        UnsupportedModelError: the tensors do not match the architecture.
    """
    weights = dict(tensors) if experts is None else _stack_experts(tensors, experts)
    missing, unexpected = module.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        raise UnsupportedModelError(
            f"The checkpoint's layer does not match {type(module).__name__}: "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}."
        )
    for name in _linear_maps(module):
        weights[f"{name}.weight"] = pack_weight(weights[f"{name}.weight"], kind=linear, between=between)
    return weights


class GenericLayer:
    """One layer, computed by the module transformers has for it.

    Args:
        module: the decoder layer on the meta device; owned by this from now on.
        weights: of :func:`prepare_weights` for the same linear kind.
        linear: kind of the linear maps (``flexpipe_serve.kernels.linear``).
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, torch.Tensor], *, linear: str) -> None:
        others = dict(weights)
        for name, child in _linear_maps(module).items():
            packed, bias = others.pop(f"{name}.weight"), others.pop(f"{name}.bias", None)
            made = make_linear(packed, bias, kind=linear, num_outputs=child.out_features)
            setattr(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], _PackedLinear(made))
        module.load_state_dict(others, assign=True)
        self._module = module.eval().requires_grad_(False)

    def weights(self) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = dict(self._module.state_dict())
        for name, child in self._module.named_modules():
            if isinstance(child, _PackedLinear):
                weights[f"{name}.weight"] = child.linear.packed
                if child.linear.bias is not None:
                    weights[f"{name}.bias"] = child.linear.bias
        return weights

    def forward(self, hidden: torch.Tensor, context: StepContext, kv: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._module(
            hidden.unsqueeze(0), position_embeddings=context.rotary, attention_mask=None, step=context, segment=kv
        )
        return out.squeeze(0)


def _linear_maps(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _stack_experts(tensors: Mapping[str, torch.Tensor], names: ExpertNames) -> dict[str, torch.Tensor]:
    """Checkpoint tensors under the module's names, all experts' weights stacked in one tensor each."""
    prefix = f"{names.checkpoint_prefix}.experts."
    weights: dict[str, torch.Tensor] = {}
    experts: dict[tuple[int, str], torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            expert, _, part = name.removeprefix(prefix).partition(".")
            experts[int(expert), part.removesuffix(".weight")] = tensor
        elif name.startswith(f"{names.checkpoint_prefix}."):
            weights["mlp." + name.removeprefix(f"{names.checkpoint_prefix}.")] = tensor
        else:
            weights[name] = tensor
    if experts:
        order = sorted({index for index, _ in experts})
        width, hidden_size = experts[order[0], names.gate].shape
        gate_up = experts[order[0], names.gate].new_empty(len(order), 2 * width, hidden_size)
        for index in order:
            gate_up[index, :width] = experts.pop((index, names.gate))
            gate_up[index, width:] = experts.pop((index, names.up))
        weights["mlp.experts.gate_up_proj"] = gate_up
        weights["mlp.experts.down_proj"] = torch.stack([experts[index, names.down] for index in order])
    return weights
