"""Write the small BioGPT of ``test_my_family.py`` and its logits: torch and transformers 5."""

from pathlib import Path

import numpy as np
import torch
from transformers import BioGptConfig, BioGptForCausalLM

HERE = Path(__file__).parent


def main():
    """Write the folder, tokens, and logits in float64."""
    torch.manual_seed(0)
    config = BioGptConfig(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=16,
    )  # fmt: skip
    model = BioGptForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(HERE)
    (HERE / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(0).integers(3, 40, (2, 9))
    logits = model.eval().double()(torch.from_numpy(tokens)).logits
    np.save(HERE / "tokens.npy", tokens.astype(np.int32))
    np.save(HERE / "logits.npy", logits.detach().numpy().astype(np.float32))


if __name__ == "__main__":
    main()
