"""What the models of a file share."""

import torch
import torch.nn.functional as F


def with_cache(output, cache, **values):
    """Return an output of transformers, whose releases name its cache differently."""
    name = "cache" if "cache" in output.__dataclass_fields__ else "past_key_values"
    return output(**values, **{name: cache})


def cache_of(output):
    """Return the cache of an output."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def batch_share(labels, num_items_in_batch=None, **kwargs):
    """Return the share that predicted labels are of those of all batches that are accumulated."""
    return 1 if num_items_in_batch is None else (labels[:, 1:] != -100).sum() / num_items_in_batch


def mask_of_tokens(inputs_embeds, attention_mask=None):
    """Return which tokens are no padding, ``[batch, seq]``."""
    if attention_mask is None:
        return torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    return attention_mask.bool()


def ctc_loss(logits, labels, config):
    """Return the loss of transcripts; labels below 0 are padding, every frame is read."""
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    frames = labels.new_full((logits.shape[0],), logits.shape[1])
    is_label = labels >= 0
    return F.ctc_loss(
        F.log_softmax(logits, dim=-1, dtype=kind).transpose(0, 1),
        labels[is_label],
        frames,
        is_label.sum(-1),
        blank=config.ctc_blank,
        reduction=config.ctc_loss_reduction,
        zero_infinity=config.ctc_zero_infinity,
    )
