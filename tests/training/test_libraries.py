"""What a run does not import: it costs every start time, and a stream its gigabyte."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

LEFT_OUT = ("scipy", "matplotlib", "triton", "datasets", "pandas", "pyarrow", "torch._inductor.codecache")
STREAM = (
    "from lion_lightning.training.libraries import load_libraries; load_libraries()\n"
    "import lion_lightning.training.run, recipes.bert_mlm.streaming, recipes.bert_mlm.module\n"
    "import lion_lightning.guard.callback, lion_lightning.tracking.wandb\n"
    "from recipes.text.model import ModelOptions; ModelOptions()\n"
    "from transformers import AutoModelForMaskedLM, BertConfig\n"
    "AutoModelForMaskedLM.from_config(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))\n"
)
needs_both = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("scipy", "matplotlib"))), reason="needs scipy and matplotlib"
)


def answer(root: Path, program: str) -> list[str]:
    """The lines that `program` prints in a process of its own."""
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def test_a_stream_of_text_imports_nothing_that_it_does_not_use(root: Path) -> None:
    asked = f"import sys, torch; print([name for name in {LEFT_OUT} if name in sys.modules], torch.cuda.is_available())"
    loaded, has_gpu = answer(root, STREAM + asked)[0].rsplit(" ", 1)
    expected = ["triton"] if has_gpu == "True" and importlib.util.find_spec("triton") else []
    assert loaded == str(expected)


def test_the_door_loads_the_libraries_so(root: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        f"sys.argv[1:] = ['data=text_files', 'data.path=/nowhere', 'hydra.run.dir={tmp_path}']\n"
        "from lion_lightning.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print('lightning' in sys.modules, 'scipy' in sys.modules, 'matplotlib' in sys.modules)\n"
    )
    assert answer(root, program)[-1] == "True False False"


@needs_both
def test_what_was_left_out_is_there_when_it_is_used(root: Path) -> None:
    used = (
        "import torch, torchmetrics, scipy.signal, scipy.stats, sys\n"
        "from transformers.loss.loss_for_object_detection import linear_sum_assignment\n"
        "print(scipy.__file__.endswith('__init__.py'), scipy.signal.convolve([1, 2], [1]).tolist())\n"
        "print([places.tolist() for places in linear_sum_assignment([[1.0, 0.0], [0.0, 1.0]])])\n"
        "metric = torchmetrics.MeanMetric(); metric.update(1.0)\n"
        "print('matplotlib' in sys.modules, type(metric.plot()[0]).__module__, 'matplotlib' in sys.modules)\n"
        "import importlib.util as util\n"
        "print(util.find_spec('triton') is None or bool(__import__('triton').__version__))\n"
    )
    lines = answer(root, STREAM + used)
    assert lines == ["True [1, 2]", "[[0, 1], [1, 0]]", "False matplotlib.figure True", "True"]


@needs_both
@pytest.mark.parametrize(
    "line",
    [
        "import scipy; scipy.__version__; import scipy.sparse as it; it.eye",
        "from scipy import sparse as it; it.eye",
        "import scipy.signal as it; it.convolve",
        "import matplotlib as it; it.use",
        "from matplotlib import ticker as it; it.Locator",
    ],
)
def test_a_package_that_needs_more_while_it_is_loaded_gets_the_real_one(root: Path, line: str) -> None:
    program = (
        "import sys; from lion_lightning.training import libraries\n"
        f"with libraries._stand_ins(): {line}\n"
        "print(sys.modules[it.__name__].__file__, libraries._withdraw('scipy'), libraries._withdraw('matplotlib'))"
    )
    file, *left = answer(root, program)[0].split()
    assert file.endswith(".py")
    assert left == ["False", "False"], "stand-ins were left behind"


@needs_both
def test_a_package_that_is_there_already_stays(root: Path) -> None:
    program = (
        "import scipy, sys; from lion_lightning.training.libraries import load_libraries; load_libraries()\n"
        "print(sys.modules['scipy'] is scipy, 'scipy.signal' in sys.modules, 'matplotlib' in sys.modules)"
    )
    assert answer(root, program) == ["True True False"]
