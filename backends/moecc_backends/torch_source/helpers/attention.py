"""Attention, masks and positions."""

import inspect
import math

import torch
from transformers.masking_utils import create_causal_mask
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


def kernel_name(config):
    """Return the name of a function in `ALL_ATTENTION_FUNCTIONS`, which has none for "eager"."""
    return (config._attn_implementation or "eager").replace("eager", "sdpa")


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


def narrowed(mask, keep):
    """Return a causal mask that also hides the keys that `keep` is false for."""
    if mask is None:  # a kernel would make it
        mask = torch.ones(keep.shape[-2:], dtype=torch.bool, device=keep.device).tril()
    if mask.dtype == torch.bool:
        return mask & keep
    return mask.masked_fill(~keep, torch.finfo(mask.dtype).min)


def attend_by_scores(
    module, query, key, value, mask=None, *, scaling, softcap=None, sinks=None, is_causal=True,
    **kwargs
):  # fmt: skip
    """Average values as `attend`, with a soft cap of the scores, or scores of no value."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = biased(torch.zeros_like(scores[:1, :1]), mask, is_causal)
    scores = scores + mask
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


def masked_softmax(scores, dim):
    """Return the softmax along `dim`: zeros, and no gradients, where all scores are −∞."""
    hidden = scores.amax(dim, keepdim=True) == float("-inf")
    return scores.masked_fill(hidden, 0).softmax(dim).masked_fill(hidden, 0)


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


def windowed_mask(window, config, hidden_states, attention_mask, position_ids, cache):
    """Return which keys each query sees: itself and those less than `window` tokens before."""
    if attention_mask is None or attention_mask.ndim == 2:
        condition = {"and_mask_function": lambda batch, head, query, key: query - key < window}
        return causal_mask(config, hidden_states, attention_mask, position_ids, cache, **condition)
    # For a static cache, generation has made a mask already, of all earlier keys.
    queries = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    queries = queries + (cache.get_seq_length() if cache is not None else 0)
    keys = torch.arange(attention_mask.shape[-1], device=hidden_states.device)
    is_bool = attention_mask.dtype == torch.bool
    lowest = False if is_bool else torch.finfo(attention_mask.dtype).min
    return attention_mask.masked_fill(queries[:, None] - keys >= window, lowest)


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


def linear_rotary_tables(positions, like, size, theta, factor, attention_factor=1.0):
    """Return rotary tables whose positions are divided by `factor`."""
    return _tables(positions, like, _frequencies(like, size, theta) / factor, attention_factor)


def dynamic_rotary_tables(
    positions, like, size, theta, factor, original_context, attention_factor=1.0
):
    """Return rotary tables whose base grows with the length of the text (dynamic NTK)."""
    length = (positions.max() + 1).clamp(min=original_context).double()
    grown = factor * length / original_context - (factor - 1)
    theta = theta * grown ** (size / (size - 2))
    return _tables(positions, like, _frequencies(like, size, theta), attention_factor)


def llama3_rotary_tables(
    positions, like, size, theta, factor, original_context, low_freq_factor, high_freq_factor,
    attention_factor=1.0
):  # fmt: skip
    """Return rotary tables with slow frequencies divided, fast ones kept, others between."""
    plain = _frequencies(like, size, theta)
    turns = original_context * plain / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return _tables(positions, like, plain / factor * (1 - keep) + plain * keep, attention_factor)


def yarn_rotary_tables(
    positions, like, size, theta, factor, original_context, beta_fast, beta_slow, truncate,
    attention_factor=1.0
):  # fmt: skip
    """Return rotary tables as YaRN interpolates them (Peng et al. 2023)."""

    def entry(turns):
        wavelength = original_context / (turns * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(theta))

    first, last = entry(beta_fast), entry(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    entries = torch.arange(size // 2, device=positions.device, dtype=torch.float64)
    keep = 1 - ((entries - first) / (last - first or 0.001)).clamp(0, 1)
    plain = _frequencies(like, size, theta)
    return _tables(positions, like, plain / factor * (1 - keep) + plain * keep, attention_factor)


def longrope_rotary_tables(
    positions, like, size, theta, original_context, short_factors, long_factors,
    attention_factor=1.0
):  # fmt: skip
    """Return rotary tables with a divisor for each frequency, others for long texts."""
    is_long = positions.max() + 1 > original_context
    short, long = (
        torch.tensor(f, device=positions.device, dtype=torch.float64)
        for f in (short_factors, long_factors)
    )
    frequencies = _frequencies(like, size, theta) / torch.where(is_long, long, short)
    return _tables(positions, like, frequencies, attention_factor)


def _frequencies(like, size, theta):
    """Return the angle per position of each pair of entries, in float64."""
    exponents = torch.arange(0, size, 2, device=like.device, dtype=torch.float64) / size
    return theta**-exponents


def _tables(positions, like, frequencies, attention_factor):
    angles = positions[..., None].double() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return tuple((f(angles) * attention_factor).to(like.dtype) for f in (torch.cos, torch.sin))


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


def signed_buckets(behind, buckets, max_distance):
    """Return the bucket of distances to keys behind a query: near ones exact, far ones geometric.

    Those of keys ahead come before the middle one; with a `max_distance` of 0 all are exact.
    """
    half = buckets // 2
    exact = half // 2 if max_distance else half
    starts, distance = list(range(1, exact + 1)), exact + 1
    for step in range(half - exact):
        # Powers of whole numbers: no rounding of logarithms decides.
        bound = (max_distance - 1) ** step * exact ** (exact - 1)
        while distance ** (exact - 1) * exact**step <= bound:
            distance += 1
        starts.append(distance)
    bounds = torch.tensor(starts, device=behind.device)
    near = torch.bucketize(behind.abs(), bounds, right=True)
    return (half + torch.where(behind < 0, -near, near)).clamp(0, buckets - 1)


def alibi(distances, heads, like):
    """Return distances times the slope of each head, which is the last axis (Press et al. 2022)."""
    power = 2 ** math.ceil(math.log2(heads))
    exponents = torch.arange(1, power + 1, device=distances.device).double() * (8 / power)
    if power != heads:
        exponents = torch.cat([exponents[1::2], exponents[::2]])[:heads]
    return (distances[..., None] * 2**-exponents).to(like.dtype)


def delta_rule(query, key, value, decay, rate):
    """Return what queries read of a state that keys write, a token after the other.

    Operands are ``[batch, seq, …, key]``, of size 1 where they are the same along an axis.
    """
    state = torch.zeros_like(widened(key[:, 0] * value[:, 0]))
    reads = []
    for token in range(key.shape[1]):
        state = decay[:, token] * state
        error = value[:, token] - (state * key[:, token]).sum(-1, keepdim=True)
        state = state + key[:, token] * (rate[:, token] * error)
        reads.append((state * query[:, token]).sum(-1))
    return torch.stack(reads, dim=1).to(query.dtype)
