"""The optimizers Lion and SIGNUM: parameter groups, the step, the step counter and the state dict."""

import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.optim import group_options, import_state, layout, state
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate
from lion_lightning.optim.kernels.select import Engine, choose
from lion_lightning.optim.telemetry import Telemetry

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Group = dict[str, Any]


Entry = tuple[Tensor, int, int]
"""A parameter, the number of its group, and its own number over all groups."""
StepSettings = dict[tuple[int, torch.device], Settings | None]
"""Settings of each group on each device in one step; None where the host knows that the step is skipped."""


class Lion(Optimizer):
    """Lion (Chen et al., 2023, arXiv:2302.06675) whose step and weight decay survive bf16.

    Every keyword may differ per parameter group. The number of steps taken, `param_groups[i]["step"]`, keys the
    stochastic rounding; it is part of the checkpoint, and a step at lr 0 does not advance it.

    Two tensors may be set as attributes, with the names and meaning of torch's fused optimizers: `grad_scale` divides
    the gradients, and a `found_inf` other than 0 makes the step change nothing. Both act inside the update, without
    synchronising.

    Args:
        params: tensors, named tensors or parameter groups; bf16, fp32 or fp64, DTensors included.
        lr: size of every weight's step; a float or a tensor of one element.
        betas: weights of the momentum in the update's direction and in the momentum itself; language recipes take
            (0.95, 0.98).
        weight_decay: decoupled; each step shrinks a weight by lr * weight_decay of itself.
        weight_bits: bits of the fp32 weight kept for a bf16 parameter: 32 (2 bytes of state, exact), 24 (1 byte,
            stochastically rounded) or 16 (no state, stochastically rounded). Ignored for fp32 and fp64.
        momentum_dtype: None (the parameter's dtype), float32, bfloat16 or int8 (blocks of 256 with an fp32 scale).
        cautious: masks updates that the gradient contradicts; no weight moves more than twice lr and its decay.
        cautious_decay: a weight decays only where the step does not take it away from zero (arXiv:2510.12402).
        maximize: ascends.
        nonfinite: "skip" leaves elements whose gradient is not finite as they are; "propagate" follows IEEE: their
            weight and momentum become NaN. Either way they are counted in `nonfinite_count`.
        fused: None takes the best engine for the device, True insists on one other than eager, False takes eager.
        seed: keys the stochastic rounding; the same on every replica.

    Raises:
        ValueError: an argument is not allowed; names it, its value and what is allowed.

    Example:
        >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=0.1)  # doctest: +SKIP
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    _has_warned = False

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
        cautious_decay: bool = False,
        maximize: bool = False,
        nonfinite: str = "skip",
        fused: bool | None = None,
        seed: int = 0,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=tuple(betas) if hasattr(betas, "__iter__") else betas,  # `check` refuses a single number
            weight_decay=weight_decay,
            weight_bits=weight_bits,
            momentum_dtype=group_options.momentum_dtype(momentum_dtype),
            cautious=cautious,
            cautious_decay=cautious_decay,
            maximize=maximize,
            nonfinite=nonfinite,
            fused=fused,
            seed=seed,
        )
        group_options.check(defaults)
        self._step_settings: StepSettings = {}
        self._places: dict[Tensor, Entry] = {}
        self._nonfinite: dict[torch.device, Tensor] = {}
        self._telemetry = Telemetry()
        super().__init__(params, defaults)
        self._saving = self.register_state_dict_post_hook(with_plain_groups)

    @override
    def add_param_group(self, param_group: Group) -> None:
        group_options.check_names(param_group, self.defaults)
        group = {**self.defaults, "step": 0, **param_group}
        group_options.check(group)
        group["momentum_dtype"] = group_options.momentum_dtype(group["momentum_dtype"])
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        if not isinstance(group["params"], set):  # which torch refuses
            # Tied weights may be listed twice: each parameter counts once, in order of appearance.
            entries = {id(entry[1] if isinstance(entry, tuple) else entry): entry for entry in group["params"]}
            group["params"] = list(entries.values())
            if any("param_names" in other for other in self.param_groups):  # torch takes names for all groups or none
                count = sum(len(other["params"]) for other in self.param_groups)
                group["params"] = [
                    entry if isinstance(entry, tuple) else (f"param_{count + place}", entry)
                    for place, entry in enumerate(group["params"])
                ]
        for entry in group["params"]:
            param = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(param, Tensor):  # torch reports entries of other types
                group_options.check_param(param)
        super().add_param_group(group)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "telemetry_every": self.telemetry_every}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_nonfinite", {})
        self.__dict__.setdefault("_telemetry", Telemetry())
        self.telemetry_every = state.get("telemetry_every", self.telemetry_every)
        super().__setstate__({name: value for name, value in state.items() if name != "telemetry_every"})
        if "_saving" not in self.__dict__:  # a copy or a pickle, which have no hooks
            self._saving = self.register_state_dict_post_hook(with_plain_groups)
        self._step_settings, self._places = {}, {}
        self.defaults.pop("differentiable", None)  # torch sets it, and Lion has no such option
        for group in self.param_groups:
            group.setdefault("step", 0)
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @property
    def nonfinite_count(self) -> Tensor:
        """Gradient elements that were not finite since the optimizer was made: int64 of shape (), on the device."""
        counts = list(self._nonfinite.values()) or [torch.zeros((), dtype=torch.int64, device="cpu")]
        return torch.stack([count.to(counts[0].device, non_blocking=True) for count in counts]).sum()

    @property
    def telemetry_every(self) -> int:
        """Number of steps from one sample of `telemetry` to the next; 0, the default, takes none. May be set."""
        return self._telemetry.every

    @telemetry_every.setter
    def telemetry_every(self, steps: int) -> None:
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"telemetry_every={steps!r} is not allowed: use a whole number, 0 or above")
        self._telemetry.every = steps

    def telemetry(self) -> dict[str, Tensor]:
        """Metrics of the last sampled step under `lion/`, tensors of shape () on the device; empty before the first.

        They are estimated from up to 16,384 elements of each parameter. A sampled step is slower than others.

        unmoved: share of weights whose stored bits did not change. zero_update: share of u = 0. sign_agreement: share
        of elements whose momentum and gradient had the same sign. flip_rate: share of u that changed sign since the
        last sample. momentum_rms. step_ratio_scalar, _vector and _matrix: lr / RMS(p), healthy at about 1e-3.
        near_bound: share of |p| > 0.9/weight_decay. realised_decay: the decay that happened over the one requested, 1
        is right. nonfinite: count.
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
            ValueError: a gradient is sparse or complex, or an option was set to a value that is not allowed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._apply_gradients()
        return loss

    @_disable_dynamo  # engines work on addresses, so a compiled training step calls them uncompiled
    def _apply_gradients(self) -> None:
        """Collects what has a gradient, chooses an engine for each update, runs them, and counts the step."""
        settings, is_begun = self._step_settings, bool(self._places)
        self._step_settings, self._places = {}, {}
        entries = [entry for entry in self._entries() if entry[0].grad is not None]
        self._prepare(entries, settings)
        if not is_begun:
            self._telemetry.begin_step()
        self._run(entries, settings)
        self._telemetry.end_step()
        for number, group in enumerate(self.param_groups):
            # ZeroRedundancyOptimizer leaves a rank groups without parameters, and may save their counters.
            owners = {number} if group["params"] else range(len(self.param_groups))
            used = (each for (owner, _), each in settings.items() if owner in owners and each is not None)
            self._count_step(group, next(used, None))

    @torch.no_grad()
    def step_param(self, param: Tensor) -> None:
        """Steps one parameter ahead of the others, for callers that apply gradients inside backward.

        The caller then frees the gradient. The next `step` completes the pass: it steps the parameters that still have
        gradients and advances the step counter once. The result equals that of one `step` with all gradients, bit for
        bit, as long as options do not change in between.

        Args:
            param: a parameter of this optimizer that has a gradient, and has not stepped since the last `step`.

        Raises:
            ValueError: as `step`.
        """
        if not self._places:
            self._places = {entry[0]: entry for entry in self._entries()}
            self._telemetry.begin_step()
        entries = [self._places[param]]
        self._prepare(entries, self._step_settings)
        self._run(entries, self._step_settings)

    def _entries(self) -> list[Entry]:
        pairs = ((param, number) for number, group in enumerate(self.param_groups) for param in group["params"])
        return [(*pair, index) for index, pair in enumerate(pairs)]

    def _prepare(self, entries: list[Entry], settings: StepSettings) -> None:
        """Checks everything, completes `settings`, and only then prepares the state of the parameters."""
        unready = []
        for param, number, index in entries:
            group = self.param_groups[number]
            assert param.grad is not None
            try:
                group_options.check_grad(param.grad, param)
                if (number, param.device) not in settings:
                    settings[number, param.device] = self._read_settings(group, param.device)
                storage = group["weight_bits"], group_options.momentum_dtype(group["momentum_dtype"])
                found = self.state.get(param, {})
                if not state.is_ready(found, param, *storage):
                    state.check(found, param)
                    state.check_device(found, param)
                    unready.append((param, storage))
            except ValueError as error:
                raise ValueError(f"{self._label(index)}: {error}") from None
        for param, storage in unready:
            self.state[param] = state.prepare(self.state[param], param, *storage)

    def _run(self, entries: list[Entry], settings: StepSettings) -> None:
        """Chooses an engine for each update, then runs those that have elements, by engine and device."""
        copies: list[tuple[Tensor, Tensor]] = []
        batches: dict[tuple[str, torch.device], tuple[Engine, list[TensorUpdate]]] = {}
        written = []
        for param, number, index in entries:
            used = settings[number, param.device]
            if used is None:
                continue
            written.append(param)
            update = layout.tensor_update(param, self.state[param], index, used, copies)
            engine = choose(update, self.param_groups[number]["fused"])
            if update.param.numel():
                batches.setdefault((engine.name, param.device), (engine, []))[1].append(update)
        for (_, device), (engine, batch) in batches.items():
            if device not in self._nonfinite:
                self._nonfinite[device] = torch.zeros((), dtype=torch.int64, device=device)
            self._telemetry.run(engine, batch, self._nonfinite[device])
        torch.autograd.graph.increment_version(written)  # engines that write memory do not inform autograd
        for target, source in copies:
            target.copy_(source)

    def _label(self, index: int) -> str:
        """A parameter's number over all groups, and its name where the optimizer has names."""
        groups = self.param_groups
        names = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
        return f"parameter {index}" + (f" ({names[index]!r})" if names[index] is not None else "")

    def _read_settings(self, group: Group, device: torch.device) -> Settings | None:
        """A group's settings for one step on a device; None where the host knows that the step is skipped."""
        group_options.check(group)
        lr = _number(group["lr"], device)
        if not self._has_warned and isinstance(lr, (int, float)) and lr > group_options.EXTREME_RATE:
            self._has_warned = True
            warnings.warn(group_options.EXTREME_RATE_WARNING.format(lr=lr), stacklevel=2)
        found_inf = _number(self.found_inf, device)
        if not isinstance(found_inf, Tensor):
            if found_inf:
                return None
            found_inf = None
        grad_scale = _number(self.grad_scale, device)
        is_random = group["weight_bits"] != 32 or group_options.momentum_dtype(group["momentum_dtype"]) == torch.int8
        if is_random and device.type != "cpu" and not isinstance(group["step"], Tensor):
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a graph would round alike in every replay: take one step before it is captured")
            # Where the kernels may be replayed from a graph, the counter has to advance on the device.
            group["step"] = torch.full((), group["step"], dtype=torch.int64, device=device)
        return Settings(
            lr=lr,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            weight_decay=float(group["weight_decay"]),
            weight_bits=int(group["weight_bits"]),
            cautious=bool(group["cautious"]),
            cautious_decay=bool(group["cautious_decay"]),
            maximize=bool(group["maximize"]),
            skip_nonfinite=group["nonfinite"] == "skip",
            seed=int(group["seed"]),
            step=_number(group["step"], device),
            grad_scale=1.0 if grad_scale is None else grad_scale,
            found_inf=found_inf,
        )

    def _count_step(self, group: Group, used: Settings | None) -> None:
        """Advances a group's counter by a step that could move weights: at lr 0, or with `found_inf`, none does."""
        if used is None:
            return
        lr, found_inf, counter = used.lr, used.found_inf, group["step"]
        if not isinstance(counter, Tensor):
            group["step"] = counter + (1 if isinstance(lr, Tensor) or lr != 0 else 0)
        else:
            counter += (lr != 0) if found_inf is None else (found_inf == 0) & (lr != 0)

    def full_precision_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict with every bf16 tensor as the fp32 number it stands for.

        See `lion_lightning.optim.state.full_precision_state_dict`.
        """
        return state.full_precision_state_dict(model, self)

    @override
    def state_dict(self) -> dict[str, Any]:
        """State of every parameter, and the options of every group as plain numbers and names.

        `fused` depends on the machine: it is saved as None, and not loaded.
        """
        for param, _, index in self._entries():
            try:
                state.check_gatherable(self.state.get(param, {}), param)
            except ValueError as error:
                raise ValueError(f"{self._label(index)}: {error}") from None
        return super().state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a `state_dict`, each tensor in the dtype it was saved in (torch casts it to the parameter's).

        State of other Lion implementations that keep nothing but `exp_avg` loads unchanged. Everything is checked
        before anything changes.

        Raises:
            ValueError: the state is of another optimizer, or does not fit; names the parameter, tensor or option, what
                was found and what is allowed.
        """
        if not hasattr(state_dict, "copy"):
            import_state.check_structure(state_dict)
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups, fresh = self._checked(state_dict)
        self.__setstate__({"state": type(self.state)(dict, fresh), "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _checked(self, state_dict: dict[str, Any]) -> tuple[list[Group], dict[Tensor, dict[str, Any]]]:
        """Groups and state as they are to be after a load; changes nothing."""
        import_state.check_loadable(state_dict)
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != saved_sizes:
            raise ValueError(f"state_dict has parameter groups of sizes {saved_sizes}; allowed here are {sizes}")
        groups = []
        for saved, current in zip(state_dict["param_groups"], self.param_groups, strict=True):
            given = deepcopy({key: value for key, value in saved.items() if key != "params"})
            group = {**self.defaults, **current, "step": 0, **given}  # what was not saved stays
            group_options.check({**group, "fused": current["fused"]})
            group.update(params=current["params"], fused=current["fused"])
            group["momentum_dtype"] = group_options.momentum_dtype(group["momentum_dtype"])
            group["step"] = _like(int(group["step"]), current["step"])
            groups.append(group)
        saved_ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        unknown = [key for key in state_dict["state"] if key not in saved_ids]
        if unknown:
            raise ValueError(
                f"state_dict has state of {unknown[:5]}, which no parameter group lists; use {saved_ids[:5]}"
            )
        fresh = {}
        for key, (param, _, index) in zip(saved_ids, self._entries(), strict=True):
            if key in state_dict["state"]:
                try:
                    fresh[param] = state.loaded(state_dict["state"][key], param)
                except ValueError as error:
                    raise ValueError(f"{self._label(index)}: {error}") from None
        return groups, fresh


class Signum(Lion):
    """SIGNUM (Bernstein et al., 2018, arXiv:1802.04434) in all of Lion's storage modes and engines.

    SIGNUM updates the momentum first, m <- b*m + (1-b)*g, and steps along sign(m). Lion with both betas equal to b
    steps along sign(b*m + (1-b)*g), which is the same.

    A parameter group may have a `momentum` of its own. Schedules that cycle the first beta, as `OneCycleLR`, move b.

    Args:
        params: as for `Lion`.
        lr: size of every weight's step.
        momentum: b, in [0, 1).
        weight_decay: decoupled; 0 in the paper.
        **options: the keyword options of `Lion`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, (momentum, momentum), weight_decay, **options)

    @override
    def add_param_group(self, param_group: Group) -> None:
        if "momentum" in param_group:
            momentum = param_group["momentum"]
            param_group = {name: value for name, value in param_group.items() if name != "momentum"}
            param_group["betas"] = (momentum, momentum)
        super().add_param_group(param_group)

    @override
    def _read_settings(self, group: Group, device: torch.device) -> Settings | None:
        settings = super()._read_settings(group, device)  # which checks the group
        group["betas"] = (group["betas"][0],) * 2
        return None if settings is None else replace(settings, beta2=settings.beta1)


def with_plain_groups(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook of `state_dict`, the first: makes Lion's groups plain numbers and names before other hooks see them."""
    groups = state_dict["param_groups"]
    plain = [group_options.saved(group) if "weight_bits" in group else group for group in groups]
    return {**state_dict, "param_groups": plain}


def _like(count: int, counter: int | Tensor) -> int | Tensor:
    """A step counter where the one before was: on a device it stays there, for graphs that are captured."""
    return torch.full_like(counter, count) if isinstance(counter, Tensor) else count


def _number(value: Any, device: torch.device) -> Any:
    """A number where the host can read it without synchronising, else a tensor of shape () on the device."""
    if not isinstance(value, Tensor):
        return group_options.plain(value)
    if value.device.type == "cpu" or device.type == "cpu":
        return value.item()
    return value.reshape(()).to(device, non_blocking=True)
