"""Steps of generation: a step with caches computes rows of the graph of whole texts.

The tokens of a step are those of a text from `start` on, and its caches hold the keys of all tokens
before. A value of the step is, at each *point*, a value of the text:

    tokens     at token s that of token start + s
    new keys   at new key s that of key start + s
    keys       at key k that of key k, for each k below the end of the new ones
    rows       in the row of a choice of a token that in the row of this choice

It is so of a node if it is the same function of its operands in both graphs, and of no other points
of them. Keys that come after a token are not those of the text: where all keys are read, they have
to be hidden, by −∞ in a softmax and by 0 in a sum. By induction over the nodes of a step, and over
steps, it is so of all.
"""

from moecc_check_graphs import Evaluation, named, need, options_of, types_of

SIDES = ("text", "step")
READERS = {
    "softmax": "axis", "max": "axes", "logsumexp": "axes", "contract": "over",
    "delta_rule": "along",
}  # fmt: skip
"""Operations that may read all keys, and the attribute that says of which axes they do."""
INPUTS = ("%tokens", "%positions", "%key_positions")
ROWS = ("group", "expert", "slot")
LEAVES = ("source", "integer", "holds")


def names_of(n, attribute):
    """Return the axes that an attribute of a node has."""
    names = options_of(n).get(attribute, ())
    return names if isinstance(names, tuple) else (names,)


