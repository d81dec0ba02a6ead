"""Draw mutants of the packages and judge each by the tests that run the changed line.

``python -m tests.mutants.drawn draw --count 300 --seed 29 > build/mutants.jsonl`` writes a mutant
a line.  ``record build/coverage`` runs the suite once and writes which test runs which line; it
needs the package ``coverage``.  ``judge build/mutants.jsonl build/coverage --copy build/copy >
build/verdicts.jsonl`` changes one place at a time in a copy of the checkout, runs the tests that
reach it, the narrowest first, and writes who failed.  ``--again FILE`` takes an earlier answer: a
mutant whose killer still fails is not judged anew.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PHASE = re.compile(r" \((setup|call|teardown)\)$")
"""What the variable PYTEST_CURRENT_TEST has behind the name of a test."""
PACKAGES = ("moecc", "passes/moecc_passes", "backends/moecc_backends")
SECONDS_OF_TESTS = 25.0
"""Tests of this many seconds, as recorded, are tried before a mutant counts as surviving."""

COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[tuple[str, ast.expr, Any]]:
    """Yield every mutation at `node`: operator, the expression that it replaces, the new one."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        flipped = ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
        yield "comparison", node, flipped
    if isinstance(node, ast.BoolOp):
        swapped = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and-or", node, ast.BoolOp(swapped, node.values)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _has_text(node):
        yield "arithmetic", node, ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "constant", node, ast.Constant(not node.value)
        elif _is_number(node):
            yield "off by one", node, ast.Constant(node.value + 1)
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "negated", node.test, ast.UnaryOp(ast.Not(), node.test)
    if isinstance(node, ast.comprehension) and node.ifs:
        yield "negated", node.ifs[0], ast.UnaryOp(ast.Not(), node.ifs[0])
    if isinstance(node, ast.Return) and getattr(node.value, "value", node.value) is not None:
        assert node.value is not None
        yield "return None", node.value, ast.Constant(None)
    if isinstance(node, ast.Call) and len(node.args) + len(node.keywords) > 1:
        if node.keywords:
            yield "dropped", node, ast.Call(node.func, node.args, node.keywords[:-1])
        else:
            yield "dropped", node, ast.Call(node.func, node.args[:-1], [])


def _is_number(node: ast.AST) -> bool:
    value = getattr(node, "value", None)
    return isinstance(node, ast.Constant) and type(value) in (int, float)


def _has_text(node: ast.BinOp) -> bool:
    parts = (part for part in (node.left, node.right) if isinstance(part, ast.Constant))
    return any(not _is_number(part) for part in parts)


