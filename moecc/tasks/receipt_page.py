"""The receipt of a conversion as a page: what was promised, what was found, what runs it."""

from __future__ import annotations

from collections.abc import Mapping

from moecc.support.page import page, table
from moecc.tasks.receipt import number_text, object_of, objects_of, receipt_lines


def receipt_page(name: str, stated: Mapping[str, object]) -> str:
    """Return the page of a receipt.

    Args:
      name: of the checkpoint.
      stated: what `load_receipt` returned.
    """
    said = (line.replace("`", "").split(": ", 1) for line in receipt_lines(stated))
    body = [
        table(("", ""), [(title, text) for title, text in said]),
        "<h2>Passes</h2>", _passes(stated), "<h2>Logits</h2>", _logits(stated),
        "<h2>Engines</h2>", _engines(stated), "<h2>Versions</h2>",
        table(("", ""), [(n, str(v)) for n, v in object_of(stated.get("versions")).items()]),
    ]  # fmt: skip
    return page(f"receipt of {name}", body, figures=False)


def _passes(stated: Mapping[str, object]) -> str:
    rows = [
        (str(one.get("pass")), _promise(one.get("promised")),
         number_text(one.get("measured_error"), ".2g"))
        for one in objects_of(stated.get("checked"))
    ]  # fmt: skip
    if not rows:
        return f"<p>No pass was checked: {stated.get('unchecked') or 'there is none'}.</p>"
    return table(("pass", "promise", "relative error at small sizes"), rows, (2,))


def _promise(stated: object) -> str:
    promise = object_of(stated)
    reason = promise.get("reason")
    return f"{promise.get('kind')}" + (f": {reason}" if reason else "")


def _logits(stated: Mapping[str, object]) -> str:
    found = object_of(stated.get("verified"))
    if not found:
        return "<p>Not compared; <code>convert --verify</code> does.</p>"
    difference = object_of(found.get("difference"))
    shown = {"max_relative": ".2e", "kl_nats": ".2e", "top1_agreement": ".2%"}
    rows = [(n.replace("_", " "), number_text(difference.get(n), f)) for n, f in shown.items()]
    rows.append(("tolerance", number_text(found.get("tolerance"), ".2e")))
    rows.append(("computed in", str(found.get("compute_dtype"))))
    return table(("", ""), rows, (1,))


def _engines(stated: Mapping[str, object]) -> str:
    rows = [
        (str(one.get("engine")), str(one.get("version")), "yes" if one.get("runs") else "no",
         _why(one))
        for one in objects_of(stated.get("engines"))
    ]  # fmt: skip
    return table(("engine", "version", "runs it", "why not, or what to know"), rows)


def _why(engine: Mapping[str, object]) -> str:
    reasons = engine.get("reasons")
    texts = [str(reason) for reason in reasons] if isinstance(reasons, list) else []
    note = engine.get("note")
    return "; ".join([*texts, *([str(note)] if note else [])])
