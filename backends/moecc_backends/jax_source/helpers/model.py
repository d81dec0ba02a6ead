"""What JAX writes otherwise than PyTorch, and the parameters of a model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from moecc_backends.torch_source.helpers.attention import widened
from moecc_backends.torch_source.helpers.experts import _with_first


class TrainingKeys:
    """Training mode, and the random keys that its noise draws."""

    def __init__(self, key=None):
        self.key = key

    def next_key(self):
        """Return a key that nothing else draws from."""
        self.key, key = jax.random.split(self.key)
        return key


def is_array(x):
    """Whether a layer has a loss."""
    return x is not None


def split_axis(x, axis, sizes):
    """Return `x` with one axis as several."""
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def merge_axes(x, start, stop=-1):
    """Return `x` with the axes from `start` to `stop` as one."""
    after = x.shape[stop % x.ndim + 1 :]
    return x.reshape(*x.shape[:start], -1, *after)


def rms_norm(x, weight, *, eps):
    """Divide vectors by the root of their mean square, which is computed in float32."""
    mean = jnp.square(widened(x)).mean(-1, keepdims=True)
    return (widened(x) * jax.lax.rsqrt(mean + eps)).astype(x.dtype) * weight


def layer_norm(x, weight, bias=None, *, eps):
    """Normalise vectors to mean 0 and variance 1, which are computed in float32."""
    centred = widened(x) - widened(x).mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normed = (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * weight
    return normed if bias is None else normed + bias


def attend(
    query, key, value, mask=None, *, scaling, is_causal=True, window=0, softcap=None, sinks=None
):
    """Average values by the softmax of query · key, ``[batch, head, seq, head_dim]``.

    Returns ``[batch, seq, head, head_dim]``.  A mask is of bool, or is added to the scores.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (jnp.repeat(x, groups, axis=1) for x in (key, value))
    scores = query @ key.swapaxes(2, 3) * scaling
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = jnp.arange(scores.shape[2])[:, None] - jnp.arange(scores.shape[3])
    seen = distance >= 0 if is_causal else jnp.full_like(distance, True, dtype=bool)
    if window:
        seen &= distance < window
    if mask is not None and mask.dtype == bool:
        seen &= mask
    elif mask is not None:
        scores = scores + mask
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column.astype(scores.dtype)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : key.shape[2]]
    return (weights @ value).swapaxes(1, 2)


def biased(bias, mask, is_causal=True):
    """Return a bias of the scores with the lowest number where a query sees nothing."""
    lowest = jnp.finfo(bias.dtype).min
    if is_causal:
        seen = jnp.tril(jnp.ones(bias.shape[-2:], bool))
        bias = jnp.where(seen, bias, lowest)
    return bias if mask is None else jnp.where(mask, bias, lowest)


def narrowed(mask, keep):
    """Return a mask that also hides the keys that `keep` is false for."""
    return keep if mask is None else mask & keep


def _frequencies(like, size, theta):
    """Return the angle per position of each pair of entries, in float64 where it is known."""
    return theta ** -(np.arange(0, size, 2) / size)


def _tables(positions, like, frequencies, attention_factor):
    angles = positions[..., None].astype(float) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    cos, sin = jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor
    return cos.astype(like.dtype), sin.astype(like.dtype)


class RaggedRows:
    """Choices of tokens, sorted by expert; a dropped choice has the expert number `experts`."""

    def __init__(self, top_k_index, experts):
        self.shape, self.experts = top_k_index.shape, experts
        chosen = top_k_index.reshape(-1)
        self.order = jnp.argsort(chosen)
        self.expert = chosen[self.order]
        self.token = self.order // self.shape[-1]
        self.sizes = jnp.bincount(chosen, length=experts)

    def gather(self, hidden_states):
        """Return the token of each choice, ``[row, …]``."""
        return hidden_states.reshape(-1, *hidden_states.shape[len(self.shape) - 1 :])[self.token]

    def gather_weights(self, top_k_weights):
        """Return the weight of each choice, ``[row]``."""
        return top_k_weights.reshape(-1)[self.order]

    def each(self, vectors):
        """Return the vector of the expert of each row, of ``[expert, …]``."""
        return vectors[jnp.minimum(self.expert, self.experts - 1)]

    def linear(self, rows, weight):
        """Return each row times the matrix of its expert, ``[expert, out, in]``."""
        return jax.lax.ragged_dot(rows, weight.swapaxes(1, 2), self.sizes)

    def combine(self, rows, top_k_weights=None):
        """Return for each token the weighted sum of the rows of its choices."""
        rows = jnp.where((self.expert == self.experts)[:, None], 0, rows)
        if top_k_weights is not None:
            rows = rows * self.gather_weights(top_k_weights)[:, None].astype(rows.dtype)
        *tokens, choices = self.shape
        count = len(self.order) // choices
        total = jnp.zeros((count, rows.shape[-1]), rows.dtype).at[self.token].add(rows)
        return total.reshape(*tokens, -1)


