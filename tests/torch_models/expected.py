"""The feed-forward blocks that the models of transformers have, by the names of their layers.

Written by hand, and read off the modules alone: it knows nothing of what a model computes, so that
a block that the search of dataflow misses is missed by no one.
"""

from __future__ import annotations

from torch import nn

FORMS: tuple[tuple[str, ...], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("wi", "wo"),
    ("Wi", "Wo"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
    ("w1", "w2"),
    ("lin1", "lin2"),
    ("linear1", "linear2"),
    ("layer_1", "layer_2"),
    ("linear_1", "linear_2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("intermediate.dense", "output.dense"),
    ("intermediate_dense", "output_dense"),
    ("lang_inter.dense", "lang_output.dense"),
    ("visn_inter.dense", "visn_output.dense"),
    ("ffn", "ffn_output"),
    ("feed_forward.intermediate", "feed_forward.output"),
    ("proj_up_gate", "proj_up", "proj_down"),
    ("input_linear", "output_linear"),
    ("ffn.w_in.w_0", "ffn.w_in.w_1", "ffn.w_out"),
    ("feed_forward.key", "feed_forward.value"),
    ("pwconv1", "pwconv2"),
    ("pointwise_conv1", "pointwise_conv2"),
    ("dense1", "dense2"),
    ("w12", "w3"),
    ("weights_in", "weights_out"),
    ("linear_fc1", "linear_fc2"),
    ("w_in", "w_out"),
    ("lin_in", "lin_out"),
    ("ff_in", "ff_out"),
    ("ffw_layer_1", "ffw_layer_2"),
    ("0", "2"),
    ("0", "3"),
    ("layers.0", "layers.1"),
    ("net.0.proj", "net.2"),
)
"""The products of a block by their names in a module: those of its input, and the last one."""


def expected_blocks(model) -> dict[str, tuple[str, ...]]:
    """Return the modules of the products of each block, by the module of the last one."""
    modules = dict(model.named_modules())
    blocks = {}
    for path, parent in modules.items():
        for form in FORMS:
            if (form[0].isdigit() and not isinstance(parent, nn.Sequential)) or _mixes(
                parent, form[0]
            ):
                continue
            names = tuple(f"{path}.{name}".lstrip(".") for name in form)
            if names[-1] not in blocks and all(_is_product(modules.get(name)) for name in names):
                blocks[names[-1]] = names
    return blocks


def _mixes(module, first: str) -> bool:
    """Whether a convolution, or a norm of hidden values, stands behind the first product."""
    children = dict(module.named_children())
    names = list(children)
    behind = names[names.index(first) :] if first in names else names
    return (
        "dwconv" in behind
        or "ffn_layernorm" in children
        or any("BatchNorm" in type(child).__name__ for child in children.values())
    )


def _is_product(module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2
