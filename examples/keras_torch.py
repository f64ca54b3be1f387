"""Lion for a Keras model on the torch backend; needs `pip install keras`. `fit` takes Keras's own optimizers only.

KERAS_BACKEND=torch python examples/keras_torch.py
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras
import torch
from torch import nn

from lion_lightning import Lion, from_adamw

keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(64, "gelu"), keras.layers.Dense(4)])
optimizer = Lion(model.parameters(), **from_adamw(lr=5e-3, weight_decay=0.02))  # a Keras model is a torch module here

inputs = torch.randn(1024, 16)
for epoch in range(20):
    for x in inputs.split(64):
        loss = nn.functional.cross_entropy(model(x, training=True), x[:, :4].argmax(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
