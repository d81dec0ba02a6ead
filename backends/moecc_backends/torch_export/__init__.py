"""Feed-forward blocks of any module of PyTorch, found by dataflow, rewritten, and put in place.

`convert` is the door.  `exporting` runs `torch.export`, and says what it cannot read; `lowering`
makes a function of JAX of what it shows, which the chapters of `moecc_backends.jaxpr` then read
like any other; `surveying` compares the blocks of two such traces; `placing` finds where blocks
stand in the module; `conversion` puts the rewritten ones there, as the modules that ``emit torch``
writes; `folders` does so for a folder of transformers.
"""

from __future__ import annotations

from moecc_backends.torch_export.conversion import convert as convert
from moecc_backends.torch_export.conversion import load as load
from moecc_backends.torch_export.folders import convert_folder as convert_folder
from moecc_backends.torch_export.folders import prove_folder as prove_folder

__all__ = ["convert", "convert_folder", "load", "prove_folder"]
