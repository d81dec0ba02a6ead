"""Routing, slots, and the rows of experts."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


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


def sparsemixer_weights(scores, index, jitter=0.01):
    """Return each choice's softmax among the scores near it, earlier choices excluded (PhiMoE)."""
    left, weights = scores, []
    for choice in index.unbind(-1):
        expert = choice[..., None]
        best = left.gather(-1, expert)
        distance = (best - scores) / torch.maximum(scores.abs(), best)
        near = left.masked_fill(distance > 2 * jitter, float("-inf"))
        weights.append(near.softmax(-1).gather(-1, expert))
        left = left.scatter(-1, expert, float("-inf"))
    return torch.cat(weights, dim=-1)


def hash_experts(ids, experts, k, seed=0, modulo=False):
    """Return experts by a hash of the token's id (Roller et al. 2021): MurmurHash3's finaliser."""
    number = ids.long()
    if not modulo:
        number = number ^ (seed * 0x9E3779B9 % 2**32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            number = (number ^ (number >> shift)) * factor & 0xFFFFFFFF
        number = number ^ (number >> 16)
    first = number % experts
    return (first[..., None] + torch.arange(k, device=ids.device)) % experts


def keep_random(weights, threshold):
    """Return which choices are kept: the first, others with probability weight / threshold."""
    first = torch.arange(weights.shape[-1], device=weights.device) == 0
    return first | (torch.rand_like(weights) < weights / max(threshold, 1e-9))


def keep_threshold(weights, threshold):
    """Return which choices are kept: the first, and others whose weight is above a threshold."""
    return _with_first(weights > threshold)


def keep_none(weights):
    """Return which choices are kept: the first alone."""
    return _with_first(torch.zeros_like(weights, dtype=torch.bool))


def keep_all(weights):
    """Return which choices are kept: all."""
    return torch.ones_like(weights, dtype=torch.bool)


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


def assign_slots_by_rule(
    top_k_index, experts, *, capacity_factor=None, groups=1, group_size=0, order="choice",
    per_choice=False, rounding="floor", minimum=4, multiple=1, cap=True, keep=None,
    priority=None, mask=None
):  # fmt: skip
    """Return the slot of each choice at its expert, −1 where it is dropped.

    Slots are counted in each group of tokens; first choices come before second ones, or with
    ``order="token"`` token by token.
    """
    choices = top_k_index.shape[-1]
    size = group_length(top_k_index[..., 0].numel(), groups, group_size)
    if capacity_factor is None:  # nothing is counted
        size = top_k_index[..., 0].numel()
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


def group_length(tokens, groups, group_size):
    """Return how many of `tokens` tokens a group has; those that no group divides are one."""
    if tokens % (group_size or groups):
        return tokens
    return group_size or tokens // groups


def by_group(x, groups, group_size=0):
    """Return values of tokens as ``[group, token, …]``."""
    return x.unflatten(0, (-1, group_length(x.shape[0], groups, group_size)))


def expert_choice(
    scores, experts, *, capacity_factor, groups=1, group_size=0, rounding="floor", minimum=4,
    multiple=1, cap=True, mask=None
):  # fmt: skip
    """Return experts, weights and slots where each expert takes the tokens that score highest."""
    size = group_length(scores[..., 0].numel(), groups, group_size)
    values = scores.reshape(-1, size, experts)
    ranked = values
    if mask is not None:
        ranked = values.masked_fill(~mask.reshape(-1, size, 1), float("-inf"))
    bound = capacity(size, 1, experts, capacity_factor, False, rounding, minimum, multiple, cap)
    ranks = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    taken = (ranks < bound) & (ranked > float("-inf"))
    slots = ranks.masked_fill(~taken, -1).view(scores.shape)
    index = torch.arange(experts, device=scores.device).expand(scores.shape)
    return index, scores, slots


def stacked(losses):
    """Return the losses of those layers that have one, ``[layer]``."""
    return torch.stack([loss for loss in losses if loss is not None])


def jitter(x, low, high, training):
    """Return `x` times numbers between `low` and `high`, in training."""
    return x * torch.empty_like(x).uniform_(low, high) if training else x


def add_noise(x, std, training):
    """Return `x` with normal noise, in training."""
    return x + torch.randn_like(x) * std if training else x