class Continuation(Evaluation):
    """Checks a step, value by value.

    Values of the text are numbered, those of equal nodes of equal values alike; those of a step
    have the number of the value that they are. `first` has a value of each number, and its node.
    """

    def check(self, text, step, outputs):
        """Check the graph of texts and that of a step. Raises: Rejected."""
        need(not text.mesh and not step.mesh, "a step on a mesh")
        self.types = dict(zip(SIDES, map(types_of, (text, step)), strict=True))
        self.numbers, self.first, self.finite, self.hidden = {"text": {}, "step": {}}, [], {}, {}
        self.choices = {}  # the number of the choices that have slots
        (tokens, length), (_, new), (keys, room) = (
            self.types[side][name].axes[-1]
            for side, name in (("text", "%tokens"), ("step", "%tokens"), ("step", "%key_positions"))
        )
        need(
            all(isinstance(n, str) for n in (length, new, room)), "tokens and keys of closed sizes"
        )
        self.tokens, self.keys = tokens, keys
        self.points = {
            "text": {(tokens, length): "tokens", (keys, length): "keys"},
            "step": {(tokens, new): "tokens", (keys, new): "new keys", (keys, room): "keys"},
        }
        self.ids = {}
        self.read_text(text)
        at = ("positions", tokens)
        renamed = ("rename", f"{{axis={tokens}, to={keys}}}", 0, self.ids[at])
        self.positions = [self.ids[at], self.ids[renamed]]
        self.numbers["step"] = dict(
            zip(INPUTS, [self.ids["%tokens"], *self.positions], strict=True)
        )
        for name, (type_, weight) in step.params.items():
            if (number := self.ids.get((type_, weight or name))) is not None:
                self.numbers["step"][name] = number
        caches = {}
        for n in step.lines:
            with named(n, " of a step"):
                if n.op == "update_slice":
                    self.add_cache(n, step, caches)
                else:
                    self.check_node(n)
        inputs = {x[1:] for x in step.inputs if x.startswith("%cache.")}
        need(outputs and {*outputs} == step.outputs.keys() - caches.keys(), "other outputs")
        inputs = {x[1:] for x in step.inputs if x.startswith("%cache.")}
        need(inputs == caches.keys(), "a cache that is not continued")
        for name, x in caches.items():
            need(step.outputs[name] == x, f"output {name}: another cache")
        for name in outputs:
            ends = text.outputs[name], step.outputs[name]
            numbers, layouts = zip(*map(self.seen, SIDES, ends), strict=True)
            is_row = self.kinds("step", ends[1]) == {tokens: "tokens"}
            same = is_row and numbers[0] == numbers[1] and layouts[0] == layouts[1]
            need(same, f"output {name}: no rows of it")

    def seen(self, side, name):
        """Return the number of a value, and its type but for the names of open sizes."""
        type_, kinds = self.types[side][name], self.kinds(side, name)
        layout = type_.dtype, [(axis, kinds.get(axis, size)) for axis, size in type_.axes]
        return self.numbers[side][name], layout

    def read_text(self, graph):
        """Number the values of the graph of texts."""

        def number(name, key, line=None):
            self.numbers["text"][name] = self.ids.setdefault(key, len(self.ids))
            self.first += [(name, line)] * (len(self.ids) - len(self.first))

        for name in graph.inputs:
            number(name, name)
        for name, (type_, weight) in graph.params.items():
            number(name, (type_, weight or name))
        for n in graph.lines:
            operands = [self.numbers["text"][x] for x in n.operands]
            for i, name in enumerate(n.results):
                key = ("positions", n.attrs["axis"]) if n.op == "positions" else None
                number(name, key or (n.op, n.text, i, *operands), n)

    def kinds(self, side, name):
        """Return the axes of a value that are points, and of what."""
        axes = self.types[side][name].axes
        kinds = {axis: self.points[side].get((axis, size)) for axis, size in axes}
        for slots in (size[1] for _, size in axes if isinstance(size, tuple)):
            number = self.numbers[side][slots]
            kinds.update(dict.fromkeys(ROWS, f"rows {number}"))
        return {axis: kind for axis, kind in kinds.items() if kind}

    def axes(self, side, name, is_read):
        """Return the variables of the axes of a value by name; both graphs share no points."""
        kinds, result = self.kinds(side, name), {}
        for axis, size in self.types[side][name].axes:
            kind = kinds.get(axis)
            if is_read and kind == "keys":
                size = "keys"  # of which all are read, and those of both are the same
            elif kind and axis != "expert":
                size = f"{kind} of the {side}"
            else:
                lengths = [n for _, n in self.points[side]]
                need(size not in lengths, f"{name}: {axis} is as long as tokens or keys")
            result[axis] = self.a.axis(axis, size)
        return result

    def operand(self, side, name, of_step, is_read, leaves, element=None):
        """Return any value; adds to `leaves` the variables of the points of its leaf."""
        number, axes = self.numbers[side][name], self.axes(side, name, is_read)
        names = [axis for axis, _ in self.types["text"][self.first[number][0]].axes]
        kinds = self.kinds(side, name)
        word = f"{side if kinds else 'both'} {number}"
        leaves[word] = [axes[x] if x in kinds and axes[x].size != "keys" else None for x in names]
        dtype = self.types[side][name].dtype
        if element is None:
            element = self.a.scope["leaf"](word, dtype, [axes[x] for x in names])
        return self.tensor(axes.values(), element, dtype, self.finite.get(of_step, True))

    def at_points(self, total, leaves):
        """Return a term of which leaves that are at their points are the same in both graphs."""

        def change(factor):
            head, attrs, _, arguments = self.a.applied(factor)
            spots = leaves.get(attrs[0]) if head in LEAVES else None
            if spots is not None:
                pairs = list(zip(arguments, spots, strict=True))
                if all(v is None or self.a.variable(x) == v for x, v in pairs):
                    others = [self.at_points(x, leaves) for x, v in pairs if v is None]
                    return self.a.apply(
                        head, (attrs[0].split()[1], *attrs[1:2], *attrs[3:]), (), others
                    )
            if not head:
                return self.a.value(factor)
            return self.a.rebuilt(factor, lambda x: self.at_points(x, leaves))

        return self.a.changed(self.a.value(total), change)

    def check_node(self, n):
        """Check a node of a step, and number its results."""
        for name in n.operands:
            need(name in self.numbers["step"], f"nothing is known of {name}")
        operands = [self.numbers["step"][x] for x in n.operands]
        keys = [(n.op, n.text, i, *operands) for i in range(len(n.results))]
        need(not n.body and all(k in self.ids for k in keys), "the text has no such node")
        numbers = [self.ids[k] for k in keys]
        self.numbers["step"].update(zip(n.results, numbers, strict=True))
        kinds = [self.kinds("step", x) for x in n.operands]
        if n.op == "assign_slots":
            self.check_assignment(n)
        elif self.choices.keys() & {*n.operands}:
            self.check_slots(n, kinds)
        elif n.op == "rename" and n.attrs["axis"] == self.tokens and n.attrs["to"] == self.keys:
            is_new = self.kinds("step", n.results[0]) == {self.keys: "new keys"}
            need(kinds == [{self.tokens: "tokens"}] and is_new, "no new keys")
        else:
            self.check_points(n, numbers)

    def check_assignment(self, n):
        """Check an assignment of slots: every choice of a token has one of its own."""
        need(not {"slots", "using"} & n.attrs.keys(), "a choice that may have no slot")
        need(self.tokens in names_of(n, "tokens"), "slots of no tokens")
        self.choices[n.results[0]] = self.numbers["step"][n.operands[0]]

    def check_slots(self, n, kinds):
        """Check a node that brings tokens to the rows of their choices, or back."""
        _, choices, slots, *_ = n.operands
        need(self.choices.get(slots) == self.numbers["step"][choices], "slots of other choices")
        need(not self.choices.keys() & {*n.operands[:2], *n.operands[3:]}, "slots as numbers")
        rows = dict.fromkeys(ROWS, f"rows {self.numbers['step'][slots]}")
        tokens = {self.tokens: "tokens"}
        is_there = n.op in ("dispatch", "dispatch_gates")
        need(is_there or n.op in ("combine", "combine_weighted"), "slots as numbers")
        need(kinds == [tokens if is_there else rows, *[tokens] * (len(kinds) - 1)], "no rows")
        result = self.kinds("step", n.results[0])
        need(result == (rows if is_there else tokens), "no rows of slots")

    def check_points(self, n, numbers):
        """Check a node that is a function of its operands at their points, whatever they are."""
        states = [self.hidden.get(x) for x in n.operands]
        is_read = self.may_read(n, states)
        leaves, terms = {}, []
        for side, m in zip(SIDES, (self.first[numbers[0]][1], n), strict=True):
            xs = [self.operand(side, x, y, is_read, leaves)
                  for x, y in zip(m.operands, n.operands, strict=True)]  # fmt: skip
            rows = [list(self.axes(side, x, is_read).values()) for x in m.results]
            results = self.results(m, xs, rows)
            for row, x in zip(rows, results, strict=True):
                need({*x.body.vars} <= {*row}, "an element of indices that are no axes")
            terms.append([self.at_points(x.body, leaves) for x in results])
        for at, (name, x, y, result) in enumerate(zip(n.results, *terms, results, strict=True)):
            need(x == y, f"{name}: two different terms")
            self.finite[name] = result.finite
            if {self.tokens, self.keys} <= self.kinds("step", name).keys():
                self.hidden[name] = self.hidden_of(n, at, states, is_read)

    def may_read(self, n, states):
        """Return whether a node reads all keys, those that come after a token being hidden."""
        if self.keys not in names_of(n, READERS.get(n.op)):
            return False
        if n.op == "delta_rule":
            return states[-1] == "zero"  # a key that is not seen writes nothing
        return "zero" in states if n.op == "contract" else states == ["infinite"]

    def hidden_of(self, n, at, states, is_read):
        """Return what a result, by its number, holds of keys after the token: None for anything."""
        if n.op == "causal":
            operands = [self.numbers["step"][x] for x in n.operands]
            return "zero" if operands == self.positions else None
        if n.op == "mask":
            is_hidden = n.attrs.get("fill", "-inf") == "-inf"
            is_hidden = is_hidden and (states[1] == "zero" or states[0] == "infinite")
            return "infinite" if is_hidden else None
        if is_read:
            return "zero"  # as only a softmax of all keys has such results
        if n.op == "cast":
            return "zero" if states == ["zero"] else None  # 0 is a number of every type
        values = {"zero": self.a.value(0), "infinite": self.a.scope["head"]("hidden")(), None: None}
        xs = [self.operand("step", x, x, False, {}, values[s])
              for x, s in zip(n.operands, states, strict=True)]  # fmt: skip
        rows = [list(self.axes("step", x, False).values()) for x in n.results]
        element = self.a.value(self.results(n, xs, rows)[at].body)
        return next((s for s in ("zero", "infinite") if element == self.a.value(values[s])), None)

    def add_cache(self, n, step, caches):
        """Take keys before `start`, and the new ones from there on, for all keys before the end."""
        cache, new, start = n.operands
        uses = [x for m in step.lines for x in m.operands if x == cache]
        need(len(uses) == 1, "two uses of a cache")
        is_there = start == "%start" and start in step.inputs and n.attrs["axis"] == self.keys
        need(is_there, "no keys from the start on")
        (result,), types = n.results, self.types["step"]
        kinds = [self.kinds("step", x) for x in (new, result)]
        need(kinds == [{self.keys: "new keys"}, {self.keys: "keys"}], "no new keys")
        need(types[cache] == types[result], "a cache of two types")
        self.numbers["step"][result] = self.numbers["step"][new]
        caches[cache[1:]] = result
