"""Noise on a checkpoint from disk to disk, in the memory of its largest tensor, and the noise itself for an audit.

    python examples/noise_checkpoint.py CHECKPOINT OUTPUT

The same as `undo noise CHECKPOINT OUTPUT --alpha=0.6`. The bits do not depend on the machine, and they are those of `noise_` in
memory.
"""

import sys
import tempfile
from pathlib import Path

import tiny
import torch
from transformers import AutoModelForCausalLM

from undo_core import noise_
from undo_core.cli import main as undo


def main(checkpoint: str, output: str) -> None:
    settings = {"alpha": 0.6, "beta": 0.1, "seed": 0}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    if undo(["noise", checkpoint, output, *flags]):
        raise SystemExit(1)

    in_memory = AutoModelForCausalLM.from_pretrained(checkpoint)
    noise_(in_memory, **settings)
    from_disk = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert all(torch.equal(value, from_disk[name]) for name, value in in_memory.state_dict().items())
    print(f"{len(from_disk)} tensors, the same bits from disk to disk as in memory")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        folder = Path(tempfile.mkdtemp())
        tiny.model().save_pretrained(folder / "model")
        main(str(folder / "model"), str(folder / "noised"))
