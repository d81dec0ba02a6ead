"""A model that moecc has written, to be edited; comments name axes of values."""

import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def kernel_name(config):
    """Return the name of a function in `ALL_ATTENTION_FUNCTIONS`, which has none for "eager"."""
    return (config._attn_implementation or "eager").replace("eager", "sdpa")


def causal_mask(config, hidden_states, attention_mask, position_ids, cache, **further):
    """Return which keys each query sees: earlier ones, and no padding."""
    past = cache.get_seq_length() if cache is not None else 0
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device) + past
    # Releases of transformers name these arguments differently.
    options = {"input_embeds": hidden_states, "past_key_values": cache, "cache_position": positions}
    options |= {"inputs_embeds": hidden_states, "cache": cache, "position_ids": position_ids}
    names = inspect.signature(create_causal_mask).parameters
    options = {name: x for name, x in options.items() if name in names}
    return create_causal_mask(config=config, attention_mask=attention_mask, **options, **further)


def extend_cache(cache, key, value, layer_idx):
    """Append keys and values to those of a layer, and return all, ``[batch, head, seq, …]``."""
    if not cache.is_compileable:
        return cache.update(key, value, layer_idx)
    # transformers 4 does not know by itself how far a static cache is written.
    past = cache.get_seq_length(layer_idx)
    positions = torch.arange(key.shape[2], device=key.device) + past
    return cache.update(key, value, layer_idx, {"cache_position": positions})


def rotate(x, cos, sin):
    """Rotate pairs of entries, one in each half, by the angles of `cos` and `sin`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rotary_tables(positions, like, size, theta, attention_factor=1.0):
    """Return cosines and sines for rotary positions, ``[batch, seq, size]``."""
    return _tables(positions, like, _frequencies(like, size, theta), attention_factor)


def _frequencies(like, size, theta):
    """Return the angle per position of each pair of entries, in float64."""
    exponents = torch.arange(0, size, 2, device=like.device, dtype=torch.float64) / size
    return theta**-exponents


def _tables(positions, like, frequencies, attention_factor):
    angles = positions[..., None].double() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return tuple((f(angles) * attention_factor).to(like.dtype) for f in (torch.cos, torch.sin))


def with_cache(output, cache, **values):
    """Return an output of transformers, whose releases name its cache differently."""
    name = "cache" if "cache" in output.__dataclass_fields__ else "past_key_values"
    return output(**values, **{name: cache})


def cache_of(output):
    """Return the cache of an output."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


class Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.config = config
        self.num_key_value_groups = 3
        self.q_proj = nn.Linear(576, 576, bias=False)
        self.k_proj = nn.Linear(576, 192, bias=False)
        self.v_proj = nn.Linear(576, 192, bias=False)
        self.o_proj = nn.Linear(576, 576, bias=False)

    def forward(self, hidden_states, cos, sin, mask, cache, **kwargs):
        q = self.q_proj(hidden_states).unflatten(-1, (-1, 64))  # [batch, seq, head, head_dim]
        k = self.k_proj(hidden_states).unflatten(-1, (-1, 64))  # [batch, seq, head, head_dim]
        # [batch, head, seq, head_dim]
        query = rotate(q, cos[:, :, None], sin[:, :, None]).transpose(1, 2)
        key = rotate(k, cos[:, :, None], sin[:, :, None]).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, 64)).transpose(1, 2)
        if cache is not None:
            key, value = extend_cache(cache, key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS[kernel_name(self.config)]
        output = attention(self, query, key, value, mask, scaling=0.125, **kwargs)[0]
        return self.o_proj(output.reshape(query.shape[0], query.shape[2], -1))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(576, 1536, bias=False)
        self.up_proj = nn.Linear(576, 1536, bias=False)
        self.down_proj = nn.Linear(1536, 576, bias=False)

    def forward(self, hidden_states):
        product = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(product)  # [batch, seq, embed]


class Layer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(576, eps=1e-05)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(576, eps=1e-05)
        self.mlp = FeedForward(config)

    def forward(self, hidden_states, cos, sin, mask, cache, **kwargs):
        normed = self.input_layernorm(hidden_states)
        attention_output = self.self_attn(normed, cos, sin, mask, cache, **kwargs)
        hidden_states = hidden_states + attention_output
        ffn_output = self.mlp(self.post_attention_layernorm(hidden_states))  # [batch, seq, embed]
        return hidden_states + ffn_output


class StMoeConfig(PretrainedConfig):
    """The configuration of this model; the sizes of its layers are in the text below."""

    model_type = "st_moe"
    base_model_tp_plan = {
        "embed_tokens": "replicate", "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise", "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise", "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise",
    }


class StMoePreTrainedModel(PreTrainedModel):
    """What all models of this file share."""

    config_class = StMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_set_attn_implementation_cached_value = True
    _can_compile_fullgraph = True

    def __call__(self, *args, **kwargs):
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise ValueError(f"{name} is not supported: register forward hooks of the layers")
        return super().__call__(*args, **kwargs)


class StMoeModel(StMoePreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, 576)
        self.layers = nn.ModuleList([Layer(config, layer_idx) for layer_idx in range(30)])
        self.norm = nn.RMSNorm(576, eps=1e-05)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not self.training
        if use_cache and cache is None:
            cache = DynamicCache()
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        past = cache.get_seq_length() if cache is not None else 0
        length = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past
        mask = causal_mask(self.config, inputs_embeds, attention_mask, position_ids, cache)
        cos, sin = rotary_tables(position_ids, self.embed_tokens.weight, 64, 100000.0)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, mask, cache, **kwargs)
        normed = self.norm(hidden_states)
        return with_cache(BaseModelOutputWithPast, cache, last_hidden_state=normed)


class StMoeForCausalLM(StMoePreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    def __init__(self, config):
        super().__init__(config)
        self.model = StMoeModel(config)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, cache, inputs_embeds,
            use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        logits = F.linear(hidden_states, self.model.embed_tokens.weight)  # [batch, seq, vocab]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return with_cache(MoeCausalLMOutputWithPast, cache_of(outputs), loss=loss, logits=logits)
