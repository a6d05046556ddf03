"""The model as transformers builds it, without weights: where a stage takes its layers' structure from."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from flexpipe_serve.model.generic_layer import ATTENTION_NAME
from flexpipe_serve.model.source import ModelSpec


class Skeleton:
    """Module tree of a model on the meta device; only buffers, such as rotary frequencies, are real."""

    def __init__(self, spec: ModelSpec) -> None:
        config = AutoConfig.from_pretrained(spec.path, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
        self._rotary: nn.Module = model.get_submodule("model.rotary_emb")
        self._layers: nn.ModuleList = model.get_submodule("model.layers")

    def layer(self, index: int) -> nn.Module:
        """A decoder layer, without weights, for the caller to keep."""
        return copy.deepcopy(self._layers[index])

    def rotary(self, device: torch.device) -> Any:
        """The rotary embedding, a ``Rotary``."""
        return copy.deepcopy(self._rotary).to(device)
