"""Names on disk that differ from a family's own by a prefix.

A model of transformers saved with a head has its tensors under a prefix (``bert.``), and a base
model saved alone lacks that of its class (``transformer.`` in a gpt2).  The rest of moecc knows one
name for each tensor; here it becomes that of the file.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

from moecc.families.configs import ModelConfig
from moecc.families.names import names_of
from moecc.ir.graph import Graph
from moecc.weights.expr import Expr, Source, transform

_OLDER = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))


@dataclass(frozen=True, slots=True)
class StoredNames:
    """The difference between a family's names and those of a file.

    Attributes:
      lacking: a prefix that names of the file lack.
      added: a prefix that the base model's names have in the file.
      older: whether norms have the names that the first of BERT's checkpoints gave them.
    """

    lacking: str = ""
    added: str = ""
    older: bool = False

    def __call__(self, name: str) -> str:
        """Return the name in the file of the tensor that the family calls `name`."""
        for word, before in _OLDER if self.older else ():
            if name.endswith(word):
                name = name.removesuffix(word) + before
        return f"{self.added}{name.removeprefix(self.lacking)}"

    def is_beside(self, name: str) -> bool:
        """Whether a tensor of the file is no part of the base model: of a head, say."""
        return bool(self.added) and not name.startswith(self.added)

    def read_by(self, graph: Graph) -> None:
        """Let the parameters of `graph` read the tensors under their names in the file."""
        if self == StoredNames():
            return
        for value in graph.params.values():
            if value.weight is not None:
                value.weight = transform(value.weight, self._renamed)

    def _renamed(self, expr: Expr) -> Expr:
        return Source(self(expr.name), expr.type) if isinstance(expr, Source) else expr


def stored_names(config: ModelConfig, tensors: Container[str]) -> StoredNames:
    """Return how the names of the file with `tensors` differ from those of the family."""
    embedding = names_of(config.model_type).embedding
    candidates = [StoredNames()]
    if config.base_prefix:
        candidates.append(StoredNames(lacking=config.base_prefix))
    if config.head_prefix:
        candidates.append(StoredNames(added=config.head_prefix))
    found = next((names for names in candidates if names(embedding) in tensors), candidates[0])
    older = replace(found, older=True)
    norm = "embeddings.LayerNorm.weight"
    return older if found(norm) not in tensors and older(norm) in tensors else found