def delta_rule(query, key, value, decay, rate):
    """Return what queries read of a state that keys write, a token after the other.

    Operands are ``[batch, seq, …, key]``, of size 1 where they are the same along an axis.
    """

    def step(state, token):
        q, k, v, factor, share = token
        state = factor * state
        error = v - (state * k).sum(-1, keepdims=True)
        state = state + k * (share * error)
        return state, (state * q).sum(-1)

    tokens = tuple(jnp.moveaxis(widened(x), 1, 0) for x in (query, key, value, decay, rate))
    start = jnp.zeros_like(tokens[1][0] * tokens[2][0])
    return jnp.moveaxis(jax.lax.scan(step, start, tokens)[1], 0, 1).astype(query.dtype)


def top_k_experts(scores, k):
    """Return the `k` experts of the largest scores, best first; a tie takes the lowest expert."""
    return jax.lax.top_k(scores, k)[1]


def hash_experts(ids, experts, k, seed=0, modulo=False):
    """Return experts by a hash of the token's id (Roller et al. 2021): MurmurHash3's finaliser."""
    number = ids.astype(jnp.uint32)
    if not modulo:
        number = number ^ jnp.uint32(seed * 0x9E3779B9 % 2**32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            number = (number ^ (number >> shift)) * jnp.uint32(factor)
        number = number ^ (number >> 16)
    first = (number % experts).astype(int)
    return (first[..., None] + jnp.arange(k)) % experts


def keep_random(weights, threshold, training):
    """Return which choices are kept: the first, others with probability weight / threshold."""
    drawn = jax.random.uniform(training.next_key(), weights.shape)
    return _with_first(drawn < weights / max(threshold, 1e-9))


def dropout(x, rate, training):
    """Return `x` with a share of zeros, and the others scaled up, in training."""
    if not training:
        return x
    keep = jax.random.bernoulli(training.next_key(), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def jitter(x, low, high, training):
    """Return `x` times numbers between `low` and `high`, in training."""
    if not training:
        return x
    return x * jax.random.uniform(training.next_key(), x.shape, x.dtype, low, high)


def add_noise(x, std, training):
    """Return `x` with normal noise, in training."""
    return x + jax.random.normal(training.next_key(), x.shape, x.dtype) * std if training else x


PARAMETERS = []

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def load(folder):
    """Return the parameters from ``model.safetensors`` of a folder, or from its shards."""
    flat, folder = {}, Path(folder)
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    for path in list(folder.glob("model.safetensors")) or shards:
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view(np.uint64)[0])
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            numbers = data[start + first : start + last].view(TYPES[entry["dtype"]])
            flat[name] = jnp.asarray(numbers.reshape(entry["shape"]))
    return nested(flat)


def save(params, folder):
    """Write parameters to ``model.safetensors`` of a folder, in place of earlier ones."""
    flat, header, end = flattened(params), {"__metadata__": {"format": "pt"}}, 0
    types = {np.dtype(kind): name for name, kind in TYPES.items()}
    for name, x in flat.items():
        entry = {"dtype": types[x.dtype], "shape": x.shape}
        header[name] = entry | {"data_offsets": (end, end := end + x.nbytes)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Parameters that were loaded may still be pages of the file that is replaced.
    with (folder / "model.safetensors.part").open("wb") as file:
        file.write(np.uint64(len(text)).tobytes() + text)
        for x in flat.values():
            file.write(x.tobytes())
    (folder / "model.safetensors.part").replace(folder / "model.safetensors")
    for pattern in ("model-*-of-*.safetensors", "model.safetensors.index.json"):
        for path in folder.glob(pattern):
            path.unlink()


def init(key, dtype=jnp.float32, std=0.02):
    """Return random parameters: normal matrices, ones for norms, zeros for other vectors."""
    flat = {}
    for name, layers, shape, kind in PARAMETERS:
        for path in [name.format(layer) for layer in layers]:
            key, drawn = jax.random.split(key)
            if kind == "normal":
                flat[path] = jax.random.normal(drawn, shape, dtype) * std
            else:
                flat[path] = jnp.full(shape, kind == "ones", dtype)
    return nested(flat)


def nested(flat):
    """Return parameters by path as dictionaries, and as lists where they are numbered."""
    tree = {}
    for name, x in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = x
    return _lists(tree)


def flattened(node, path=""):
    """Return nested parameters by path, in NumPy."""
    if not isinstance(node, dict | list):
        return {path.removeprefix("."): np.asarray(node)}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    parts = [flattened(inner, f"{path}.{name}") for name, inner in items]
    return {name: x for part in parts for name, x in part.items()}


def _lists(node):
    if not isinstance(node, dict):
        return node
    node = {name: _lists(inner) for name, inner in node.items()}
    numbers = [str(number) for number in range(len(node))]
    return [node[number] for number in numbers] if set(numbers) == set(node) else node
