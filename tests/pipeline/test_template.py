"""Pipeline templates: passes under one name, with their options forwarded by declaration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest

from moecc.errors import InputError, UsageError
from moecc.ir import parse
from moecc.model.open import open_model
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Preserves, options
from moecc.rewrite.pipeline import (
    Pipeline,
    PipelineTemplate,
    TemplateOption,
    TemplateStep,
    installed,
)
from moecc.rewrite.runner import run_pipeline

from .samples import REGISTRY, BadPass


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

    def apply(self, graph, ctx):
        """Write."""
        graph.attrs["notes"] = [*graph.attrs.get("notes", []), *[self.word] * self.times]
        return PassResult(True, self.times, {"words": self.times, self.word: 1})


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
)


def registry(template=TWICE):
    return REGISTRY.extended({template.name: lambda: template}, "the tests")


def run(text, template=TWICE, **context):
    graph = parse("moecc 1\ngraph g {\n input %x : f32[a=2]\n output y = %x\n}\n")
    pipeline = Pipeline.parse(text, registry(template))
    return graph, run_pipeline(graph, pipeline, context=Context(**context))


def test_options_come_from_the_passes_unless_the_template_says_otherwise():
    offered = options(registry().get("note-twice"))
    assert list(offered) == ["times", "word", "second", "kind"]
    times, word, _, kind = offered.values()
    assert (times.default, times.doc) == (2, "how often")
    assert word.required
    assert (word.type, word.doc) == (str, "the first word")
    assert (kind.type, kind.default) == (Literal["exact", "approximate"], "exact")


def test_it_runs_its_passes_in_order():
    graph, report = run("note-twice{word=a}")
    assert graph.attrs["notes"] == ["a", "a", "end"]
    (template_run,) = report.runs
    assert template_run.result.matched == 2
    assert template_run.result.stats == {"words": 2, "a": 1, "end": 1}


def test_both_spellings_are_one_and_print_as_one():
    texts = (
        "@note-twice{word=a times=3}",
        "note-twice{word=a times=3}",
        " @note-twice{times=3 word=a}",
    )
    pipelines = {Pipeline.parse(text, registry()) for text in texts}
    assert [str(pipeline) for pipeline in pipelines] == ["note-twice{times=3 word=a}"]


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_must_match_ends_the_run(first):
    note = TemplateStep(NotePass, fixed={"word": "a"})
    bad = TemplateStep(BadPass, ("way",))
    steps = (bad, note) if first else (note, bad)
    template = PipelineTemplate("both", "two", steps, (TemplateOption("way"),))
    with pytest.raises(InputError, match="both: matched nothing, but must match") as caught:
        run("both{way=miss}", template)
    assert "@layers.6: reason 6" in str(caught.value)
    graph, report = run("both{way=miss}", template, allow_unmatched=True)
    assert report.changed is not first
    assert graph.attrs.get("notes", []) == ([] if first else ["a"])


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
    with pytest.raises(UsageError, match=fault) as caught:
        registry(faulty).get(faulty.name)
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


def test_the_template_that_the_page_shows_runs(tmp_path):
    root = Path(__file__).parents[2]
    page = (root / "docs" / "writing-a-pass.md").read_text("utf-8")
    code = page[page.index("## A pipeline template") :].split("```python\n")[1].split("```")[0]
    file = tmp_path / "switch.py"
    file.write_text(code)
    with open_model(str(root / "tests" / "golden" / "llama_gqa")) as model:
        graph = model.graph
    pipeline = Pipeline.parse("switch{experts=4}", installed().with_file(file))
    run_pipeline(graph, pipeline)
    assert [n.attrs["top_k"] for n in graph if n.op.routes] == [1]
