"""Muon for the matrices inside a network and Lion for the rest, as one optimizer: a baseline of comparisons."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon, Optimizer
from typing_extensions import override

from lion_lightning.optim import import_state, state
from lion_lightning.optim.lion import Lion, ParamsT, with_plain_groups

NOT_MUON = ("embed", "wte", "wpe", "head", "classifier", "decoder")
"""Parts of the names of embeddings and output layers, which Muon is not made for."""


class MuonWithLion(Optimizer):
    """torch's Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) for matrices, Lion for other parameters.

    Each parameter group is split into two, `<name>/muon` and `<name>/lion`. There is one `step`, one state dict and one
    list of parameter groups, so schedules, checkpoints and automatic optimization work as with any optimizer.

    Args:
        params: tensors, named tensors or parameter groups. Parameters of two dimensions go to Muon, unless their name
            says that they are an embedding or an output layer; without names all of them do.
        lr: Muon's, in AdamW's units (`adjust_lr_fn="match_rms_adamw"`: Liu et al., 2025, arXiv:2502.16982).
        weight_decay: Muon's, decoupled. A group with a decay of 0 has none for its other parameters either.
        momentum: Muon's.
        lion: options of `Lion` for the other parameters. Its rate is a tenth of `lr` by default, and its decay ten
            times the other. A group with twice the rate `lr` has twice Lion's as well.
        not_muon: parts of names of matrices that Lion takes.

    Raises:
        ValueError: an option is not allowed, or `params` is empty.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        lion: Mapping[str, Any] | None = None,
        not_muon: Sequence[str] = NOT_MUON,
    ) -> None:
        self._muon = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
        self._lion = {"lr": lr / 10, "weight_decay": 10 * weight_decay, **(lion or {})}
        self._not_muon = tuple(not_muon)
        self._parts: dict[type[Optimizer], Optimizer] = {}
        super().__init__(params, {})
        self._saving = self.register_state_dict_post_hook(with_plain_groups)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        members = [params] if isinstance(params, Tensor) else list(params)
        matrices = [member for member in members if self._is_matrix(member)]
        others = [member for member in members if not self._is_matrix(member)]
        name = {"name": f"{param_group['name']}/muon"} if "name" in param_group else {}
        if matrices or not members:  # torch reports a list without members
            self._add(Muon, self._muon, {**param_group, **name, "params": matrices})
        if others:
            group = {key: value for key, value in param_group.items() if key not in self._muon}
            group["lr"] = self._lion["lr"] * (param_group.get("lr", self._muon["lr"]) / (self._muon["lr"] or 1.0))
            if param_group.get("weight_decay") == 0:
                group["weight_decay"] = 0.0
            name = {"name": f"{param_group['name']}/lion"} if "name" in param_group else {}
            self._add(Lion, self._lion, {**group, **name, "params": others})

    def _is_matrix(self, member: Any) -> bool:
        name, param = member if isinstance(member, tuple) else ("", member)
        return param.ndim == 2 and not any(part in name.lower() for part in self._not_muon)

    def _add(self, kind: type[Optimizer], options: Mapping[str, Any], group: dict[str, Any]) -> None:
        """Adds a group to the optimizer of its kind; both this one and that hold the same dict."""
        if kind in self._parts:
            self._parts[kind].add_param_group(group)
        else:
            self._parts[kind] = kind([group], **options)
        super().add_param_group(self._parts[kind].param_groups[-1])

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step of both; see `Lion.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share_groups()
        for part in self._parts.values():
            part.state = self.state
            part.step()
        return loss

    def _share_groups(self) -> None:
        """Gives each part the groups of its kind: callbacks may have replaced the list of groups."""
        for kind, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if ("ns_steps" in group) == (kind is Muon)]

    @override
    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer; the groups are those of the two optimizers, in the order of `param_groups`."""
        for param, entry in self.state.items():
            state.check_gatherable(entry, param)
        return super().state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a `state_dict`.

        Raises:
            ValueError: it is no state dict, is of another optimizer, or does not fit.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        import_state.check_structure(state_dict)
        groups = state_dict["param_groups"]
        found, allowed = (
            [("muon" if "ns_steps" in group else "other", len(group["params"])) for group in each]
            for each in (groups, self.param_groups)
        )
        if found != allowed:
            raise ValueError(f"state_dict has groups (kind, number of parameters) {found}; allowed here are {allowed}")
        for saved, group in zip(groups, self.param_groups, strict=True):
            for key, param in zip(saved["params"], group["params"], strict=True) if "ns_steps" in group else ():
                _check_muon(key, param, state_dict["state"].get(key, {}))
        self._share_groups()
        loaded = list(self.param_groups)
        fresh: dict[Tensor, Any] = {}
        for part in (self._parts[kind] for kind in (Lion, Muon) if kind in self._parts):  # Lion checks first
            numbers = [id(group) for group in self.param_groups]
            positions = [numbers.index(id(group)) for group in part.param_groups]
            ids = {key for position in positions for key in groups[position]["params"]}
            part.load_state_dict(
                {
                    "state": {key: value for key, value in state_dict["state"].items() if key in ids},
                    "param_groups": [groups[position] for position in positions],
                }
            )
            fresh.update(part.state)
            for position, group in zip(positions, part.param_groups, strict=True):
                loaded[position] = group
        self.__setstate__({"state": type(self.state)(dict, fresh), "param_groups": loaded})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_saving" not in self.__dict__:  # a copy or a pickle, which have no hooks
            self._saving = self.register_state_dict_post_hook(with_plain_groups)

    @override
    def __getstate__(self) -> dict[str, Any]:
        own = ("_muon", "_lion", "_not_muon", "_parts")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}


def _check_muon(key: object, param: Tensor, entry: Mapping[str, Any]) -> None:
    """Refuses state of Muon that does not fit a parameter, which torch's would find in the middle of a step."""
    buffer = entry.get("momentum_buffer", param) if isinstance(entry, Mapping) else entry
    if not isinstance(buffer, Tensor) or buffer.shape != param.shape:
        seen = tuple(buffer.shape) if isinstance(buffer, Tensor) else f"a {type(buffer).__name__}"
        raise ValueError(f"parameter {key}: the momentum_buffer is {seen}; allowed here is {tuple(param.shape)}")
