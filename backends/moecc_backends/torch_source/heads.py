"""Heads of encoders: models for tasks whose last layer is new, since graphs end before heads."""

from __future__ import annotations

from collections.abc import Sequence

HEAD = '''
class <name>(StMoePreTrainedModel):
    """The encoder, and a new head that reads <reads>."""

    def __init__(self, config):
        super().__init__(config)
        self.model = StMoeModel(config)
        self.classifier = nn.Linear(<width>, config.num_labels)
        self.post_init()

    def forward(self, <arguments>, labels=None, **kwargs):
        outputs = self.model(<passed>)
        logits = self.classifier(outputs.last_hidden_state<index>)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())<plus>
        return <output>(loss=loss, logits=logits<aux>)
'''

FIRST, EVERY = ("its first token", "[:, 0]"), ("every token", "")
HEADS = {
    "input_ids": {"SequenceClassification": FIRST, "TokenClassification": EVERY},
    "pixel_values": {"ImageClassification": FIRST},
}
"""The tasks of encoders by their main input, and what their heads read."""


def heads(
    main_input: str, arguments: Sequence[str], width: int, *, has_loss: bool
) -> dict[str, dict[str, str | list[str]]]:
    """Return for each task of an encoder the parts of HEAD.

    Args:
      main_input: the first argument of the encoder.
      arguments: all of them.
      width: the size of its hidden states.
      has_loss: whether the encoder has an auxiliary loss.
    """
    shared: dict[str, str | list[str]] = {
        "arguments": ", ".join(f"{name}=None" for name in arguments),
        "passed": ", ".join(arguments),
        "width": str(width),
        "plus": " + outputs.aux_loss" if has_loss else "",
        "aux": ", aux_loss=outputs.aux_loss" if has_loss else "",
        "output": "StMoeClassifierOutput" if has_loss else "SequenceClassifierOutput",
    }
    return {
        task: {**shared, "name": f"StMoeFor{task}", "reads": reads, "index": index}
        for task, (reads, index) in HEADS.get(main_input, {}).items()
    }
