"""LoRA adapters of PEFT: a folder of small matrices, read as the model they are merged into."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from math import isfinite, nan, sqrt
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from moecc.errors import Problem, Problems, quoted
from moecc.formats.files import identify, read_json_object, require_unchanged
from moecc.formats.folder import SafetensorsFolder
from moecc.formats.modelcard import CardEntries, hub_repository, merged_cards, read_card
from moecc.formats.safetensors import ADAPTER_CONFIG, read_header
from moecc.formats.source import Checkpoint, DerivedCheckpoint, TensorInfo, nearest_tensor
from moecc.support.lazy import np
from moecc.support.record import RecordReader
from moecc.support.text import amount, both
from moecc.support.untyped import Json
from moecc.types import Array
from moecc.weights.arithmetic import branch_and_name, name_in

if TYPE_CHECKING:
    from moecc.formats.expert_adapter import ExpertDelta

# Regular expressions of strangers, matched in time that is linear in the text.
#
# Python's own matcher backtracks, and a pattern such as ``(a+)+b`` takes longer than anyone waits.
# Here a part of a pattern maps the set of positions where it may begin to those where it may end,
# so that no position is tried twice.  What cannot be matched in this way is no `NamePattern`.

LONGEST = 1024
"""The most characters of a pattern."""

_DEEPEST = 16
_ATOM = re.compile(
    r"\\[dDwWsS]|\\[^\w\s]|\[\^?(?:[\w.]-[\w.]|[\w.]|\\[dDwWsS.])+\]|[^\\()\[\]{}|*+?^$]", re.ASCII
)

_Step = Callable[[str, Set[int]], Set[int]]
"""From the positions where a part may begin to those where it may end."""


class UnsupportedPattern(ValueError):
    """The pattern is none, or has a construct that is not matched here."""


@dataclass(frozen=True)
class NamePattern:
    """A regular expression without look-around, back-references, counts and lazy repetitions.

    Attributes:
      text: the pattern.
      step: what it matches.
    """

    text: str
    step: _Step

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches `name`, or what follows one of its dots."""
        starts = {0, *(at + 1 for at, character in enumerate(name) if character == ".")}
        return len(name) in self.step(name, starts)


def parse_pattern(text: str) -> NamePattern:
    """Return the pattern that `text` spells.

    Raises:
      UnsupportedPattern: it spells none, is too long, or has another construct.
    """
    if len(text) > LONGEST:
        raise UnsupportedPattern(f"more than {LONGEST:,} characters")
    parser = _PatternParser(text)
    step, _ = parser.alternatives(0)
    if parser.at != len(text):
        raise UnsupportedPattern(f"{text[parser.at]!r} at character {parser.at + 1}")
    return NamePattern(text, step)


