"""What a run says of its speed, against numbers put in by hand."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from lion_lightning.errors import ConfigError
from lion_lightning.training import performance
from lion_lightning.training.build import settle_precision
from lion_lightning.training.performance import WARMUP_BATCHES, Throughput, choose_precision, peak_flops

FLOPS_PER_SAMPLE, TOKENS_PER_SAMPLE, PEAK = 6e6, 32, 1e12


class Module:
    def __init__(self):
        self.logged = {}

    def flops_per_sample(self):
        return FLOPS_PER_SAMPLE

    def tokens_per_sample(self):
        return TOKENS_PER_SAMPLE

    def log_dict(self, figures):
        self.logged = figures


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(performance, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(performance, "peak_flops", lambda device, precision: PEAK)
    return now


def trainer(world_size=1):
    return SimpleNamespace(
        world_size=world_size, global_step=10, log_every_n_steps=10, accumulate_grad_batches=2, precision="32-true",
        optimizers=[], strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip


def train(callback, batches, clock, world_size=1, wait=0.01, work=0.04):
    module, owner = Module(), trainer(world_size)
    callback.on_train_start(owner, module)
    for batch in batches:
        clock.seconds += wait
        callback.on_train_batch_start(owner, module, batch, 0)
        clock.seconds += work
        callback.on_train_batch_end(owner, module, None, batch, 0)
    return module.logged


def text(rows, length=TOKENS_PER_SAMPLE):
    return {"input_ids": torch.zeros(rows, length, dtype=torch.int64)}


def test_tokens_steps_waiting_and_utilisation(clock):
    logged = train(Throughput(), [text(8)] * (WARMUP_BATCHES + 3), clock, world_size=2)
    assert logged["perf/samples_per_second"] == pytest.approx(2 * 8 / 0.05)
    assert logged["perf/tokens_per_second"] == pytest.approx(2 * 8 * TOKENS_PER_SAMPLE / 0.05)
    assert logged["perf/step_ms"] == pytest.approx(2 * 50), "two micro-batches are a step"
    assert logged["perf/data_wait"] == pytest.approx(0.2)
    assert logged["perf/mfu"] == pytest.approx(8 * FLOPS_PER_SAMPLE / 0.05 / PEAK), "two devices do twice as much"
    assert logged["data/tokens_seen"] == (WARMUP_BATCHES + 3) * 2 * 8 * TOKENS_PER_SAMPLE


def test_shorter_sequences_count_for_what_they_are(clock):
    whole, cut = Throughput(), Throughput()
    left = train(whole, [text(8)] * (WARMUP_BATCHES + 1), clock)
    right = train(cut, [text(32, TOKENS_PER_SAMPLE // 4)] * (WARMUP_BATCHES + 1), clock)
    for name in ("perf/tokens_per_second", "perf/mfu", "data/tokens_seen"):
        assert left[name] == pytest.approx(right[name])
    assert right["perf/samples_per_second"] == pytest.approx(4 * left["perf/samples_per_second"])


def test_images_have_no_tokens(clock):
    logged = train(Throughput(), [{"pixels": torch.zeros(4, 3, 8, 8)}] * (WARMUP_BATCHES + 1), clock)
    assert "perf/tokens_per_second" not in logged
    assert "data/tokens_seen" not in logged
    assert logged["perf/mfu"] == pytest.approx(4 * FLOPS_PER_SAMPLE / 0.05 / PEAK)


def test_a_device_that_nobody_knows_has_no_utilisation(clock, monkeypatch):
    monkeypatch.setattr(performance, "peak_flops", lambda device, precision: None)
    assert "perf/mfu" not in train(Throughput(), [text(8)] * (WARMUP_BATCHES + 1), clock)


def test_what_was_seen_goes_on_after_a_resume(clock):
    first, second = Throughput(), Throughput()
    train(first, [text(8)] * 3, clock)
    second.load_state_dict(first.state_dict())
    logged = train(second, [text(8)] * (WARMUP_BATCHES + 1), clock)
    assert logged["data/samples_seen"] == (3 + WARMUP_BATCHES + 1) * 8


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("64-true", torch.float64)]
)
def test_the_peak_of_a_cpu_is_the_best_of_some_matrix_products(monkeypatch, precision, dtype):
    ticks = iter([0.0, 0.4, 1.0, 1.1, 2.0, 2.3, 3.0, 3.2])
    multiplied = []
    monkeypatch.setattr(performance.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(torch.nn.functional, "linear", lambda inputs, weight: multiplied.append(inputs.dtype))
    assert peak_flops(torch.device("cpu"), precision) == pytest.approx(2 * 1024**3 / 0.1)
    assert multiplied == [dtype] * 4


def test_of_other_devices_nothing_is_said():
    assert peak_flops(torch.device("meta"), "32-true") is None


@pytest.mark.parametrize(
    ("again", "kept"), [(0.9 * PEAK, PEAK), (1.2 * PEAK, 1.2 * PEAK), (0.5 * PEAK, None), (3 * PEAK, None)]
)
def test_a_peak_that_differs_at_the_end_of_the_run_is_not_used(clock, monkeypatch, again, kept):
    callback = Throughput()
    logged = train(callback, [text(8)] * (WARMUP_BATCHES + 1), clock)
    monkeypatch.setattr(performance, "peak_flops", lambda device, precision: again)
    callback.on_train_end(trainer(), Module())
    mfu = callback.measured(trainer()).get("perf/mfu")
    assert mfu == (None if kept is None else pytest.approx(logged["perf/mfu"] * PEAK / kept))


def test_more_than_the_peak_is_no_utilisation(clock):
    assert "perf/mfu" not in train(Throughput(), [text(8)] * (WARMUP_BATCHES + 1), clock, work=1e-6, wait=0.0)


@pytest.mark.parametrize(("half", "name"), [(2.2e12, "bf16-mixed"), (1.2e12, "32-true"), (1e11, "32-true")])
def test_auto_is_bf16_where_it_is_faster(monkeypatch, half, name):
    monkeypatch.delenv("LION_LIGHTNING_PRECISION")
    speeds = {torch.float32: 1e12, torch.bfloat16: half}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(performance, "_matmul_flops", lambda device, dtype, side: speeds[dtype])
    assert choose_precision("auto", is_alone=True)[0] == name
    assert choose_precision("cpu", is_alone=False)[0] == "32-true", "ranks that measure might not agree"
    disturbed = iter([1e10, half, *[1e12, half] * 4])  # another program ran during the first product in fp32
    monkeypatch.setattr(performance, "_matmul_flops", lambda device, dtype, side: next(disturbed))
    assert choose_precision("auto", is_alone=True)[0] == name


def test_a_cpu_without_bf16_products_is_not_measured(monkeypatch):
    monkeypatch.delenv("LION_LIGHTNING_PRECISION")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(performance, "_matmul_flops", lambda device, dtype, side: pytest.fail("measured"))
    assert choose_precision("cpu", is_alone=True)[0] == "32-true"


@pytest.mark.parametrize("has_bf16", [True, False])
def test_several_processes_on_gpus_go_by_what_the_gpu_can_do(monkeypatch, has_bf16):
    monkeypatch.delenv("LION_LIGHTNING_PRECISION")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_precision("auto", is_alone=False)[0] == ("bf16-mixed" if has_bf16 else "32-true")


def test_the_configuration_names_the_precision_that_was_chosen(monkeypatch):
    trainer = {"precision": "auto", "accelerator": "cpu", "devices": 1, "num_nodes": 1}
    cfg = OmegaConf.create({"trainer": trainer})
    monkeypatch.setenv("LION_LIGHTNING_PRECISION", "bf8")
    with pytest.raises(ConfigError, match=r"LION_LIGHTNING_PRECISION must be one of 32-true.* got 'bf8'"):
        settle_precision(cfg)
    monkeypatch.delenv("LION_LIGHTNING_PRECISION")
    assert settle_precision(cfg).startswith("auto: ")
    assert cfg.trainer.precision in ("32-true", "bf16-mixed")
    cfg.trainer.precision = "bf16-true"
    assert settle_precision(cfg) == "as configured"
    assert cfg.trainer.precision == "bf16-true"


def test_a_step_of_several_micro_batches_has_one_optimizer_step(clock):
    """40 ms for each of four micro-batches, and 60 for the optimizer's step in the last one."""
    callback, module, owner = Throughput(), Module(), trainer()
    owner.accumulate_grad_batches = 4
    callback.on_train_start(owner, module)
    for number in range(WARMUP_BATCHES + 41):
        callback.on_train_batch_start(owner, module, text(8), 0)
        clock.seconds += 0.04 + 0.06 * (number % 4 == 3)
        callback.on_train_batch_end(owner, module, None, text(8), 0)
    assert module.logged["perf/step_ms"] == pytest.approx(220)
    assert module.logged["perf/samples_per_second"] == pytest.approx(4 * 8 / 0.22)
