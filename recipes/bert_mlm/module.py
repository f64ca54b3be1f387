"""BERT pre-training by masked language modelling, as a LightningModule."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PretrainedConfig

from lion_lightning.hyperparams import Schedule
from lion_lightning.lightning import LionMixin, OptimizerFactory

from ..text.model import ModelOptions, model_flops
from ..text.tokenizer import replacement_ids, special_tokens, starts_word
from .data import TextBlocks
from .masking import IGNORED, MaskedBatch, Masking, mask_tokens
from .model import build_model, hidden_logits, hidden_loss, row_cross_entropy

VALIDATION = Masking(rate=0.15)  # always, so that runs compare
VALIDATION_SEED = 20_181_011


class BertMLM(LionMixin, LightningModule):
    """A `transformers` masked language model trained on packed blocks.

    The encoder runs on whole blocks; the vocabulary head, most of a small BERT's work, on hidden tokens only.

    Args:
        config: a `transformers` configuration with a masked-LM head; its vocabulary is set to the tokenizer's.
        data: the blocks, after `setup`.
        optimizer_factory, schedule: see `LionMixin`.
        masking: how training tokens are hidden; validation always hides 15 %, the same tokens each time.
        seed: keys the masks of training.
        options: how the model is computed, and the checkpoint it starts from.
    """

    special_tokens: Tensor
    replacement_ids: Tensor
    starts_word: Tensor | None

    def __init__(
        self,
        config: PretrainedConfig,
        data: TextBlocks,
        optimizer_factory: OptimizerFactory,
        schedule: Schedule,
        masking: Masking,
        seed: int = 1,
        options: ModelOptions = ModelOptions(),  # noqa: B008, it is frozen
    ) -> None:
        super().__init__()
        self.optimizer_factory, self.schedule = optimizer_factory, schedule
        self.masking, self.seed, self.data = masking, seed, data
        self.model = build_model(config, data, options)
        # Not persistent: they derive from the tokenizer, and the keys of checkpoints stay the same.
        tokenizer = data.ready.tokenizer
        self.register_buffer("special_tokens", special_tokens(tokenizer), persistent=False)
        self.register_buffer("replacement_ids", replacement_ids(tokenizer), persistent=False)
        words = None if masking.unit == "token" else starts_word(tokenizer)
        self.register_buffer("starts_word", words, persistent=False)
        self.separator = tokenizer.sep_token_id if options.within_documents else None
        # Two functions, so that each has its own graphs: training one for each shape, validation one for its full
        # batches and one for all others.
        self._loss = options.compiled(hidden_loss, dynamic=False)
        self._logits = options.compiled(hidden_logits)
        self.val_loss, self.val_accuracy = MeanMetric(nan_strategy=math.nan), MeanMetric()  # NaN stays in the mean

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        masked = self._mask(batch, self.masking, self.seed)
        loss = self._loss(self.model, masked.input_ids, masked.positions, masked.targets, self.separator)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        masked = self._mask(batch, VALIDATION, VALIDATION_SEED)
        targets = masked.targets.flatten()
        kept = targets != IGNORED
        logits = self._logits(self.model, masked.input_ids, masked.positions, self.separator)
        self.val_loss.update(row_cross_entropy(logits, targets)[kept])
        self.val_accuracy.update((logits.argmax(-1) == targets)[kept].float())

    def on_validation_epoch_end(self) -> None:
        loss = self.val_loss.compute()
        self.log_dict({"val/loss": loss, "val/perplexity": loss.exp(), "val/accuracy": self.val_accuracy.compute()})
        self.val_loss.reset()
        self.val_accuracy.reset()

    def on_fit_start(self) -> None:
        if self.logger is not None:
            self.logger.log_metrics({"data/unigram_entropy": self.data.unigram_entropy()}, step=self.global_step)

    def _mask(self, batch: dict[str, Tensor], masking: Masking, seed: int) -> MaskedBatch:
        tokenizer = self.data.ready.tokenizer
        return mask_tokens(
            batch["input_ids"],
            batch["sample"],
            masking=masking,
            seed=seed,
            mask_id=tokenizer.mask_token_id,
            special_tokens=self.special_tokens,
            replacement_ids=self.replacement_ids,
            starts_word=self.starts_word,
        )

    # The interface that `training.run` expects of every recipe.

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start of a run."""
        config = self.model.config
        shape = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
        return {"model": f"{type(self.model).__name__}, {self.model.num_parameters() / 1e6:.1f} M parameters, {shape}"}

    def tokens_per_sample(self) -> int:
        return self.data.settings.sequence_length

    def flops_per_sample(self) -> int:
        """Floating-point operations of forward and backward for a training block; see `model_flops`."""
        batch = self.data.val_set.__getitems__([(0, 0)])  # type: ignore[attr-defined]
        hidden = self._mask(batch, self.masking, self.seed).positions.shape[1]
        return model_flops(self.model, self.tokens_per_sample(), hidden)

    def export(self, folder: Path, card: str) -> None:
        """Write a Hugging Face model folder that `pipeline("fill-mask")` opens, with `card` as its README."""
        self.model.save_pretrained(folder)
        tokenizer = self.data.ready.tokenizer  # one with a name may be made for longer texts, or know no limit
        tokenizer.model_max_length = min(tokenizer.model_max_length, self.model.config.max_position_embeddings)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def showcase(self) -> list[str]:
        """Three validation sentences with a hidden word, and the model's first three guesses for it."""
        return [f"{text} -> {guesses} (it was: {answer})" for text, answer, guesses in self._fills(count=3)]

    def predictions(self) -> tuple[list[str], list[list[Any]]]:
        """A table of the same for more sentences, for the log."""
        return ["sentence", "hidden word", "guesses"], [list(fill) for fill in self._fills(count=20)]

    @torch.no_grad()
    def _fills(self, count: int) -> list[tuple[str, str, str]]:
        """Sentence, hidden word and the three likeliest words, for up to `count` validation blocks."""
        tokenizer, fills = self.data.ready.tokenizer, []
        blocks = self.data.ready.val
        for block in blocks[:: max(1, len(blocks) // count)][:count]:
            tokens = torch.from_numpy(block[:25].astype("int64"))
            place = _whole_word(tokens, tokenizer)
            answer = str(tokenizer.convert_ids_to_tokens(int(tokens[place])))
            hidden = tokens.clone()
            hidden[place] = tokenizer.mask_token_id
            places = torch.tensor([[place]], device=self.device)
            scores = hidden_logits(self.model, hidden[None].to(self.device), places, self.separator)
            best = scores[0].topk(3).indices.tolist()
            text = str(tokenizer.decode(hidden[1:].tolist())).replace("[SEP]", "/")
            fills.append((text, answer, ", ".join(tokenizer.convert_ids_to_tokens(best))))
        return fills


def _whole_word(tokens: Tensor, tokenizer: Any) -> int:
    """The place of a whole word of letters near the middle of `tokens`; the middle where there is none."""
    words = tokenizer.convert_ids_to_tokens(tokens.tolist())
    middle = len(words) // 2
    whole = [i for i in range(1, len(words) - 1) if words[i].isalpha() and not words[i + 1].startswith("##")]
    return min((i for i in whole if len(words[i]) > 2), key=lambda i: abs(i - middle), default=middle)
