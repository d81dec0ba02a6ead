"""Proofs that two graphs are the same function."""

# Lemmas are registered where they are defined, in the order in which they are tried.
from moecc.prove import lemmas as lemmas  # isort: skip
from moecc.prove import sums as sums  # isort: skip
from moecc.prove import shards as shards  # isort: skip
from moecc.prove.prover import Prover as Prover
from moecc.prove.prover import Verdict as Verdict
from moecc.prove.prover import evidence as evidence
from moecc.prove.prover import prove as prove
