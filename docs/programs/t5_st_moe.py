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


def float_type(like):
    """Return the type of floating-point numbers in which `like` is computed with."""
    return like.dtype if like.is_floating_point() else torch.get_default_dtype()


def one_hot(index, size, like):
    """Return ones at `index` along a new axis, zeros elsewhere; a negative index has none."""
    return (index[..., None] == torch.arange(size, device=index.device)).to(float_type(like))


def attend(module, query, key, value, mask=None, *, scaling, is_causal=True, **kwargs):
    """Average values by the softmax of query · key, ``[batch, head, seq, head_dim]``.

    Returns ``[batch, seq, head, head_dim]``.
    """
    name = module.config._attn_implementation or "eager"
    attention = ALL_ATTENTION_FUNCTIONS["sdpa" if name == "eager" else name]
    options = kwargs if is_causal else {**kwargs, "is_causal": False}
    return attention(module, query, key, value, mask, scaling=scaling, **options)[0]


def biased(bias, mask, is_causal=True):
    """Return a bias of the scores with the lowest number where a query sees nothing."""
    rows, columns = bias.shape[-2:]
    if mask is None and is_causal and rows > 1:
        seen = torch.ones(rows, columns, dtype=torch.bool, device=bias.device)
        mask = seen.tril(columns - rows)
    if mask is None:
        return bias
    lowest = torch.finfo(bias.dtype).min
    return torch.where(mask, bias, lowest) if mask.dtype == torch.bool else bias + mask


def causal_mask(config, hidden_states, attention_mask, position_ids, cache, window=0):
    """Return which keys each query sees: earlier ones, no padding, within the window if any."""
    past = cache.get_seq_length() if cache is not None else 0
    places = torch.arange(hidden_states.shape[1], device=hidden_states.device) + past
    # Releases of transformers name these otherwise.
    options = {"input_embeds": hidden_states, "past_key_values": cache, "cache_position": places}
    options |= {"inputs_embeds": hidden_states, "cache": cache, "position_ids": position_ids}
    names = inspect.signature(create_causal_mask).parameters
    options = {name: x for name, x in options.items() if name in names}
    if window:
        options["and_mask_function"] = lambda batch, head, query, key: query - key < window
    return create_causal_mask(config=config, attention_mask=attention_mask, **options)


def extend_cache(cache, key, value, layer_idx):
    """Append keys and values to those of a layer, and return all, ``[batch, head, seq, …]``."""
    if not cache.is_compileable:
        return cache.update(key, value, layer_idx)
    # transformers 4 does not know by itself how far a static cache is written.
    past = cache.get_seq_length(layer_idx)
    positions = torch.arange(key.shape[2], device=key.device) + past
    return cache.update(key, value, layer_idx, {"cache_position": positions})


def relative_buckets(distance, *, bidirectional, buckets, max_distance):
    """Return the bucket of each distance from query to key: near ones exact, far ones geometric."""
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


