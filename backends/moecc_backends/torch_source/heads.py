"""Models of an encoder with a head: the one of its checkpoint, or a new one for another task."""

from __future__ import annotations

from collections.abc import Sequence

HEAD = '''
class <name>(StMoePreTrainedModel):
    """The encoder, and <doc>."""

    accepts_loss_kwargs = False  # Trainer then divides the loss by the accumulated batches

    def __init__(self, config):
        super().__init__(config)
        <constructor>
        self.post_init()

    def forward(self, <arguments>, labels=None, **kwargs):
        outputs = self.model(<passed>)
        hidden_states = outputs.last_hidden_state
        <statements>
        loss = None
        if labels is not None:
            loss = <loss><plus>
        return <output>(loss=loss, logits=logits<aux>)
'''

BY_TOKEN = "F.cross_entropy(logits.flatten(0, -2), labels.flatten())"
BY_PROBLEM = "self.loss_function(labels, logits, self.config)"
LOSSES = {
    "MaskedLM": BY_TOKEN,
    "TokenClassification": BY_TOKEN,
    "AudioClassification": BY_TOKEN,
    "SequenceClassification": BY_PROBLEM,
    "ImageClassification": BY_PROBLEM,
    "CTC": "ctc_loss(logits, labels, self.config)",
}
"""The losses of transformers by task; those of whole inputs depend on ``problem_type``."""

FIRST, EVERY = ("its first token", "[:, 0]"), ("every token", "")
NEW_HEADS = {
    "input_ids": {"SequenceClassification": FIRST, "TokenClassification": EVERY},
    "pixel_values": {"ImageClassification": FIRST},
}
"""The tasks of new heads by the main input of an encoder, and the states that they read."""

Parts = dict[str, str | list[str]]


def head_parts(
    task: str,
    arguments: Sequence[str],
    constructor: Sequence[str],
    statements: Sequence[str],
    *,
    doc: str = "the head of its checkpoint",
    has_loss: bool,
) -> Parts:
    """Return the parts of HEAD.

    Args:
      task: the task, as the classes of transformers call it.
      arguments: the arguments of the encoder.
      constructor: the statements that make the modules of the head.
      statements: the statements that compute ``logits``.
      doc: a phrase for the docstring.
      has_loss: whether the encoder has an auxiliary loss.
    """
    return {
        "name": f"StMoeFor{task}",
        "doc": doc,
        "constructor": ["self.model = StMoeModel(config)", *constructor],
        "statements": list(statements),
        "arguments": ", ".join(f"{name}=None" for name in arguments),
        "passed": ", ".join(arguments),
        "loss": LOSSES[task],
        "plus": " + outputs.aux_loss" if has_loss else "",
        "aux": ", aux_loss=outputs.aux_loss" if has_loss else "",
        "output": "StMoeClassifierOutput" if has_loss else "SequenceClassifierOutput",
    }


def new_heads(
    main_input: str, arguments: Sequence[str], width: int, *, has_loss: bool
) -> dict[str, Parts]:
    """Return the parts of HEAD for each task of an encoder, by task.

    Args:
      main_input: the first argument of the encoder.
      arguments: all of them.
      width: the size of its hidden states.
      has_loss: whether the encoder has an auxiliary loss.
    """
    constructor = [f"self.classifier = nn.Linear({width}, config.num_labels)"]
    return {
        task: head_parts(
            task, arguments, constructor, [f"logits = self.classifier(hidden_states{index})"],
            doc=f"a new head that reads {reads}", has_loss=has_loss,
        )
        for task, (reads, index) in NEW_HEADS.get(main_input, {}).items()
    }  # fmt: skip
