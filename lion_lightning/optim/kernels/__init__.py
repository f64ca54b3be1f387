"""The engines that run the Lion rule on flat tensors. Nothing here imports from the rest of `lion_lightning.optim`."""
