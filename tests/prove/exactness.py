"""The lemmas in ``docs/exactness.md``; ``python -m tests.prove.exactness PAGE`` writes them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from itertools import chain

from moecc.prove import prover  # noqa: F401  registers all lemmas
from moecc.prove.rules import APPLICATIONS, MONOMIALS, SUMS
from moecc.support.generated_docs import GeneratedPart


def _rows() -> Iterator[str]:
    yield "| used on | lemmas |"
    yield "|---|---|"
    groups = (
        ("a function", chain.from_iterable(APPLICATIONS.values())),
        ("a product", MONOMIALS),
        ("a sum", SUMS),
    )
    for title, lemmas in groups:
        texts = []
        for name, lemma in sorted({x.name: x for x in lemmas}.items()):
            statement = inspect.getdoc(lemma.apply)
            assert statement is not None, name
            text = " ".join(statement.partition("\n\n")[0].split())
            texts.append(f"*{name}*: {text.replace('|', chr(92) + '|')}")
        yield f"| {title} | {'<br>'.join(texts)} |"


LEMMAS = GeneratedPart("lemmas", "tests.prove.exactness", lambda: "\n".join(_rows()))

if __name__ == "__main__":
    sys.exit(LEMMAS.main())
