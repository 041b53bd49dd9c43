"""`python -m unmask.bench.memory PRESET DTYPE COMPILE`: peak memory of a decode in a process of its own, in MB."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def main(preset: str, dtype: str, compile: str) -> None:
    """Decode one block of the preset, and print what the process took at most."""
    import torch

    from unmask.bench import cases
    from unmask.bench.presets import find

    torch.set_num_threads(1)
    shape = find(preset)
    model = cases.model_of(shape, dtype, cases.EAGER if compile == "off" else cases.FAST)
    recipe = cases.schedule(shape)
    with torch.inference_mode():
        denoise, canvas = cases.entered(model, recipe, cases.canvas_of(model, cases.prompts(shape), shape.length))
        cases.step(denoise, recipe, canvas)
    print(peak())


def peak() -> float:
    """Megabytes that this process held at most; on Linux without what its parent held before it began."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    except (OSError, StopIteration):
        scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


if __name__ == "__main__":
    main(*sys.argv[1:])