class ExpertRows:
    """The choices of tokens sorted by expert; expert number `experts` is that of dropped ones."""

    def __init__(self, top_k_index, experts):
        self.shape, self.experts = top_k_index.shape, experts
        chosen = top_k_index.flatten()
        self.expert, self.order = chosen.sort(stable=True)
        self.token = self.order // top_k_index.shape[-1]
        every = torch.arange(experts, device=chosen.device)
        self.ends = torch.searchsorted(self.expert, every, right=True)
        # Under torch.compile numbers of rows are not known.
        self.bounds = None if torch.compiler.is_compiling() else [0, *self.ends.tolist()]

    def gather(self, hidden_states):
        """Return the token of each choice, ``[row, …]``."""
        return hidden_states.flatten(0, len(self.shape) - 2).index_select(0, self.token)

    def gather_weights(self, top_k_weights):
        """Return the weight of each choice, ``[row]``."""
        return top_k_weights.flatten().index_select(0, self.order)

    def each(self, vectors):
        """Return the vector of the expert of each row, of ``[expert, …]``."""
        return vectors.index_select(0, self.expert.clamp(max=self.experts - 1))

    def linear(self, rows, weight):
        """Return each row times the matrix of its expert, ``[expert, out, in]``."""
        if hasattr(weight, "to_local"):  # the part of this device, in tensor parallelism
            weight = weight.to_local()
        # An operation of transformers 5, whose gradient is written in place.
        grouped = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
        if grouped is not None and (self.bounds is None or torch.is_grad_enabled()):
            return grouped(rows, weight.transpose(1, 2), self.ends)
        if self.bounds is None:
            masks = ((self.expert != number)[:, None] for number in range(self.experts))
            parts = [rows.masked_fill(mask, 0) for mask in masks]
            return sum(F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True))
        parts = [(slice(*b), n) for n, b in enumerate(pairwise(self.bounds)) if b[0] < b[1]]
        products = rows.new_zeros(len(rows), weight.shape[1])
        if torch.is_grad_enabled():
            results = [F.linear(rows[part], weight[expert]) for part, expert in parts]
            return torch.cat([*results, products[self.bounds[-1] :]])
        for part, expert in parts:
            torch.mm(rows[part], weight[expert].T, out=products[part])
        return products

    def combine(self, rows, top_k_weights=None):
        """Return for each token the weighted sum of the rows of its choices."""
        if self.bounds is None or self.bounds[-1] < len(rows):
            rows = rows.masked_fill((self.expert == self.experts)[:, None], 0)
        if top_k_weights is not None:
            rows = rows * self.gather_weights(top_k_weights)[:, None].to(rows.dtype)
        tokens = self.shape[:-1]
        total = rows.new_zeros(tokens.numel(), rows.shape[-1])
        return total.index_add(0, self.token, rows).unflatten(0, tokens)


