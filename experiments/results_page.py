"""Write `docs/experiments.md` from what is declared and what was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from curves_figure import curves_of, draw_curves
from declared import HERE, SEEDS, Experiment, Line, declared, read_results
from verdicts import Effect, Verdict, effect_of, verdict_of

PAGE = HERE.parent / "docs" / "experiments.md"

HEAD = """# Experiments

Does it learn? Each experiment trains models of 0.2 to 1.2 million parameters over bytes, but for
(l) with 4.8 to 15.4 million, on this documentation, on two cores: enough to see whether the
machinery does what it should, and far too small to say what holds at scale. `experiments/` has the
recipes, the changes of each arm, and the runner; `python experiments/run.py a b` runs what has no
result yet, and writes this page from `experiments/results/`, which has the result, steps, tokens
and processor time of each seed.

The dense model (`experiments/base.toml`) is trained for 300 steps of 2,048 bytes, once for each
seed; an arm goes on from it (`experiments/continue.toml`), on batches in another order. Losses are
of held-out paragraphs, in nats a byte, after the last step. An effect is the difference between two
arms of one seed, so of one dense model and one order of batches; its interval of 95 % is Student's
over the seeds. A claim is *reproduced* where the whole interval is below 0, and *not shown* where
it holds 0: this is then too small to tell. Every arm has the same learning rate; a sweep of each
might move effects of this size. (a), (b), (e) and (f) have an earlier text of the documentation
than the others.

* Fine-tuning (`experiments/finetune.toml`) goes on from the sparse model of (a): in (g) on Pang and
  Lee's sentences of plots and reviews, in (t) on the pairs of RTE 1 to 3, in (q) on questions with
  their six coarse classes; `--tasks FOLDER` has them. A result is the share of wrong answers in a
  held-out tenth; a row has 56 bytes of a text. Where a model does no better than the likelier
  label, its claims are *not measurable here*.
* In (h) an encoder-decoder learns hidden spans from random parameters (`experiments/spans.toml`). A
  result is the entropy of the first choices of sentinels, the mean over the layers of a stack,
  divided by that of an even spread; other tokens have 0.9 of it in the decoder.
* "As much compute" in (a) and (l) is that of active parameters, 1.67 times; executed FLOPs say
  1.52. Both begin from 2.8 tokens a parameter at most, and end after 150 steps; in
  [worth.md](worth.md), from a dense model that was trained for longer and with the recipe of today,
  experts are worth it.

Processor time includes the compilation of the programs.
"""

TAIL = """
## Run again

