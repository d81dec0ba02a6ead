"""The texts of definitions and of graphs, and what graphs mean by the definitions.

A graph is read line by line, and evaluated operation by operation: each value becomes a tensor, its
axes and its element as a term. Terms are those of moecc_check, which calls this file.
"""

import ast
import json
import re
from collections import namedtuple
from contextlib import contextmanager
from functools import cache
from pathlib import Path

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
def table_text():
    """Return the lemmas and the definitions."""
    files = (Path(__file__).with_name(f"moecc_check_{n}.txt") for n in ("lemmas", "definitions"))
    return "\n".join(file.read_text("utf-8") for file in files)


@cache
def read_table(text=None):
    """Return the entries of a table, in lists by kind and name, and its sets of heads."""
    table, words, lines = {}, {}, []
    text = re.sub(r"(?m)^\s*#.*\n", "", text or table_text())
    for row in re.sub(r"\n {8}\s*", " ", text).splitlines():
        kind, _, rest = row.strip().partition(" ")
        if row.startswith(" "):
            target, rest = rest.split(" = ", 1) if kind == "let" else ("", rest)
            lines.append((kind, target and parsed(target), compile(rest, row, "eval")))
        elif kind in ("lemma", "bounds", "define", "operation", "weight", "device", "local"):
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
LINE = re.compile(rf"({NAME}(?:, {NAME})*) = ([\w./-]+)((?: {NAME},?)*)(?: ({ATTRS}))?"
                  rf" : ({TYPE}(?:, {TYPE})*)(?: @\S*(?: by [\w./\-]+)?)?( \{{)?")  # fmt: skip
NOTE = re.compile(r"attr (\w+) = \S.*")
ATTR = re.compile(rf'\s*(\w+)\s*=\s*(\([^()]*\)|{STRING}|[^,()"\s]+)\s*(?:,|\Z)')
OPERAND = re.compile(r"([\s,]*(?:(\w+)=)?)(?=\w+\()")
PIECE = re.compile(
    rf"[\s,]*(?:(\w+|\([^()]*\))=)?({STRING}|\([^()]*\)|[^\s,()\[\]]+(?:\[[^\]\n]*\])?)"
)


Type = namedtuple("Type", "dtype axes mesh unreduced")  # a size: a number, name, or (kind, value)
Line = namedtuple("Line", "results op operands text types attrs body")
Graph = namedtuple("Graph", "inputs params lines outputs mesh")  # the mesh: sizes by name


def scalar(text):
    """Return an attribute: a number, a word, or a list of words or of pairs."""
    if text.startswith("("):
        words = filter(None, map(str.strip, text[1:-1].split(",")))
        return tuple(tuple(map(scalar, w.split("="))) if "=" in w else scalar(w) for w in words)
    if text.startswith('"'):
        return json.loads(text)
    if re.fullmatch(r"-?\d+|0x[0-9a-f]+", text):
        return int(text, 0)
    return float(text) if re.fullmatch(r"-?\d[\d.]*([eE][+-]?\d+)?", text) else text


def read_type(text):
    """Return a type, with the mesh axes of each of its axes."""
    dtype, inner, unreduced = re.fullmatch(r"(\w+)\[(.*)\](?: unreduced\((.*)\))?", text).groups("")
    axes, mesh = [], []
    for part in filter(None, map(str.strip, inner.split(","))):
        name, over, size = re.fullmatch(r"(\w+)(?:@([\w*]+))?=(\w+|\w+\(%.*\))", part).groups("")
        extent = re.fullmatch(r"(\w+)\((%.*)\)", size)
        axes.append((name, extent.groups() if extent else scalar(size)))
        mesh.append(tuple(filter(None, over.split("*"))))
    return Type(dtype, tuple(axes), tuple(mesh), tuple(re.findall(r"\w+", unreduced)))


def read_graph(lines, end="}"):
    """Return the graph of an iterator's lines up to one."""
    graph, notes = Graph({}, {}, [], {}, {}), set()
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
            match = NOTE.fullmatch(text)
            need(match and match[1] not in notes, f"no statement, or again: {text[:100]}")
            notes.add(match[1])
            if match[1] == "mesh":  # another note has no meaning
                graph.mesh.update(json.loads(text[12:]))
                need(all(type(n) is int and n > 0 for n in graph.mesh.values()), "no mesh")
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
        spelled = self.text if self.name == "aligned" else self.spelled  # its term has its text
        self.kind = (spelled, *kinds) if kinds else (self.name, self.type)


