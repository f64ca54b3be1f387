"""What two processes check together; `python -m tests.optim.distributed_checks RANK FILE` is one of them.

Both ranks see the same batches where the result is held to a single process, so that averaging changes no bit; the
replicas of DDP see different ones.
"""

import sys
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lion_lightning.optim import Lion, layout
from lion_lightning.optim.gradient_release import release_gradients
from lion_lightning.optim.kernels import storage_formats

MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32, bf16 momentum": (torch.float32, {"momentum_dtype": "bfloat16"}),
    "fp32, int8 momentum": (torch.float32, {"momentum_dtype": "int8"}),
    "fp64": (torch.float64, {}),
    "bf16/32": (torch.bfloat16, {}),
    "bf16/24": (torch.bfloat16, {"weight_bits": 24}),
    "bf16/24, int8": (torch.bfloat16, {"weight_bits": 24, "momentum_dtype": "int8"}),
    "bf16/16": (torch.bfloat16, {"weight_bits": 16}),
    "bf16/16, int8": (torch.bfloat16, {"weight_bits": 16, "momentum_dtype": "int8"}),
    "bf16/16, eager": (torch.bfloat16, {"weight_bits": 16, "fused": False}),
    "bf16/32, cautious": (torch.bfloat16, {"cautious": True}),
}
FEW = ("fp32, int8 momentum", "bf16/32", "bf16/24", "bf16/16, int8")
"""Every kind of state, for checks in which the mode matters less."""
BLOCKWISE = {("momentum_dtype", "int8"), ("cautious", True)}
"""Options that work on blocks of 256 elements of a local part: a shard that cuts a block has other blocks."""
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}


SHARES = ("unmoved", "zero_update", "sign_agreement", "flip_rate", "near_bound")
"""Metrics of telemetry whose mean over equal shards is that of the whole tensor."""


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype, scale: float = 0.03) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    # 96 x 64 gives each rank whole blocks of int8 momentum; 3 rows are an uneven split, 1 row leaves rank 1 empty.
    layers = [nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 1)]
    return nn.Sequential(*layers).to(dtype)