def top_k_experts(scores, k):
    """Return the `k` experts of the largest scores, best first; a tie takes the lowest expert."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def keep_random(weights, threshold):
    """Return which choices are kept: the first, others with probability weight / threshold."""
    keep = torch.rand_like(weights) < weights / max(threshold, 1e-9)
    return _with_first(keep)


def _with_first(keep):
    first = torch.arange(keep.shape[-1], device=keep.device) == 0
    return keep | first


def capacity(tokens, choices, experts, factor, per_choice, rounding, minimum, multiple, cap):
    """Return the rows of an expert in a group of `tokens` tokens; `factor` is a ratio of two."""
    numerator, denominator = factor[0] * tokens, factor[1] * experts
    if per_choice:
        numerator = numerator * choices
    slots = numerator // denominator
    if rounding == "ceil":
        slots = -(-numerator // denominator)
    elif rounding == "round":  # a half goes to the even neighbour
        slots = (2 * numerator + denominator) // (2 * denominator)
        if (2 * numerator + denominator) % (2 * denominator) == 0 and slots % 2:
            slots -= 1
    slots = -(-max(slots, minimum) // multiple) * multiple
    return min(slots, tokens) if cap else slots


def assign_slots(
    top_k_index, experts, *, capacity_factor=None, groups=1, group_size=0, order="choice",
    per_choice=False, rounding="floor", minimum=4, multiple=1, cap=True, keep=None,
    priority=None, mask=None
):
    """Return the slot of each choice at its expert, −1 where it is dropped.

    Slots are counted in each group of tokens; first choices come before second ones, or with
    ``order="token"`` token by token.
    """
    choices = top_k_index.shape[-1]
    if capacity_factor is None:  # nothing is counted
        groups, group_size = 1, 0
    size = group_size or top_k_index[..., 0].numel() // groups
    chosen = top_k_index.reshape(-1, size, choices)
    wanted = chosen >= 0
    if keep is not None:
        wanted = wanted & keep.reshape(chosen.shape)
    if mask is not None:
        wanted = wanted & mask.reshape(-1, size, 1)
    turns = torch.arange(size, device=chosen.device).expand(chosen.shape[0], size)
    if priority is not None:
        ranks = priority.reshape(-1, size).argsort(dim=-1, descending=True, stable=True)
        turns = ranks.argsort(dim=-1)
    # The line in which choices wait: by choice and turn, or by turn and choice.
    line = turns[..., None] + size * torch.arange(choices, device=chosen.device)
    if order == "token":
        line = turns[..., None] * choices + torch.arange(choices, device=chosen.device)
    line = line.flatten(1)
    first = line.argsort(dim=-1)
    waiting = torch.where(wanted, chosen, experts).flatten(1).gather(1, first)
    counts = F.one_hot(waiting, experts + 1).cumsum(1)
    slots = counts.gather(2, waiting[..., None])[..., 0] - 1
    slots = slots.gather(1, line).view(chosen.shape)
    if capacity_factor is not None:
        bound = capacity(
            size, choices, experts, capacity_factor, per_choice, rounding, minimum, multiple, cap
        )
        wanted = wanted & (slots < bound)
    return slots.masked_fill(~wanted, -1).view(top_k_index.shape)


def stacked(losses):
    """Return the losses of those layers that have one, ``[layer]``."""
    return torch.stack([loss for loss in losses if loss is not None])


def with_cache(output, cache, **values):
    """Return an output of transformers, whose releases name its cache differently."""
    return output(**values, **{_cache_name(output): cache})


def _cache_name(output):
    return "cache" if "cache" in output.__dataclass_fields__ else "past_key_values"


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_key_value_groups = 1
        self.layer_norm = nn.RMSNorm(512, eps=1e-06)
        self.SelfAttention = Scope(
            q=nn.Linear(512, 512, bias=False),
            k=nn.Linear(512, 512, bias=False),
            v=nn.Linear(512, 512, bias=False),
            o=nn.Linear(512, 512, bias=False),
        )

    def forward(self, hidden_states, mask, bias):
        normed = self.layer_norm(hidden_states)
        # [batch, head, seq, head_dim]
        query = self.SelfAttention.q(normed).unflatten(-1, (-1, 64)).transpose(1, 2)
        key = self.SelfAttention.k(normed).unflatten(-1, (-1, 64)).transpose(1, 2)
        value = self.SelfAttention.v(normed).unflatten(-1, (-1, 64)).transpose(1, 2)
        mask_2 = biased(bias.permute(2, 0, 1)[None], mask[:, None, None], is_causal=False)
        attended = attend(self, query, key, value, mask_2, scaling=1.0, is_causal=False)
        return self.SelfAttention.o(attended.flatten(2))  # [batch, seq, embed]


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm = nn.RMSNorm(512, eps=1e-06)
        self.DenseReluDense = Scope(
            wi_0=nn.Linear(512, 2048, bias=False),
            wi_1=nn.Linear(512, 2048, bias=False),
            wo=nn.Linear(2048, 512, bias=False),
        )

    def forward(self, hidden_states):
        normed = self.layer_norm(hidden_states)
        activated = F.gelu(self.DenseReluDense.wi_0(normed), approximate="tanh")
        return self.DenseReluDense.wo(activated * self.DenseReluDense.wi_1(normed))


class Router(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 512))

    def forward(self, hidden_states):
        # [batch, seq, expert]
        router_logits = F.linear(widened(hidden_states), widened(self.weight))
        top_k_index = top_k_experts(router_logits, 2)  # best first
        top_k_weights = router_logits.gather(-1, top_k_index).softmax(-1)
        slots = assign_slots(
            top_k_index,
            8,
            capacity_factor=(5, 4) if self.training else None,
            keep=keep_random(top_k_weights, 0.2) if self.training else None,
        )
        top_k_index_2 = top_k_index.masked_fill(slots < 0, 8)
        router_z_loss = torch.square(router_logits.logsumexp(-1)).mean()
        largest = one_hot(top_k_index, 8, hidden_states).sum(-1).amax(-1)  # [batch, seq]
        product = one_hot(top_k_index[..., :1], 8, hidden_states).sum(2) * largest[:, :, None]
        totals = largest.sum((0, 1))[None]
        # [group, expert]
        totals_2 = (router_logits.softmax(-1) * largest[:, :, None]).sum((0, 1))[None]
        share = product.sum((0, 1))[None] / totals.clamp(min=1.0)[:, None]
        balance_loss = ((share * totals_2 / totals.clamp(min=1.0)[:, None]).sum(-1) * 8.0).mean()
        return top_k_index_2, top_k_weights, router_z_loss, balance_loss


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wi_0 = Scope(weight=nn.Parameter(torch.empty(8, 2048, 512)))
        self.wi_1 = Scope(weight=nn.Parameter(torch.empty(8, 2048, 512)))
        self.expert_bias = nn.Parameter(torch.empty(8, 2048))
        self.wo = Scope(weight=nn.Parameter(torch.empty(8, 512, 2048)))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        rows = ExpertRows(top_k_index, 8)
        inputs = rows.gather(hidden_states)  # [row, embed]
        activated = F.gelu(rows.linear(inputs, self.wi_0.weight), approximate="tanh")
        product = activated * rows.linear(inputs, self.wi_1.weight) * rows.each(self.expert_bias)
        return rows.combine(rows.linear(product, self.wo.weight), top_k_weights)


class ExtraFeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = Scope(
            layer_norm=nn.RMSNorm(512, eps=1e-06),
            DenseReluDense=Scope(
                wi_0=nn.Linear(512, 2048, bias=False),
                wi_1=nn.Linear(512, 2048, bias=False),
                wo=nn.Linear(2048, 512, bias=False),
            ),
        )

    def forward(self, hidden_states):
        layer_norm = self.layer.layer_norm(hidden_states)
        activated = F.gelu(self.layer.DenseReluDense.wi_0(layer_norm), approximate="tanh")
        return self.layer.DenseReluDense.wo(activated * self.layer.DenseReluDense.wi_1(layer_norm))


class DecoderAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.config = config
        self.num_key_value_groups = 1
        self.layer_norm = nn.RMSNorm(512, eps=1e-06)
        self.SelfAttention = Scope(
            q=nn.Linear(512, 512, bias=False),
            k=nn.Linear(512, 512, bias=False),
            v=nn.Linear(512, 512, bias=False),
            o=nn.Linear(512, 512, bias=False),
        )

    def forward(self, hidden_states, bias, seen, cache, **kwargs):
        normed = self.layer_norm(hidden_states)
        # [batch, head, seq, head_dim]
        query = self.SelfAttention.q(normed).unflatten(-1, (-1, 64)).transpose(1, 2)
        key = self.SelfAttention.k(normed).unflatten(-1, (-1, 64)).transpose(1, 2)
        value = self.SelfAttention.v(normed).unflatten(-1, (-1, 64)).transpose(1, 2)
        if cache is not None:
            key, value = extend_cache(cache, key, value, self.layer_idx)
        mask = biased(bias.permute(0, 3, 1, 2), seen)
        attended = attend(self, query, key, value, mask, scaling=1.0, is_causal=False, **kwargs)
        return self.SelfAttention.o(attended.flatten(2))  # [batch, seq, embed]


class CrossAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_key_value_groups = 1
        self.layer_norm = nn.RMSNorm(512, eps=1e-06)
        self.EncDecAttention = Scope(
            q=nn.Linear(512, 512, bias=False),
            k=nn.Linear(512, 512, bias=False),
            v=nn.Linear(512, 512, bias=False),
            o=nn.Linear(512, 512, bias=False),
        )

    def forward(self, hidden_states, memory, mask):
        # [batch, seq, head, head_dim]
        q = self.EncDecAttention.q(self.layer_norm(hidden_states)).unflatten(-1, (-1, 64))
        query = q.transpose(1, 2)  # [batch, head, seq, head_dim]
        key = self.EncDecAttention.k(memory).unflatten(-1, (-1, 64)).transpose(1, 2)
        value = self.EncDecAttention.v(memory).unflatten(-1, (-1, 64)).transpose(1, 2)
        attended = attend(
            self, query, key, value, mask[:, None, None], scaling=1.0, is_causal=False
        )
        return self.EncDecAttention.o(attended.flatten(2))  # [batch, seq, embed]


class EncoderDenseLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList([Attention(config), FeedForward(config)])

    def forward(self, hidden_states, mask, bias):
        hidden_states = hidden_states + self.layer[0](hidden_states, mask, bias)
        return hidden_states + self.layer[1](hidden_states), None, None


class EncoderSparseLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(
            [
                Attention(config),
                Scope(DenseReluDense=Experts(config), layer_norm=nn.RMSNorm(512, eps=1e-06)),
            ],
        )
        self.router = Router(config)
        self.extra_ffn = ExtraFeedForward(config)

    def forward(self, hidden_states, mask, bias):
        hidden_states = hidden_states + self.layer[0](hidden_states, mask, bias)
        normed = self.layer[1].layer_norm(hidden_states)
        top_k_index, top_k_weights, router_z_loss, balance_loss = self.router(normed)
        hidden_states_2 = self.layer[1].DenseReluDense(normed, top_k_index, top_k_weights)
        hidden_states = hidden_states + hidden_states_2
        hidden_states = hidden_states + self.extra_ffn(hidden_states)
        return hidden_states, router_z_loss, balance_loss


class DecoderDenseLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer = nn.ModuleList(
            [DecoderAttention(config, layer_idx), CrossAttention(config), FeedForward(config)]
        )

    def forward(self, hidden_states, bias, seen, cache, memory, mask, **kwargs):
        o = self.layer[0](hidden_states, bias, seen, cache, **kwargs)  # [batch, seq, embed]
        hidden_states = hidden_states + o
        hidden_states = hidden_states + self.layer[1](hidden_states, memory, mask)
        return hidden_states + self.layer[2](hidden_states), None, None


class DecoderSparseLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer = nn.ModuleList(
            [
                DecoderAttention(config, layer_idx),
                CrossAttention(config),
                Scope(DenseReluDense=Experts(config), layer_norm=nn.RMSNorm(512, eps=1e-06)),
            ],
        )
        self.router = Router(config)
        self.extra_ffn = ExtraFeedForward(config)

    def forward(self, hidden_states, bias, seen, cache, memory, mask, **kwargs):
        o = self.layer[0](hidden_states, bias, seen, cache, **kwargs)  # [batch, seq, embed]
        hidden_states = hidden_states + o
        hidden_states = hidden_states + self.layer[1](hidden_states, memory, mask)
        normed = self.layer[2].layer_norm(hidden_states)
        top_k_index, top_k_weights, router_z_loss, balance_loss = self.router(normed)
        hidden_states_2 = self.layer[2].DenseReluDense(normed, top_k_index, top_k_weights)
        hidden_states = hidden_states + hidden_states_2
        hidden_states = hidden_states + self.extra_ffn(hidden_states)
        return hidden_states, router_z_loss, balance_loss


class StMoeConfig(PretrainedConfig):
    """The configuration of this model; the sizes of its layers are in the text below."""

    model_type = "st_moe"


class StMoePreTrainedModel(PreTrainedModel):
    """What all models of this file share."""

    config_class = StMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "EncoderDenseLayer", "EncoderSparseLayer", "DecoderDenseLayer", "DecoderSparseLayer"
    ]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_attention_backend = False
    _can_set_attn_implementation_cached_value = True
    _can_compile_fullgraph = True


@dataclass
class StMoeEncoderOutput(BaseModelOutput):
    """An output with the losses of the routers."""

    encoder_balance_losses: torch.Tensor | None = None
    encoder_router_z_losses: torch.Tensor | None = None


@dataclass
class StMoeSeq2SeqOutput(Seq2SeqLMOutput):
    """An output with the losses of the routers."""

    aux_loss: torch.Tensor | None = None


class EncoderOf:
    """The encoder of a model, as generation calls it."""

    def __init__(self, model):
        self.model, self.main_input_name = model, model.main_input_name

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """Return what the decoder reads."""
        return self.model.encode(input_ids, attention_mask)

    __call__ = forward


class StMoeForConditionalGeneration(StMoePreTrainedModel, GenerationMixin):
    """The encoder, the decoder and its head."""

    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.shared = nn.Embedding(32128, 512)
        self.encoder = Scope(
            block=nn.ModuleList(
                [layer(config) for layer in [EncoderDenseLayer, EncoderSparseLayer] * 3]
            ),
            final_layer_norm=nn.RMSNorm(512, eps=1e-06),
        )
        self.decoder = Scope(
            block=nn.ModuleList(
                [
                    layer(config, layer_idx) for layer_idx, layer in enumerate(
                        [DecoderDenseLayer, DecoderSparseLayer] * 3
                    )
                ],
            ),
            final_layer_norm=nn.RMSNorm(512, eps=1e-06),
        )
        self.lm_head = nn.Linear(512, 32128, bias=False)
        self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias = nn.Embedding(32, 8)
        self.decoder.block[0].layer[0].SelfAttention.relative_attention_bias = nn.Embedding(32, 8)
        self.encoder.main_input_name = self.main_input_name
        self.post_init()

    def get_encoder(self, *args, **kwargs):
        """Return the encoder, which generation runs once."""
        return EncoderOf(self)

    def encode(self, input_ids=None, attention_mask=None):
        """Return the last hidden states of the encoder."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask = attention_mask.bool()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        # [seq, kv_seq]
        buckets = relative_buckets(
            positions - positions[..., None], bidirectional=True, buckets=32, max_distance=128
        )
        # [seq, kv_seq, head]
        bias = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias(buckets)
        hidden_states = self.shared(input_ids)
        encoder_router_z_losses = []
        encoder_balance_losses = []
        for layer in self.encoder.block:
            hidden_states, router_z_loss, balance_loss = layer(hidden_states, attention_mask, bias)
            encoder_router_z_losses.append(router_z_loss)
            encoder_balance_losses.append(balance_loss)
        memory = self.encoder.final_layer_norm(hidden_states)  # [batch, kv_seq, embed]
        return StMoeEncoderOutput(
            last_hidden_state=memory,
            encoder_balance_losses=encoder_balance_losses,
            encoder_router_z_losses=encoder_router_z_losses,
        )

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        cache=None,
        labels=None,
        use_cache=None,
        **kwargs,
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
            decoder_input_ids = torch.cat([start, labels[:, :-1]], dim=1)
            decoder_input_ids = decoder_input_ids.masked_fill(
                decoder_input_ids == -100, self.config.pad_token_id or 0
            )
        inputs_embeds = self.shared(decoder_input_ids)
        past = cache.get_seq_length() if cache is not None else 0
        length = inputs_embeds.shape[1]
        position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past
        key_position_ids = torch.arange(past + length, device=inputs_embeds.device)[None]
        memory = encoder_outputs[0]
        if attention_mask is None:
            attention_mask = memory.new_ones(memory.shape[:2])
        attention_mask = attention_mask.bool()
        seen = causal_mask(self.config, inputs_embeds, decoder_attention_mask, position_ids, cache)
        # [batch, seq, kv_seq]
        buckets = relative_buckets(
            key_position_ids[:, None] - position_ids[..., None],
            bidirectional=False,
            buckets=32,
            max_distance=128,
        )
        # [batch, seq, kv_seq, head]
        bias = self.decoder.block[0].layer[0].SelfAttention.relative_attention_bias(buckets)
        hidden_states = inputs_embeds
        router_z_losses = []
        balance_losses = []
        for layer in self.decoder.block:
            hidden_states, router_z_loss, balance_loss = layer(
                hidden_states, bias, seen, cache, memory, attention_mask, **kwargs
            )
            router_z_losses.append(router_z_loss)
            balance_losses.append(balance_loss)
        logits = self.lm_head(self.decoder.final_layer_norm(hidden_states))  # [batch, seq, vocab]
        balance_loss = stacked(encoder_outputs.encoder_balance_losses + balance_losses).sum()
        router_z_loss = stacked(encoder_outputs.encoder_router_z_losses + router_z_losses).sum()
        aux_loss = balance_loss * 0.01 + router_z_loss * 0.001
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + aux_loss
        return with_cache(StMoeSeq2SeqOutput, both, loss=loss, logits=logits, aux_loss=aux_loss)
