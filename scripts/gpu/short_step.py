"""Two steps of every storage mode on small, odd and unaligned tensors: what compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python scripts/gpu/short_step.py

Without torch's caching allocator every tensor is an allocation of its own, and an access past its end is seen.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the project's modules

from lion_lightning.optim import Lion
from scripts.bench.bench_peers import DTYPES, MODES

SIZES = (1, 255, 1024, 1025, 70_001)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for mode, (dtype, options) in MODES.items():
        params = [nn.Parameter(torch.randn(size, device=device, dtype=DTYPES[dtype])) for size in SIZES]
        params.append(nn.Parameter(torch.randn(4097, device=device, dtype=DTYPES[dtype])[1:]))
        for cautious in (False, True):
            optimizer = Lion(params, cautious=cautious, weight_decay=0.1, **options)
            for _ in range(2):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
        print(f"{mode}: {int(optimizer.nonfinite_count)} gradients that are not finite on {device}", flush=True)


if __name__ == "__main__":
    main()
