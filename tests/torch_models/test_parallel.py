"""Converted models on two processes: DistributedDataParallel and FSDP2, over gloo on the CPU."""

import socket
from copy import deepcopy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("jax", reason="jax is not installed")

from torch import distributed, multiprocessing  # noqa: E402

from moecc import torch as mt  # noqa: E402

from .models import Block, Language, Whole, tokens  # noqa: E402

PIPELINE = "upcycle{experts=4 top-k=2}"
pytestmark = pytest.mark.filterwarnings("ignore")


def batch():
    """Return two sequences, of which each process has one."""
    return torch.cat([tokens()[:1], tokens()[1:]])


def loss_of(model, ids):
    return model(ids).square().mean()


def model_by(seed=0):
    """Return a converted model whose experts differ."""
    torch.manual_seed(seed)
    moe = mt.convert(Language(Whole(), Block()).double().eval(), tokens(), PIPELINE)
    with torch.no_grad():
        for param in moe.parameters():
            param += 0.05 * torch.randn_like(param)
    return moe


def train_on(rank, port, moe, results):
    """Compute gradients of a rank's sequence by both ways, and return those of all."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    ids = batch()[rank : rank + 1]
    copied = torch.nn.parallel.DistributedDataParallel(deepcopy(moe), find_unused_parameters=True)
    loss_of(copied, ids).backward()
    by_copies = {name: p.grad for name, p in copied.module.named_parameters()}
    from torch.distributed.fsdp import fully_shard

    sharded = deepcopy(moe)
    for layer in sharded.layers:
        fully_shard(layer)
    fully_shard(sharded)
    loss_of(sharded, ids).backward()
    by_shards = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
    if rank == 0:
        results.update(copies=by_copies, shards=by_shards)
    distributed.barrier()
    distributed.destroy_process_group()


def test_gradients_of_two_processes_are_those_of_one():
    moe = model_by()
    loss_of(moe, batch()).backward()
    expected = {name: p.grad for name, p in moe.named_parameters()}
    moe.zero_grad(set_to_none=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        arguments = (port, moe, results)
        processes = [context.Process(target=train_on, args=(rank, *arguments)) for rank in (0, 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0, 0]
        for grads in (results["copies"], results["shards"]):
            assert grads.keys() == expected.keys()
            for name, grad in grads.items():
                assert torch.allclose(grad, expected[name], atol=1e-12), name
