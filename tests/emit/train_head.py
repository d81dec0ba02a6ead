"""Train the new head of an emitted encoder for a step, with transformers alone: JSON of losses.

PYTHON train_head.py FOLDER TASK OUT
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
folder, task, out = sys.argv[1:]
loader = getattr(transformers, f"AutoModelFor{task}")
model = loader.from_pretrained(folder, trust_remote_code=True, num_labels=3)
config = model.config
if task == "ImageClassification":
    inputs = {"pixel_values": torch.randn(2, *json.loads(os.environ["PIXELS"]))}
else:
    inputs = {"input_ids": torch.randint(3, 16, (2, 6))}
labels = torch.tensor([0, 2])
if task == "TokenClassification":
    labels = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 1, -100, -100, -100, -100]])
optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
losses = []
for _ in range(3):
    output = model.train()(**inputs, labels=labels)
    output.loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    losses.append(float(output.loss.detach()))
model.eval().save_pretrained(out)
state = get_optimizer_state_dict(model, optimiser)["state"]
state = {f"{kind}.{name}": x for name, kinds in state.items() for kind, x in kinds.items()}
save_file(state, f"{out}/optimizer.safetensors")
base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
aux = output.get("aux_loss")
print(json.dumps({"losses": losses, "shape": list(output.logits.shape),
                  "aux_loss": None if aux is None else float(aux.detach()),
                  "base": type(base).__name__}))  # fmt: skip
