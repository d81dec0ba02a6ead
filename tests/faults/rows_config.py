"""Faults of the config and of what is asked of the model."""

from __future__ import annotations

from .place import (
    GOLDEN,
    UPCYCLE,
    advised,
    config,
    pipeline,
    recipe,
    tensors,
    warned,
)
from .rows import row
from .spoil import large_recipe, read_back

ROWS = [
    row(
        29,
        "a config of another model",
        1,
        "another shape than config.json says|no tensor of the",
        config(hidden_size=32),
        config(vocab_size=40),
        config(num_hidden_layers=2),
        config(num_key_value_heads=1),
        config(intermediate_size=32),
    ),
    row(
        31,
        "a head that is tied and is not",
        1,
        "the two differ|there is no output matrix",
        config(tie_word_embeddings=True),
        tensors(lambda t: t.pop("lm_head.weight")),
    ),
    row(
        33,
        "a source that is sparse already",
        1,
        "it is sparse already",
        pipeline(UPCYCLE, source=GOLDEN / "mixtral_gqa"),
    ),
    row(
        34,
        "a recipe that is none",
        1,
        "did you mean 'source'|Cannot overwrite|another type|nested too deeply|UTF-8|too large",
        recipe('[model]\nsorce = "x"\n'),
        recipe("a = 1\na = 2\n"),
        recipe('[optimizer]\nrate = "1e-3"\n'),
        recipe("a = " + "[" * 9000),
        recipe(b"a = '\xff'"),
        recipe("a = " + "1" * 5000 + "\n" + "b" * 2**20),
        large_recipe,
    ),
    row(
        35,
        "options that contradict each other",
        2,
        "top-k does not suit|whole virtual groups",
        pipeline("upcycle{experts=2 top-k=3}"),
        pipeline("upcycle{experts=4 granularity=5}"),
    ),
    row(
        35,
        "options that do not suit the model",
        1,
        "no feed-forward block to convert in layer 7|no shared expert"
        "|does not divide over the mesh",
        pipeline("upcycle{layers=7}"),
        pipeline("upcycle{experts=2 shared=0.5}"),
        pipeline("upcycle{experts=4},annotate-sharding{mesh=expert:3 rules=expert-parallel}"),
    ),
    row(
        36,
        "options that are rarely meant",
        0,
        "router gets no gradient|power of two|no loss|always chosen",
        *(
            advised(t)
            for t in (
                "upcycle{top-k=1}",
                "upcycle{experts=6}",
                "upcycle{router-init=zero}",
                "add-losses{balance-coef=0.0}",
            )
        ),
    ),
    row(
        37,
        "token ids that the model has not",
        0,
        "has no row in the embedding|is no token of",
        warned("tokenizer.json", {"model": {"vocab": {"a": 40}}}),
        warned("generation_config.json", {"eos_token_id": 99}),
    ),
    row(38, "a licence of the source", 0, r"license: other\n[^~]*my-own|LICENSE", read_back),
]
