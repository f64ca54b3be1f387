"""The Lion optimizer: parameter groups, state, the step counter and the choice of an engine."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.optim import group_options, layout, precision
from lion_lightning.optim.kernels import Engine, choose
from lion_lightning.optim.kernels.cpu import CpuEngine, Tasks
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate
from lion_lightning.optim.state import loaded, prepare
from lion_lightning.optim.telemetry import Telemetry

Batch = tuple[Engine, list[TensorUpdate]]
"""What an engine is to do on one device."""
ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Lion(Optimizer):
    """Lion (Chen et al., 2023, arXiv:2302.06675) whose step and weight decay survive bf16.

    Every keyword may differ per parameter group. The number of steps taken, `param_groups[i]["step"]`, keys the
    stochastic rounding; it is part of the checkpoint, and a step at lr 0 does not advance it.

    Args:
        params: tensors, named tensors or parameter groups; bf16, fp32 or fp64, DTensors included.
        lr: size of every weight's step; a float or a tensor of one element.
        betas: weights of the momentum in the update's direction and in the momentum itself; language recipes take
            (0.95, 0.98).
        weight_decay: decoupled; a weight shrinks by lr * weight_decay of itself a step.
        weight_bits: bits of the fp32 weight kept for a bf16 parameter: 32 (2 bytes of state, exact), 24 (1 byte,
            stochastically rounded) or 16 (no state, stochastically rounded). Of no meaning to fp32 and fp64.
        momentum_dtype: None (the parameter's dtype), float32, bfloat16 or int8 (blocks of 256 with an fp32 scale).
        cautious: masks updates that the gradient contradicts; no weight moves more than twice lr and its decay.
        maximize: ascends.
        nonfinite: "skip" leaves elements whose gradient is not finite as they are; "propagate" follows IEEE: their
            weight and momentum become NaN. Either way they are counted in `nonfinite_count`.
        fused: None takes the best engine for the device, True insists on one that is not eager, False takes eager.
        seed: keys the stochastic rounding; the same on every replica.

    Raises:
        ValueError: an argument is not allowed; names it, its value and what is.

    Example:
        >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=0.1)  # doctest: +SKIP

    Two tensors may be set as attributes, named and meant as in torch's fused optimizers: `grad_scale` divides the
    gradients and a `found_inf` other than 0 makes the step change nothing. Both act inside the update, without a wait
    for the device. And a function: `before_update` is called once, by the next step, when it has looked up all
    gradients and before anything changes; it may set those two, and says whether it has. It is given the tasks of the
    cpu engine, or None where another one has something to do.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    before_update: Callable[[Tasks | None], bool] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        weight_bits: int = 32,
        momentum_dtype: torch.dtype | str | None = None,
        cautious: bool = False,
        maximize: bool = False,
        nonfinite: str = "skip",
        fused: bool | None = None,
        seed: int = 0,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            weight_decay=weight_decay,
            weight_bits=weight_bits,
            momentum_dtype=group_options.momentum_dtype(momentum_dtype),
            cautious=cautious,
            maximize=maximize,
            nonfinite=nonfinite,
            fused=fused,
            seed=seed,
        )
        group_options.check(defaults)
        self._nonfinite: dict[torch.device, Tensor] = {}
        self._telemetry = Telemetry()
        super().__init__(params, defaults)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group_options.check_names(param_group)
        group = {**self.defaults, "step": 0, **param_group}
        group_options.check(group)
        group["momentum_dtype"] = group_options.momentum_dtype(group["momentum_dtype"])
        group["params"] = _once(group["params"])
        for entry in [group["params"]] if isinstance(group["params"], Tensor) else group["params"]:
            param = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(param, Tensor):  # torch has its own words for what is not a tensor
                group_options.check_param(param)
        super().add_param_group(group)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_nonfinite", {})
        self.__dict__.setdefault("_telemetry", Telemetry())
        self.defaults.pop("differentiable", None)  # torch sets it, and Lion has no such option
        for group in self.param_groups:
            group.setdefault("step", 0)
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @property
    def nonfinite_count(self) -> Tensor:
        """Gradient elements that were not finite since the optimizer was made: 0-d int64, without a wait for it."""
        counts = list(self._nonfinite.values())
        if not counts:
            return torch.zeros((), dtype=torch.int64)
        return sum((count.to(counts[0].device, non_blocking=True) for count in counts[1:]), counts[0].clone())

    @property
    def telemetry_every(self) -> int:
        """Every how many steps `telemetry` is sampled; 0, the default, is never. May be set."""
        return self._telemetry.every

    @telemetry_every.setter
    def telemetry_every(self, steps: int) -> None:
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"telemetry_every={steps!r} is not allowed: use a whole number, 0 or above")
        self._telemetry.every = steps

    def telemetry(self) -> dict[str, Tensor]:
        """Figures of the last sampled step under `lion/`, 0-d tensors on the device; empty before the first.

        unmoved: share of weights whose stored bits did not change. zero_update: share of u = 0. sign_agreement: share
        of elements whose momentum and gradient had the same sign. flip_rate: share of u that changed sign since the
        last sample. momentum_rms. step_ratio_scalar, _vector and _matrix: lr / RMS(p), about 1e-3 is healthy.
        near_bound: share of |p| > 0.9/weight_decay. realised_decay: what happened over what was asked, 1 is right.
        nonfinite: count.
        """
        return self._telemetry.summary()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a gradient is sparse or complex, or an option was set to what is not allowed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @_disable_dynamo  # engines work on addresses: a compiled training step calls them as they are
    def _update(self) -> None:
        look, self.before_update = self.before_update, None
        updates: list[tuple[Engine, TensorUpdate]] = []
        copies: list[tuple[Tensor, Tensor]] = []
        stepped: list[Tensor] = []
        counts: list[tuple[dict[str, Any], list[Settings]]] = []
        index = -1
        for group in self.param_groups:
            settings: dict[torch.device, Settings | None] = {}
            for param in group["params"]:
                index += 1
                if param.grad is None:
                    continue
                group_options.check_grad(param.grad)
                if param.device not in settings:
                    settings[param.device] = self._settings(group, param.device)
                now, state = settings[param.device], self.state[param]
                prepare(state, param, group["weight_bits"], group_options.momentum_dtype(group["momentum_dtype"]))
                if now is not None:
                    update = layout.tensor_update(param, state, index, now, copies)
                    updates.append((choose(update, group["fused"]), update))
                    stepped.append(param)
            counts.append((group, [now for now in settings.values() if now is not None]))
        batches = _batches(updates)
        tasks = None if look is None else _tasks(batches)
        if look is not None and look(tasks):
            self._update()  # with other settings
            return
        self._run(batches, tasks)
        torch.autograd.graph.increment_version(stepped)  # engines that write memory do not tell autograd
        for group, used in counts:
            self._count_step(group, used)
        for target, source in copies:
            target.copy_(source)

    def _run(self, batches: list[Batch], tasks: Tasks | None) -> None:
        self._telemetry.attach([update for _, batch in batches for update in batch])
        for engine, batch in batches:
            device = batch[0].param.device
            if device not in self._nonfinite:
                self._nonfinite[device] = torch.zeros((), dtype=torch.int64, device=device)
            if isinstance(engine, CpuEngine):
                engine.step(batch, self._nonfinite[device], tasks)
            else:
                engine.step(batch, self._nonfinite[device])

    def _settings(self, group: dict[str, Any], device: torch.device) -> Settings | None:
        """The group's settings for one step on a device; None where the host knows that the step is to be skipped."""
        group_options.check(group)
        found_inf = _known(self.found_inf, device)
        if found_inf is not None and not isinstance(found_inf, Tensor):
            if found_inf != 0:
                return None
            found_inf = None
        grad_scale = _known(self.grad_scale, device)
        lr = _known(group["lr"], device)
        assert lr is not None
        is_random = group["weight_bits"] != 32 or group_options.momentum_dtype(group["momentum_dtype"]) == torch.int8
        if is_random and device.type != "cpu" and not isinstance(group["step"], Tensor):
            # Where the kernels may be replayed from a graph, the counter has to advance on the device.
            group["step"] = torch.full((), group["step"], dtype=torch.int64, device=device)
        return Settings(
            lr=lr,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            weight_decay=float(group["weight_decay"]),
            weight_bits=group["weight_bits"],
            cautious=group["cautious"],
            maximize=group["maximize"],
            skip_nonfinite=group["nonfinite"] == "skip",
            seed=group["seed"],
            step=_known(group["step"], device),
            grad_scale=1.0 if grad_scale is None else grad_scale,
            found_inf=found_inf,
        )

    def _count_step(self, group: dict[str, Any], used: list[Settings]) -> None:
        """Advances a group's counter by a step that could move weights: at lr 0, or with `found_inf`, none does."""
        if not used:
            return
        lr, found_inf, counter = used[0].lr, used[0].found_inf, group["step"]
        if not isinstance(counter, Tensor):
            group["step"] = counter + (1 if isinstance(lr, Tensor) or lr != 0 else 0)
        elif isinstance(lr, Tensor) or found_inf is not None:
            moves = (lr != 0).to(counter.dtype) if isinstance(lr, Tensor) else torch.ones_like(counter)
            counter += moves if found_inf is None else moves * (found_inf == 0)
        elif lr != 0:
            counter += 1

    def full_precision_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict with every bf16 tensor as the fp32 number it stands for: see precision.py."""
        return precision.full_precision_state_dict(model, self)

    @override
    def state_dict(self) -> dict[str, Any]:
        """State of every parameter and the options of every group but `fused`, which is the machine's affair."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.pop("fused", None)
            group["step"] = int(group["step"])
        return saved

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a `state_dict`, each tensor in the dtype it was saved in (torch casts it to the parameter's).

        State of other Lion implementations that call the momentum `exp_avg` loads as it is.

        Raises:
            ValueError: groups differ in number or size from those of this optimizer.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups = deepcopy(state_dict["param_groups"])
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in groups]
        if sizes != saved_sizes:
            raise ValueError(f"state_dict has parameter groups of sizes {saved_sizes}; allowed here are {sizes}")
        saved_ids = chain.from_iterable(group["params"] for group in groups)
        params = dict(zip(saved_ids, chain.from_iterable(g["params"] for g in self.param_groups), strict=True))
        state = {params.get(key, key): loaded(value, params.get(key)) for key, value in state_dict["state"].items()}
        for group, current in zip(groups, self.param_groups, strict=True):
            group["params"] = current["params"]
            group.update({name: current[name] for name in ("fused",)})
            if "param_names" in current:
                group.setdefault("param_names", current["param_names"])
        fresh: dict[str, Any] = {"state": type(self.state)(dict, state), "param_groups": groups}
        self.__setstate__(fresh)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _batches(updates: list[tuple[Engine, TensorUpdate]]) -> list[Batch]:
    """Those that have elements, by engine and device."""
    batches: dict[tuple[str, torch.device], Batch] = {}
    for engine, update in updates:
        if update.param.numel():
            batches.setdefault((engine.name, update.param.device), (engine, []))[1].append(update)
    return list(batches.values())


def _tasks(batches: list[Batch]) -> Tasks | None:
    """Those of the cpu engine, if it has all to do."""
    if len(batches) != 1 or not isinstance(engine := batches[0][0], CpuEngine):
        return None
    return engine.tasks(batches[0][1])


def _once(params: Any) -> Any:
    """Each parameter of a group once, in order of appearance: tied weights may be listed twice."""
    if isinstance(params, (Tensor, set)):  # torch takes the one and refuses the other
        return params
    return list({id(entry[1] if isinstance(entry, tuple) else entry): entry for entry in params}.values())


def _known(value: Any, device: torch.device) -> Any:
    """A number where the host can know it without waiting for the device, else a 0-d tensor on the device."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu" or device.type == "cpu":
        return value.item()
    return value.reshape(()).to(device, non_blocking=True)
