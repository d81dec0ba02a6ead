"""The text model of a folder that holds one beside encoders of images or sound."""

from __future__ import annotations

from types import MappingProxyType

from moecc.errors import InputError
from moecc.families.config import FAMILY
from moecc.families.registry import parse_config
from moecc.families.wrappers import Wrapper, file_name, put_back, text_config, text_names
from moecc.formats.source import Checkpoint, DerivedCheckpoint, TensorInfo
from moecc.support.text import amount
from moecc.support.untyped import JsonDict
from moecc.types import Array, Axis, TensorType
from moecc.weights.expr import Expr, Source


class WrappedText(DerivedCheckpoint):
    """A text model, under the names and with the config of its family.

    Attributes:
      wrapper: the model that holds it.
      others: the other tensors of the file, by their names there.
    """

    def __init__(self, base: Checkpoint, wrapper: Wrapper, *, by_family: bool = True) -> None:
        super().__init__(base)
        self.wrapper, self.format = wrapper, base.format
        self._names = text_names(base.tensors)
        if not self._names:
            raise InputError(
                "the tensors of the text model are not where a wrapper has them",
                where=str(base.path),
                expected="language_model.model.embed_tokens.weight, or as transformers 5 names it",
                found="no such tensor",
            )
        tensors = base.tensors
        names_in_file = frozenset(self._names.values())
        # A graph of the user's own reads tensors under their names in the file, too.
        named = {} if by_family else dict(tensors)
        self.tensors = MappingProxyType(named | {n: tensors[f] for n, f in self._names.items()})
        self.others: dict[str, TensorInfo] = {
            name: info for name, info in tensors.items() if name not in names_in_file
        }
        self.config = text_config(wrapper, base.config, is_tied="lm_head.weight" not in self._names)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor, or of one of the others."""
        return self.base.read(self._names.get(name, name), start, stop)

    def remarks(self) -> list[str]:
        """Return the remarks of the base, and which tensors are not the text model's."""
        parts = sorted({name.partition(".")[0] for name in self.others})
        count = amount(len(self.others), "tensor")
        beside = f"beside the text model, {count} are left as they are: {', '.join(parts)}"
        return [*self.base.remarks(), *([beside] if parts else [])]

    def holder_of(self, family: str) -> Wrapper | None:
        """Return the wrapper if it can hold a text model of a family, else None."""
        stays = family == self.config["model_type"]
        return self.wrapper if stays or (self.wrapper.holds_any and family != FAMILY) else None

    def stored_name(self, name: str) -> str:
        """Return the name in the wrapper's file of a tensor of the text model."""
        return self._names.get(name) or file_name(name, self._names)

    def other_tensors(self) -> list[tuple[str, Expr]]:
        """Return the other tensors by name, each read as it is stored."""
        return [(name, Source(name, _type_of(info))) for name, info in self.others.items()]

    def config_with(self, text: JsonDict) -> JsonDict:
        """Return the wrapper's config.json with the config of a converted text model."""
        before = parse_config(self.config, str(self.path)).to_json()
        return put_back(self.base.config, text, before)


def wrapped_in(checkpoint: Checkpoint | None) -> WrappedText | None:
    """Return the wrapped text model that a checkpoint reads, adapters and branches beneath it."""
    while isinstance(checkpoint, DerivedCheckpoint) and not isinstance(checkpoint, WrappedText):
        checkpoint = checkpoint.base
    return checkpoint if isinstance(checkpoint, WrappedText) else None


def _type_of(info: TensorInfo) -> TensorType:
    axes = tuple(Axis(f"axis_{number}", size) for number, size in enumerate(info.shape))
    return TensorType(info.dtype, axes)
