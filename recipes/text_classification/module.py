"""Fine-tuning a BERT to classify texts, or to predict a value from them, as a LightningModule."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import MeanMetric, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from lion_lightning.errors import ConfigError, check_number
from lion_lightning.hyperparams import Schedule
from lion_lightning.lightning import LionMixin, OptimizerFactory

from ..text.model import ModelOptions, load_or_build, model_flops, usable_config
from .data import TOKEN_TYPES, LabeledTexts, decode

INPUTS = ("input_ids", "attention_mask", TOKEN_TYPES)
SHOWCASE_TEXTS = 1000


class TextClassifier(LionMixin, LightningModule):
    """A `transformers` sequence classifier, from a checkpoint or from scratch.

    Args:
        config: a `transformers` configuration; vocabulary and classes are set to the data's.
        data: the texts, after `setup`.
        optimizer_factory, schedule: see `LionMixin`.
        monitor: the metric that decides which checkpoint is best, one of those that are logged.
        classifier_dropout: share of activations dropped before the classifier.
        options: how the model is computed, and the checkpoint it starts from.
        seed: not used: nothing here is random but dropout, which Lightning seeds.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        data: LabeledTexts,
        optimizer_factory: OptimizerFactory,
        schedule: Schedule,
        monitor: str = "val/loss",
        classifier_dropout: float = 0.0,
        options: ModelOptions = ModelOptions(),  # noqa: B008, it is frozen
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.optimizer_factory, self.schedule, self.data = optimizer_factory, schedule, data
        self.model = build_model(config, data, classifier_dropout, options)
        self.started_from = options.pretrained
        self._scores = options.compiled(scores)
        self.val_loss = MeanMetric(nan_strategy=math.nan)  # NaN stays in the mean
        self.metrics = nn.ModuleDict(build_metrics(len(data.classes)))
        logged = ["val/loss", *(f"val/{name}" for name in self.metrics)]
        if monitor not in logged:
            raise ConfigError(f"recipe.monitor must be one of {', '.join(logged)} with this data, got {monitor}")

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Scores of the classes, float (batch, classes), or values, float (batch,)."""
        return self._of(batch, self._scores)

    def _of(self, batch: dict[str, Tensor], function: Callable[..., Tensor]) -> Tensor:
        inputs = {name: batch[name].to(self.device) for name in INPUTS if name in batch}
        logits = function(self.model, inputs).float()
        return logits if self.data.classes else logits.squeeze(-1)

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats, or the squared error of a value."""
        return (cross_entropy if self.data.classes else mse_loss)(logits, labels, reduction=reduction)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(self(batch), batch["labels"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch)
        self.val_loss.update(self.loss(logits, batch["labels"], reduction="none"))
        guesses = logits.argmax(-1) if self.data.classes else logits
        for metric in self.metrics.values():
            metric.update(guesses, batch["labels"])  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        metrics: dict[str, Any] = {"loss": self.val_loss, **self.metrics}
        self.log_dict({f"val/{name}": metric.compute().float() for name, metric in metrics.items()})
        for metric in metrics.values():
            metric.reset()

    # The interface that `training.run` expects of every recipe.

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start of a run."""
        origin = f"pre-trained, from {self.started_from}" if self.started_from else "from scratch"
        return {"model": f"{type(self.model).__name__}, {self.model.num_parameters() / 1e6:.1f} M parameters, {origin}"}

    def tokens_per_sample(self) -> int:
        return self.data.mean_tokens

    def flops_per_sample(self) -> int:
        """Floating-point operations of forward and backward for a text of mean length; see `model_flops`."""
        return model_flops(self.model, self.tokens_per_sample(), head_rows=1)

    def export(self, folder: Path, card: str) -> None:
        """Write a Hugging Face folder that `pipeline("text-classification")` opens, with `card` as its README."""
        self.model.save_pretrained(folder)
        self.data.tokenizer.save_pretrained(folder)
        usage = (
            f"Texts were cut at {self.data.sequence_length} tokens: "
            '`pipeline("text-classification", FOLDER)(texts, truncation=True)` does the same.'
        )
        (folder / "README.md").write_text(f"{card}\n{usage}\n", encoding="utf-8")

    def showcase(self) -> list[str]:
        """The most confident mistakes, or the largest errors of a value, on up to 1,000 validation texts."""
        seen, mistakes = self._mistakes(count=3)
        if not mistakes:
            return [f"all of the first {seen} validation texts are right"]
        template = "{0} -> {2} with {3:.0%} (it is {1})" if self.data.classes else "{0} -> {2} (it is {1})"
        return [template.format(*mistake) for mistake in mistakes]

    def predictions(self) -> tuple[list[str], list[list[Any]]]:
        """A table of more of them, for the log."""
        columns = ["text", "class", "guess", "share"] if self.data.classes else ["text", "value", "guess", "error"]
        return columns, [list(mistake) for mistake in self._mistakes(count=20)[1]]

    @torch.no_grad()
    def _mistakes(self, count: int) -> tuple[int, list[tuple[str, str, str, float]]]:
        """The number of texts, and the worst mistakes: text, truth, guess and the guess's share or error."""
        dataset: Any = self.data.val_set
        seen = min(len(dataset), SHOWCASE_TEXTS)
        step = self.data.batch_size
        parts = [range(start, min(start + step, seen)) for start in range(0, seen, step)]
        batches = [dataset.__getitems__([(index, index) for index in part]) for part in parts]
        logits = torch.cat([self._of(batch, scores) for batch in batches]).cpu()
        labels = torch.cat([batch["labels"] for batch in batches])
        classes, tokenizer = self.data.classes, self.data.tokenizer
        if classes:
            worth, guesses = logits.softmax(-1).max(-1)
            wrong = (guesses != labels).nonzero().flatten()
        else:
            guesses, worth, wrong = logits, (logits - labels).abs(), torch.arange(seen)
        worst = wrong[worth[wrong].argsort(descending=True)][:count].tolist()

        def shown(values: Tensor, i: int) -> str:
            return classes[int(values[i])] if classes else f"{values[i].item():.3g}"

        def text(i: int) -> str:
            return decode(tokenizer, batches[i // step]["input_ids"][i % step].tolist())

        return seen, [(text(i), shown(labels, i), shown(guesses, i), float(worth[i])) for i in worst]


def scores(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Scores of a batch: float (batch, classes)."""
    return model(**inputs).logits


def build_metrics(classes: int) -> dict[str, Metric]:
    """The metrics of GLUE by name: accuracy, F1 and Matthews' of classes; Pearson's and Spearman's of values.

    F1 is that of the second of two classes, as GLUE has it, and the mean over the classes where there are more.
    """
    if not classes:
        with warnings.catch_warnings():  # two numbers per text take little memory
            warnings.filterwarnings("ignore", message=".*will save all targets.*")
            return {"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()}
    f1 = BinaryF1Score() if classes == 2 else MulticlassF1Score(classes, average="macro")
    accuracy, matthews = MulticlassAccuracy(classes, average="micro"), MulticlassMatthewsCorrCoef(classes)
    return {"accuracy": accuracy, "f1": f1, "matthews": matthews}


def build_model(config: PretrainedConfig, data: LabeledTexts, dropout: float, options: ModelOptions) -> Any:
    """The classifier of `config`, or of `options.pretrained`, for the data's vocabulary and classes.

    Raises:
        ConfigError: the data has no labels; the model is of a type that is not supported, has too few positions or, of
            a checkpoint, another vocabulary.
    """
    if not isinstance(data, LabeledTexts):
        raise ConfigError(
            f"recipe=text_classification trains on labeled text, not on {type(data).__name__}; try data=python_packages"
        )
    if options.within_documents:
        raise ConfigError("model.within_documents=true is for packed blocks; here every text has a row of its own")
    check_number("recipe.module.classifier_dropout", dropout, "[0, 1)")
    config = usable_config("text_classification", config, data.sequence_length, options)
    config.classifier_dropout = dropout
    config.problem_type = "single_label_classification" if data.classes else "regression"
    config.id2label = dict(enumerate(data.classes or ("value",)))
    config.label2id = {name: number for number, name in config.id2label.items()}
    return load_or_build(AutoModelForSequenceClassification, config, data.tokenizer, options)