`make proof-learning` repeats one claim from nothing, in 4 min 48 s on two cores: on the
documentation of 28 November 2026, a capacity of 1.25 against one of 0.75 is −0.1160 ± 0.0300 over
the same three seeds. The first claim of (a) was −0.0085 ± 0.0172 on another text: an effect of that
size is at the edge of what three seeds can tell. SmolLM2 upcycled against SmolLM2 trained on was
not run.
"""


def page(lines: Sequence[Line]) -> str:
    """Return the page."""
    experiments = declared().values()
    parts = [HEAD, *_results(experiments, lines)]
    for experiment in experiments:
        parts += _curves(experiment, [x for x in lines if x["experiment"] == experiment.key])
    return "\n".join(parts) + TAIL


def write_page(path: Path = PAGE) -> None:
    """Write the page and its pictures from the results."""
    lines = read_results()
    path.write_text(page(lines), "utf-8")
    for experiment in declared().values():
        if experiment.curves and any(curves_of(experiment, lines).values()):
            draw_curves(experiment, lines, path.with_name(picture(experiment)))


def picture(experiment: Experiment) -> str:
    """Return the file of the curves of an experiment, beside the page."""
    return f"experiments_{experiment.key}.svg"


def _claims(experiment: Experiment, lines: Sequence[Line]) -> Iterator[str]:
    """Yield the claims of an experiment, each with its effect and verdict."""
    for claim in experiment.claims:
        effect = effect_of(lines, experiment, claim)
        verdict = _verdict(effect, verdict_of(lines, experiment, claim))
        values = f": {_effect(effect, experiment.unit)}" if effect.values else ""
        yield f"{claim}{values}: **{verdict}**"


def _effect(effect: Effect, unit: str) -> str:
    if not effect.values:
        return ""
    half = f" ± {effect.half_width:.4f}" if len(effect.values) > 1 else ""
    unit = "" if unit == "nats a byte" else f", {unit}"
    return f"{effect.mean:+.4f}{half}{unit}".replace("-", "−")


def _verdict(effect: Effect, verdict: Verdict) -> str:
    if effect.values and verdict is Verdict.NOT_RUN:
        return f"fewer than {len(SEEDS)} seeds"
    return verdict.value


def _results(experiments: Iterable[Experiment], lines: Sequence[Line]) -> Iterator[str]:
    """Yield a table of the experiments: their claims, and the mean result of each arm."""
    yield "## Claims and results\n"
    yield "| | experiment | claims, with their effects | held-out means, by arm |"
    yield "|---|---|---|---|"
    for experiment in experiments:
        runs = [x for x in lines if x["experiment"] == experiment.key]
        arms = []
        for arm in experiment.arms:
            losses = [float(line["loss"]) for line in runs if line["arm"] == arm]
            arms.append(f"{arm}: {mean(losses):.4f}" if losses else f"{arm}: not run")
        title = f"{experiment.title}<br>After {experiment.source}<br>{_cost(runs)}"
        claims = "<br>".join(_claims(experiment, lines))
        yield f"| {experiment.key} | {title} | {claims} | {'<br>'.join(arms)} |"
    yield ""


def _cost(lines: Sequence[Line]) -> str:
    """Return how many runs an experiment had, on how many tokens, and what they took."""
    runs = {line["recipe"]: int(line["tokens"]) for line in lines if line["steps"]}
    hours = sum(float(line["processor_seconds"]) for line in lines) / 3600
    tokens = sum(runs.values()) / 1e6
    seeds = len({line["seed"] for line in lines})
    return f"{len(runs)} runs, seeds: {seeds}, {tokens:.2f} M tokens, {hours:.2f} hours"


def _curves(experiment: Experiment, lines: Sequence[Line]) -> Iterator[str]:
    """Yield the picture of the training loss after the switch, and its differences."""
    if not any(curves_of(experiment, lines).values()):
        return  # no seed has all arms yet
    seen = ", ".join(f"“{arm}”" for arm in experiment.arms)
    yield f"![Training loss by step of {seen}]({picture(experiment)})\n"
    yield from _early(experiment, lines)


def _early(experiment: Experiment, lines: Sequence[Line]) -> Iterator[str]:
    """Yield how far each arm is from the first over the first steps, paired by seed and step."""
    curves = curves_of(experiment, lines)
    (first, base), *others = curves.items()
    if len(base) < len(SEEDS):
        return
    spans = [(2, 10), (11, 20), (21, 30), (31, 40)]
    shown = [span for span in spans if span[1] <= experiment.curves]
    spans_text = ", ".join(f"{a} to {b}" for a, b in shown)
    arms = []
    for arm, each in others:
        effects = (
            Effect(tuple(mean(curve[a - 1 : b]) - mean(base[seed][a - 1 : b])
                         for seed, curve in each.items()))
            for a, b in shown
        )  # fmt: skip
        arms.append(f"{arm}: {', '.join(_effect(x, 'nats a byte') for x in effects)}")
    text = (
        f"({experiment.key}) Training loss after the switch less that of {first}, the mean over "
        f"steps {spans_text}, ± Student's 95 % over the seeds. {'; '.join(arms)}."
    )
    yield textwrap.fill(text, 100)
    yield ""
