"""What a stranger's file, name or picture cannot do, and what a run does not tell of its owner."""

import contextlib
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from PIL import Image
from torch.distributed.checkpoint.api import CheckpointException

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.image_classification.images import square
from lion_lightning.training.checkpoint.files import load
from lion_lightning.training.checkpoint.sharded_state import load_sharded
from lion_lightning.training.logging_setup import (
    HIDDEN,
    redacted,
    redacted_argument,
    redacted_text,
    refuse_secrets_of_a_sweep,
)

CANARY = "canary" + "9d4f" * 6
SECRETS = {  # how a secret gets on a command line
    "a name that says so": f"+hub.token={CANARY}1",
    "camel case": f"+store.secretAccessKey={CANARY}2",
    "deep": f"+a.b.c.password={CANARY}3",
    "in a list": f"+apikey=[{CANARY}4,x]",
    "user information of a URL": f"+mirror=https://someone:{CANARY}5@example.org/data",
    "a query": f"+signed='https://example.org/x?size=3&X-Amz-Signature={CANARY}6&token={CANARY}7'",
    "a Hugging Face token": f"+note=hf_{CANARY}8",
    "a W&B key": f"+remark=wandb_v1_{CANARY}9",
}


def with_canary(folder: Path) -> list[str]:
    """Files below `folder` in which a secret can be read."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [str(file.relative_to(folder)) for file in files if CANARY.encode() in file.read_bytes()]


@pytest.mark.slow
def test_no_file_of_a_run_holds_a_secret(root: Path, tmp_path: Path) -> None:
    """A real run with W&B, its secrets on the command line and in the environment; every file it wrote is searched."""
    settings = ["recipe=image_classification", "optim.lr=5e-4", "logger=wandb", "logger.mode=offline",
                "trainer.max_steps=2", "trainer.val_check_interval=2", f"hydra.run.dir={tmp_path / 'run'}"]  # fmt: skip
    environment = {"WANDB_API_KEY": f"{CANARY}10", "HF_TOKEN": f"hf_{CANARY}11", "SECRET": f"{CANARY}12"}
    done = subprocess.run(
        [sys.executable, "train.py", *settings, *SECRETS.values()],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert CANARY not in done.stdout + done.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" and b"val_check_interval" in file.read_bytes() for file in files)
    assert any(file.suffix == ".ckpt" for file in files)
    assert not with_canary(tmp_path)
    kept = OmegaConf.load(tmp_path / "run/config.yaml")
    assert kept.hub.token == HIDDEN
    assert kept.mirror == f"https://{HIDDEN}@example.org/data"
    assert kept.optim.lr == 5e-4, "nothing else is hidden"


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_a_secret_on_the_command_line_of_a_sweep_is_refused(secret: str) -> None:
    """Hydra would keep it in `multirun.yaml`."""
    with pytest.raises(ConfigError, match=r"put it into an environment variable") as refused:
        refuse_secrets_of_a_sweep(["-m", "optim=lion,adamw", secret])
    assert CANARY not in str(refused.value)
    refuse_secrets_of_a_sweep(["optim=lion", secret])  # a single run keeps no command line


def test_a_sweep_takes_secrets_from_the_environment() -> None:
    free = ["+hub.token=${oc.env:A},${oc.env:B}", "data.revision=" + "a1" * 20 + "," + "b2" * 20, "~hub", "seed=1,2"]
    refuse_secrets_of_a_sweep(["--multirun", *free])


@pytest.mark.parametrize("name", ["token", "hub_token", "apiKey", "API_KEY", "db-password", "aws_secret_access_key"])
def test_a_setting_whose_name_says_so_is_hidden(name: str) -> None:
    assert redacted({"a": [{name: "x"}, {name: 5}]}) == {"a": [{name: HIDDEN}, {name: HIDDEN}]}
    assert redacted_argument(f"+a.{name}=x") == f"+a.{name}={HIDDEN}"


@pytest.mark.parametrize(
    "value",
    [
        {"max_tokens": 5, "tokens_per_sample": 64, "monkey": "x", "tokenizer": "wordpiece", "keys": "a", "key": "b"},
        {"revision": "0123456789abcdef0123456789abcdef01234567", "path": "/a/b@c", "lr": 1e-3, "token": None},
        {"url": "https://example.org/a?size=3", "betas": [0.9, 0.99], "flag": True},
    ],
)
def test_nothing_else_is_hidden(value: dict[str, Any]) -> None:
    assert redacted(value) == value


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "a1" * 17,
        "ghp_" + "a1" * 18,
        "sk-ant-" + "a1" * 20,
        "AKIA" + "A1" * 8,
        "a1" * 20,
        "wandb_v1_" + "a" * 40,
    ],
)
def test_a_token_is_known_by_its_look(token: str) -> None:
    assert redacted_text(f"see {token} there") == f"see {HIDDEN} there"


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("where", ["metadata", "item"])
def test_a_malicious_sharded_checkpoint_is_refused_and_runs_nothing(tmp_path: Path, where: str) -> None:
    owned, folder, weights = tmp_path / "owned", tmp_path / "sharded", {"w": torch.ones(3)}
    item = Exploit(owned) if where == "item" else 5
    dcp.save({"state_dict": weights, "other": item}, checkpoint_id=folder, no_dist=True)
    if where == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Exploit(owned)))
    with pytest.raises(RuntimeError, match=r"cannot be loaded: rank 0: .*(place in the metadata|Weights only load)"):
        load_sharded({"state_dict": {"w": torch.zeros(3)}, "other": 0}, folder, alone=True)
    assert not owned.exists()
    with contextlib.suppress(Exception, CheckpointException):  # torch itself runs it
        dcp.load({"state_dict": {"w": torch.zeros(3)}, "other": 0}, checkpoint_id=folder, no_dist=True)
    assert owned.exists(), "the exploit does not work, so nothing was shown"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_honest_sharded_checkpoint_loads(tmp_path: Path) -> None:
    saved = {"state_dict": {"w": torch.arange(3.0)}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "name": "decay"}]}
    dcp.save(saved, checkpoint_id=tmp_path / "sharded", no_dist=True)
    loaded = {"state_dict": {"w": torch.zeros(3)}, "groups": [{"lr": 0.0, "betas": (0.0, 0.0), "name": ""}]}
    load_sharded(loaded, tmp_path / "sharded", alone=True)
    assert loaded["state_dict"]["w"].tolist() == [0.0, 1.0, 2.0]
    assert loaded["groups"] == saved["groups"]


def test_a_members_path_never_leaves_its_folder(tmp_path: Path) -> None:
    """Nothing here unpacks archives; a checkpoint is one, and torch reads its members without writing any."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    path = inside / "a.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 1}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../outside", "written")
    with contextlib.suppress(pickle.UnpicklingError):  # refused as a whole: as good
        load(path)
    assert not outside.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["inside"]


