"""A model that moecc has written, to be edited; comments name axes of values."""

import inspect
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def widened(x):
    """Return `x` in float32, or in float64 if it has that."""
    return x if x.dtype == torch.float64 else x.float()


def attend(module, query, key, value, mask=None, **kwargs):
    """Return ``[batch, seq, head, head_dim]`` of operands ``[batch, head, seq, head_dim]``."""
    name = (module.config._attn_implementation or "eager").replace("eager", "sdpa")
    return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, mask, **kwargs)[0]


def biased(bias, mask, is_causal=True):
    """Return a bias of the scores with the lowest number where a query sees nothing."""
    rows, columns = bias.shape[-2:]
    if mask is None and is_causal and rows > 1:  # the first query is at the first key
        mask = torch.ones(rows, columns, dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    lowest = torch.finfo(bias.dtype).min
    return torch.where(mask, bias, lowest) if mask.dtype == torch.bool else bias + mask


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


def relative_buckets(query, key, buckets, max_distance, *, bidirectional):
    """Return the bucket of each distance from query to key: near ones exact, far ones geometric."""
    distance = key[..., None, :] - query[..., None]
    half = buckets // 2 if bidirectional else buckets
    ahead = distance > 0
    behind = distance.abs() if bidirectional else (-distance).clamp(min=0)
    exact = half // 2
    starts = list(range(1, exact + 1))
    while len(starts) < half - 1:
        step, start = len(starts) - exact + 1, starts[-1]
        # Powers of whole numbers: no rounding of logarithms decides.
        while start ** (half - exact) < max_distance**step * exact ** (half - exact - step):
            start += 1
        starts.append(start)
    bounds = torch.tensor(starts, device=distance.device)
    bucket = torch.bucketize(behind, bounds, right=True)
    return bucket + half * ahead if bidirectional else bucket


class Scope(nn.Module):
    """Modules and parameters under one name of the checkpoint."""

    def __init__(self, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


def drawn(*shape):
    """Return a parameter of normal numbers."""
    parameter = nn.Parameter(torch.empty(shape))
    nn.init.normal_(parameter, std=0.02)  # which transformers leaves out as it loads weights
    return parameter


class ExpertRows:
    """Choices of tokens, sorted by expert; a dropped choice has the expert number `experts`."""

    def __init__(self, top_k_index, experts):
        self.shape, self.experts = top_k_index.shape, experts
        self.expert, self.order = top_k_index.flatten().sort(stable=True)
        self.token = self.order // top_k_index.shape[-1]
        numbers = torch.arange(experts, device=top_k_index.device)
        self.ends = torch.searchsorted(self.expert, numbers, right=True)
        # The first row of each expert and the end; torch.compile knows none of them.
        self.bounds = None if torch.compiler.is_compiling() else [0, *self.ends.tolist()]

    def gather(self, hidden_states):
        """Return the token of each choice, ``[row, …]``."""
        return hidden_states.flatten(0, len(self.shape) - 2).index_select(0, self.token)

    def gather_weights(self, top_k_weights):
        """Return the weight of each choice, ``[row]``."""
        return top_k_weights.flatten().index_select(0, self.order)

    def each(self, vectors):
        """Return the vector of the expert of each row, of ``[expert, …]``."""
        vectors = vectors.to_local() if hasattr(vectors, "to_local") else vectors
        return vectors.index_select(0, self.expert.clamp(max=self.experts - 1))

    def linear(self, rows, weight):
        """Return each row times the matrix of its expert, ``[expert, out, in]``."""
        weight = weight.to_local() if hasattr(weight, "to_local") else weight  # on this device
        # An operation of transformers 5, whose gradient is written in place.
        grouped = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
        if grouped is not None and (self.bounds is None or torch.is_grad_enabled()):
            return grouped(rows, weight.transpose(1, 2), self.ends)
        if self.bounds is None:  # each expert multiplies all rows, those of others as zeros
            masks = ((self.expert != number)[:, None] for number in range(self.experts))
            parts = [rows.masked_fill(mask, 0) for mask in masks]
            return sum(F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True))
        parts = [(slice(*b), n) for n, b in enumerate(pairwise(self.bounds)) if b[0] < b[1]]
        products = rows.new_zeros(len(rows), weight.shape[1])
        if torch.is_grad_enabled():
            results = [F.linear(rows[part], weight[expert]) for part, expert in parts]
            return torch.cat([*results, products[self.bounds[-1] :]])
        for part, expert in parts:  # without gradients, in place
            torch.mm(rows[part], weight[expert].T, out=products[part])
        return products

    def combine(self, rows, top_k_weights=None):
        """Return for each token the weighted sum of the rows of its choices."""
        if self.bounds is None or self.bounds[-1] < len(rows):
            rows = rows.masked_fill((self.expert == self.experts)[:, None], 0)
        if top_k_weights is not None:
            rows = rows * self.gather_weights(top_k_weights)[:, None].to(rows.dtype)
        total = rows.new_zeros(self.shape[:-1].numel(), rows.shape[-1])
        return total.index_add(0, self.token, rows).unflatten(0, self.shape[:-1])


def top_k_experts(scores, k):
    """Return the `k` experts of the largest scores, best first; a tie takes the lowest expert."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def keep_random(weights, threshold):
    """Return which choices are kept: the first, others with probability weight / threshold."""
    first = torch.arange(weights.shape[-1], device=weights.device) == 0
    return first | (torch.rand_like(weights) < weights / max(threshold, 1e-9))


def assign_slots(top_k_index, experts, capacity_factor=None, keep=None):
    """Return the slot of each choice at its expert, −1 where it is dropped; first choices first."""
    chosen = top_k_index.flatten(0, -2).transpose(0, 1)  # [choice, token]
    tokens, wanted = chosen.shape[1], torch.ones_like(chosen, dtype=torch.bool)
    if keep is not None:
        wanted = keep.flatten(0, -2).transpose(0, 1)
    waiting = torch.where(wanted, chosen, experts).reshape(-1)
    counts = F.one_hot(waiting, experts + 1).cumsum(0)
    slots = counts.gather(1, waiting[:, None]).view(chosen.shape) - 1
    if capacity_factor is not None:
        bound = capacity_factor[0] * tokens // (capacity_factor[1] * experts)  # a ratio of two
        wanted = wanted & (slots < min(max(bound, 4), tokens))
    return slots.masked_fill(~wanted, -1).transpose(0, 1).view(top_k_index.shape)


def with_cache(output, cache, **values):
    """Return an output of transformers, whose releases name its cache differently."""
    name = "cache" if "cache" in output.__dataclass_fields__ else "past_key_values"
    return output(**values, **{name: cache})


class Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.config = config
        self.num_key_value_groups = 1
        self.q = nn.Linear(512, 512, bias=False)
        self.k = nn.Linear(512, 512, bias=False)
        self.v = nn.Linear(512, 512, bias=False)
        self.o = nn.Linear(512, 512, bias=False)

    def forward(self, hidden_states, key_value_states, mask, cache=None, **kwargs):
        # [batch, head, seq, head_dim]
        query = self.q(hidden_states).unflatten(-1, (-1, 64)).transpose(1, 2)
        key = self.k(key_value_states).unflatten(-1, (-1, 64)).transpose(1, 2)
        value = self.v(key_value_states).unflatten(-1, (-1, 64)).transpose(1, 2)
        if cache is not None:
            key, value = extend_cache(cache, key, value, self.layer_idx)
        attended = attend(self, query, key, value, mask, scaling=1.0, is_causal=False, **kwargs)
        return self.o(attended.flatten(2))  # [batch, seq, embed]


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wi_0 = nn.Linear(512, 2048, bias=False)
        self.wi_1 = nn.Linear(512, 2048, bias=False)
        self.wo = nn.Linear(2048, 512, bias=False)

    def forward(self, hidden_states):
        activated = F.gelu(self.wi_0(hidden_states), approximate="tanh")
        return self.wo(activated * self.wi_1(hidden_states))  # [batch, seq, embed]


class Router(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = drawn(8, 512)

    def forward(self, hidden_states):
        # [batch, seq, expert]
        router_logits = F.linear(widened(hidden_states), widened(self.weight))
        choices = top_k_experts(router_logits, 2)  # best first
        top_k_weights = router_logits.gather(-1, choices).softmax(-1)
        capacity_factor = (5, 4) if self.training else None
        keep = keep_random(top_k_weights, 0.2) if self.training else None
        slots = assign_slots(choices, 8, capacity_factor=capacity_factor, keep=keep)
        top_k_index = choices.masked_fill(slots < 0, 8)  # 8 if dropped
        router_z_loss = torch.square(router_logits.logsumexp(-1)).mean()
        chosen = F.one_hot(choices[..., :1], 8).to(router_logits.dtype).sum(2)
        counted = F.one_hot(choices, 8).to(router_logits.dtype).sum(-1).amax(-1)  # [batch, seq]
        token_count = counted.sum((0, 1))[None]
        sums = router_logits.softmax(-1).sum((0, 1))[None]  # [group, expert]
        share_of_tokens = chosen.sum((0, 1))[None] / token_count.clamp(min=1.0)[:, None]
        balance = (share_of_tokens * sums / token_count.clamp(min=1.0)[:, None]).sum(-1)
        balance_loss = (balance * 8.0).mean()
        return top_k_index, top_k_weights, router_z_loss, balance_loss


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wi_0 = Scope(weight=drawn(8, 2048, 512))
        self.wi_1 = Scope(weight=drawn(8, 2048, 512))
        self.expert_bias = nn.Parameter(torch.ones(8, 2048))
        self.wo = Scope(weight=drawn(8, 512, 2048))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        rows = ExpertRows(top_k_index, 8)
        inputs = rows.gather(hidden_states)  # [row, embed]
        activated = F.gelu(rows.linear(inputs, self.wi_0.weight), approximate="tanh")
        product = activated * rows.linear(inputs, self.wi_1.weight) * rows.each(self.expert_bias)
        return rows.combine(rows.linear(product, self.wo.weight), top_k_weights)


class Layer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx, is_sparse, is_decoder):
        super().__init__()
        self.is_decoder = is_decoder
        self.is_sparse = is_sparse
        self.layer = nn.ModuleList([
            Scope(
                SelfAttention=Attention(config, layer_idx), layer_norm=nn.RMSNorm(512, eps=1e-06)
            ),
            *(
                [Scope(
                    EncDecAttention=Attention(config, None), layer_norm=nn.RMSNorm(512, eps=1e-06)
                )] if is_decoder else []
            ),
            Scope(
                DenseReluDense=(Experts if is_sparse else FeedForward)(config),
                layer_norm=nn.RMSNorm(512, eps=1e-06),
            ),
        ])
        if is_sparse:
            self.router = Router(config)
            self.extra_ffn = Scope(layer=Scope(
                DenseReluDense=FeedForward(config), layer_norm=nn.RMSNorm(512, eps=1e-06)
            ))

    def forward(self, hidden_states, mask, cache=None, memory=None, memory_mask=None, **kwargs):
        normed = self.layer[0].layer_norm(hidden_states)
        attention_output = self.layer[0].SelfAttention(normed, normed, mask, cache, **kwargs)
        hidden_states = hidden_states + attention_output
        if self.is_decoder:
            normed = self.layer[1].layer_norm(hidden_states)
            attention_output = self.layer[1].EncDecAttention(normed, memory, memory_mask)
            hidden_states = hidden_states + attention_output
        if not self.is_sparse:
            ffn_output = self.layer[-1].DenseReluDense(self.layer[-1].layer_norm(hidden_states))
            return hidden_states + ffn_output, None, None
        normed = self.layer[-1].layer_norm(hidden_states)
        top_k_index, top_k_weights, router_z_loss, balance_loss = self.router(normed)
        expert_output = self.layer[-1].DenseReluDense(normed, top_k_index, top_k_weights)
        hidden_states = hidden_states + expert_output
        normed = self.extra_ffn.layer.layer_norm(hidden_states)
        hidden_states = hidden_states + self.extra_ffn.layer.DenseReluDense(normed)
        return hidden_states, router_z_loss, balance_loss


class StMoeConfig(PretrainedConfig):
    """The configuration of this model; the sizes of its layers are in the text below."""

    model_type = "st_moe"


class StMoePreTrainedModel(PreTrainedModel):
    """What all models of this file share."""

    config_class = StMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "shared"
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    _can_set_attn_implementation_cached_value = True
    _can_compile_fullgraph = True

    def __call__(self, *args, **kwargs):
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise ValueError(f"{name} is not supported: register forward hooks of the layers")
        return super().__call__(*args, **kwargs)


@dataclass
class StMoeEncoderOutput(BaseModelOutput):
    balance_losses: torch.Tensor | None = None
    router_z_losses: torch.Tensor | None = None


@dataclass
class StMoeSeq2SeqOutput(Seq2SeqLMOutput):
    aux_loss: torch.Tensor | None = None


class StMoeForConditionalGeneration(StMoePreTrainedModel, GenerationMixin):
    """The encoder, the decoder and its head."""

    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, 512)
        self.encoder = Scope(
            block=nn.ModuleList([
                Layer(config, layer_idx, is_sparse, is_decoder=False)
                for layer_idx, is_sparse in enumerate([False, True] * 3)
            ]),
            final_layer_norm=nn.RMSNorm(512, eps=1e-06),
        )
        self.decoder = Scope(
            block=nn.ModuleList([
                Layer(config, layer_idx, is_sparse, is_decoder=True)
                for layer_idx, is_sparse in enumerate([False, True] * 3)
            ]),
            final_layer_norm=nn.RMSNorm(512, eps=1e-06),
        )
        self.lm_head = nn.Linear(512, config.vocab_size, bias=False)
        self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias = nn.Embedding(32, 8)
        self.decoder.block[0].layer[0].SelfAttention.relative_attention_bias = nn.Embedding(32, 8)
        self.encoder.forward = self.encode
        self.encoder.main_input_name = self.main_input_name
        self.post_init()

    def get_encoder(self, *args, **kwargs):
        """Return the encoder, which generation runs once."""
        return self.encoder

    def encode(self, input_ids=None, attention_mask=None, **kwargs):
        """Return the last hidden states of the encoder."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask = attention_mask.bool()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        buckets = relative_buckets(positions, positions, 32, 128, bidirectional=True)
        # [seq, kv_seq, head]
        bias = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias(buckets)
        mask = biased(bias.permute(2, 0, 1)[None], attention_mask[:, None, None], is_causal=False)
        hidden_states = self.shared(input_ids)
        router_z_losses, balance_losses = [], []
        for layer in self.encoder.block:
            hidden_states, router_z_loss, balance_loss = layer(hidden_states, mask)
            router_z_losses.append(router_z_loss)
            balance_losses.append(balance_loss)
        memory = self.encoder.final_layer_norm(hidden_states)  # [batch, kv_seq, embed]
        return StMoeEncoderOutput(
            last_hidden_state=memory, balance_losses=balance_losses, router_z_losses=router_z_losses
        )

    def forward(
        self, input_ids=None, attention_mask=None, decoder_input_ids=None,
        decoder_attention_mask=None, encoder_outputs=None, past_key_values=None, cache=None,
        labels=None, use_cache=None, **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not self.training
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        both, cache = cache, cache.self_attention_cache if cache is not None else None
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_ids, attention_mask)
        if decoder_input_ids is None and labels is not None:
            start = labels.new_full(labels[:, :1].shape, self.config.decoder_start_token_id)
            ids = torch.cat([start, labels[:, :-1]], dim=1)
            decoder_input_ids = ids.masked_fill(ids == -100, self.config.pad_token_id or 0)
        inputs_embeds = self.shared(decoder_input_ids)
        past = cache.get_seq_length() if cache is not None else 0
        length = inputs_embeds.shape[1]
        position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past
        is_static = cache is not None and cache.is_compileable
        keys = cache.layers[0].max_cache_len if is_static else past + length
        key_position_ids = torch.arange(keys, device=inputs_embeds.device)[None]
        memory = encoder_outputs[0]
        if attention_mask is None:
            attention_mask = memory.new_ones(memory.shape[:2])
        attention_mask = attention_mask.bool()
        mask = causal_mask(self.config, inputs_embeds, decoder_attention_mask, position_ids, cache)
        buckets = relative_buckets(position_ids, key_position_ids, 32, 128, bidirectional=False)
        # [batch, seq, kv_seq, head]
        bias = self.decoder.block[0].layer[0].SelfAttention.relative_attention_bias(buckets)
        mask = biased(bias.permute(0, 3, 1, 2), mask)
        memory_mask = attention_mask[:, None, None]
        hidden_states = inputs_embeds
        router_z_losses, balance_losses = [], []
        for layer in self.decoder.block:
            hidden_states, router_z_loss, balance_loss = layer(
                hidden_states, mask, cache, memory, memory_mask, **kwargs
            )
            router_z_losses.append(router_z_loss)
            balance_losses.append(balance_loss)
        logits = self.lm_head(self.decoder.final_layer_norm(hidden_states))  # [batch, seq, vocab]
        balance_loss = sum(filter(torch.is_tensor, encoder_outputs.balance_losses + balance_losses))
        router_z_loss = sum(filter(
            torch.is_tensor, encoder_outputs.router_z_losses + router_z_losses
        ))
        aux_loss = balance_loss * 0.01 + router_z_loss * 0.001
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + aux_loss
        return with_cache(StMoeSeq2SeqOutput, both, loss=loss, logits=logits, aux_loss=aux_loss)
