"""Proofs that two graphs are the same function."""

from moecc.prove.evidence import evidence as evidence
from moecc.prove.prover import Prover as Prover
from moecc.prove.prover import Verdict as Verdict
from moecc.prove.prover import prove as prove
