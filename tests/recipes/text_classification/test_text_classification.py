"""Fine-tuning: batches as the tokenizer has them, metrics against oracles, and runs that learn, resume and export."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bert import build as build_mlm
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, ModernBertConfig, PretrainedConfig, ResNetConfig, pipeline

from lion_lightning.errors import ConfigError
from lion_lightning.hyperparams import cosine
from lion_lightning.optim import Lion
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.tables import Row
from lion_lightning.recipes.text.model import ModelOptions
from lion_lightning.recipes.text_classification.data import LabeledTexts
from lion_lightning.recipes.text_classification.labels import TextSplits, label_splits
from lion_lightning.recipes.text_classification.module import TextClassifier, build_metrics, scores
from lion_lightning.recipes.text_classification.sources import TextSource

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


class Made(TextSource):
    """Texts of different lengths whose first word tells the class, or whose number of words is the value."""

    def __init__(self, count: int = 64, classes: int = 2, pairs: bool = False) -> None:
        self.count, self.classes, self.pairs = count, classes, pairs

    def fingerprint(self) -> str:
        return f"made {self.count} {self.classes} {self.pairs}"

    def account(self) -> None:
        return None

    def load(self) -> TextSplits:
        random = np.random.default_rng(0)
        rows = []
        for number in range(self.count):
            words = [WORDS[word] for word in random.integers(0, 8, random.integers(3, 20))]
            label = WORDS.index(words[0]) % self.classes if self.classes else float(len(words))
            rows.append(Row(" ".join(words), "and " + words[-1] if self.pairs else None, label, number))
        half = self.count // 2
        return label_splits(rows[:half], rows[half:], pairs=self.pairs, regression=not self.classes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def data_of(cache: str, source: Any = None, **options: Any) -> LabeledTexts:
    options = {"batch_size": 8, "sequence_length": 32, "vocab_size": 256, **options}
    data = LabeledTexts(source or Made(), cache_dir=cache, **options)
    data.setup("fit")
    return data


def build(
    data: LabeledTexts, kind: type[PretrainedConfig] = BertConfig, options: ModelOptions | None = None, **changes: Any
) -> TextClassifier:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = kind(**sizes, **(NO_DROPOUT if kind is BertConfig else {}))
    options = options or ModelOptions()
    return TextClassifier(config, data, partial(Lion, lr=1e-3), cosine, options=options, **changes).eval()


def batch_of(data: LabeledTexts, *indices: int) -> dict[str, torch.Tensor]:
    return data.val_set.__getitems__([(index, index) for index in indices])


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("padding", ["longest", "fixed"])
def test_batches_are_those_of_the_tokenizer(cache: str, padding: str, pairs: bool) -> None:
    source = Made(pairs=pairs)
    data = data_of(cache, source, padding=padding)
    splits, indices = source.load(), [5, 2, 9]
    seconds = [splits.val.seconds[i] for i in indices] if splits.val.seconds else None
    how = {"padding": "max_length" if padding == "fixed" else "longest", "max_length": 32}
    expected = data.tokenizer([splits.val.texts[i] for i in indices], seconds, return_tensors="pt", **how)
    batch = batch_of(data, *indices)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert batch["labels"].tolist() == [splits.val.labels[i] for i in indices]
    assert batch["sample"].tolist() == indices


def test_a_tokenizer_with_token_types_has_them_in_the_batch(cache: str, tmp_path: Path) -> None:
    tokenizer = data_of(cache).tokenizer
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    data = data_of(cache, Made(pairs=True), tokenizer=str(tmp_path))
    batch = batch_of(data, 0, 1)
    ids, types = batch["input_ids"], batch["token_type_ids"]
    separators = (ids == data.tokenizer.sep_token_id).cumsum(1) - (ids == data.tokenizer.sep_token_id).long()
    assert torch.equal(types, ((separators == 1) & batch["attention_mask"].bool()).long())
    assert types.sum() > 0


def test_long_texts_are_cut_and_counted(cache: str) -> None:
    data, whole = data_of(cache, sequence_length=8), data_of(cache)
    lengths = [np.diff(part.texts.bounds) for part in (whole.train_set, whole.val_set)]
    cut = sum(int((part > 8).sum()) for part in lengths)
    assert cut > 0
    assert f"{cut} were cut at 8" in data.describe()["texts"]
    assert batch_of(data, *range(8))["input_ids"].shape[1] == 8


@pytest.mark.parametrize("kind", [BertConfig, ModernBertConfig])
@torch.no_grad()
def test_padding_changes_no_score(cache: str, kind: type[PretrainedConfig]) -> None:
    data = data_of(cache)
    module = build(data, kind)
    together = module(batch_of(data, *range(8)))
    alone = torch.cat([module(batch_of(data, index)) for index in range(8)])
    fixed = build(data_of(cache, padding="fixed"), kind)(batch_of(data_of(cache, padding="fixed"), *range(8)))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together, fixed, rtol=1e-4, atol=1e-6)
    assert together.std() > 1e-3


# Metrics against their definitions in float64.


def by_hand(guesses: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    table = np.zeros((classes, classes))
    np.add.at(table, (labels, guesses), 1)
    right, true, told, total = np.diag(table), table.sum(1), table.sum(0), table.sum()
    f1 = 2 * right / (true + told)
    covariance = right.sum() * total - (true * told).sum()
    spread = np.sqrt((total**2 - (told**2).sum()) * (total**2 - (true**2).sum()))
    return {
        "accuracy": right.sum() / total,
        "f1": f1[1] if classes == 2 else f1.mean(),
        "matthews": covariance / spread,
    }


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_classes_are_their_definitions(classes: int) -> None:
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, 300)
    guesses = np.where(random.random(300) < 0.5, labels, random.integers(0, classes, 300))
    metrics = build_metrics(classes)
    for name, expected in by_hand(guesses, labels, classes).items():
        for part in (slice(0, 100), slice(100, 300)):
            metrics[name].update(torch.tensor(guesses[part]), torch.tensor(labels[part]))
        assert float(metrics[name].compute()) == pytest.approx(expected, abs=1e-6), name


def test_metrics_of_values_are_their_definitions() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=200)
    guesses = values**3 + random.normal(size=200)
    ranks = [part.argsort().argsort() for part in (guesses, values)]
    expected = {"pearson": np.corrcoef(guesses, values)[0, 1], "spearman": np.corrcoef(*ranks)[0, 1]}
    for name, metric in build_metrics(0).items():
        metric.update(torch.tensor(guesses, dtype=torch.float32), torch.tensor(values, dtype=torch.float32))
        assert float(metric.compute()) == pytest.approx(expected[name], abs=1e-5), name


@torch.no_grad()
def test_validation_counts_every_text_once(cache: str) -> None:
    data = data_of(cache)
    module = build(data)
    everything = batch_of(data, *range(len(data.val_set)))
    expected = (module(everything).argmax(-1) == everything["labels"]).float().mean()
    logged: dict[str, Any] = {}
    module.log_dict = logged.update  # type: ignore[method-assign,assignment]
    for start in range(0, 32, 5):
        module.validation_step(batch_of(data, *range(start, min(start + 5, 32))), 0)
    module.on_validation_epoch_end()
    assert float(logged["val/accuracy"]) == pytest.approx(float(expected))
    assert float(logged["val/loss"]) == pytest.approx(
        float(module.loss(module(everything), everything["labels"])), rel=1e-5
    )


# The model.


def test_the_encoder_of_a_pre_training_run_is_taken_over(blocks: TextBlocks, cache: str, tmp_path: Path) -> None:
    for kind in (BertConfig, ModernBertConfig):
        trained = build_mlm(blocks, kind=kind)
        with torch.no_grad():
            for weight in trained.model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        folder = str(tmp_path / kind.model_type)
        trained.export(Path(folder), "# card")
        module = build(data_of(cache, tokenizer=folder), options=ModelOptions(pretrained=folder))
        ours, theirs = module.model.base_model.state_dict(), trained.model.base_model.state_dict()
        torch.testing.assert_close({name: ours[name] for name in theirs}, theirs, rtol=0, atol=0)
        assert module.model.config.num_labels == 2
        assert "pre-trained, from" in module.describe()["model"]
        with pytest.raises(ConfigError, match=r"set data\.tokenizer="):
            build(data_of(cache), options=ModelOptions(pretrained=folder))


@pytest.mark.parametrize("kind", [BertConfig, ModernBertConfig])
def test_flops_are_those_that_torch_counts(cache: str, kind: type[PretrainedConfig]) -> None:
    data = data_of(cache, padding="fixed")
    module = build(data, kind, ModelOptions(attention="eager")).train()
    with FlopCounterMode(display=False) as counter:
        module.training_step(batch_of(data, 0), 0).backward()
    assert module.flops_per_sample() == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.slow
def test_batches_do_not_compile_again(cache: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    data = data_of(cache, padding="longest")
    module = build(data, options=ModelOptions(compile="eager")).train()

    def go(train: bool, *batches: range) -> int:
        module.train(train)
        for part in batches:
            with torch.inference_mode(not train):
                loss = module.loss(module(batch_of(data, *part)), batch_of(data, *part)["labels"])
            if train:
                loss.backward()
        return counters["stats"]["unique_graphs"]

    go(True, range(0, 4), range(4, 8), range(8, 12))
    compiled = go(False, range(0, 8), range(8, 16), range(16, 21))
    assert compiled <= 4  # for training and for validation: the first shape, and one of all others
    assert go(True, range(12, 16), range(16, 20)) == compiled
    assert go(False, range(21, 29), range(29, 32)) == compiled


def test_what_cannot_work_is_told_in_a_line(cache: str, blocks: TextBlocks) -> None:
    data = data_of(cache)
    with pytest.raises(ConfigError, match=r"labeled text, not on TextBlocks; try data=python_packages"):
        build(blocks)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"not resnet; try model=bert_mini"):
        TextClassifier(ResNetConfig(), data, Lion, cosine)
    with pytest.raises(ConfigError, match=r"within_documents=true is for packed blocks"):
        build(data, options=ModelOptions(within_documents=True))
    with pytest.raises(ConfigError, match=r"recipe.monitor must be one of val/loss, val/accuracy, .* got val/pearson"):
        build(data, monitor="val/pearson")
    with pytest.raises(ConfigError, match=r"classifier_dropout must be in \[0, 1\), got 1.5"):
        build(data, classifier_dropout=1.5)
    for change, told in (
        ("padding", "longest, fixed"),
        ("sequence_length", "at least 8"),
        ("vocab_size", "at least 256"),
    ):
        with pytest.raises(ConfigError, match=told):
            data_of(cache, **{change: 3})


# Whole runs.


@pytest.fixture
def go(compose: Any, tmp_path: Path) -> Any:
    from lion_lightning.training.run import run

    rows = ["text,label", *(f"{WORDS[n % 8]} {WORDS[n // 8 % 8]} {n},{'even' if n % 2 else 'odd'}" for n in range(400))]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    small = [
        "recipe=text_classification", "data=labeled_files", f"data.path={tmp_path / 'table.csv'}", "logger=none",
        "data.sequence_length=16", "data.vocab_size=256", "data.batch_size=16", "model.config.hidden_size=32",
        "model.config.intermediate_size=64", "tuned=none", "optim.lr=3e-3", "trainer.val_check_interval=10",
        f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    return lambda *overrides: run(compose(*small, *overrides))


def test_a_run_learns_and_its_export_opens(go: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert go("trainer.max_steps=30", "model.config.num_hidden_layers=1") > 0.95
    assert "always " in capsys.readouterr().out, "the yardstick"
    classify = pipeline("text-classification", model=str(tmp_path / "run" / "export"), device="cpu")
    said = [answer["label"] for answer in classify(["alpha gamma 16", "beta gamma 17", "delta alpha 3"])]
    assert said == ["odd", "even", "even"]


def test_a_resumed_run_ends_bit_equal(go: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def weights(name: str) -> dict[str, torch.Tensor]:
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    one = ["model.config.num_hidden_layers=1", "export=false", "schedule=constant", "guard.warmup_steps=2"]
    go(*one, "trainer.max_steps=12", f"run_dir={tmp_path}/whole")
    go(*one, "trainer.max_steps=6", f"run_dir={tmp_path}/parts")
    capsys.readouterr()
    go(*one, "trainer.max_steps=12", f"run_dir={tmp_path}/parts", "resume=auto")
    assert "it starts afresh" not in capsys.readouterr().out
    torch.testing.assert_close(weights("parts"), weights("whole"), rtol=0, atol=0)


def test_values_are_predicted(cache: str) -> None:
    data = data_of(cache, Made(classes=0))
    module = build(data, monitor="val/spearman")
    batch = batch_of(data, *range(8))
    assert batch["labels"].dtype == torch.float32
    assert module(batch).shape == (8,)
    with torch.no_grad():
        error = (module(batch) - batch["labels"]).square().mean().item()
        assert module.training_step(batch, 0).item() == pytest.approx(error)
    assert len(module.showcase()) == 3
    values = data.source.load().val.labels
    assert data.describe()["labels"] == f"values from {min(values):g} to {max(values):g}"


def test_the_most_confident_mistakes_are_shown(cache: str) -> None:
    data = data_of(cache)
    module = build(data)
    with torch.no_grad():
        shares = module(batch_of(data, *range(32))).softmax(-1)
    labels = batch_of(data, *range(32))["labels"]
    wrong = shares.argmax(-1) != labels
    columns, rows = module.predictions()
    assert columns == ["text", "class", "guess", "share"]
    assert rows[0][3] == pytest.approx(float(shares.max(-1).values[wrong].max()), rel=1e-4)
    assert len(rows) == min(20, int(wrong.sum()))
    assert all(truth != guess for _, truth, guess, _ in rows)
    assert module.showcase()[0].startswith(rows[0][0])


def test_the_scores_are_those_of_the_library(cache: str) -> None:
    data = data_of(cache)
    module = build(data)
    batch = batch_of(data, 0, 1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = module.model(**inputs, labels=batch["labels"]).loss
    torch.testing.assert_close(module.training_step(batch, 0), loss)
    torch.testing.assert_close(scores(module.model, inputs), module(batch))
