"""Rules for operations that rename, split, merge, slice and repeat axes."""

from __future__ import annotations

from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.rewrite import Match, P, Rule
from moecc_passes.canonicalize.elementwise import operand, same_type

_x = P.any("x")


def _renames_to_itself(match: Match) -> str | None:
    old, new = match.attr("old"), match.attr("new")
    return None if old == new else f"it renames {old} to {new}"


def _rename_once(match: Match, b: Builder) -> Value:
    return b.rename(match.value("x"), axis=match.attr("old"), to=match.attr("new"))


def _same_parts(match: Match) -> str | None:
    """Reject unless the merged axes are the split ones, in order."""
    split, merged = tuple(n for n, _ in match.attr("into")), match.attr("axes")
    if split != merged:
        return f"({', '.join(split)}) is split, ({', '.join(merged)}) is merged"
    return None


def _whole_again(match: Match) -> str | None:
    if match.attr("old") == match.attr("new"):
        return same_type(match)
    # A split that dropped a mesh axis is not undone by a rename, which keeps it.
    axis = match.value("x").type[match.attr("old")]
    return "the axis is sharded over a mesh" if axis.mesh else None


def _parts_made_whole(match: Match) -> str | None:
    return _same_parts(match) or _whole_again(match)


def _slice_once(match: Match, b: Builder) -> Value:
    offset = match.attr("offset")
    return b.slice(
        match.value("x"),
        axis=match.attr("axis"),
        start=offset + match.attr("start"),
        stop=offset + match.attr("stop"),
    )


def _reduces_nothing(axes: tuple[str, ...]) -> bool:
    return not axes


RULES = (
    Rule(
        "rename-to-itself",
        P.rename(_x, axis=P.attr("old"), to=P.attr("new")),
        operand,
        _renames_to_itself,
    ),
    Rule(
        "rename-chain",
        P.rename(
            P.rename(_x, axis=P.attr("old"), to=P.attr("mid")), axis=P.attr("mid"), to=P.attr("new")
        ),
        _rename_once,
    ),
    Rule(
        "merge-of-split",
        P.merge(
            P.split(_x, axis=P.attr("old"), into=P.attr("into")),
            axes=P.attr("axes"),
            into=P.attr("new"),
        ),
        _rename_once,
        _parts_made_whole,
    ),
    # The axes need not have been neighbours, so the order of the type decides.
    Rule(
        "split-of-merge",
        P.split(P.merge(_x, into=P.attr("axis")), axis=P.attr("axis")),
        operand,
        same_type,
    ),
    Rule("slice-of-all", P.slice(_x), operand, same_type),
    Rule(
        "slice-of-slice",
        P.slice(
            P.slice(_x, axis=P.attr("axis"), start=P.attr("offset")),
            axis=P.attr("axis"),
            start=P.attr("start"),
            stop=P.attr("stop"),
        ),
        _slice_once,
    ),
    Rule("broadcast-to-same", P.broadcast(_x, P.any()), operand, same_type),
    Rule(
        "reduce-nothing",
        P.sum(_x, axes=_reduces_nothing)
        | P.mean(_x, axes=_reduces_nothing)
        | P.max(_x, axes=_reduces_nothing),
        operand,
    ),
)
