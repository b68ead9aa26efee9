"""The decoder: pre-norm, RoPE or no position embedding, ReLU feed-forward, each part dense or sparse by the config.

RMSNorm where the paper has LayerNorm: it is what the models that this house runs are built with, so one engine serves
both, and it costs one vector less. Weights start as in the authors' code (Glorot uniform matrices and kernels, zero
biases, D of the multiplicative layer from N(0, 0.5)), dense parts alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from tulle.models.scaling_transformer.attention import DenseAttention, Multiplicative, Rotary, SparseAttention
from tulle.models.scaling_transformer.configuration import ScalingTransformerConfig
from tulle.models.scaling_transformer.feed_forward import DenseFeedForward, SparseFeedForward


class ScalingTransformerLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ScalingTransformerConfig, layer_idx: int):
        super().__init__()
        attention = DenseAttention if config.qkv_modules is None else SparseAttention
        feed_forward = DenseFeedForward if config.ff_block is None else SparseFeedForward
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer_idx)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = feed_forward(config)

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary = None,
        attention_mask: Tensor | None = None,
        padding: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``[B, T, d]`` → ``[B, T, d]``."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden), rotary, attention_mask, padding, past_key_values, **kwargs
        )
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class ScalingTransformerPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of the classes below."""

    config_class = ScalingTransformerConfig
    config: ScalingTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScalingTransformerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": ScalingTransformerLayer,
        "attentions": [DenseAttention, SparseAttention],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, Multiplicative):
            init.normal_(module.d, std=0.5)
            init.xavier_uniform_(module.e)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SparseFeedForward):
            init.xavier_uniform_(module.w1)
            init.xavier_uniform_(module.w2)
            init.zeros_(module.b2)
        elif isinstance(module, LlamaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, LlamaRotaryEmbedding):
            frequencies, _ = module.compute_default_rope_parameters(self.config)  # type: ignore[arg-type]
            init.copy_(module.inv_freq, frequencies)
            init.copy_(module.original_inv_freq, frequencies)


class ScalingTransformerModel(ScalingTransformerPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: ScalingTransformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(ScalingTransformerLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        # It reads rope_parameters, max_position_embeddings and head_dim, which this config has as well.
        self.rotary_emb: nn.Module | None = None
        if config.position_embedding == "rope":
            self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask: Any
        if isinstance(attention_mask, dict):  # generate has made them, for static caches
            mask, padding = attention_mask["full_attention"], attention_mask.get("linear_attention")
        else:
            known: dict[str, Any] = {
                "config": self.config,
                "inputs_embeds": hidden,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
            }
            mask = create_causal_mask(**known, position_ids=position_ids)
            padding = create_recurrent_attention_mask(**known)
        rotary = None if self.rotary_emb is None else self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                rotary=rotary,
                attention_mask=mask,
                padding=padding,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class ScalingTransformerForCausalLM(ScalingTransformerPreTrainedModel, GenerationMixin):
    """The decoder with its head: a matrix, tied or not, or a multiplicative layer with d_out = vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ScalingTransformerConfig):
        super().__init__(config)
        self.model = ScalingTransformerModel(config)
        self.vocab_size = config.vocab_size
        if config.loss_modules is None:
            self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            self.lm_head = Multiplicative(config.hidden_size, config.vocab_size, config.loss_modules, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
