"""Lints: what a published design guide advises against, with the section that says so.

A lint is no error, and no warning either: it may be just what an experiment is about.  ``moecc
lint`` shows them, and ``--warnings error`` makes them one.
"""

from __future__ import annotations

from moecc.errors import Problem

PAPER = "ST-MoE"
"""Designing Effective Sparse Expert Models (Zoph et al. 2022), whose sections are cited."""

MOST_EXPERTS = 256
"""Beyond this many, more experts hardly help (section 5.1)."""

BALANCE, ROUTER_Z = 1e-2, 1e-3
"""The coefficients of the balance loss (appendix A) and of the router z-loss (section 3.3)."""


def advice(
    what: str, place: str | None, section: str, *, expected: str | None = None, found: object = None
) -> Problem:
    """Return a lint; `section` is the place in the paper, "section 5.1" or "appendix A"."""
    said = None if found is None else f"{found:g}" if isinstance(found, float) else str(found)
    return Problem(what, place, expected, said, f"{PAPER}, {section}")


def too_many_experts(experts: int, place: str) -> list[Problem]:
    """Return a lint if there are more experts than help."""
    if experts <= MOST_EXPERTS:
        return []
    return [advice("more experts than help", place, "section 5.1",
                   expected=f"at most {MOST_EXPERTS}", found=experts)]  # fmt: skip


def too_much_capacity(factor: float | None, experts: int, place: str) -> list[Problem]:
    """Return a lint if an expert has more slots than there are tokens."""
    if factor is None or factor <= experts:
        return []
    return [advice("an expert has more slots than there are tokens", place, "section 2",
                   expected=f"at most {experts}, the number of experts", found=factor)]  # fmt: skip


def coefficient(value: float, usual: float, what: str, place: str, section: str) -> list[Problem]:
    """Return a lint if a coefficient is 0, or a hundred times off the paper's."""
    if value == 0:
        return [advice(f"{what} is off", place, section, expected=f"{usual:g}", found=0)]
    if usual / 100 < value < usual * 100:
        return []
    return [advice(f"{what} is a hundred times off", place, section,
                   expected=f"{usual:g}", found=value)]  # fmt: skip
