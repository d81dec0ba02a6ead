"""Steps that name, cut, join and repeat axes, and compute nothing."""

from __future__ import annotations

from moecc.testing.growth import Growth, is_within, mixable, mixable_fixed


def rename(g: Growth) -> None:
    """Rename an axis."""
    x = g.find(lambda v: bool(mixable(v.type)))
    if x is None:
        return
    to = g.new_axis(g.pick(("mlp", "embed", "kv_seq", "head")), x.type)
    g.emit("rename", x, axis=g.pick(mixable(x.type)).name, to=to.name)


def split(g: Growth) -> None:
    """Cut an axis of fixed size in two."""
    x = g.find(lambda v: bool(mixable_fixed(v.type)))
    if x is None:
        return
    axis = g.pick(mixable_fixed(x.type))
    whole = int(str(axis.size))
    outer = g.pick([d for d in range(1, whole + 1) if whole % d == 0])
    names = g.new_axis("head", x.type).name, g.new_axis("head_dim", x.type).name
    g.emit("split", x, axis=axis.name, into=((names[0], outer), (names[1], whole // outer)))


def merge(g: Growth) -> None:
    """Make one axis of two or three of fixed size."""
    x = g.find(lambda v: len(mixable_fixed(v.type)) > 1)
    if x is None:
        return
    axes = list(dict.fromkeys(g.pick(mixable_fixed(x.type)).name for _ in range(3)))
    into = axes[0] if g.chance(30) else g.new_axis("embed", x.type).name
    g.emit("merge", x, axes=tuple(axes), into=into)


def broadcast(g: Growth) -> None:
    """Repeat a value along the axes of another."""
    like = g.find(lambda v: bool(v.type.axes))
    if like is None:
        return
    x = g.find(lambda v: is_within(v.type, like.type))
    if x is not None:
        g.emit("broadcast", x, like)


def slice_(g: Growth) -> None:
    """Take a range of an axis of fixed size."""
    x = g.find(lambda v: bool(mixable_fixed(v.type)))
    if x is None:
        return
    axis = g.pick(mixable_fixed(x.type))
    start = g.choices.below(int(str(axis.size)))
    stop = start + 1 + g.choices.below(int(str(axis.size)) - start)
    g.emit("slice", x, axis=axis.name, start=start, stop=stop)
