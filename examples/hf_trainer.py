"""Lion in the Trainer of Hugging Face transformers: `python examples/hf_trainer.py`.

Needs `pip install accelerate`.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from lion_lightning import Lion, from_adamw

set_seed(0)
tokens = torch.randint(4, 64, (512, 16))
data = [{"input_ids": row, "labels": (row[0] > 33).long()} for row in tokens]
config = BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2
)
settings = from_adamw(lr=5e-3, weight_decay=0.02)
arguments = TrainingArguments(
    tempfile.mkdtemp(),
    num_train_epochs=10,
    per_device_train_batch_size=64,
    weight_decay=settings["weight_decay"],  # the Trainer gives its groups this decay, whatever Lion is given
    logging_steps=10,
    report_to=[],
)
lion = (Lion, {"lr": settings["lr"]})  # the rate of the arguments is not used
trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=data, optimizer_cls_and_kwargs=lion)
trainer.train()