def graph_of(text):
    head, name, *lines = text.split("\n")
    is_head = head == "moecc 1" and re.fullmatch(r"graph [\w./\-]+ \{", name)
    need(is_head and text.endswith("\n}\n"), "no text of a graph")
    lines = iter(lines)
    graph = read_graph(lines)
    need(list(lines) == [""], "text after a graph")
    return graph


def options_of(n):
    """Return the attributes of a node, read."""
    return {k: scalar(v) if isinstance(v, str) else v for k, v in n.attrs.items()}


@contextmanager
def named(n, where=""):
    """Say of what goes wrong in which node it does."""
    try:
        yield
    except (Rejected, *MALFORMED) as error:
        reason = f"{', '.join(n.results)} = {n.op}{where}: {error or repr(error)}"
        raise Rejected(reason) from error


# Graphs.


class Evaluation:
    """Evaluates graphs by the definitions of the table."""

    def __init__(self, algebra, rolled):
        self.a, self.rolled, self.weights = algebra, rolled, {}
        self.sizes, self.tags = {}, {}  # of axes and of slots that are another graph's
        self.tensor = algebra.scope["tensor"]
        algebra.scope["assigned"] = self.assigned

    def assigned(self, head, *indices):
        """Return slots with the application that they are, whatever a lemma makes of it."""
        values = list(map(self.a.value, indices))
        factor = self.a.application(head.name, head.attrs, list(head.functions), values)
        x = self.tensor((), head(*indices))
        return x._replace(slots=(factor, self.tags.get(self.a.tag(x), self.a.tag(x))))

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
        words = {
            "name": scalar(name), "to": to, "T": axes, "dtype": dtype, "unknown": unknown,
            "spelled": e.text,
        }  # fmt: skip
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
                size = self.extent(*size, values)
            axes.append(self.a.axis(name, self.sizes.get(size, size)))
        return tuple(axes)

    def extent(self, kind, slots, values):
        """Return the name of a size that slots set."""
        return f"{kind if kind == 'groups' else 'slots'} {self.a.tag(values[slots])}"

    def leaf(self, name, type_):
        axes = self.typed_axes(type_, {})
        return self.tensor(axes, self.a.scope["leaf"](name, type_.dtype, axes), type_.dtype)

    def evaluate(self, graph, values, runs=(), frozen=()):
        """Return all values of a graph, whose inputs are given or arbitrary.

        Parameters that are frozen are stopped twins: nothing is said of their gradients.
        """
        need({*frozen} <= {*graph.params}, "a frozen parameter that the graph lacks")
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
                values[name] = x._replace(body=self.a.stopped(x.body)) if name in frozen else x
        for n in graph.lines:
            with named(n):
                self.run(n, values, runs)
        return values

    def run(self, n, values, runs=()):
        """Add the results of a node, maybe in a run with a number, to the values."""
        axes = [self.typed_axes(t, values) for t in n.types]
        results = self.results(n, tuple(values[x] for x in n.operands), axes)
        for name, type_, row, x in zip(n.results, n.types, axes, results, strict=True):
            need({*x.body.vars} <= {*row, *runs}, "an element of indices that are no axes")
            values[name] = x._replace(axes=row, dtype=type_.dtype)

    def body(self, graph):
        """Return the function of a graph, from tensors to tensors."""

        def call(*xs):
            pairs = zip(graph.inputs.items(), xs, strict=True)
            inputs = {k: x._replace(dtype=t.dtype) for (k, t), x in pairs}
            runs = {v for x in xs for v in x.body.vars if v not in x.axes}
            values = self.evaluate(graph, inputs, runs)
            return [values[name] for name in graph.outputs.values()]

        return call

    def results(self, n, xs, axes, kind="operation", **more):
        """Return the results of an operation: by its definition, or uninterpreted."""
        finite, rules = all(x.finite for x in xs), self.a.table.get((kind, n.op), ())
        marks = rules[0].marks if rules else ""
        if rules and ("†" in marks or (not self.a.exact and (finite or "∞" in marks))):
            words = {
                **more,
                "i": {v.name: v for row in axes for v in row}.__getitem__,
                "notes": lambda *but: [f"{k}={v}" for k, v in n.attrs.items() if k not in but],
                "rolled": self.rolled, "body": n.body and self.body(n.body),
                "is_flat": n.body and not any(inner.body for inner in n.body.lines),
            }  # fmt: skip
            options = options_of(n)
            unknown = options.keys() - rules[0].options.keys()
            need(not unknown or "**" in rules[0].options, f"no meaning of {sorted(unknown)}")
            result = self.a.defined((kind, n.op), xs, options, words)
            need(result is not None, "its definition does not hold")
            tensors = result if isinstance(result, list) else [result]
            return [x if hasattr(x, "finite") else self.tensor((), x, "", finite) for x in tensors]
        if kind != "operation":
            return self.results(n, xs, axes)
        need(not n.body, "a body of no meaning")
        key = tuple(filter(None, [n.text]))
        if n.op in self.a.words.get("own", ()) and not self.a.exact:
            key += tuple(x.dtype for x in xs)
            keys = [(*key, i, t.dtype) for i, t in enumerate(n.types)]
            bodies = [self.a.apply(f"operation {n.op}", attrs, (), xs) for attrs in keys]
            return [self.tensor((), body, "", finite) for body in bodies]
        if n.op in self.a.words["elementwise"] and not self.a.exact:
            body = self.a.apply(f"{n.op} of infinite" if rules else n.op, key, (), xs)
            return [self.tensor((), body, "", finite or n.op in self.a.words["finite"])]
        if n.op in self.a.words["commutative"] and len(xs) == 2:
            xs = sorted(xs, key=lambda x: self.a.function(x.axes, x.body).node.number)
        layout = tuple((tuple(v.name for v in x.axes), x.dtype) for x in xs)
        text = f"{n.text} {n.results[0]}" if n.op == "jax" else n.text  # a graph has no more of it
        attrs = [(i, text, layout, t.dtype, *((v.name, v.size) for v in row))
                 for i, (t, row) in enumerate(zip(n.types, axes, strict=True))]  # fmt: skip
        return [self.opaque(f"operation {n.op}", key, xs, row, "", finite)
                for key, row in zip(attrs, axes, strict=True)]  # fmt: skip


