"""Settings of all tests: one thread, and property tests that draw the same few examples every time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("unmask", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("unmask")
