"""The command line over the import: files in, a file that Lion loads out, and what it says when they do not fit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lion_lightning.commands.convert import main
from lion_lightning.optim import Lion
from lion_lightning.optim.import_state import import_state, read

FOLDER = Path(__file__).parents[1] / "optim" / "peer_states"


def state_file(name: str, folder: Path) -> Path:
    torch.save(read(FOLDER / f"{name}.pt")["optimizer"], folder / "in.pt")
    return folder / "in.pt"


@pytest.mark.parametrize("name", ["lion_pytorch_float32", "bitsandbytes_8bit_float32", "flashlion_float32"])
def test_the_file_loads_as_the_import_does(name: str, tmp_path: Path) -> None:
    saved = read(FOLDER / f"{name}.pt")
    torch.save({"optimizer_states": [saved["optimizer"]], "epoch": 3}, tmp_path / "last.ckpt")
    assert main([str(tmp_path / "last.ckpt"), str(tmp_path / "out.pt")]) == 0
    optimizers = [Lion([nn.Parameter(weight.clone()) for weight in saved["weights"]]) for _ in range(2)]
    optimizers[0].load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    import_state(saved["optimizer"], optimizers[1])
    for left, right in zip(optimizers[0].state.values(), optimizers[1].state.values(), strict=True):
        assert torch.equal(left["exp_avg"], right["exp_avg"])
    assert optimizers[0].state_dict()["param_groups"] == optimizers[1].state_dict()["param_groups"]


def test_the_kahan_sum_needs_the_model_and_then_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, source = read(FOLDER / "optimi_bfloat16.pt"), state_file("optimi_bfloat16", tmp_path)
    out = tmp_path / "deep" / "out.pt"
    assert main([str(source), str(out)]) == 1
    assert "compensates a bfloat16 weight, but no weights were given" in capsys.readouterr().err
    first, second = saved["weights"]
    # The buffer of integers and the tied name are no parameters of their own.
    torch.save({"model": {"w": first, "count": torch.tensor(3), "b": second, "tied": first}}, tmp_path / "model.pt")
    assert main([str(source), str(out), "--model", str(tmp_path / "model.pt")]) == 0
    assert "2 with the lower bits" in capsys.readouterr().out
    assert read(out)["state"][0]["weight_remainder"].dtype == torch.int16
    assert main([str(source), str(out), "--force", "--model", str(tmp_path / "model.pt"), "--names", "w,b"]) == 0
    assert main([str(source), str(out), "--force", "--drop-compensation"]) == 0
    assert "weight_remainder" not in read(out)["state"][0]


def test_misfits_end_with_code_1_and_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = state_file("timm_float32", tmp_path), tmp_path / "out.pt"
    torch.save({"w": torch.ones(3)}, tmp_path / "model.pt")
    assert main([str(source), str(out), "--model", str(tmp_path / "model.pt")]) == 1
    assert "state of 2 parameters does not fit 1 parameters" in capsys.readouterr().err
    assert main([str(source), str(out), "--model", str(tmp_path / "model.pt"), "--names", "x,y"]) == 1
    assert "--names 'x' is not in" in capsys.readouterr().err
    assert main(["https://example.org/in.pt", str(out)]) == 1
    assert main([str(source), str(source)]) == 1
    assert "exists: use another name" in capsys.readouterr().err
    assert not out.exists()


def test_help_explains_the_order_and_wrong_arguments_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    assert "by position" in capsys.readouterr().out
    with pytest.raises(SystemExit) as wrong:
        main(["in.pt", "out.pt", "--from", "adam"])
    assert wrong.value.code == 2


def test_a_place_that_cannot_be_written_is_a_sentence_and_the_old_file_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = state_file("lion_pytorch_float32", tmp_path)
    (tmp_path / "folder").mkdir()
    assert main([str(source), str(tmp_path / "folder"), "--force"]) == 1
    assert "directory" in capsys.readouterr().err

    def full(*_: object) -> None:
        raise RuntimeError("file write failed")

    before = source.read_bytes()
    monkeypatch.setattr(torch, "save", full)
    assert main([str(source), str(source), "--force"]) == 1
    assert capsys.readouterr().err == "error: file write failed\n"
    assert source.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "in.pt"]
