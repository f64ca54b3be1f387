"""Lion in TRL's SFTTrainer with a LoRA of PEFT: `python examples/trl_sft.py`; needs `pip install trl peft`."""

import tempfile

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lion_lightning import Lion, from_adamw

words = ["<pad>", "<eos>", "<unk>", "the", "cat", "sat", "on", "mat", "dog", "ran", "to", "park"]
tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
text = Dataset.from_dict({"text": ["the cat sat on the mat", "the dog ran to the park"] * 32})
config = LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
settings = from_adamw(lr=2e-2, weight_decay=0.01)
trainer = SFTTrainer(
    LlamaForCausalLM(config),
    SFTConfig(
        tempfile.mkdtemp(),
        num_train_epochs=10,
        per_device_train_batch_size=16,
        weight_decay=settings["weight_decay"],  # the Trainer gives its groups this decay, whatever Lion is given
        logging_steps=10,
        report_to=[],
        bf16=False,
    ),
    train_dataset=text,
    processing_class=PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    optimizer_cls_and_kwargs=(Lion, {"lr": settings["lr"]}),
)
trainer.train()
