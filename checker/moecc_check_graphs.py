"""The texts of definitions and of graphs, and what graphs mean by the definitions.

A graph is read line by line, and evaluated operation by operation: each value becomes a tensor, its
axes and its element as a term. Terms are those of moecc_check, which calls this file.
"""

import ast
import json
import re
from collections import namedtuple
from functools import cache

MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class Rejected(Exception):
    """The proof is not accepted: where, and why."""


def need(condition, reason):
    if not condition:
        raise Rejected(reason)


# The table of lemmas and definitions.

ENTRY = re.compile(r"([†∞]*) *(?:([^:()]+): )?(.*?)(?: given (.*?))?(?: = (.*))?")
Rule = namedtuple("Rule", "marks operands names options lines")  # lines: a kind, a pattern, code


def parsed(text):
    return ast.parse(text, mode="eval").body


@cache
def read_table(text):
    """Return the entries of the table, in lists by kind and name, and its sets of heads."""
    table, words, lines = {}, {}, []
    for row in re.sub(r"\n {8}\s*", " ", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines():
        kind, _, rest = row.strip().partition(" ")
        if row.startswith(" "):
            target, rest = rest.split(" = ", 1) if kind == "let" else ("", rest)
            lines.append((kind, target and parsed(target), compile(rest, row, "eval")))
        elif kind in ("lemma", "bounds", "define", "operation", "weight"):
            marks, name, subject, given, right = ENTRY.fullmatch(rest).groups("")
            lines = [("=", None, compile(right, row, "eval"))] if right else []
            if kind in ("lemma", "bounds"):
                names, options = name or subject.partition("[")[0].partition("(")[0], {}
                operands = [*parsed(f"[{given}]").elts, parsed(subject)]
            else:
                names, _, inner = subject.partition("(")
                given = parsed(f"lambda {inner[:-1]}: 0").args
                pairs = zip(given.kwonlyargs, given.kw_defaults, strict=True)
                options = {k.arg: d and ast.literal_eval(d) for k, d in pairs}
                options.update({"**": None} if given.kwarg else {})
                star = [ast.Starred(ast.Name(given.vararg.arg))] if given.vararg else []
                operands = [*(ast.Name(a.arg) for a in given.args), *star]
            plain = [p.value if isinstance(p, ast.Starred) else p for p in operands]
            bound = {p.id for p in plain if isinstance(p, ast.Name)}
            for name in names.split(" | "):
                rule = Rule(marks, operands, bound, options, lines)
                table.setdefault((kind, name), []).append(rule)
        elif row:
            words.setdefault(kind, set()).update(rest.split())
    return table, words


# Texts of graphs.

NAME = r"%[A-Za-z0-9_][A-Za-z0-9_.\-]*(?:\{[0-9.]+\}[A-Za-z0-9_.\-]*)*"
TYPE = r"[a-z][a-z0-9]*\[[^\]\n]*\](?: unreduced\([^)\n]*\))?"
STRING = r'"(?:[^"\\\n]|\\.)*"'
ATTRS = rf'\{{(?:[^{{}}"\n]|{STRING})*\}}'
INPUT = re.compile(rf"input ({NAME}) : ({TYPE})")
PARAM = re.compile(rf"param ({NAME}) : ({TYPE})(?: = (.*?))?(?: @\S*)?")
OUTPUT = re.compile(rf"output (\S+) = ({NAME})")
LINE = re.compile(rf"({NAME}(?:, {NAME})*) = (\w+)((?: {NAME},?)*)(?: ({ATTRS}))?"
                  rf" : ({TYPE}(?:, {TYPE})*)(?: @\S*(?: by .*?)?)?( \{{)?")  # fmt: skip
ATTR = re.compile(rf'\s*(\w+)\s*=\s*(\([^()]*\)|{STRING}|[^,()"\s]+)\s*(?:,|\Z)')
OPERAND = re.compile(r"([\s,]*(?:(\w+)=)?)(?=\w+\()")
PIECE = re.compile(
    rf"[\s,]*(?:(\w+|\([^()]*\))=)?({STRING}|\([^()]*\)|[^\s,()\[\]]+(?:\[[^\]\n]*\])?)"
)


Type = namedtuple("Type", "dtype axes unreduced")  # a size: a number, a name, or (kind, value)
Line = namedtuple("Line", "results op operands text types attrs body")
Graph = namedtuple("Graph", "inputs params lines outputs")


def scalar(text):
    """Return an attribute: a number, a word, or a list of words or of pairs."""
    if text.startswith("("):
        words = filter(None, map(str.strip, text[1:-1].split(",")))
        return tuple(tuple(map(scalar, w.split("="))) if "=" in w else scalar(w) for w in words)
    if text.startswith('"'):
        return json.loads(text)
    if re.fullmatch(r"-?\d+|0x[0-9a-f]+", text):
        return int(text, 0)
    return float(text) if re.fullmatch(r"-?\d[\d.]*(e[+-]?\d+)?", text) else text


def read_type(text):
    """Return a type; where its axes lie on devices is no part of it."""
    dtype, inner, unreduced = re.fullmatch(r"(\w+)\[(.*)\](.*)", text).groups()
    axes = []
    for part in filter(None, map(str.strip, inner.split(","))):
        name, size = re.fullmatch(r"(\w+)(?:@[\w*]+)?=(.*)", part).groups()
        extent = re.fullmatch(r"(\w+)\((%.*)\)", size)
        axes.append((name, extent.groups() if extent else scalar(size)))
    return Type(dtype, tuple(axes), unreduced)


def read_graph(lines, end="}"):
    """Return the graph of an iterator's lines up to one."""
    graph = Graph({}, {}, [], {})
    for line in lines:
        text = line.strip()
        if line == end:
            return graph
        if match := INPUT.fullmatch(text):
            graph.inputs[match[1]] = read_type(match[2])
        elif match := PARAM.fullmatch(text):
            graph.params[match[1]] = read_type(match[2]), match[3]
        elif match := OUTPUT.fullmatch(text):
            graph.outputs[match[1]] = match[2]
        elif match := LINE.fullmatch(text):
            results, op, operands, attrs, types, brace = match.groups("")
            need(not ATTR.sub("", attrs[1:-1]).strip(), f"attributes {attrs}")
            body = (
                read_graph(lines, line[: len(line) - len(line.lstrip())] + "}") if brace else None
            )
            types = list(map(read_type, re.findall(TYPE, types)))
            pairs, operands = dict(ATTR.findall(attrs[1:-1])), re.findall(NAME, operands)
            graph.lines.append(Line(results.split(", "), op, operands, attrs, types, pairs, body))
        else:
            need(text.startswith("attr "), f"no statement: {text[:100]}")  # a note has no meaning
    raise Rejected("the graph has no end")


class Expression:
    """The text of a weight expression, in its parts."""

    def __init__(self, text, at=0):
        match = re.compile(r"(\w+)\((?:(\w+)=(\d+)\.\.(\d+)(?:\.\.(\d+))?, *)?").match(text, at)
        need(match, f"no weight expression: {text[at : at + 60]}")
        self.name, axis, low, high, step = match.groups()
        self.operands, self.words, self.keywords, self.type = [], [], {}, None
        spelled, self.end = [match[0]], match.end()
        if axis:  # each(axis=low..high, body)
            body, numbers = (
                Expression(text, self.end),
                range(int(low), int(high) + 1, int(step or 1)),
            )
            texts = (body.text.replace(f"{{{axis}}}", str(i)) for i in numbers)
            self.operands, self.end = list(map(Expression, texts)), body.end
            self.name, self.keywords = "stack", {"axis": axis}
        while text[self.end] != ")":
            if match := OPERAND.match(text, self.end):
                self.operands.append(Expression(text, match.end()))
                self.keywords.update({match[2]: "_"} if match[2] else {})
                spelled += [match[1], "_"]
                self.end = self.operands[-1].end
                continue
            match = PIECE.match(text, self.end)
            key, value = match.groups()
            if key:
                self.keywords[key] = value
            elif value.endswith("]"):
                self.type = read_type(value)
            elif value != ":":
                self.words.append(scalar(value))
            spelled.append(match[0])
            self.end = match.end()
        self.end += 1
        self.text, self.spelled = text[at : self.end], "".join(spelled) + ")"
        self.leaves = [x for e in self.operands for x in e.leaves] or [self]
        kinds = tuple(e.kind for e in self.operands)
        self.kind = (self.spelled, *kinds) if kinds else (self.name, self.type)


def graph_of(text):
    need(text.startswith("moecc 1\ngraph ") and text.endswith("\n}\n"), "no text of a graph")
    lines = iter(text.split("\n")[2:])
    graph = read_graph(lines)
    need(list(lines) == [""], "text after a graph")
    return graph


# Graphs.


class Evaluation:
    """Evaluates graphs by the definitions of the table."""

    def __init__(self, algebra, rolled):
        self.a, self.rolled, self.weights = algebra, rolled, {}
        self.tensor = algebra.scope["tensor"]

    def opaque(self, head, attrs, xs, axes, dtype="", finite=True):
        """Return an unknown function of tensors."""
        functions = [self.a.function(x.axes, x.body) for x in xs]
        return self.tensor(axes, self.a.apply(head, attrs, functions, axes), dtype, finite)

    # Weight expressions.

    def weight(self, e):
        if e.text not in self.weights:
            x = self.alike(e) if e.name == "stack" and len(e.operands) > 1 else None
            x = x or self.expression(e, [self.weight(o) for o in e.operands])
            self.weights[e.text] = x
        return self.weights[e.text]

    def alike(self, e):
        """Return a stack of expressions that differ in leaves alone as one over families."""
        place, leaves = self.a.fresh(len(e.operands)), []
        if len({p.kind for p in e.operands}) > 1:
            return None
        for row in zip(*(p.leaves for p in e.operands), strict=True):
            is_source, type_ = row[0].name == "source", row[0].type
            names = tuple(x.words[0] if is_source else x.text for x in row)
            if len(set(names)) == 1:
                leaves.append(self.weight(row[0]))
                continue
            if len(set(names)) < len(names) or row[0].name == "full":
                return None
            axes = self.typed_axes(type_, {})
            attrs = (names, type_.dtype, tuple(v.size for v in axes)) if is_source else (names, ())
            head = "family" if is_source else "weights"
            leaves.append(self.opaque(head, attrs, (), (place, *axes), type_.dtype))
            leaves[-1] = leaves[-1]._replace(axes=axes)
        remaining = iter(leaves)

        def over(p):
            return self.expression(p, [*map(over, p.operands)]) if p.operands else next(remaining)

        x, at = over(e.operands[0]), int(e.keywords.get("position", 0))
        new = self.a.axis(e.keywords["axis"], len(e.operands))
        body = self.a.substitute(x.body, {place: self.a.value(new)})
        return x._replace(axes=(*x.axes[:at], new, *x.axes[at:]), body=body)

    def expression(self, e, xs):
        """Return an expression of operands. Intermediate results are real numbers."""
        axes = self.typed_axes(e.type, {}) if e.type else ()
        dtype = e.type.dtype if e.type else xs[0].dtype

        def unknown(axes, dtype):
            layout = tuple((tuple(v.name for v in t.axes), t.dtype) for t in xs)
            return self.opaque("weight", (e.spelled, layout), xs, axes, dtype)

        options = {k: scalar(v) for k, v in e.keywords.items()}
        name, to = next(iter(e.keywords), ""), next(iter(options.values()), "")
        words = {"name": scalar(name), "to": to, "T": axes, "dtype": dtype, "unknown": unknown}
        x = self.a.defined(("weight", e.name), (*xs, *e.words), options, words)
        need(x or e.type, f"no definition of the expression {e.name}")
        x = x or unknown(axes, dtype)
        return x._replace(dtype=x.dtype or dtype)

    # Operations.

    def typed_axes(self, type_, values):
        """Return the variables of a type, whose extents other values may set."""
        axes = []
        for name, size in type_.axes:
            if isinstance(size, tuple):
                kind, slots = size
                size = f"{kind if kind == 'groups' else 'slots'} {self.a.tag(values[slots])}"
            axes.append(self.a.axis(name, size))
        return tuple(axes)

    def leaf(self, name, type_):
        axes = self.typed_axes(type_, {})
        return self.tensor(axes, self.a.scope["leaf"](name, type_.dtype, axes), type_.dtype)

    def evaluate(self, graph, values):
        """Return all values of a graph, whose inputs are given or arbitrary."""
        for name, type_ in graph.inputs.items():
            values[name] = values.get(name) or self.leaf(f"input {name[1:]}", type_)
        used = {x for n in graph.lines for x in n.operands} | set(graph.outputs.values())
        for name, (type_, text) in graph.params.items():
            if name in used:
                x = self.leaf(f"parameter {name[1:]}", type_)
                if text:
                    e = Expression(text)
                    need(e.end == len(text), f"{name}: text after a weight expression")
                    need({*self.weight(e).axes} == {*x.axes}, f"{name}: of other axes")
                    element = self.a.value(self.a.scope["cast_to"](self.weight(e), type_.dtype))
                    x = self.tensor(self.weight(e).axes, element, type_.dtype)
                values[name] = x
        for n in graph.lines:
            try:
                results = self.results(n, tuple(values[x] for x in n.operands), values)
                for name, type_, x in zip(n.results, n.types, results, strict=True):
                    axes = self.typed_axes(type_, values)
                    need({*x.body.vars} <= {*axes}, "an element of indices that are no axes")
                    values[name] = self.tensor(axes, x.body, type_.dtype, x.finite)
            except (Rejected, *MALFORMED) as error:
                reason = f"{', '.join(n.results)} = {n.op}: {error or repr(error)}"
                raise Rejected(reason) from error
        return values

    def body(self, graph):
        """Return the function of a graph, from tensors to tensors."""

        def call(*xs):
            pairs = zip(graph.inputs.items(), xs, strict=True)
            values = self.evaluate(graph, {k: x._replace(dtype=t.dtype) for (k, t), x in pairs})
            return [values[name] for name in graph.outputs.values()]

        return call

    def results(self, n, xs, values):
        """Return the results of an operation: by its definition, or uninterpreted."""
        finite, rules = all(x.finite for x in xs), self.a.table.get(("operation", n.op), ())
        marks, axes = rules[0].marks if rules else "", [self.typed_axes(t, values) for t in n.types]
        if rules and ("†" in marks or (not self.a.exact and (finite or "∞" in marks))):
            words = {
                "i": {v.name: v for row in axes for v in row}.__getitem__,
                "notes": lambda *but: [f"{k}={v}" for k, v in n.attrs.items() if k not in but],
                "rolled": self.rolled, "body": n.body and self.body(n.body),
                "is_flat": n.body and not any(inner.body for inner in n.body.lines),
            }  # fmt: skip
            options = {k: scalar(v) for k, v in n.attrs.items()}
            unknown = options.keys() - rules[0].options.keys()
            need(not unknown or "**" in rules[0].options, f"no meaning of {sorted(unknown)}")
            result = self.a.defined(("operation", n.op), xs, options, words)
            need(result is not None, "its definition does not hold")
            return [self.tensor((), x, "", getattr(x, "finite", finite))
                    for x in (result if isinstance(result, list) else [result])]  # fmt: skip
        need(not n.body, "a body of no meaning")
        if n.op in self.a.words["elementwise"] and not self.a.exact:
            name = f"{n.op} of infinite" if rules else n.op
            body = self.a.apply(name, (n.text,) if n.text else (), (), xs)
            return [self.tensor((), body, "", finite or n.op in self.a.words["finite"])]
        layout = tuple((tuple(v.name for v in x.axes), x.dtype) for x in xs)
        attrs = [(i, n.text, layout, t.dtype, *((v.name, v.size) for v in row))
                 for i, (t, row) in enumerate(zip(n.types, axes, strict=True))]  # fmt: skip
        return [self.opaque(f"operation {n.op}", key, xs, row, "", finite)
                for key, row in zip(attrs, axes, strict=True)]  # fmt: skip
