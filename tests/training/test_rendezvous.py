"""Ranks agree on a name that no attempt before them had, whatever was left in the store."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from lion_lightning.training.distributed import agree

PATIENCE = timedelta(seconds=20)


def attempt(store: dist.Store, ranks: list[int], patience: timedelta = PATIENCE) -> dict[int, str]:
    """What each of `ranks` returns, of three."""
    agreed: dict[int, str] = {}

    def one(rank: int) -> None:
        agreed[rank] = agree(store, rank, 3, patience)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return agreed


def test_each_attempt_has_one_name_of_its_own() -> None:
    store = dist.HashStore()
    store.set_timeout(PATIENCE)
    names = [attempt(store, order) for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2])]
    assert all(len(agreed) == 3 and len(set(agreed.values())) == 1 for agreed in names)
    assert len({agreed[0] for agreed in names}) == 3


def test_what_a_crashed_attempt_asked_is_answered_and_forgotten() -> None:
    store = dist.HashStore()
    store.set_timeout(PATIENCE)
    store.set("question/1", "somebody who is gone")
    first = attempt(store, [0, 1, 2])
    store.set("question/2", "somebody who came only half")
    assert set(attempt(store, [2, 1, 0]).values()).isdisjoint(first.values())


def test_ranks_that_never_come_are_named() -> None:
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError, match="these ranks had not come: 1, 2"):
        agree(store, 0, 3, timedelta(seconds=0.1))