def test_no_code_here_unpacks_an_archive(root: Path) -> None:
    words = ("extractall", "unpack_archive", "tarfile", "zipfile")
    files = [*root.glob("lion_lightning/**/*.py"), *root.glob("recipes/**/*.py"), *root.glob("scripts/*.py")]
    assert len(files) > 40
    assert not [file.name for file in files if any(word in file.read_text(encoding="utf-8") for word in words)]
    assert tarfile.__name__ in words, "the words are those of the modules"


def test_remote_code_is_never_trusted(root: Path) -> None:
    files = [*root.glob("lion_lightning/**/*.py"), *root.glob("recipes/**/*.py"), *root.glob("conf/**/*.yaml")]
    found = [file.name for file in files if re.search(r"trust_remote_code(?!=False)", file.read_text(encoding="utf-8"))]
    assert not found
    unsafe = [
        file.name for file in files if re.search(r"load\w*\(.*weights_only=False", file.read_text(encoding="utf-8"))
    ]
    assert not unsafe


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it is `side` pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_000, 12_000, 100_000])
def test_a_picture_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    """Below Pillow's own warning, between its warning and its error, and beyond."""
    data = bomb(side)
    assert len(data) < 10_000
    tracemalloc.start()
    with pytest.raises((ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)):
        square({"bytes": data, "path": None}, 32)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    assert Image.open(io.BytesIO(bomb(100))).size == (100, 100), "the pictures are none"