def check_graphs(evaluation, devices, texts, log):
    """Check that two graphs are equal, and that devices compute them. Raises: Rejected.

    A log may have a graph between them, the first on devices that have a part of the batch each;
    the last one is the program of such a device: it computes a part of each output, or a summand.
    """
    first, second, *programs = map(graph_of, (texts[0], *log.get("parts", ()), texts[1]))
    outputs, frozen = log.get("outputs", list(first.outputs)), log.get("frozen", [[], []])
    for names, text in zip(frozen, texts, strict=True):
        need(not names or "\n  attr frozen = {" in text, "frozen parameters where all are trained")
    pairs = zip((first, second), frozen, strict=True)
    values = [evaluation.evaluate(g, {}, (), names) for g, names in pairs]
    compare((first, second), values, outputs, bool(programs))
    for graph, row in zip((first, second), values, strict=True):
        devices.check(graph, row)
    for program in programs:
        need(not first.mesh and not program.mesh, "no micro-batch")
        (axis,) = second.mesh
        for name, type_ in second.inputs.items():
            need(type_.mesh[:1] == ((axis,),), f"{name} is no batch in parts")
        types = types_of(second)
        for name in outputs:
            t = types[second.outputs[name]]
            need(any(t.mesh) != bool(t.unreduced), f"output {name}: no part, and no part of a sum")
        device = Devices(evaluation.a)
        shards = device.program(second, values[1])
        compare((second, program), (shards, device.evaluate(program, {})), outputs, True)


def compare(graphs, values, outputs, in_parts=False):
    """Compare the inputs and the outputs of two graphs. Raises: Rejected."""
    on_meshes = all(g.mesh for g in graphs)
    need(not on_meshes or graphs[0].mesh == graphs[1].mesh, "graphs on other meshes")

    def interface(types):
        return {k: t if on_meshes else t._replace(mesh=()) for k, t in types.items()}

    need(interface(graphs[0].inputs) == interface(graphs[1].inputs), "graphs of other inputs")
    need(outputs and all({*outputs} <= {*g.outputs} for g in graphs), "outputs that a graph lacks")
    for name in outputs:
        x, y = (v[g.outputs[name]] for v, g in zip(values, graphs, strict=True))
        s, t = (types_of(g)[g.outputs[name]] for g in graphs)
        same = (x.axes, x.dtype) == (y.axes, y.dtype) and (in_parts or s.unreduced == t.unreduced)
        need(same and (not on_meshes or s.mesh == t.mesh), f"output {name}: of two types")
        need(x.body == y.body, f"output {name}: two different terms")


# Devices.


