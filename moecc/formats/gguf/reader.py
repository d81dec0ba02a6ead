"""Open a GGUF file as a Hugging Face folder: with its names, row order and config.

Quantised blocks are dequantised to float32 when they are read, some rows at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from moecc.errors import InputError, Problems, nearest, printable, quoted
from moecc.families.config import ModelConfig
from moecc.families.gemma4 import LayerInputsConfig
from moecc.formats.files import DescriptorPool
from moecc.formats.folder import rows_of
from moecc.formats.gguf.config import HeadSizes, make_config
from moecc.formats.gguf.families import (
    ROPE_FACTORS,
    GgufFamily,
    dense_architectures,
    families_of,
    first_expert,
    hugging_face_name,
    is_norm,
    known_names,
    layer_input_architectures,
    mixture_architectures,
    read_architectures,
    turned_projection,
)
from moecc.formats.gguf.header import (
    GgufArray,
    GgufHeader,
    Key,
    StoredTensor,
    StoredValue,
    part_count,
    read_gguf_header,
    shown,
)
from moecc.formats.gguf.layer_inputs import read_layer_inputs, streams_of
from moecc.formats.gguf.older import Order, read_shape
from moecc.formats.gguf.rearranged import join
from moecc.formats.gguf.storage import BY_NAME, dequantise, logarithms
from moecc.formats.gguf.tokenizer import tokenizer_files
from moecc.formats.modelcard import CardEntries
from moecc.formats.source import Checkpoint, TensorInfo, quantised_remark, tensor_info
from moecc.support.lazy import np
from moecc.support.text import with_article
from moecc.support.untyped import JsonDict
from moecc.types import F32, Array, DType, tensor
from moecc.weights.arithmetic import Cast
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Expr, Source, sources
from moecc.weights.simplify import simplify

# A model in several GGUF files, as llama-gguf-split writes it.
#
# The files are named ``NAME-00001-of-00003.gguf``; the first has the metadata, and each says how
# many there are (``split.count``) and which one it is (``split.no``, from 0).

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_LARGEST = 4096


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; of a part, those of all parts, as one.

    Raises:
      InputError: with all problems of the headers, and parts that are missing or do not match.
      MachineError: a file cannot be read.
    """
    header = read_gguf_header(path)
    if part_count(header.metadata) <= 1:
        return header
    problems = Problems()
    parts = list(_parts(header, problems))
    problems.raise_if_any()
    first = parts[0]
    tensors = dict(first.tensors)
    for part in parts[1:]:
        for name, stored in part.tensors.items():
            if name in tensors:
                where = f"{part.path}, tensor {quoted(name)}"
                home = f"also in {tensors[name].file.name}"
                problems.add("two parts have this tensor", where=where, found=home)
            tensors[name] = stored
    stated = first.metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        where = f"{first.path}, metadata key 'split.tensors.count'"
        count = f"{len(tensors):,} in all parts"
        problems.add("tensors are missing", where=where, expected=f"{stated}", found=count)
    problems.raise_if_any()
    others = {part.path: part.identity for part in parts[1:]}
    return replace(first, tensors=tensors, parts=others)


def _parts(header: GgufHeader, problems: Problems) -> Iterator[GgufHeader]:
    """Yield the headers of all parts in order, the given one included."""
    count = part_count(header.metadata)
    named = _PART.fullmatch(header.path.name)
    if named is None or int(named["count"]) != count or count > _LARGEST:
        raise InputError(
            "the name is not that of a part of a split model, so the others cannot be found",
            where=header.path,
            expected=f"NAME-00001-of-{count:05}.gguf, up to {_LARGEST:,} parts",
            found=f"one of {count:,} parts",
            hint="name the parts as llama-gguf-split does, or join them with its --merge",
        )
    for number in range(count):
        path = header.path.with_name(f"{named['stem']}-{number + 1:05}-of-{count:05}.gguf")
        if path == header.path:
            part = header
        elif path.exists():
            part = read_gguf_header(path)
        else:
            hint = "a split model is read with all of its parts beside each other"
            problems.add("a part of the model is missing", where=path, hint=hint)
            continue
        for key, expected in (("split.no", number), ("split.count", count)):
            value = part.metadata.get(key)
            if value != expected:
                problems.add(
                    "the part is not the one that its name says",
                    where=f"{part.path}, metadata key {key!r}",
                    expected=f"{expected}",
                    found=shown(value),
                )
        yield part