class _PatternParser:
    """Reads a pattern from left to right; each method returns a step, and whether it repeats."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def _take(self, token: str) -> bool:
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def alternatives(self, depth: int) -> tuple[_Step, bool]:
        """Read sequences with bars between them."""
        if depth > _DEEPEST:
            raise UnsupportedPattern(f"more than {_DEEPEST} groups inside one another")
        read = [self._sequence(depth)]
        while self._take("|"):
            read.append(self._sequence(depth))
        steps = [step for step, _ in read]
        repeats = any(repeated for _, repeated in read)
        return (steps[0] if len(steps) == 1 else _either(steps)), repeats

    def _sequence(self, depth: int) -> tuple[_Step, bool]:
        steps: list[_Step] = []
        repeats = False
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            step, repeated = self._repeated(depth)
            steps.append(step)
            repeats |= repeated
        return _in_order(steps), repeats

    def _repeated(self, depth: int) -> tuple[_Step, bool]:
        start = self.at
        step, repeats = self._single(depth)
        for mark in "*+?":
            if not self._take(mark):
                continue
            if repeats and mark != "?":
                raise UnsupportedPattern(f"a repetition of a repetition at character {start + 1}")
            if self.text[self.at : self.at + 1] in tuple("*+?{"):
                raise UnsupportedPattern(f"{self.text[self.at]!r} at character {self.at + 1}")
            return _repetition(step, mark), True
        return step, repeats

    def _single(self, depth: int) -> tuple[_Step, bool]:
        if self._take("^"):
            return (lambda name, starts: starts & {0}), False
        if self._take("$"):
            return (lambda name, starts: starts & {len(name)}), False
        if self._take("(?:") or self._take("("):
            read = self.alternatives(depth + 1)
            if not self._take(")"):
                raise UnsupportedPattern("a parenthesis is not closed")
            return read
        atom = _ATOM.match(self.text, self.at)
        if atom is None:
            raise UnsupportedPattern(f"{self.text[self.at]!r} at character {self.at + 1}")
        self.at = atom.end()
        try:
            character = re.compile(atom[0])
        except re.error as error:
            raise UnsupportedPattern(str(error)) from None
        return _one(character), False


def _one(character: re.Pattern[str]) -> _Step:
    def step(name: str, starts: Set[int]) -> Set[int]:
        return {at + 1 for at in starts if character.match(name, at) is not None}

    return step


def _in_order(steps: list[_Step]) -> _Step:
    def step(name: str, starts: Set[int]) -> Set[int]:
        for part in steps:
            if not starts:
                break
            starts = part(name, starts)
        return starts

    return step


def _either(steps: list[_Step]) -> _Step:
    def step(name: str, starts: Set[int]) -> Set[int]:
        return {at for part in steps for at in part(name, starts)}

    return step


def _repetition(inner: _Step, mark: str) -> _Step:
    def step(name: str, starts: Set[int]) -> Set[int]:
        if mark == "?":
            return starts | inner(name, starts)
        reached: set[int] = set() if mark == "+" else set(starts)
        begun: set[int] = set()
        fresh: Set[int] = starts
        while fresh:
            begun |= fresh
            ends = inner(name, fresh)
            reached |= ends
            fresh = ends - begun
        return reached

    return step


# The adapter itself.

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_PREFIX = "base_model.model."
_MOST_PATTERNS = 4096
_MERGE_WITH_PEFT = "merge the adapter with PEFT (merge_and_unload), and give that model"
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<letter>[AB])(?:\.weight)?")

_UNSUPPORTED = {
    "use_dora": "DoRA scales the rows of the merged matrix",
    "lora_bias": "biases of the second matrix",
    "layer_replication": "layers that occur several times",
    "megatron_config": "layers of Megatron",
    "trainable_token_indices": "rows of an embedding that were trained",
    "alora_invocation_tokens": "adapters that tokens switch on",
    "use_qalora": "adapters of pooled inputs",
    "use_bdlora": "block-diagonal adapters",
    "arrow_config": "adapters between which a router chooses",
    "kasa_config": "adapters with singular values of their own",
    "monteclora_config": "adapters that are drawn at random",
}
"""Keys of a config whose adapters are more than W + s · B A."""

_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the matrices of the model as they are.

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take from W what A and B begin with, so that the adapter is
one of the rest of W, which no file holds.
"""

_INPUTS_FIRST = re.compile(
    r"(?:transformer\.)?h\.\d+\.(?:attn\.c_(?:attn|proj)|mlp\.c_(?:fc|proj))"
)
"""The modules of a gpt2 whose matrices are ``[in, out]``: PEFT turns those, whatever a config says.

Of the other families here it turns none; an added one may have such matrices."""

