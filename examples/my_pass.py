"""A pass of your own, in a file of your own; no registration, no package.

    moecc passes --load examples/my_pass.py my-pass
    moecc opt model.moe --load examples/my_pass.py -p my-pass --diff --check

Its property test is ``tests/examples/test_my_pass.py``; the parts are explained in
``docs/writing-a-pass.md``.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from moecc.ir import Graph
from moecc.rewrite import P, Rule, rewrite
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Preserves

X = P.any("x")
TWICE = Rule("relu-twice", P.relu(P.relu(X)), lambda m, build: build.relu(m.value("x")))
SWISH = Rule(
    "swish",
    P.mul(X, P.sigmoid(X)),
    lambda m, build: build.silu(m.value("x")),
    preserves="reassociation",
)


@dataclass(frozen=True)
class MyPass(Pass):
    """Write x · sigmoid(x) as silu(x), and a relu of a relu as one.

    Before: ``%a = sigmoid %x`` and ``%b = mul %x, %a``; after: ``%b = silu %x``.
    """

    name: ClassVar[str] = "my-pass"
    summary: ClassVar[str] = "write x · sigmoid(x) as silu(x), and a relu of a relu as one"

    exact: Annotated[bool, "leave out what is equal only in real arithmetic"] = False

    @property
    def preserves(self) -> Preserves:
        """What the options promise; ``--check`` and the property test hold the pass to it."""
        return EXACT if self.exact else Preserves("reassociation", "silu rounds another way")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Rewrite until nothing matches."""
        rules = [TWICE] if self.exact else [TWICE, SWISH]
        return PassResult.of(rewrite(graph, rules, origin=self.name))
