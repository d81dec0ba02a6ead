"""The independent checker accepts proofs of the matrix, and no log or graph with a fault."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import moecc_check
import pytest
from tiers import few

from moecc.ir.text import parse, print_graph
from moecc.prove import prove

from ..oracle.test_matrix import proved  # noqa: TID252
from . import mutants
from .cases import cases, failures
from .corruptions import FAULTS, Proof, corrupted, is_accepted, proof_of
from .devices import misjudged_on_devices
from .logs import misjudged
from .mutants import GRAPHS, STEPS, TABLE, TERMS, Mutant, checker_of, is_alive, of_table
from .parts import misjudged_parts
from .steps import misjudged_steps

UPCYCLED = ("run", "llama_gqa", "upcycle{experts=4}")
OF_A_STEP = ("step", "mixtral_gqa", "")
ON_A_MESH = (
    "run",
    "llama_gqa",
    "annotate-sharding{mesh=data:2,model:2 rules=tensor-parallel},lower-collectives",
)


@cache
def _proof(job: tuple[str, ...]) -> Proof:
    proof = proof_of(*job)
    assert proof is not None
    return proof


@cache
def _rebuilt() -> ModuleType:
    """Return the checker as its mutants are built, with nothing changed."""
    return checker_of(Mutant("nothing", frozenset(), "", ""))


ENTRIES = moecc_check.read_table()


def test_every_lemma_is_true_where_its_conditions_hold_and_else_refused() -> None:
    assert not [*failures(moecc_check, ENTRIES)]


def test_every_lemma_of_the_table_has_uses_of_both_kinds() -> None:
    lemmas = {name for kind, name in ENTRIES[0] if kind == "lemma"}
    assert {c.lemma for c in cases() if c.holds} == lemmas
    without_conditions = {"parentheses", "name"}  # of any term with these heads
    assert {c.lemma for c in cases() if not c.holds} == lemmas - without_conditions


def test_logs_by_hand_are_told_apart() -> None:
    assert not [*misjudged(_rebuilt())]


@pytest.mark.parametrize("head", ["equal", "maximum"])
def test_arguments_of_symmetric_heads_have_one_order_whatever_is_bound(head: str) -> None:
    a = moecc_check.Algebra(*ENTRIES)
    source, sigma = moecc_check.Head(a, "source", ("w", "f32")), a.scope["Σ"]
    older, free, newer = a.fresh(4), a.fresh(4), a.fresh(4)

    def total(v: Any) -> Any:
        factor = (
            a.scope["equal"](v - free)
            if head == "equal"
            else a.scope[head](source(free), source(v))
        )
        return sigma([v], factor, source(v))

    assert total(older) == total(newer)


def test_tied_factors_stay_in_order_when_a_lemma_renames_them() -> None:
    a = moecc_check.Algebra(*ENTRIES)
    source = moecc_check.Head(a, "source", ("x", "f32"))
    product = a.multiply(source(a.fresh("S")), source(a.fresh("S")))
    renamed = moecc_check.Term(product.node, tuple(map(a.fresh, product.node.sizes)))
    assert a.multiply(renamed) == renamed


def test_graphs_on_a_mesh_are_told_apart() -> None:
    assert not [*misjudged_on_devices(_rebuilt())]


def test_micro_batches_and_frozen_parameters_are_told_apart() -> None:
    assert not [*misjudged_parts(_rebuilt())]


def test_steps_of_generation_are_told_apart() -> None:
    assert not [*misjudged_steps(_rebuilt())]


def test_the_checker_itself_passes_for_no_mutant(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds to judge it by is left to the tests above."""
    for slow in ("misjudged_on_devices", "misjudged_parts", "misjudged_steps"):
        monkeypatch.setattr(mutants, slow, lambda checker: ())
    for part in (TABLE, TERMS, GRAPHS, STEPS):
        for lemmas in (frozenset(["range"]), frozenset[str]()):
            nothing = Mutant("nothing", lemmas, part, "")
            assert is_alive(nothing._replace(text=nothing._replace(part="").text_of(part)))


@cache
def _mutants() -> list[Mutant]:
    return random.Random(5).sample([*of_table()], 20)


@pytest.mark.parametrize("number", few(map(pytest.param, range(20)), 8))
def test_mutants_of_lemmas_are_told_apart(number: int) -> None:
    mutant = _mutants()[number]
    assert not is_alive(mutant), mutant.change