_GUESSES = 20
_MOST_VALUES = 1000
CARD_KEYS = {
    "name": "name",
    "basename": "basename",
    "organization": "organization",
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "language": "languages",
    "datasets": "datasets",
}
"""The facts of a model that are kept, and the keys of the metadata after ``general.``."""


class GgufFile(Checkpoint):
    """A checkpoint in a GGUF file; see `moecc.formats.source.Checkpoint`.

    Attributes:
      metadata: the metadata keys and values of the file.
    """

    format = "gguf"

    def __init__(
        self,
        header: GgufHeader,
        config: JsonDict,
        tensors: dict[str, TensorInfo],
        *,
        head_dims: Mapping[str, int] | None = None,
        norms_plus_one: bool = False,
        orders: Mapping[str, Order] | None = None,
        wholes: Mapping[str, Expr] | None = None,
        parts: Mapping[str, TensorInfo] | None = None,
    ) -> None:
        self.path = header.path
        self.config = config
        self.tensors = MappingProxyType(tensors)
        self.metadata = MappingProxyType(header.metadata)
        self._identities = header.identities
        self._spans = header.spans
        self._head_dims = head_dims or {}
        self._pool = DescriptorPool()
        self._norms_plus_one = norms_plus_one
        self._orders = orders or {}
        self._wholes = wholes or {}
        self._parts = parts or {}
        self._turned: tuple[dict[str, bytes], str | None] | None = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; thread-safe.

        Raises:
          InputError: no such tensor, or the file was truncated, changed or replaced since opening.
          MachineError: the system cannot read it, or the `gguf` package is missing.
          ValueError: rows beyond the tensor.
        """
        info = tensor_info(self.tensors, name, self.path)
        shape, _ = rows_of(info, start, stop)
        stop = start + shape[0]
        if (joined := self._wholes.get(name)) is not None:
            return evaluate(joined, self._read_part, rows=(start, stop))
        if order := self._orders.get(name):
            stored = replace(info, shape=order.shape(info.shape))
            return order(self._stored(stored, 0, stored.shape[0]))[start:stop]
        head_dim = self._head_dims.get(name)
        if head_dim is None or start == stop:
            return self._stored(info, start, stop)
        # The rows of a head are in another order on disk, so whole heads are read.
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        heads = halves_from_neighbours(self._stored(info, first, last), head_dim)
        return np.ascontiguousarray(heads[start - first : stop - first])

    def _read_part(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows of a tensor by its name in the file."""
        return self._stored(self._parts[name], start, stop)

    def companions(self) -> dict[str, Path | bytes]:
        """Return the tokenizer and generation config, translated from the metadata.

        Without a tokenizer the result is empty, and `remarks` has the reason.

        Raises:
          MachineError: the file cannot be read.
        """
        return dict(self._tokenizer()[0])

    def remarks(self) -> list[str]:
        """Return notes on what this file lost or could not provide. Raises as `companions`."""
        remarks = quantised_remark(self.tensors)
        reason = self._tokenizer()[1]
        if reason is not None:
            remarks.append(f"no tokenizer could be made from this file: {reason}")
        return remarks

    def stored_keys(self, prefix: str) -> list[Key]:
        """Return the keys that begin with `prefix`, their values as they stand in the file.

        Raises:
          InputError: the file was truncated, changed or replaced since opening.
          MachineError: the system cannot read it.
        """
        keys = []
        for name, (begin, end) in self._spans.items():
            if name.startswith(prefix):
                raw = bytearray(end - begin)
                self._pool.read_into(self.path, self._identities[self.path], memoryview(raw), begin)
                keys.append(Key(name, StoredValue(bytes(raw))))
        return keys

    def card(self) -> CardEntries:
        """Return names, licence, language and data sets as the metadata state them."""
        card: CardEntries = {}
        for key, name in CARD_KEYS.items():
            value = self.metadata.get(f"general.{name}")
            if isinstance(value, str) and value:
                card[key] = (value,)
            elif isinstance(value, GgufArray) and not value.letter and value.count <= _MOST_VALUES:
                card[key] = tuple(value.strings())
        return card

    def files(self) -> list[Path]:
        """Return the file itself, or all files of a model in several."""
        return list(self._identities)

    def close(self) -> None:
        """Close the file."""
        self._pool.close()

    def _stored(self, info: TensorInfo, start: int, stop: int | None) -> Array:
        """Read rows in file order."""
        shape, skipped = rows_of(info, start, stop)
        raw = np.empty(shape[0] * (info.nbytes // info.shape[0]), np.uint8)
        if raw.size:
            identity = self._identities[info.file]
            self._pool.read_into(info.file, identity, raw.data, info.offset + skipped)
        if not info.storage:
            values: Array = raw.view(info.dtype.numpy).reshape(shape)
            if info.name.endswith((".A_log", ".ssm_a")):
                return logarithms(values)
            is_more = self._norms_plus_one and is_norm(info.name)
            return values - np.ones((), values.dtype) if is_more else values
        return dequantise(raw, BY_NAME[info.storage]).reshape(shape)

    def _tokenizer(self) -> tuple[dict[str, bytes], str | None]:
        if self._turned is None:
            rows = self.config["vocab_size"]
            length = self.config.get("max_position_embeddings", self.config.get("n_positions"))
            assert isinstance(rows, int), "a size"
            assert isinstance(length, int), "a size"
            try:
                self._turned = tokenizer_files(self.metadata, rows, length), None
            except InputError as error:
                self._turned = {}, str(error.problems[0]).replace("\n ", ";")
        return self._turned


def halves_from_neighbours(rows: Array, head_dim: int) -> Array:
    """Reorder the rows [heads x head_dim, ...] of a query or key projection.

    In the file the rotary embedding rotates row 2i of a head with row 2i + 1; Hugging Face rotates
    row i with row i + head_dim / 2.
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a GGUF file, or any part of a model in several; no weight is read.

    Headers and metadata are checked.

    Raises:
      InputError: not a GGUF file, an invalid one, or an unsupported model; all problems.
      MachineError: the system denies access.
    """
    header = read_gguf(Path(path))
    architecture = str(header.metadata.get("general.architecture"))
    if (layered := layer_input_architectures().get(architecture)) is not None:
        return _open_layer_inputs(header, layered)
    shape = read_architectures().get(architecture)
    if shape is not None and first_expert(header.tensors) is None:
        return _open_shape(header, shape)
    family, problems = _family(header), Problems()
    names = _names(header, family, problems)
    divisors = _rotary_divisors(header, problems)
    config, sizes = make_config(header, family, divisors, problems)
    head_dims = _head_dims(header, names, family, sizes, problems)
    if divisors is not None and 2 * divisors.size != sizes.head_dim:
        problems.add(
            "the number of divisors of the rotary frequencies does not match the head",
            where=f"{header.path}, tensor {ROPE_FACTORS!r}",
            expected=f"{sizes.head_dim / 2:g} for heads of width {sizes.head_dim}",
            found=f"{divisors.size}",
        )
    problems.raise_if_any()
    tensors = {
        new: _info(header.tensors[old], new, family.unit_axis(new)) for old, new in names.items()
    }
    wholes, parts = _wholes(header, names, family, config)
    tensors |= {name: _whole_info(name, joined, parts) for name, joined in wholes.items()}
    return GgufFile(
        header, config, tensors, head_dims=head_dims, wholes=wholes, parts=parts,
        norms_plus_one=family.has("norm_offset"),
    )  # fmt: skip


def _wholes(
    header: GgufHeader, names: Mapping[str, str], family: GgufFamily, config: JsonDict
) -> tuple[dict[str, Expr], dict[str, TensorInfo]]:
    """Return the tensors that are made of others of the file, and these by their stored names."""
    numbers = {end: n for ends in family.rearranged().values() for n, end in enumerate(ends)}
    stored: dict[str, dict[int, TensorInfo]] = {}
    for old, new in names.items():
        number = numbers.get(old.split(".", 2)[-1])
        if number is not None:
            stored.setdefault(new, {})[number] = _info(header.tensors[old], old)
    typed = family.config.from_json(config, str(header.path)) if stored else None
    wholes: dict[str, Expr] = {}
    for name, parts in stored.items():
        _, end = family.whole_of(name)
        infos = [parts[number] for number in sorted(parts)]
        dtype = infos[0].dtype if len({info.dtype for info in infos}) == 1 else F32
        try:
            sources = [_source(info, number, dtype) for number, info in enumerate(infos)]
            assert typed is not None, "some tensor is stored otherwise"
            wholes[name] = simplify(join(end, sources, typed))
        except (InputError, ValueError, IndexError):
            raise InputError(
                f"the file does not have {quoted(name)} as llama.cpp wants it",
                where=f"{header.path}, tensor {quoted(infos[0].name)}",
                expected=" and ".join(family.rearranged()[end]) + ", of the sizes of the config",
                found=", ".join(f"{list(info.shape)}" for info in infos),
            ) from None
    return wholes, {info.name: info for parts in stored.values() for info in parts.values()}


def _source(info: TensorInfo, number: int, dtype: DType) -> Expr:
    axes = {f"axis{number}_{at}": size for at, size in enumerate(info.shape)}
    source = Source(info.name, tensor(info.dtype, **axes))
    return source if info.dtype is dtype else Cast(source, dtype)


def _whole_info(name: str, joined: Expr, parts: Mapping[str, TensorInfo]) -> TensorInfo:
    infos = [parts[source.name] for source in sources(joined)]
    nbytes = sum(info.nbytes for info in infos)
    return replace(
        infos[0], name=name, shape=joined.type.shape, dtype=joined.type.dtype, nbytes=nbytes
    )


def _open_shape(header: GgufHeader, shape: type[ModelConfig]) -> GgufFile:
    """Open a file of one of the architectures that are read only."""
    problems = Problems()
    config, names, orders = read_shape(header, shape, problems)
    problems.raise_if_any()
    infos = {new: _info(header.tensors[old], new) for old, new in names.items()}
    for name, order in orders.items():
        infos[name] = replace(infos[name], shape=order.shape(infos[name].shape))
    return GgufFile(header, config, infos, orders=orders)


def _open_layer_inputs(header: GgufHeader, family: type[LayerInputsConfig]) -> GgufFile:
    """Open a file of a model whose layers read embeddings of their own."""
    problems = Problems()
    divisors = _rotary_divisors(header, problems)
    config, names, stacks = read_layer_inputs(header, family, divisors, problems)
    problems.raise_if_any()
    tensors = {new: _info(header.tensors[old], new) for old, new in names.items()}
    parts = {old: _info(header.tensors[old], old) for old in stacks}
    wholes: dict[str, Expr] = {}
    for old, info in parts.items():
        for name, expr in streams_of(old, _source(info, 0, info.dtype)).items():
            nbytes, wholes[name] = info.nbytes // info.shape[0], expr
            tensors[name] = replace(info, name=name, shape=expr.type.shape, nbytes=nbytes)
    return GgufFile(header, config, tensors, wholes=wholes, parts=parts)


def _family(header: GgufHeader) -> GgufFamily:
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise InputError(
            "the file does not state its architecture",
            where=f"{header.path}, metadata key 'general.architecture'",
            expected=f"one of {', '.join((*dense_architectures(), *_further_architectures()))}",
        )
    experts = header.metadata.get(f"{architecture}.expert_count", 0)
    sparse = first_expert(header.tensors) is not None or (type(experts) is int and experts > 0)
    table = mixture_architectures() if sparse else dense_architectures()
    for family in families_of(architecture, sparse=sparse):
        if all(
            header.metadata.get(f"{architecture}.{key}") == value
            for key, value in family.facts.fixed
        ):
            return family
    if architecture in table:
        return table[architecture]
    architectures = table if sparse else (*table, *_further_architectures())
    raise InputError(
        f"moecc does not support {'mixtures of ' if sparse else ''}this architecture",
        where=f"{header.path}, metadata key 'general.architecture'",
        expected=f"one of {', '.join(architectures)}",
        found=printable(architecture[:100]),
        hint="read the folder that the file was made from",
    )


def _further_architectures() -> tuple[str, ...]:
    """Return the architectures of models that are no decoders of Llama's line."""
    return (*layer_input_architectures(), *read_architectures())


def _names(header: GgufHeader, family: GgufFamily, problems: Problems) -> dict[str, str]:
    """Return the Hugging Face name of each tensor; unknown tensors go to `problems`."""
    names: dict[str, str] = {}
    candidates, guesses = known_names(family), _GUESSES
    for name in header.tensors:
        new = hugging_face_name(name, family)
        if new is not None:
            names[name] = new
        elif name != ROPE_FACTORS:
            model_type = family.config.model_type
            kind = model_type if family.mixture else f"dense {model_type}"
            fault = f"{with_article(kind)} has no tensor {quoted(name)}"
            # Suggesting the nearest name takes longer than everything else.
            hint = nearest(name[:100], candidates) if (guesses := guesses - 1) >= 0 else None
            problems.add(fault, where=header.path, hint=hint)
    return names


def _rotary_divisors(header: GgufHeader, problems: Problems) -> Array | None:
    """Read the divisors of the rotary frequencies, ``[head_dim / 2]``."""
    stored = header.tensors.get(ROPE_FACTORS)
    if stored is None:
        return None
    if stored.storage.name != "F32" or len(stored.shape) > 1 or stored.shape[0] > 1 << 16:
        where = f"{header.path}, tensor {ROPE_FACTORS!r}"
        form = f"{list(stored.shape)} in {stored.storage.name}"
        problems.add("not a vector of divisors", where=where, expected="[d] in F32", found=form)
        return None
    raw = np.empty(stored.nbytes, np.uint8)
    with closing(DescriptorPool()) as pool:
        pool.read_into(stored.file, header.identities[stored.file], raw.data, stored.offset)
    return raw.view(np.float32).astype(np.float64)


def _head_dims(
    header: GgufHeader,
    names: Mapping[str, str],
    family: GgufFamily,
    sizes: HeadSizes,
    problems: Problems,
) -> dict[str, int]:
    """Return the head width of the tensors whose rows are stored in another order."""
    if not family.facts.pairs_neighbours:
        return {}
    head_dims = {}
    for old, new in names.items():
        turned = turned_projection(new)
        if turned is None:
            continue
        heads = sizes.heads if turned == "q" else sizes.groups
        rows = header.tensors[old].shape[0]
        if rows != heads * sizes.head_dim or sizes.head_dim % 2:
            problems.add(
                "the rows are not whole heads of even width",
                where=f"{header.path}, tensor {quoted(old)}",
                expected=f"{heads} heads of width {sizes.head_dim}",
                found=f"{rows:,} rows",
            )
        head_dims[new] = sizes.head_dim
    return head_dims


def _info(stored: StoredTensor, name: str, unit_axis: int | None = None) -> TensorInfo:
    storage, shape = stored.storage, stored.shape
    # Some vectors here are matrices of one row in Hugging Face.
    if unit_axis is not None and len(shape) == unit_axis + 1:
        shape = (*shape[:unit_axis], 1, *shape[unit_axis:])
    return TensorInfo(
        name=name,
        dtype=storage.dtype,
        shape=shape,
        nbytes=stored.nbytes,
        file=stored.file,
        offset=stored.offset,
        storage=storage.name if storage.is_quantised else "",
    )