class Devices(Evaluation):
    """Checks that devices compute the values of graphs, each node for any values of its operands.

    A device has a shard of each operand, or a summand of it, and does what the table says: it then
    has to have its shard of the result. By induction it has so of all values, and of all runs of a
    scan.
    """

    def __init__(self, algebra):
        super().__init__(algebra, False)
        self.proved = {}  # whether the results of a node are finite, by all that this depends on

    def check(self, graph, values):
        """Check a graph, if it is on a mesh, given the values of its inputs and parameters."""
        if not graph.mesh:
            for name, t in types_of(graph).items():
                need(not any(t.mesh) and not t.unreduced, f"{name} lies on no mesh")
            return
        self.a.scope["mesh_sizes"] = graph.mesh
        leaves = {**graph.inputs, **{k: t for k, (t, _) in graph.params.items() if k in values}}
        for name, type_ in leaves.items():
            need(not type_.unreduced, f"{name}: a device is given a summand")
            self.need_shards(type_, name)
        self.check_lines(graph, {name: values[name].finite for name in leaves})

    def need_shards(self, type_, name):
        """Refuse a type of which devices have no equal shards, or not all."""
        names = [*type_.unreduced, *(m for row in type_.mesh for m in row)]
        need(len({*names}) == len(names), f"{name}: two uses of a mesh axis")
        for (axis, size), over in zip(type_.axes, type_.mesh, strict=True):
            is_equal = not isinstance(size, int) or size % self.a.scope["count"](over) == 0
            need(is_equal, f"{name}: {axis} does not divide")

    def check_lines(self, graph, finite):
        """Check the nodes of a graph; adds to `finite` which results are."""
        setters = {n.results[-1]: n for n in graph.lines if n.op in self.a.words["assigners"]}
        types = types_of(graph)
        for n in graph.lines:
            with named(n, " on devices"):
                if n.body:
                    holds = self.check_scan(n, types, finite)
                else:
                    lines = [*(setters[x] for x in n.operands if x in setters), n]
                    key = self.key(lines, types, finite)
                    if key not in self.proved:
                        self.proved[key] = self.check_node(lines, types, finite)
                    holds = self.proved[key]
                finite.update(zip(n.results, holds, strict=True))

    def key(self, lines, types, finite):
        numbers, mesh = {}, tuple(self.a.scope["mesh_sizes"].items())

        def number(name):
            return numbers.setdefault(name, len(numbers))

        def numbered(t):
            sizes = [(s[0], number(s[1])) if isinstance(s, tuple) else s for _, s in t.axes]
            return t._replace(axes=(*zip((name for name, _ in t.axes), sizes, strict=True),))

        return mesh, *((n.op, n.text, *((number(x), numbered(types[x]), finite.get(x))
                        for x in n.operands), *((number(x), numbered(types[x]))
                        for x in n.results)) for n in lines)  # fmt: skip

    def check_scan(self, n, outside, finite):
        """Check a scan, whose runs begin and end alike; return which results are finite."""
        types, carries = types_of(n.body), options_of(n).get("carries", 0)
        inputs, returned = list(n.body.inputs), list(n.body.outputs.values())
        outer = [*(outside[x] for x in n.operands), *n.types, *(types[x] for x in inputs[:carries])]
        inner = [types[x] for x in (*inputs, *returned, *returned[:carries])]
        for s, t in zip(outer, inner, strict=True):
            need(placement(s) == placement(t), f"{t} lies elsewhere in a run: {s}")
        holds, carried = [finite[x] for x in n.operands], None
        while carried != holds[:carries]:
            carried = holds[:carries]
            values = dict(zip(inputs, holds, strict=True))
            self.check_lines(n.body, values)
            holds[:carries] = [
                x and values[y] for x, y in zip(carried, returned[:carries], strict=True)
            ]
        return [values[y] for y in returned]

    def check_node(self, lines, types, finite):
        """Check the last of these nodes; return which of its results are finite."""
        self.setters, values, shards = {}, {}, {}
        for n in lines:
            for at, name in enumerate(n.operands):
                if name not in values:
                    values[name], shards[name] = self.unknown(n, at, types, values, finite)
            self.run(n, values)
            shape = self.add_shards(n, types, values, shards)
        for name, t, x in zip(n.results, n.types, shape, strict=True):
            y, places = shards[name], self.a.scope["over"]
            self.need_shards(t, name)
            allowed = {*y.axes, *places(t.unreduced), *(v for row in t.mesh for v in places(row))}
            need({*y.body.vars} <= allowed, f"{name} depends on where a device is")
            x, y = map(self.a.scope["at_lone"], (x, self.a.scope["summed"](y, t.unreduced)))
            need(self.a.value(x) == self.a.value(y), f"{name}: two different terms")
        return [values[name].finite for name in n.results]

    def program(self, graph, values):
        """Return what a device computes of any shards of the inputs, by the values of all devices.

        The sizes of graphs that are evaluated from now on are those of shards.
        """
        self.a.scope["mesh_sizes"], types, shards = graph.mesh, types_of(graph), {}
        for name in (x for x in (*graph.inputs, *graph.params) if x in values):
            x = shards[name] = self.a.scope["shard_of"](values[name], types[name].mesh)
            if name in graph.inputs:
                element = self.a.scope["leaf"](f"input {name[1:]}", x.dtype, x.axes)
                shards[name] = self.tensor(x.axes, element, x.dtype)
        for n in graph.lines:
            with named(n, " on a device"):
                need(not n.body, "a body on a device")
                self.add_shards(n, types, values, shards)
            if n.op == "expert_choice" or n.attrs.get("slots") == "capacity":
                slots = shards[n.results[-1]]  # as many as on all devices: groups are equal
                self.tags[self.a.tag(slots.body)] = slots.slots[1]
        for name in graph.inputs:
            pairs = zip(values[name].axes, shards[name].axes, strict=True)
            self.sizes.update({v.size: w.size for v, w in pairs if isinstance(v.size, str)})
        return shards

    def add_shards(self, n, types, values, shards):
        """Add what a device computes of its shards to them; return the shards of the results."""
        shard_of = self.a.scope["shard_of"]
        shape = [shard_of(values[x], t.mesh) for x, t in zip(n.results, n.types, strict=True)]
        local = self.on_device(n, shape, [types[x] for x in n.operands], values, shards)
        for name, t, x, y in zip(n.results, n.types, shape, local, strict=True):
            shards[name] = y._replace(axes=x.axes, dtype=t.dtype)
        return shape

    def unknown(self, n, at, types, values, finite):
        """Return an operand that may have any value, and the shard of a device of it."""
        type_ = types[n.operands[at]]
        axes, rows = self.typed_axes(type_, values), 0
        if (n.op, at) == ("embedding", 1) and not type_.unreduced:
            rows = dict(types[n.operands[0]].axes)[n.attrs["axis"]]
        over = self.a.scope["over"](type_.unreduced)
        rows = rows if isinstance(rows, int) else 0
        element = self.a.scope["unknown"](f"operand {len(values)}", type_.dtype, axes, over, rows)
        x = self.tensor(axes, element, type_.dtype, finite[n.operands[at]])
        shard = self.a.scope["shard_of"](x, type_.mesh)
        return self.a.scope["summed"](x, type_.unreduced), shard

    def on_device(self, n, shape, types, values, shards):
        """Return what a device computes of its shards."""
        xs, axes = [shards[x] for x in n.operands], [x.axes for x in shape]
        words = {
            "expected": shape, "laid": mesh_by_name(n.types[-1]),
            "mesh_of": lambda j, name: mesh_by_name(types[j])(name),
        }  # fmt: skip
        sizes = {}
        pairs = [(values[x].axes, y.axes) for x, y in zip(n.operands, xs, strict=True)]
        if n.op not in self.a.words["moves"]:
            pairs += [(values[x].axes, row) for x, row in zip(n.results, axes, strict=True)]
        for v, w in (pair for a, b in pairs for pair in zip(a, b, strict=True)):
            need(
                n.op in ("embedding", "join") or sizes.setdefault(v, w) == w,
                f"two shards of {v.name}",
            )
        words["options"], counts = (
            options_of(n),
            self.a.defined(("local", n.op), (), options_of(n), words) or {},
        )
        need(all(counts.values()), "parts that do not divide over devices")
        attrs = {k: counts.get(k, v) for k, v in n.attrs.items() if counts.get(k) != 1}
        if counts:
            n = n._replace(attrs=attrs, text=repr(attrs))
        results = self.results(n, xs, axes, "device", **words)
        if n.op in self.a.words["assigners"]:  # with as many slots as on all devices together
            tag = self.a.tag(values[n.results[-1]])
            results[-1] = results[-1]._replace(slots=(results[-1].slots[0], tag))
        return results

    def extent(self, kind, slots, values):
        if slots in values:
            return super().extent(kind, slots, values)
        return f"{kind} of setter {self.setters.setdefault(slots, len(self.setters))}"


def types_of(graph):
    """Return the types of all values of a graph by name."""
    results = {x: t for n in graph.lines for x, t in zip(n.results, n.types, strict=True)}
    return {**graph.inputs, **{k: t for k, (t, _) in graph.params.items()}, **results}


def mesh_by_name(type_):
    return lambda name: dict(zip((n for n, _ in type_.axes), type_.mesh, strict=True)).get(name, ())


def placement(type_):
    """Return the mesh axes of the axes that have some, and those of a sum."""
    pairs = zip((name for name, _ in type_.axes), type_.mesh, strict=True)
    return {name: over for name, over in pairs if over}, {*type_.unreduced}