def walk(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Yield each node with the function that it is in; messages and annotations are left out."""
    for name, field in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in field if isinstance(field, list) else [field]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert):
                continue
            inner = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{function}.{child.name}".lstrip(".")
            yield child, inner
            yield from walk(child, inner)


def draw(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield mutants, the operators in turn; `nth` counts equal texts in a function."""
    sites = collections.defaultdict(list)
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        text = path.read_text()
        nth = collections.Counter()
        for node, function in walk(ast.parse(text)):
            for operator, old, new in changes(node):
                site = (operator, function, ast.unparse(old))
                new = ast.unparse(ast.fix_missing_locations(copy.deepcopy(new)))
                sites[operator].append(
                    {"file": str(path.relative_to(ROOT)), "operator": operator,
                     "function": function, "old": site[2], "new": new, "nth": nth[site]}
                )  # fmt: skip
                nth[site] += 1
    rng = random.Random(seed)
    for operators in sites.values():
        rng.shuffle(operators)
    for index in range(count):
        yield sites[sorted(sites)[index % len(sites)]].pop()


def mutate(text: str, mutant: dict[str, Any]) -> tuple[str, range] | None:
    """Return the changed text and the lines of the change, or None where the code has gone."""
    nth = 0
    for node, function in walk(ast.parse(text)):
        for operator, old, _ in changes(node):
            if (operator, function, ast.unparse(old)) != (
                mutant["operator"], mutant["function"], mutant["old"]
            ):  # fmt: skip
                continue
            if nth == mutant["nth"]:
                lines = text.encode().splitlines(keepends=True)
                head = b"".join(lines[: old.lineno - 1])
                head += lines[old.lineno - 1][: old.col_offset]
                tail = lines[old.end_lineno - 1][old.end_col_offset :]
                tail += b"".join(lines[old.end_lineno :])
                changed = head + b"(" + mutant["new"].encode() + b")" + tail
                return changed.decode(), range(old.lineno, old.end_lineno + 1)
            nth += 1
    return None


class Recorder:
    """The plug-in of pytest that tells coverage which test runs, and how much time each takes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logstart(self, nodeid: str):
        import coverage

        if (current := coverage.Coverage.current()) is not None:
            current.switch_context(nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item) -> Iterator[None]:
        before = sum(os.times()[:4])
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = sum(os.times()[:4]) - before

    def pytest_sessionfinish(self):
        import coverage

        if (current := coverage.Coverage.current()) is not None:
            current.stop()
            current.save()
        path = self.folder / f"seconds-{os.getpid()}.json"
        path.write_text(json.dumps(self.seconds))


def pytest_configure(config):
    """Register the recorder, also in the workers of xdist."""
    config.pluginmanager.register(Recorder(Path(os.environ["MOECC_COVERAGE"])))


def record(folder: Path, arguments: list[str]):
    """Run the suite under coverage, child processes too."""
    shutil.rmtree(folder, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / "sources" / package)
    (folder / "root").write_text(str(ROOT))
    settings = folder / "coveragerc"
    sources = ", ".join(str(ROOT / package) for package in PACKAGES)
    settings.write_text(
        f"[run]\nsource = {sources}\nparallel = true\ndata_file = {folder.resolve()}/data\n"
        "context = ${PYTEST_CURRENT_TEST-}\ndisable_warnings = no-data-collected, "
        "module-not-imported, no-ctracer, module-not-measured, already-imported\n"
    )
    env = dict(os.environ, MOECC_COVERAGE=str(folder.resolve()))
    env["COVERAGE_PROCESS_START"] = str(settings.resolve())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.mutants.drawn"]
    subprocess.run([*command, "-m", "not slow", *arguments], cwd=ROOT, env=env, check=False)


class Coverage:
    """Which tests run a line, as `record` wrote it."""

    def __init__(self, folder: Path):
        from coverage.numbits import numbits_to_nums

        root = Path((folder / "root").read_text())
        self.tests: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
        self.by_file: dict[str, set[str]] = collections.defaultdict(set)
        self.breadth: collections.Counter[str] = collections.Counter()
        self.seconds: collections.Counter[str] = collections.Counter()
        for path in folder.glob("seconds-*.json"):
            for test, seconds in json.loads(path.read_text()).items():
                self.seconds[test] = max(self.seconds[test], seconds)
        query = (
            "select file.path, context.context, numbits from line_bits"
            " join file on file.id = file_id join context on context.id = context_id"
        )
        for data in folder.glob("data.*"):
            connection = sqlite3.connect(data)
            for path, context, bits in connection.execute(query):
                test = PHASE.sub("", context)
                if test not in self.seconds or not Path(path).is_relative_to(root):
                    continue
                name = sys.intern(str(Path(path).relative_to(root)))
                lines = numbits_to_nums(bits)
                self.breadth[test] += len(lines)
                self.by_file[name].add(test)
                for line in lines:
                    self.tests[name, line].add(test)
            connection.close()

    def choose(self, file: str, lines: range, is_in_function: bool) -> list[str]:
        """Return the tests to try, one of each function first, the narrowest first."""
        tests = set[str]().union(*(self.tests.get((file, line), ()) for line in lines))
        if not is_in_function:
            tests = self.by_file.get(file, set())
        variants = collections.Counter()
        ordered = []
        for test in sorted(tests, key=lambda t: (self.breadth[t] * (0.2 + self.seconds[t]), t)):
            function = test.split("[")[0]
            ordered.append((variants[function], len(ordered), test))
            variants[function] += 1
        budget, chosen = SECONDS_OF_TESTS, []
        for _, _, test in sorted(ordered):
            if budget > 0 and variants:
                chosen.append(test)
                budget -= self.seconds[test] + 0.02
        return chosen


def run_tests(copied: Path, tests: list[str], limit: float) -> tuple[bool, str]:
    """Return whether a test fails in a copy, and which one; a process forked here runs them."""
    output = copied / "output.txt"
    process = os.fork()
    if process == 0:
        os.setsid()
        descriptor = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for number in (1, 2):
            os.dup2(descriptor, number)
        os.chdir(copied)
        # Seconds of the processor: what the clock says hangs on who else is at work.
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        sys.argv = ["pytest"]
        arguments = ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
        os._exit(int(pytest.main([*arguments, *tests])))
    end = time.monotonic() + 10 * limit
    while (status := os.waitpid(process, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.05)
    if status[0] == 0:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return True, "time"
    text = output.read_text(errors="replace")
    failures = [
        line.partition(" ")[2].split(" - ")[0]
        for line in text.splitlines()
        if line.startswith(("FAILED ", "ERROR "))
    ]
    code = os.waitstatus_to_exitcode(status[1])
    if unknown := re.findall(r"^ERROR: not found: \S*/(tests/\S+)$", text, re.MULTILINE):
        # Its parameters are called otherwise by now.
        raise LookupError(unknown[0])
    if code > 0 and not failures:
        raise RuntimeError(f"pytest ends with {code}: {text[-800:]}")
    return code != 0, (failures or ["time"])[0]


def _is_there(copied: Path, test: str) -> bool:
    file, _, name = test.partition("[")[0].partition("::")
    path = copied / file
    return path.exists() and f"def {name.split('::')[-1]}(" in path.read_text()


def judge(mutants: list[dict[str, Any]], folder: Path, copied: Path,
          earlier: dict[str, str], part: str) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield each mutant with its killer, or None."""
    coverage = Coverage(folder)
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    shutil.rmtree(copied, ignore_errors=True)
    for file in files.split():
        (copied / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copied / file)
    (copied / "build").mkdir(exist_ok=True)
    paths = [str(copied / parent) for parent in ("", "passes", "backends")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.path[:0] = paths
    # Not hypothesis, whose plug-in pytest rewrites as it imports it.
    for module in ("pytest", "numpy", "jax", "jax.numpy"):
        __import__(module)
    unfit = set()
    fit = set()
    index, total = map(int, part.split("/"))
    for number, mutant in enumerate(mutants):
        if number % total != index:
            continue
        path = copied / mutant["file"]
        text = path.read_text() if path.exists() else ""
        change = mutate(text, mutant)
        recorded = folder / "sources" / mutant["file"]
        original = mutate(recorded.read_text(), mutant) if recorded.exists() else None
        if change is None or original is None:
            yield {**mutant, "killer": "gone"}
            continue
        in_function = mutant["function"].split(".")[-1].lstrip("_")[:1].islower()
        tests = coverage.choose(mutant["file"], original[1], in_function)
        tests = [test for test in tests if _is_there(copied, test)]
        key = json.dumps({k: mutant[k] for k in sorted(mutant)})
        if earlier.get(key) in tests:
            tests.insert(0, tests.pop(tests.index(earlier[key])))
        killer, trial = None, 0
        while candidates := [test for test in tests if test not in unfit]:
            path.write_text(change[0])
            # Bytecode is known by time and size.
            stamp = 1_700_000_000 + 100 * number + trial
            os.utime(path, (stamp, stamp))
            seconds = sum(coverage.seconds[test] for test in candidates)
            try:
                failed, killer = run_tests(copied, candidates, 60 + 4 * seconds)
            except LookupError as error:
                unfit.update(test for test in tests if test.split("[")[0] == error.args[0])
                continue
            finally:
                path.write_text(text)
                os.utime(path, (stamp + 50, stamp + 50))
            if not failed:
                killer = None
            # A test that fails in the copy without any change judges nothing.
            if killer is None or killer == "time" or killer in fit:
                break
            if run_tests(copied, [killer], 120)[0]:
                unfit.add(killer)
                trial += 1
            else:
                fit.add(killer)
                break
        else:
            killer = None
        yield {**mutant, "killer": killer, "tests": len(tests)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("--count", type=int, default=300)
    drawing.add_argument("--seed", type=int, default=29)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("arguments", nargs="*", default=["-n", "2", "--dist", "worksteal"])
    judging = commands.add_parser("judge")
    judging.add_argument("mutants", type=Path)
    judging.add_argument("folder", type=Path)
    judging.add_argument("--copy", type=Path, required=True)
    judging.add_argument("--again", type=Path)
    judging.add_argument("--part", default="0/1")
    options = parser.parse_args()
    if options.command == "draw":
        for mutant in draw(options.count, options.seed):
            print(json.dumps(mutant))
    elif options.command == "record":
        record(options.folder, options.arguments)
    else:
        lines = options.mutants.read_text().splitlines()
        mutants = [json.loads(line) for line in lines]
        earlier = {}
        if options.again is not None:
            for verdict in map(json.loads, options.again.read_text().splitlines()):
                killer = verdict.pop("killer")
                verdict.pop("tests", None)
                earlier[json.dumps({k: verdict[k] for k in sorted(verdict)})] = killer
        copied = options.copy.resolve()
        for verdict in judge(mutants, options.folder, copied, earlier, options.part):
            print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
