"""What weight expressions mean in index notation is what they evaluate to."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moecc.prove.evaluation import Evaluation
from moecc.prove.rules import Lemmas
from moecc.terms.term import Algebra, Application
from moecc.weights.evaluate import evaluate
from moecc.weights.text import parse_expr

from .reflection import Env, Model

X, Y, V = (
    'source("x" : f32[mlp=4, embed=3])',
    'source("y" : f32[mlp=4, embed=3])',
    'source("v" : f32[mlp=4])',
)
EXPRESSIONS = (
    X,
    "full(0.1 : f32[mlp=4])",
    f"tile({X}, expert=2, position=1)",
    f"stack({X}, {Y}, axis=expert, position=2)",
    f"stack({X}, {X}, {Y}, axis=expert)",
    f"stack({X}, {X}, axis=expert)",
    f"stack(tile({X}, copy=2), tile({Y}, copy=2), axis=layer)",
    f"stack(scale({X}, 0.1), scale({Y}, 0.1), axis=layer)",
    f"stack({X}, tile({V}, embed=3, position=1), axis=layer)",
    f"concat({X}, {Y}, axis=mlp)",
    f"concat(slice({X}, mlp=1:3), {Y}, {X}, axis=mlp)",
    f"index({X}, mlp=2)",
    f"slice({X}, mlp=1:3)",
    f"split({X}, mlp=(group=2, mlp=2))",
    f"merge({X}, (mlp, embed)=flat)",
    f"rename({X}, mlp=inner)",
    f"permute({X}, (embed, mlp))",
    f"merge(permute(split({X}, mlp=(a=2, b=2)), (b, a, embed)), (b, a)=mlp)",
    f"scale({X}, 0.7)",
    f"add({X}, {V})",
    f"mul({X}, {V})",
    f"cast({X}, f64)",
)


class Sources(Model):
    """Sources are arrays; everything else is interpreted as it is written."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.arrays = arrays

    def _applied(self, term: Application, env: Env) -> float:
        name, attrs = term.head
        if name not in ("source", "family"):
            return super()._applied(term, env)
        at = [round(self.value(p, env)) for p in term.arguments]
        source = attrs[0] if name == "source" else attrs[0][at.pop(0)]  # type: ignore[index]
        return float(self.arrays[str(source)][tuple(at)])


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_weight_is_its_term(text: str) -> None:
    rng = np.random.default_rng(5)
    shapes = {"x": (4, 3), "y": (4, 3), "v": (4,)}
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    expr, _ = parse_expr(text)
    expected = evaluate(expr, lambda name, start=0, stop=None: arrays[name][start:stop])
    tensor = Evaluation(Algebra(Lemmas()))._weight(expr)
    assert tensor.names == expr.type.names
    for at in product(*map(range, expected.shape)):
        value = Sources(arrays).value(tensor.body, dict(zip(tensor.axes, at, strict=True)))
        assert np.isclose(value, expected[at], rtol=1e-6), (text, at, tensor.body)