_STORED_AS = re.compile(
    r"(?:[-._](?:gguf|safetensors|unsloth|bnb|hf|awq|gptq|fp8|bf16|f?p?(?:16|32)|[48]-?bit|int[48]"
    r"|mxfp4|i?q\d(?:_\w+)*))+$"
)
"""The end of a model's name that states how it is stored."""


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter and no model."""
    return (path / ADAPTER_CONFIG).is_file()


@dataclass(frozen=True)
class LoraSettings:
    """The keys of ``adapter_config.json`` that say how it is merged.

    Attributes:
      peft_type: the kind of adapter.
      lora_alpha: the numerator of the scale.
      alpha_pattern: other numerators, by patterns of modules; the first that matches counts.
      use_rslora: whether the denominator is the root of the rank (Kalajdzievski 2023).
      fan_in_fan_out: whether the matrices of linear layers are ``[in, out]``.
      base_model_name_or_path: the model that it is of, if it says so.
      init_lora_weights: how A and B began.
    """

    peft_type: Literal["LORA"]
    lora_alpha: float = nan
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    base_model_name_or_path: object = ""
    init_lora_weights: object = None


@dataclass(frozen=True)
class MatrixDelta:
    """The product that is added to a matrix of the model.

    Attributes:
      first: the tensor A, ``[rank, in]``.
      second: the tensor B, ``[out, rank]``.
      scale: the factor s.
      is_turned: whether the matrix is ``[in, out]``.
    """

    first: str
    second: str
    scale: float
    is_turned: bool

    def rows(self, stored: Checkpoint, start: int, stop: int) -> Array:
        """Return rows [start, stop) of what is added, but for the scale, in float32."""
        first = stored.read(self.first).astype(np.float32)
        rows: Array
        if self.is_turned:
            rows = first.T[start:stop] @ stored.read(self.second).astype(np.float32).T
        else:
            rows = stored.read(self.second, start, stop).astype(np.float32) @ first
        return rows


class AdaptedCheckpoint(DerivedCheckpoint):
    """A model with a LoRA adapter merged into it; see `moecc.formats.source.Checkpoint`.

    A matrix of the model is W + s · B A, computed in float32 and rounded once to the type of W; a
    tensor that the adapter has whole takes the place of the model's (Hu et al. 2021, and
    ``merge_and_unload`` of PEFT).  Rows are made as they are read.
    """

    format = "adapter"

    def __init__(self, base: Checkpoint, path: Path, *, allow_other_base: bool = False) -> None:
        """Open the adapter in the folder `path` of the model `base`.

        Args:
          base: the model that it is merged into.
          path: the folder.
          allow_other_base: whether it may name another model than `base` as its own.

        Raises:
          InputError: it is no LoRA adapter of this model; all problems at once.
        """
        file = path / ADAPTER_WEIGHTS
        # Identified before they are read, so that no change in between goes unnoticed.
        self._identities = {p: identify(p) for p in (path / ADAPTER_CONFIG, file)}
        config = read_json_object(path / ADAPTER_CONFIG, limit_bytes=_MAX_CONFIG_BYTES)
        super().__init__(base)
        self.path = path
        self.tensors = MappingProxyType(dict(base.tensors))
        self._stored = SafetensorsFolder(path, {}, {file: read_header(file)}, {})
        reading = _AdapterReading(base, config, self._stored.tensors, path)
        stated = reading.settings.base_model_name_or_path
        self._stated_base = stated if isinstance(stated, str) else ""
        other_base = self.other_base()
        if other_base is not None and not allow_other_base:
            reading.problems.add(
                "the adapter is of another model",
                where=f"{path / ADAPTER_CONFIG}: base_model_name_or_path",
                expected=f"{base.path.name}, which is SOURCE",
                found=quoted(other_base),
                hint="if that is SOURCE under another name, --allow-other-base merges it",
            )
        reading.problems.raise_if_any()
        self._deltas, self._replaced = reading.deltas, reading.replaced

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a merged tensor; thread-safe.

        Raises: as the model's.
        """
        dtype = self.tensors[name].dtype.numpy if name in self.tensors else None
        if name in self._replaced:
            return self._stored.read(self._replaced[name], start, stop).astype(dtype)
        weight = self.base.read(name, start, stop)
        delta = self._deltas.get(name)
        if delta is None:
            return weight
        with np.errstate(over="ignore", invalid="ignore"):  # the writer reports such numbers
            added = delta.rows(self._stored, start, start + len(weight)) * np.float32(delta.scale)
            merged: Array = (weight.astype(np.float32) + added).astype(dtype)
        return merged

    def remarks(self) -> list[str]:
        """Return what the adapter is of, if it says so, and how much of the model it changes."""
        model = f" of {self._stated_base}" if self._stated_base else ""
        count = len(self._deltas) + len(self._replaced)
        differ = "differs" if count == 1 else "differ"
        return [f"a LoRA adapter{model}: {amount(count, 'tensor')} {differ}"]

    def other_base(self) -> str | None:
        """Return the model that the adapter says it is of, if this one has another name.

        Names are compared without owner and folder, and without an end that states how weights are
        stored (``-bnb-4bit``, ``-Q4_K_M.gguf``); a model that was renamed has another one, too.
        """
        stated = self.base.config.get("_name_or_path")
        names = _names(str(self.base.path)) | (_names(stated) if isinstance(stated, str) else set())
        is_other = self._stated_base and not names & _names(self._stated_base)
        return self._stated_base if is_other else None

    def card(self) -> CardEntries:
        """Return what is kept of the adapter's card."""
        return read_card(self.path)

    def files(self) -> list[Path]:
        """Return the config and the weights of the adapter."""
        return [*self._identities]

    def require_unchanged(self) -> None:
        """Raise InputError if a file changed since it was opened."""
        require_unchanged(self._identities)

    def close(self) -> None:
        """Close the files of the adapter, not those of the model."""
        self._stored.close()


