"""The tiny checkpoints that golden logits are made of."""

from __future__ import annotations

from case import Case as Case
from cases_decoders import DECODERS
from cases_dense import DENSE
from cases_mixtures import MIXTURES
from cases_stacks import STACKS

CASES = DENSE | DECODERS | MIXTURES | STACKS