@pytest.mark.parametrize(
    "job",
    [
        UPCYCLED,
        ("run", "llama_gqa", "roll-layers"),
        ("run", "modernbert_windows", "upcycle{experts=4}"),
        ("run", "deepseek_v2_groups", "canonicalize"),
        ("run", "bert_square", "upcycle{experts=4 granularity=4 top-k=4 router-std=1}"),
        ON_A_MESH,
        (
            "run",
            "bert_gelu",
            "upcycle{experts=4 routing=expert-choice capacity-factor=2 groups=4},add-losses ; "
            "annotate-sharding{mesh=data:2,expert:2 rules=expert-parallel},lower-collectives,"
            "roll-layers",
        ),
        (
            "run",
            "switch_half",
            "annotate-sharding{mesh=data:2,fsdp:2 rules=data-parallel,fsdp},lower-collectives,"
            "roll-layers",
        ),
    ],
)
def test_a_proof_of_the_matrix_is_accepted(job: tuple[str, ...]) -> None:
    assert is_accepted(moecc_check, _proof(job))


@pytest.mark.parametrize(("source", "target", "method"), proved("cell"))
def test_the_proof_of_a_cell_is_accepted(source: str, target: str, method: str) -> None:
    assert proof_of("cell", source, target, method) is not None


ALTERED = (UPCYCLED, OF_A_STEP, ("part", "mixtral_gqa", ""), ON_A_MESH)


@pytest.mark.parametrize("job", few(map(pytest.param, ALTERED)))
def test_no_fault_is_accepted(job: tuple[str, ...]) -> None:
    chance, kinds = random.Random(7), Counter[str]()
    while len(kinds) < (2 if job == OF_A_STEP else len(FAULTS) - 1) or kinds.total() < 20:
        kind, proof = corrupted(_proof(job), chance)
        kinds[kind] += 1
        assert not is_accepted(moecc_check, proof), kind


def test_a_file_that_is_not_json_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (log := tmp_path / "log.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["moecc-check", str(log), str(log), str(log)])
    assert moecc_check.main() == 1
    assert capsys.readouterr().out.startswith(f"rejected: {log} is not JSON: ")


def test_what_a_prover_without_a_condition_proves_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moecc.prove import lemmas, rules

    text = """moecc 1
graph g {{
  input %x : f32[batch=B, embed=8]
  %y = {} : f32[batch=B, embed=8]
  %z = softmax %y {{axis=embed}} : f32[batch=B, embed=8]
  output z = %z
}}
"""
    before, after = (parse(text.format(f"scale %x {{by={n}}}")) for n in ("2.0", "3.0"))
    lemma = next(e for e in rules.APPLICATIONS["share"] if e.name == "equal shares")

    def without_condition(algebra, application):  # type: ignore[no-untyped-def]
        return lemmas.inverse_size(algebra, application.abstractions[0].variables[0])

    object.__setattr__(lemma, "apply", without_condition)
    try:
        verdict = prove(before, after)
    finally:
        object.__setattr__(lemma, "apply", lemmas.equal_shares)
    assert verdict.status == "proved"
    with pytest.raises(moecc_check.Rejected, match="equal shares"):
        moecc_check.accepted(verdict.log, print_graph(before), print_graph(after))


@pytest.mark.parametrize("op", ["div %x, %z", "log %z", "rsqrt %z"])
def test_no_number_is_finite_outside_of_the_domain_of_its_operation(op: str) -> None:
    """The quotient by 0 less itself is no 0: what is right of 2 is not of 0."""
    axes = "batch=B" if op.startswith("div") else ""
    head, end = "moecc 1\ngraph g {\n  input %x : f32[batch=B]\n", "}\n"
    before = f"{head}  output y = %x\n{end}"

    def after(number: float) -> str:
        return (
            f"{head}  %z = constant {{value={number}}} : f32[]\n  %q = {op} : f32[{axes}]\n"
            f"  %w = sub %q, %q : f32[{axes}]\n  %r = add %x, %w : f32[batch=B]\n"
            f"  output y = %r\n{end}"
        )

    verdict = prove(parse(before), parse(after(2.0)))
    assert is_accepted(moecc_check, (verdict.log, before, after(2.0)))
    of_zero = verdict.log | {"after": sha256(after(0.0).encode()).hexdigest()}
    assert not is_accepted(moecc_check, (of_zero, before, after(0.0)))
    assert prove(parse(before), parse(after(0.0)), refute=False).status == "unknown"


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2), (["a", "b"], 2)])
def test_the_command_says_how_it_is_used(
    words: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["moecc-check", *words])
    assert moecc_check.main() == code
    streams = capsys.readouterr()
    assert "moecc-check PROOF BEFORE.moe AFTER.moe" in (streams.err if code else streams.out)
