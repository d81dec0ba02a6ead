"""Rewriting: patterns, the matcher and its near misses, the driver."""

from moecc.rewrite.driver import RewriteLimitError as RewriteLimitError
from moecc.rewrite.driver import RewriteResult as RewriteResult
from moecc.rewrite.driver import RuleStats as RuleStats
from moecc.rewrite.driver import find as find
from moecc.rewrite.driver import may_rewrite as may_rewrite
from moecc.rewrite.driver import rewrite as rewrite
from moecc.rewrite.pattern import Match as Match
from moecc.rewrite.pattern import Misses as Misses
from moecc.rewrite.pattern import NearMiss as NearMiss
from moecc.rewrite.pattern import P as P
from moecc.rewrite.pattern import Pattern as Pattern
from moecc.rewrite.pattern import PreservesKind as PreservesKind
from moecc.rewrite.pattern import Rule as Rule
from moecc.rewrite.pattern import fits as fits
from moecc.rewrite.pattern import match as match
