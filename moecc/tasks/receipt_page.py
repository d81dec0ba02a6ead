"""The receipt of a conversion as a page: what was promised, what was found, what runs it."""

from __future__ import annotations

from collections.abc import Mapping

from moecc.support.page import render_page
from moecc.tasks.receipt import number_text, object_of, objects_of, receipt_lines


def receipt_page(name: str, stated: Mapping[str, object]) -> str:
    """Return the page of a receipt.

    Args:
      name: of the checkpoint.
      stated: what `load_receipt` returned.
    """
    lines = (line.replace("`", "").split(": ", 1) for line in receipt_lines(stated))
    return render_page(
        "receipt.html", f"receipt of {name}",
        facts=[(title, text) for title, text in lines],
        passes=[
            (str(check.get("pass")), _promise(check.get("promised")),
             number_text(check.get("measured_error"), ".2g"))
            for check in objects_of(stated.get("checked"))
        ],
        unchecked=stated.get("unchecked") or "there is none",
        logits=_logits(object_of(stated.get("verified"))),
        engines=[
            (str(engine.get("engine")), str(engine.get("version")),
             "yes" if engine.get("runs") else "no", _reasons(engine))
            for engine in objects_of(stated.get("engines"))
        ],
        versions=object_of(stated.get("versions")).items(),
    )  # fmt: skip


def _promise(stated: object) -> str:
    promise = object_of(stated)
    reason = promise.get("reason")
    return f"{promise.get('kind')}" + (f": {reason}" if reason else "")


def _logits(comparison: Mapping[str, object]) -> list[tuple[str, str]]:
    if not comparison:
        return []
    difference = object_of(comparison.get("difference"))
    formats = {"max_relative": ".2e", "kl_nats": ".2e", "top1_agreement": ".2%"}
    return [
        *((n.replace("_", " "), number_text(difference.get(n), f)) for n, f in formats.items()),
        ("tolerance", number_text(comparison.get("tolerance"), ".2e")),
        ("computed in", str(comparison.get("compute_dtype"))),
    ]


def _reasons(engine: Mapping[str, object]) -> str:
    reasons = engine.get("reasons")
    texts = [str(reason) for reason in reasons] if isinstance(reasons, list) else []
    note = engine.get("note")
    return "; ".join([*texts, *([str(note)] if note else [])])
