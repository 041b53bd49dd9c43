"""One decoder-only transformer for all families, its checkpoints and its tokenizer."""

from unmask.models.config import Experts, Layout, ModelConfig, RopeScaling
from unmask.models.families import supported
from unmask.models.kv import KVPool
from unmask.models.load import Loaded, load_checkpoint, save_checkpoint
from unmask.models.tokenizer import Tokenizer
from unmask.models.transformer import Transformer

__all__ = [
    "Experts",
    "KVPool",
    "Layout",
    "Loaded",
    "ModelConfig",
    "RopeScaling",
    "Tokenizer",
    "Transformer",
    "load_checkpoint",
    "save_checkpoint",
    "supported",
]