def train(model: nn.Module, optimizer: Lion, first: int, steps: int, dtype: torch.dtype, rank: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(values((8, 64), 100 + 1000 * rank + step, dtype, 1.0)).float().square().sum().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(mine: nn.Module, theirs: nn.Module, label: str) -> None:
    for (name, left), right in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(whole(left.detach()), whole(right.detach())), f"{label}: {name}"


def assert_same_state(mine: Lion, theirs: Lion, label: str) -> None:
    left, right = mine.state_dict()["state"], theirs.state_dict()["state"]
    assert left.keys() == right.keys()
    for key, state in left.items():
        for name, value in state.items():
            same = torch.equal(whole(value.double()), whole(right[key][name].double()))  # gloo knows no int16
            assert same, f"{label}: {name}"


def assert_alike_on_all_ranks(tensor: Tensor, label: str) -> None:
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    assert all(torch.equal(copy, tensor) for copy in copies), label


def distributed_pair(
    shape: tuple[int, ...], placement: Shard | Replicate, mesh: DeviceMesh, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter]:
    """The same parameter twice: distributed, and whole."""
    start = values(shape, len(shape), dtype)
    return nn.Parameter(distribute_tensor(start, mesh, [placement])), nn.Parameter(start.clone())


def step_pairs(
    pairs: list[tuple[nn.Parameter, nn.Parameter]], options: dict[str, Any], steps: int
) -> tuple[Lion, Lion]:
    optimizers = tuple(Lion([pair[side] for pair in pairs], **OPTIONS, **options) for side in (0, 1))
    for step in range(steps):
        for index, (distributed, single) in enumerate(pairs):
            single.grad = values(tuple(single.shape), 10 * step + index, single.dtype, 1e-3)
            distributed.grad = single.grad.clone()
            if isinstance(distributed, DTensor):
                distributed.grad = distribute_tensor(single.grad, distributed.device_mesh, distributed.placements)
        for optimizer in optimizers:
            optimizer.step()
    return optimizers[0], optimizers[1]


def check_shards_equal_the_whole_in_every_mode(mesh: DeviceMesh) -> None:
    """Even, uneven and empty shards of the first dimension, beside plain tensors and replicated ones."""
    for label, (dtype, options) in MODES.items():
        shapes = [(64, 128)] if BLOCKWISE & options.items() else [(64, 128), (1, 7), (5, 3), (3,)]
        pairs = [distributed_pair(shape, Shard(0), mesh, dtype) for shape in shapes]
        pairs.append(distributed_pair((6, 9), Replicate(), mesh, dtype))
        plain = values((11, 4), 5, dtype)
        pairs.insert(1, (nn.Parameter(plain.clone()), nn.Parameter(plain.clone())))
        optimizer, _ = step_pairs(pairs, options, 3)
        for distributed, single in pairs:
            assert torch.equal(whole(distributed.detach()), single), f"{label}: shape {tuple(single.shape)}"
        assert optimizer.param_groups[0]["step"] == 3
        empty = [layout.local(param).numel() == 0 for param, _ in pairs]
        assert any(empty) == (mesh.get_rank() == 1 and len(shapes) == 4)


def check_columns_sharded_equal_the_whole_where_nothing_is_random(mesh: DeviceMesh) -> None:
    for label in ("fp32", "fp32, bf16 momentum", "fp64", "bf16/32"):
        dtype, options = MODES[label]
        pairs = [distributed_pair(shape, Shard(1), mesh, dtype) for shape in ((6, 64), (4, 5), (3, 1))]
        step_pairs(pairs, options, 3)
        for distributed, single in pairs:
            assert torch.equal(whole(distributed.detach()), single), f"{label}: shape {tuple(single.shape)}"


def check_telemetry_of_shards_averages_to_that_of_the_whole(mesh: DeviceMesh) -> None:
    for dtype, momentum_dtype in ((torch.float32, None), (torch.bfloat16, "int8")):
        pair = distributed_pair((64, 128), Shard(0), mesh, dtype)
        figures = []
        for param in pair:
            optimizer = Lion([param], lr=1e-3, weight_decay=20.0, momentum_dtype=momentum_dtype)
            optimizer.telemetry_every = 1
            for step in range(2):
                grad = values((64, 128), step, dtype, 1e-3)
                grad[step::3] = 0.0
                param.grad = distribute_tensor(grad, mesh, [Shard(0)]) if isinstance(param, DTensor) else grad
                optimizer.step()
            found = optimizer.telemetry()
            figures.append(torch.stack([found[f"lion/{name}"] for name in SHARES]))
        dist.all_reduce(figures[0])
        torch.testing.assert_close(figures[0] / dist.get_world_size(), figures[1], rtol=1e-9, atol=1e-12)


def check_int8_blocks_belong_to_local_parts(mesh: DeviceMesh) -> None:
    """Where a shard cuts a block, the momentum is still as good as int8 can be."""
    pair = distributed_pair((101, 67), Shard(0), mesh, torch.float32)
    optimizer, _ = step_pairs([pair], {"momentum_dtype": "int8", "betas": (0.9, 0.0)}, 1)
    state, exact = optimizer.state[pair[0]], pair[1].grad
    assert state["exp_avg"].dtype == torch.int8
    assert exact is not None
    here = storage_formats.dequantize(layout.flat(layout.local(state["exp_avg"])), layout.local(state["exp_avg_scale"]))
    start = 0 if mesh.get_rank() == 0 else 51 * 67
    expected = exact.flatten()[start : start + here.numel()]
    assert (here - expected).abs().max() <= 0.033 * expected.abs().max()  # the widest step between levels
    torch.testing.assert_close(whole(pair[0].detach()), pair[1].detach(), rtol=0, atol=1e-8)


def check_int8_loads_where_its_blocks_are_the_same_and_is_refused_elsewhere(mesh: DeviceMesh) -> None:
    """States of two shards, gathered as `full_state_dict` gathers them, given to one process."""
    cases = [((96, 64), Shard(0), True), ((128, 64), Shard(0), True), ((101, 67), Shard(0), False)]
    cases += [((2, 2500), Shard(0), False), ((64, 512), Shard(1), False), ((97, 64), Shard(0), False)]
    for shape, placement, fits in cases:
        pair = distributed_pair(shape, placement, mesh, torch.float32)
        optimizer, single = step_pairs([pair], {"momentum_dtype": "int8"}, 2)
        saved = single.state_dict()
        saved["state"][0] = {key: whole(value) for key, value in optimizer.state[pair[0]].items()}
        assert saved["state"][0]["exp_avg"].dtype == torch.int8
        alone = Lion([nn.Parameter(pair[1].detach().clone())], momentum_dtype="int8")
        if fits:
            alone.load_state_dict(saved)
            assert_same_state(alone, single, f"{shape}")
        else:
            with pytest.raises(ValueError, match=r"parameter 0: exp_avg_scale has shape .*same shards"):
                alone.load_state_dict(saved)


def sharded(dtype: torch.dtype, mesh: DeviceMesh) -> nn.Module:
    model = network(dtype)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_fsdp2_equals_a_single_process(mesh: DeviceMesh) -> None:
    """In every mode, stepped after backward and inside it."""
    for label, (dtype, options) in MODES.items():
        if label in ("fp64", "bf16/16, eager", "bf16/32, cautious"):
            continue
        single = network(dtype)
        reference = Lion(single.parameters(), **OPTIONS, **options)
        train(single, reference, 0, 3, dtype)
        for release in (False, True):
            model = sharded(dtype, mesh)
            optimizer = Lion(model.parameters(), **OPTIONS, **options)
            if release:
                release_gradients(model, optimizer)
            train(model, optimizer, 0, 3, dtype)
            assert all((param.grad is None) == release for param in model.parameters())
            assert_same(model, single, f"{label}, {release=}")
            assert_same_state(optimizer, reference, f"{label}, {release=}")


def replica(dtype: torch.dtype, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(network(dtype), bucket_cap_mb=0.02, **options)


def check_ddp_replicas_stay_alike_with_and_without_release(mesh: DeviceMesh) -> None:
    for label, (dtype, options) in MODES.items():
        results = []
        for release, as_view in ((False, False), (True, False), (True, True)):
            model = replica(dtype, gradient_as_bucket_view=as_view)
            optimizer = Lion(model.parameters(), **OPTIONS, **options)
            if release:
                handle = release_gradients(model, optimizer)
            train(model, optimizer, 0, 3, dtype, mesh.get_rank())
            for param in model.parameters():
                assert (param.grad is None) == release
                assert_alike_on_all_ranks(param.detach().float(), label)
                for name, value in optimizer.state[param].items():
                    assert_alike_on_all_ranks(value.float(), f"{label}: {name}")
            if release:
                handle.remove()
                train(model, optimizer, 3, 1, dtype, mesh.get_rank())
                assert next(model.parameters()).grad is not None
            else:
                train(model, optimizer, 3, 1, dtype, mesh.get_rank())
            assert optimizer.param_groups[0]["step"] == 4
            results.append((model, optimizer))
        for model, optimizer in results[1:]:
            assert_same(results[0][0], model, f"{label}: release")
            assert_same_state(results[0][1], optimizer, f"{label}: release")


def check_release_says_what_ddp_cannot_do(mesh: DeviceMesh) -> None:
    inside = replica(torch.float32)
    handle = release_gradients(inside.module, Lion(inside.parameters()))
    _expect(RuntimeError, "pass the wrapper", lambda: inside(torch.ones(2, 64)))
    handle.remove()
    unused = replica(torch.float32, find_unused_parameters=True)
    _expect(ValueError, "find_unused_parameters=True", lambda: release_gradients(unused, Lion(unused.parameters())))
    model = replica(torch.float32)
    optimizer = Lion(model.parameters())
    for _ in range(2):  # a second handle on the same wrapper works
        with release_gradients(model, optimizer):
            train(model, optimizer, 0, 1, torch.float32)
    with release_gradients(model, optimizer):
        model(torch.ones(2, 64)).sum().backward()
        _expect(RuntimeError, "second gradient", lambda: model(torch.ones(2, 64)).sum().backward())


def _expect(kind: type[Exception], message: str, action: Any) -> None:
    with pytest.raises(kind, match=message):
        action()


def check_asking_for_the_state_of_a_fresh_optimizer_changes_nothing(mesh: DeviceMesh) -> None:
    """torch.distributed.checkpoint takes a step at lr 0 with gradients of zero to make the state exist."""
    for label in FEW:
        dtype, options = MODES[label]
        model, untouched = sharded(dtype, mesh), sharded(dtype, mesh)
        optimizer = Lion(model.parameters(), **OPTIONS, **options)
        get_optimizer_state_dict(model, optimizer)
        assert_same(model, untouched, label)
        assert optimizer.param_groups[0]["step"] == 0
        assert optimizer.param_groups[0]["lr"] == OPTIONS["lr"]
        assert not any(layout.local(value).any() for state in optimizer.state.values() for value in state.values())
        train(model, optimizer, 0, 2, dtype)
        other = Lion(untouched.parameters(), **OPTIONS, **options)
        train(untouched, other, 0, 2, dtype)
        assert_same(model, untouched, f"{label}: after training")


def check_a_sharded_state_loads_into_a_fresh_optimizer(mesh: DeviceMesh) -> None:
    for label in FEW:
        dtype, options = MODES[label]
        model, resumed = sharded(dtype, mesh), sharded(dtype, mesh)
        optimizer = Lion(model.parameters(), **OPTIONS, **options)
        train(model, optimizer, 0, 2, dtype)
        with torch.no_grad():
            for target, source in zip(resumed.parameters(), model.parameters(), strict=True):
                layout.local(target).copy_(layout.local(source))
        fresh = Lion(resumed.parameters(), **OPTIONS, **options)
        set_optimizer_state_dict(resumed, fresh, get_optimizer_state_dict(model, optimizer))
        train(model, optimizer, 2, 2, dtype)
        train(resumed, fresh, 2, 2, dtype)
        assert_same(model, resumed, label)


CHECKS = [
    check_shards_equal_the_whole_in_every_mode,
    check_columns_sharded_equal_the_whole_where_nothing_is_random,
    check_telemetry_of_shards_averages_to_that_of_the_whole,
    check_int8_blocks_belong_to_local_parts,
    check_int8_loads_where_its_blocks_are_the_same_and_is_refused_elsewhere,
    check_fsdp2_equals_a_single_process,
    check_ddp_replicas_stay_alike_with_and_without_release,
    check_release_says_what_ddp_cannot_do,
    check_asking_for_the_state_of_a_fresh_optimizer_changes_nothing,
    check_a_sharded_state_loads_into_a_fresh_optimizer,
]


def main(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (2,))
    for check in CHECKS:
        start = time.perf_counter()
        check(mesh)
        print(f"{check.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
