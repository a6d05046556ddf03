"""The model as transformers builds it, without weights: where a stage takes its layers' structure from."""

from __future__ import annotations

import copy

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from flexpipe_serve.model.generic_layer import ATTENTION_NAME
from flexpipe_serve.model.source import ModelSpec


class Skeleton:
    """Module tree of a model on the meta device; only buffers, such as rotary frequencies, are real."""

    def __init__(self, spec: ModelSpec) -> None:
        self.config = AutoConfig.from_pretrained(spec.path, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(self.config, attn_implementation=ATTENTION_NAME)
        self._decoder: nn.Module = model.get_submodule("model")
        self._layers: nn.ModuleList = model.get_submodule("model.layers")

    def layer(self, index: int) -> nn.Module:
        """A decoder layer, without weights, for the caller to keep."""
        return copy.deepcopy(self._layers[index])

    def norm(self, weight: torch.Tensor) -> nn.Module:
        """The final norm with its weight."""
        norm = copy.deepcopy(self._decoder.get_submodule("norm"))
        norm.load_state_dict({"weight": weight}, assign=True)
        return norm.requires_grad_(False)

    def rotary(self, device: torch.device) -> nn.Module:
        """The rotary embedding: ``(x, positions[1, n]) -> cos, sin`` of [1, n, rotary_dim] in the dtype of ``x``."""
        return copy.deepcopy(self._decoder.get_submodule("rotary_emb")).to(device)
