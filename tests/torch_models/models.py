"""Small modules of PyTorch, of no library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HIDDEN, VOCAB = 8, 12, 30


class FeedForward(nn.Module):
    """A gated block that is a module."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.down(self.dropout(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """A residual layer that a subclass changes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def hidden(self, x):
        return F.gelu(self.up(x))

    def forward(self, x):
        return x + self.down(self.hidden(self.norm(x)))


class Whole(Block):
    """A layer with a module for its block."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.up = self.down = None
        self.mlp = FeedForward(dropout)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Language(nn.Module):
    """Tokens, layers, logits."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tokens():
    """Return a batch of tokens."""
    return torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
