"""Rewriting: patterns, the matcher and its near misses, the driver."""

from moecc.rewrite.driver import RewriteLimitError as RewriteLimitError
from moecc.rewrite.driver import RewriteResult as RewriteResult
from moecc.rewrite.driver import RuleStats as RuleStats
from moecc.rewrite.driver import find as find
from moecc.rewrite.driver import may_rewrite as may_rewrite
from moecc.rewrite.driver import rewrite as rewrite
from moecc.rewrite.match import Match as Match
from moecc.rewrite.match import Misses as Misses
from moecc.rewrite.match import NearMiss as NearMiss
from moecc.rewrite.match import fits as fits
from moecc.rewrite.match import match as match
from moecc.rewrite.pattern import P as P
from moecc.rewrite.pattern import Pattern as Pattern
from moecc.rewrite.rule import PreservesKind as PreservesKind
from moecc.rewrite.rule import Rule as Rule
