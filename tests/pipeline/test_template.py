"""Pipeline templates: passes under one name, with their options forwarded by declaration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import pytest

from moecc.errors import InputError, Problem, UsageError
from moecc.ir import parse
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Preserves, options
from moecc.rewrite.pattern import NearMiss
from moecc.rewrite.pipeline import (
    Pipeline,
    PipelineTemplate,
    TemplateOption,
    TemplateStep,
    installed,
)
from moecc.rewrite.runner import run_pipeline

from .samples import REGISTRY


@dataclass(frozen=True)
class NotePass(Pass):
    """Write words into the graph's attributes."""

    name: ClassVar[str] = "note"
    summary: ClassVar[str] = "write words"

    word: Annotated[str, "what is written"]
    times: Annotated[int, "how often"] = 1
    kind: Annotated[Literal["exact", "approximate"], "the promise"] = "exact"

    @property
    def preserves(self):
        """As the option says."""
        return Preserves("approximate", self.word) if self.kind == "approximate" else EXACT

    def validate(self):
        """Refuse to write nothing."""
        return [Problem("too few", "times", found=str(self.times))] if self.times < 1 else []

    def warnings(self):
        """Warn of many."""
        return [Problem("many", "times")] if self.times > 5 else []

    def apply(self, graph, ctx):
        """Write."""
        graph.attrs["notes"] = [*graph.attrs.get("notes", []), *[self.word] * self.times]
        return PassResult(True, self.times, {"words": self.times, self.word: 1})


@dataclass(frozen=True)
class PickyPass(Pass):
    """Match only where asked to."""

    name: ClassVar[str] = "picky"
    summary: ClassVar[str] = "match where asked"
    must_match: ClassVar[bool] = True
    preserves = EXACT

    found: bool = True

    def apply(self, graph, ctx):
        """Match or miss."""
        misses = [] if self.found else [NearMiss("picky", "here", "was told so")]
        return PassResult(self.found, int(self.found), near_misses=misses)


def _not_both(item):
    if item.word == "both":
        yield Problem("not both", "word")


TWICE = PipelineTemplate(
    name="note-twice",
    summary="write two words",
    options=(
        TemplateOption("times", 2),
        TemplateOption("word", doc="the first word"),
        TemplateOption("second", True, "whether another follows", bool),
        TemplateOption("kind"),
    ),
    steps=(
        TemplateStep(NotePass, ("word", "times")),
        TemplateStep(NotePass, ("kind",), {"word": "end"}, when="second", statistics=("end",)),
    ),
    check=_not_both,
)


def registry(*templates):
    made = {t.name: (lambda t=t: t) for t in templates}
    return REGISTRY.extended(made, "the tests")


def graph():
    return parse("moecc 1\ngraph g {\n input %x : f32[a=2]\n output y = %x\n}\n")


def run(text, template=TWICE, **context):
    made = graph()
    pipeline = Pipeline.parse(text, registry(template))
    return made, run_pipeline(made, pipeline, context=Context(**context))


def test_options_come_from_the_passes_unless_the_template_says_otherwise():
    found = options(registry(TWICE).get("note-twice"))
    assert list(found) == ["times", "word", "second", "kind"]
    assert (found["times"].default, found["times"].doc) == (2, "how often")
    assert found["word"].required
    assert (found["word"].type, found["word"].doc) == (str, "the first word")
    assert found["kind"].type == Literal["exact", "approximate"]
    assert found["kind"].default == "exact"


def test_it_runs_its_passes_in_order():
    made, report = run("note-twice{word=a}")
    assert made.attrs["notes"] == ["a", "a", "end"]
    (one,) = report.runs
    assert one.result.matched == 2
    assert one.result.stats == {"words": 2, "a": 1, "end": 1}


def test_both_spellings_are_one_and_print_as_one():
    texts = (
        "@note-twice{word=a times=3}",
        "note-twice{word=a times=3}",
        " @note-twice{times=3 word=a}",
    )
    made = [Pipeline.parse(text, registry(TWICE)) for text in texts]
    assert made[0] == made[1] == made[2]
    assert str(made[0]) == "note-twice{times=3 word=a}"


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_must_match_ends_the_run(first):
    note = TemplateStep(NotePass, fixed={"word": "a"})
    picky = TemplateStep(PickyPass, ("found",))
    steps = (picky, note) if first else (note, picky)
    template = PipelineTemplate("both", "two", steps, (TemplateOption("found"),))
    with pytest.raises(InputError, match="both: matched nothing, but must match") as caught:
        run("both{found=false}", template)
    assert "here: was told so" in str(caught.value)
    made, report = run("both{found=false}", template, allow_unmatched=True)
    assert report.changed is not first
    assert made.attrs.get("notes", []) == ([] if first else ["a"])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"steps": ()}, "it has no step"),
        ({"steps": (TemplateStep(NotePass, ("wrd",), {"word": "a"}),)}, "note has no option 'wrd'"),
        ({"steps": (TemplateStep(NotePass, ("times",)),)}, "note needs the option 'word'"),
        (
            {"steps": (TemplateStep(NotePass, ("word",), {"word": "a"}),)},
            "the option 'word' of note is forwarded and fixed",
        ),
        ({"options": TWICE.options[1:]}, "it forwards 'times' to note, but does not offer it"),
        (
            {"options": (*TWICE.options[:2], TWICE.options[3])},
            "note is enabled by the option 'second', which it does not offer",
        ),
        ({"options": (*TWICE.options, TemplateOption("more", 1, type=int))}, "no step takes its"),
        ({"name": "Two"}, "'Two' is not in kebab-case"),
    ],
)
def test_a_faulty_declaration_is_refused_with_its_fault(changes, fault):
    faulty = replace(TWICE, **changes)
    with pytest.raises(UsageError) as caught:
        registry(faulty).get(faulty.name)
    assert fault in str(caught.value)
    assert "the tests, " in str(caught.value)


OWN = """
from moecc_passes.cleanup import DcePass
from moecc_passes.st_moe import ST_MOE
from moecc.rewrite.pipeline import PipelineTemplate, TemplateStep

ONCE = TemplateStep(DcePass)
CLEAN = PipelineTemplate("clean", "remove what is dead, twice", (ONCE, ONCE))
assert ST_MOE.steps
"""


def test_a_file_of_ones_own_may_hold_templates(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN, encoding="utf-8")
    found = installed().with_file(path)
    assert set(found.names()) - set(installed().names()) == {"clean"}
    (item,) = Pipeline.parse("@clean", found)
    assert item.preserves == EXACT
    assert found.get("clean").__doc__ == "Remove what is dead, twice."


def test_options_reach_the_passes_that_they_name():
    """Whatever a step forwards has in the step's pass the value that the template was given."""
    from moecc_passes.st_moe import ST_MOE

    item = ST_MOE(experts=4, threshold=0.5, z_coef=0.25, mode="eval")
    for step, made in item.parts:
        assert all(getattr(made, name) == getattr(item, name) for name in step.forward)
    assert [made.name for _, made in item.parts] == [
        "upcycle", "record-modes", "specialize", "add-losses"
    ]  # fmt: skip
    assert [m.name for _, m in ST_MOE(losses=False).parts] == ["upcycle", "record-modes"]
