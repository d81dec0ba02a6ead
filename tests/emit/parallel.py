"""Run by torchrun with transformers: a folder's model on all processes against one alone."""

import json
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)


def outputs(model, tokens):
    """Return logits, and the gradients of all parameters."""
    logits = model(input_ids=tokens, use_cache=False).logits
    logits.square().mean().backward()
    slopes = [p.grad for p in model.parameters()]
    return [getattr(x, "full_tensor", lambda x=x: x)() for x in (logits.detach(), *slopes)]


def main():
    """Print the relative differences of logits and gradients, from process 0."""
    folder = sys.argv[1]
    load = transformers.AutoModelForCausalLM.from_pretrained
    options = {"trust_remote_code": True, "dtype": torch.float64}
    tokens = torch.arange(24).reshape(2, 12) % 16
    whole = outputs(load(folder, **options), tokens)
    plan = {"tp_plan": "auto"}
    if sys.argv[2] == "experts":
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="all_reduce")
        plan = {"distributed_config": config}
    model = load(folder, **plan, **options)
    parts = outputs(model, tokens)
    placements = [p.placements for p in model.parameters() if hasattr(p, "placements")]
    sharded = sum(place.is_shard() for places in placements for place in places)
    if dist.get_rank() == 0:
        pairs = zip(parts, whole, strict=True)
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
        print(json.dumps({"logits": errors[0], "gradient": max(errors), "sharded": sharded}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