def _names(source: str) -> set[str]:
    """Return the names of a model that a path, also one of the Hub's cache, or a hub id states."""
    path = Path(source.replace("\\", "/").rstrip("/"))
    names = {
        path.name,
        path.expanduser().resolve().name,
        (hub_repository(path) or "").split("/")[-1],
    }
    return {_STORED_AS.sub("", name.lower()) for name in names} - {""}


class _AdapterReading:
    """The tensors of an adapter, matched with those of the model; collects the problems."""

    def __init__(
        self, base: Checkpoint, config: Json, tensors: Mapping[str, TensorInfo], path: Path
    ) -> None:
        self.base, self.tensors, self.path = base, tensors, path
        self.problems = Problems()
        self.deltas: dict[str, MatrixDelta | ExpertDelta] = {}
        self.replaced: dict[str, str] = {}
        self._config_path = str(path / ADAPTER_CONFIG)
        self.settings = self._read_settings(config)
        self._patterns = self._read_patterns()
        pairs: dict[str, dict[str, str]] = {}
        for name in tensors:
            match = _MATRIX.fullmatch(_without_prefix(name))
            if match is None:
                self._add_replaced(name)
            else:
                kind = match["letter"] + ("t" if match["table"] else "")
                pairs.setdefault(match["module"], {})[kind] = name
        for module, parts in pairs.items():
            self._add_pair(module, parts)

    def _read_settings(self, config: Json) -> LoraSettings:
        reader = RecordReader(lambda path: self._config_path)
        settings = reader.section(LoraSettings, config, is_open=True)
        self.problems.extend(problem for _, problem in reader.problems)
        for key, feature in _UNSUPPORTED.items():
            if config.get(key):
                self.problems.add(
                    f"moecc does not merge {feature}",
                    where=f"{self._config_path}: {key}",
                    hint=_MERGE_WITH_PEFT,
                )
        start = settings.init_lora_weights
        if (start.lower() if isinstance(start, str) else start) not in _PLAIN_INITIALISATIONS:
            self.problems.add(
                "the training of this adapter began with other matrices than the model's",
                where=f"{self._config_path}: init_lora_weights",
                expected="true, false, gaussian, eva, orthogonal or mica",
                found=quoted(str(start)),
                hint="write it as a plain LoRA first: save_pretrained of PEFT with "
                "path_initial_model_for_weight_conversion",
            )
        return settings

    def _read_patterns(self) -> list[NamePattern]:
        where = f"{self._config_path}: alpha_pattern"
        count = len(self.settings.alpha_pattern)
        if count > _MOST_PATTERNS:
            expected = f"at most {_MOST_PATTERNS:,}"
            self.problems.add(
                "too many patterns", where=where, expected=expected, found=f"{count:,}"
            )
            return []
        patterns = []
        for text in self.settings.alpha_pattern:
            try:
                patterns.append(parse_pattern(text))
            except UnsupportedPattern as error:
                self.problems.add(
                    f"moecc does not match the pattern {quoted(text)}",
                    where=where,
                    expected="names, dots, classes, groups, and repetitions that are not nested",
                    found=str(error),
                    hint=_MERGE_WITH_PEFT,
                )
        return patterns

    def _add_replaced(self, name: str) -> None:
        tensor = (
            _without_prefix(name).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        )
        info = self.base.tensors.get(tensor)
        if info is None:
            self._unknown(tensor, name)
        elif info.shape != self.tensors[name].shape:
            self._misshapen(name, str(info.shape), str(self.tensors[name].shape))
        else:
            self.replaced[tensor] = name

    def _add_pair(self, module: str, parts: Mapping[str, str]) -> None:
        from moecc.formats.expert_adapter import product_shape

        is_table = any(kind.endswith("t") for kind in parts)
        first, second = (parts.get(letter + "t" * is_table) for letter in "AB")
        tensor = f"{module}.weight"
        if tensor not in self.base.tensors:
            # Transformers calls the sparse block of mixtral mlp, whose files have another name.
            renamed = tensor.replace(".mlp.", ".block_sparse_moe.")
            tensor = renamed if renamed in self.base.tensors else tensor
        info = self.base.tensors.get(tensor)
        if first is None or second is None:
            self.problems.add(
                "an adapter's matrix lacks its partner",
                where=f"{self.path}: {module}",
                expected="lora_A and lora_B",
                found=", ".join(parts.values()),
            )
            return
        shapes = self.tensors[first].shape, self.tensors[second].shape
        if info is None or len(info.shape) == 3:
            self._add_experts(module.replace(".base_layer", ""), tensor, first, second)
            return
        is_gpt2 = self.base.config.get("model_type") == "gpt2"
        is_turned = is_table or (is_gpt2 and _INPUTS_FIRST.fullmatch(module) is not None)
        if not is_turned and not is_gpt2 and self.settings.fan_in_fan_out:
            if len(set(info.shape)) == 1:
                self.problems.add(
                    "the matrix is square: its shape does not tell whether inputs come first",
                    where=f"{self.path / ADAPTER_CONFIG}: fan_in_fan_out",
                    expected="false",
                    found=f"true, and {quoted(tensor)} of {info.shape}",
                    hint="set it to false: PEFT turns no matrix of a linear layer",
                )
                return
            is_turned = True
        shape = product_shape(*shapes, is_turned)
        if shape != info.shape:
            product = f"{shapes[1]} times {shapes[0]}"
            self._misshapen(tensor, f"a product of shape {info.shape}", product)
            return
        scale = self._scale(module, shapes[0][0])
        if scale is not None:
            self.deltas[tensor] = MatrixDelta(first, second, scale, is_turned)

    def _add_experts(self, module: str, tensor: str, first: str, second: str) -> None:
        """Add an adapter of a parameter of experts, which may be many tensors on disk."""
        shapes = self.tensors[first].shape, self.tensors[second].shape
        from moecc.formats.expert_adapter import ExpertDelta, find_parameter

        family = self.base.config.get("model_type")
        parameter = find_parameter(self.base.tensors, family, module, *shapes)
        if parameter is None:
            self._unknown(tensor, first)
            return
        if isinstance(parameter, Problem):
            where = f"{self.path}: {parameter.where}"
            self.problems.extend([replace(parameter, where=where, hint=_MERGE_WITH_PEFT)])
            return
        (of, is_turned), count = parameter, parameter[0].shape[0]
        scale = self._scale(of.name, shapes[0][0] // count)
        twice = [name for name in of.parts if name in self.deltas]
        if twice:
            message = "two adapters are of one parameter of experts"
            self.problems.add(message, where=f"{self.path}: {module}", found=of.name,
                              hint=_MERGE_WITH_PEFT)  # fmt: skip
        elif scale is not None:
            for name, (expert, start) in of.parts.items():
                self.deltas[name] = ExpertDelta(
                    first, second, scale, count, is_turned, expert, start
                )

    def _scale(self, module: str, rank: int) -> float | None:
        """Return s: alpha / rank, or / √rank where it is stabilised (Kalajdzievski 2023)."""
        key = next((p.text for p in self._patterns if p.matches(module)), None)
        alpha = self.settings.lora_alpha if key is None else self.settings.alpha_pattern[key]
        if not isfinite(alpha):
            where = f"{self._config_path}: lora_alpha"
            self.problems.add("not a usable number", where=where, expected="a finite number")
            return None
        return alpha / (sqrt(rank) if self.settings.use_rslora else rank)

    def _unknown(self, tensor: str, name: str) -> None:
        self.problems.add(
            "the adapter is for a module that the model does not have",
            where=f"{self.path}: {quoted(name)}",
            expected=f"{quoted(tensor)} in {self.base.path}",
            hint=nearest_tensor(self.base.tensors, tensor),
        )

    def _misshapen(self, name: str, expected: str, actual: str) -> None:
        self.problems.add(
            "the adapter does not suit the model's shapes",
            where=f"{self.path}: {quoted(name)}",
            expected=expected,
            found=actual,
            hint="it is of another model, or of another size",
        )


def _without_prefix(name: str) -> str:
    return name.removeprefix(_PREFIX).replace(".default.", ".")


# A checkpoint with others beside it: models of the same architecture, and statistics, by name.


class SeveralCheckpoints(DerivedCheckpoint):
    """A base and its branches as one; see `moecc.formats.source.Checkpoint`.

    Config and companions are those of the base.  A tensor that a branch stores in another type is
    read in that of the base, rounded to nearest if that is narrower.

    Attributes:
      base: the model that the branches stand beside.
      branches: the others, by name.
      tables: what has tensors of its own, by name: statistics.
    """

    def __init__(
        self,
        base: Checkpoint,
        branches: Mapping[str, Checkpoint],
        tables: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        super().__init__(base)
        self.branches = dict(branches)
        self.tables = dict(tables or {})
        self.format = base.format
        self.tensors = MappingProxyType(
            dict(base.tensors)
            | {
                name_in(branch, name): replace(info, dtype=base.tensors[name].dtype)
                for branch, checkpoint in branches.items()
                for name, info in checkpoint.tensors.items()
                if name in base.tensors
            }
            | {
                name_in(table, name): replace(info, name=name_in(table, name))
                for table, checkpoint in self.tables.items()
                for name, info in checkpoint.tensors.items()
            }
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor. Raises: as its checkpoint."""
        branch, tensor = branch_and_name(name)
        if branch in self.tables:
            return self.tables[branch].read(tensor, start, stop)
        if branch not in self.branches:
            return self.base.read(name, start, stop)
        values = self.branches[branch].read(tensor, start, stop)
        wanted = self.tensors[name].dtype.numpy
        return values if values.dtype == wanted else values.astype(wanted)

    def card(self) -> CardEntries:
        """Return what is kept of the cards of all models."""
        return merged_cards([self.base.card(), *(b.card() for b in self.branches.values())])

    def remarks(self) -> list[str]:
        """Return notes for readers of the result, those of the branches with their name."""
        remarks = [*self.base.remarks(), *self._narrowed()]
        models = {"base": self.base, **self.branches}
        silent = [name for name, model in models.items() if "license" not in model.card()]
        if 0 < len(silent) < len(models):
            remarks.append(f"of {both(silent)} no licence is known")
        for branch, checkpoint in self.branches.items():
            remarks += [f"{branch}: {remark}" for remark in checkpoint.remarks()]
        return remarks

    def _narrowed(self) -> list[str]:
        remarks = []
        for branch, checkpoint in self.branches.items():
            pairs = {
                (info.dtype.name, self.base.tensors[name].dtype.name)
                for name, info in checkpoint.tensors.items()
                if name in self.base.tensors
                and info.dtype.itemsize_bytes > self.base.tensors[name].dtype.itemsize_bytes
            }
            remarks += [f"{branch} is stored in {a}, and read in {b}" for a, b in sorted(pairs)]
        return remarks

    def files(self) -> list[Path]:
        """Return the files of all."""
        return [*self.named_files().values()]

    def named_files(self) -> dict[str, Path]:
        """Return the files of all by name, those of a branch below its name."""
        return self.base.named_files() | {
            f"{branch}/{path.name}": path
            for branch, checkpoint in (*self.branches.items(), *self.tables.items())
            for path in checkpoint.files()
        }

    def places(self) -> list[Path]:
        """Return the folders and files of all."""
        return [place for checkpoint in self._all() for place in checkpoint.places()]

    def require_unchanged(self) -> None:
        """Raise InputError if a file of any changed since it was opened."""
        for checkpoint in self._all():
            checkpoint.require_unchanged()

    def close(self) -> None:
        """Close the files of all."""
        for checkpoint in self._all():
            checkpoint.close()

    def _all(self) -> tuple[Checkpoint, ...]:
        return (self.base, *self.branches.values(), *self.tables.values())
