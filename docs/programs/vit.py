"""A model that moecc has written, to be edited; comments name axes of values."""


import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend(module, query, key, value, mask=None, **kwargs):
    """Return ``[batch, seq, head, head_dim]`` of operands ``[batch, head, seq, head_dim]``."""
    name = (module.config._attn_implementation or "eager").replace("eager", "sdpa")
    return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, mask, **kwargs)[0]


class Scope(nn.Module):
    """Modules and parameters under one name of the checkpoint."""

    def __init__(self, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


def drawn(*shape):
    """Return a parameter of normal numbers."""
    parameter = nn.Parameter(torch.empty(shape))
    nn.init.normal_(parameter, std=0.02)  # which transformers leaves out as it loads weights
    return parameter


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_key_value_groups = 1
        self.attention = Scope(
            query=nn.Linear(768, 768), key=nn.Linear(768, 768), value=nn.Linear(768, 768)
        )
        self.output = Scope(dense=nn.Linear(768, 768))

    def forward(self, hidden_states, key_value_states):
        # [batch, head, seq, head_dim]
        query = self.attention.query(hidden_states).unflatten(-1, (-1, 64)).transpose(1, 2)
        key = self.attention.key(key_value_states).unflatten(-1, (-1, 64)).transpose(1, 2)
        value = self.attention.value(key_value_states).unflatten(-1, (-1, 64)).transpose(1, 2)
        # [batch, seq, q]
        merged = attend(self, query, key, value, scaling=0.125, is_causal=False).flatten(2)
        return self.output.dense(merged)  # [batch, seq, embed]


class Layer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(768, eps=1e-12)
        self.attention = Attention(config)
        self.layernorm_after = nn.LayerNorm(768, eps=1e-12)
        self.intermediate = Scope(dense=nn.Linear(768, 3072))
        self.output = Scope(dense=nn.Linear(3072, 768))

    def forward(self, hidden_states):
        normed = self.layernorm_before(hidden_states)
        hidden_states = hidden_states + self.attention(normed, normed)
        activated = F.gelu(self.intermediate.dense(self.layernorm_after(hidden_states)))
        return hidden_states + self.output.dense(activated)


class StMoeConfig(PretrainedConfig):
    """The configuration of this model; the sizes of its layers are in the text below."""

    model_type = "st_moe"


class StMoePreTrainedModel(PreTrainedModel):
    """What all models of this file share."""

    config_class = StMoeConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_set_attn_implementation_cached_value = True
    _can_compile_fullgraph = True

    def __call__(self, *args, **kwargs):
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise ValueError(f"{name} is not supported: register forward hooks of the layers")
        return super().__call__(*args, **kwargs)


class StMoeModel(StMoePreTrainedModel):
    """The encoder."""

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = Scope(
            patch_embeddings=Scope(projection=Scope(
                weight=drawn(768, 3, 16, 16), bias=nn.Parameter(torch.zeros(768))
            )),
            position_embeddings=drawn(197, 768),
            cls_token=drawn(1, 768),
        )
        self.encoder = Scope(layer=nn.ModuleList([Layer(config) for _ in range(12)]))
        self.layernorm = nn.LayerNorm(768, eps=1e-12)
        self.post_init()

    def forward(self, pixel_values=None, **kwargs):
        patches = F.conv2d(
            pixel_values, self.embeddings.patch_embeddings.projection.weight, stride=16
        ).permute(0, 2, 3, 1)
        patches = (patches + self.embeddings.patch_embeddings.projection.bias).flatten(1, 2)
        patches = patches + self.embeddings.position_embeddings[1:]
        image = self.embeddings.cls_token + self.embeddings.position_embeddings[:1]
        hidden_states = torch.cat([image.expand_as(patches[:, :1]), patches], dim=1)
        for layer in self.encoder.layer:
            hidden_states = layer(hidden_states)
        normed = self.layernorm(hidden_states)
        return BaseModelOutput(last_hidden_state=normed)


class StMoeForImageClassification(StMoePreTrainedModel):
    """The encoder, and a new head that reads its first token."""

    accepts_loss_kwargs = False  # Trainer then divides the loss by the accumulated batches

    def __init__(self, config):
        super().__init__(config)
        self.model = StMoeModel(config)
        self.classifier = nn.Linear(768, config.num_labels)
        self.post_init()

    def forward(self, pixel_values=None, labels=None, **kwargs):
        outputs = self.model(pixel_values)
        hidden_states = outputs.last_hidden_state
        logits = self.classifier(hidden_states[:, 0])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)
