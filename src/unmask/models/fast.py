"""The fast path of a processor: a transformer's blocks in C kernels, or in prepacked products where there are none."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.models import native
from unmask.models.kv import KVView
from unmask.models.layers import MLP, Linear
from unmask.models.native import Arena, Unavailable, Weight, pointer
from unmask.models.sight import Ragged, Sight
from unmask.models.transformer import RELEASED, Block, Transformer

MODES = ("auto", "off")
KEPT = 100_000_000
"""Weights of the largest model that keeps its matrices beside the packed ones when it is loaded."""
OPS = torch.ops.mkldnn
NEEDED: dict[str, set[str]] = {"float32": set(), "bfloat16": {"amx", "avx512_bf16"}, "int8": {"vnni"}}
"""For each kind of weights, what of a processor makes it fast; one of them is enough."""


class Native:
    """All blocks of a dense transformer and its head, in the kernels for one kind of weights.

    Hidden states are fp32 whatever the weights are; keys and values have the dtype of the model.
    """

    def __init__(self, model: Transformer, kind: str, *, keep: bool = True) -> None:
        self.kind, self.library = kind, native.library(kind, half=model.dtype == torch.bfloat16)
        c = self.config = model.config
        self.cell = model.dtype
        self.cos, self.sin = (t.detach().float().contiguous() for t in (model.cos, model.sin))
        self.norms = [_norms(block) for block in model.blocks]
        head = model.embed.weight if model.head is None else model.head.weight
        shapes = [m.weight.shape for block in model.blocks for m in _matrices(block)]
        arena = Arena(sum(Arena.room(shape, kind) for shape in [*shapes, head.shape]))
        self.weights = [[_packed(m, kind, arena, keep) for m in _matrices(block)] for block in model.blocks]
        made = (
            native.Layer(*map(pointer, norms), *(w.packed for w in weights))
            for norms, weights in zip(self.norms, self.weights, strict=True)
        )
        self.layers = (native.Layer * c.layers)(*made)
        self.out = Weight(head, None, kind, arena)
        if not keep and model.head is not None:
            model.head.weight = _gone(model.head.weight)
        self.last = model.norm.weight.detach().float()
        half = (c.rotary or c.head_dim) // 2
        sizes = (c.d_model, c.heads, c.kv_heads, c.head_dim, half, c.ff, c.max_positions)
        self.shape = native.Shape(*sizes, 1, c.norm_eps, pointer(self.cos), pointer(self.sin))
        tables = [m._parameters for m in model.modules()]
        counted = [(own, n, p) for own in tables for n, p in own.items() if p is not None and not p.is_inference()]
        self._sources = [(own, n, p, p._version) for own, n, p in counted]

    @property
    def current(self) -> bool:
        """Are the model's weights those that were packed? Not after a step of training or `load_state_dict`."""
        return all(own[name] is p and p._version == before for own, name, p, before in self._sources)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copy of the model may be trained, and starts without."""

    def __call__(
        self, x: Tensor, index: Tensor | None, kv: KVView | None, sight: Sight | None, ragged: Ragged | None
    ) -> Tensor:
        """x [B, Q, D], or [1, N, D] of ragged rows -> the same in fp32, behind the last block."""
        batch, width, _ = x.shape
        x = x.clone() if x.dtype == torch.float32 else x.float()
        index = torch.arange(width)[None] if index is None else index
        index = (index.expand(batch, -1) if ragged is None else index).long()
        if ragged is None:
            start = torch.arange(0, batch * width + 1, width)
        else:
            start = torch.nn.functional.pad(ragged.count.cumsum(0), (1, 0))
        store, place, base, length, strides, step = self._store(batch * width, start, index, kv)
        query = key = group = None
        if sight is not None:
            rows = batch if ragged is None else len(ragged.count)
            query = sight.query.int().expand(batch, -1).contiguous()
            key = sight.key.int().expand(rows, -1).contiguous()
            if query.numel() != batch * width or key.shape[1] < int(length.max()):
                raise IndexError("a sight is not of the shape of its queries and keys")
            group = torch.arange(0, key.numel(), key.shape[1])
        tensors = [t if t is None else t.contiguous() for t in (start, index, place, base, length, group)]
        seen = (pointer(query), pointer(key))
        held = (store.stride(0), batch * width) if kv is None else (store.stride(1), store.shape[4])
        run = native.Pass(len(start) - 1, batch * width, *map(pointer, tensors), *strides, *held, *seen)
        self.shape.threads = torch.get_num_threads()
        keys, values = (pointer(t) for t in (store[0] if kv is not None else store)[:2])
        failed = self.library.blocks(self.shape, self.layers, len(self.layers), run, pointer(x), keys, values, step)
        if failed == -2:
            raise IndexError(f"a position is not among the model's {self.config.max_positions}, or not in the pool")
        if failed:
            raise MemoryError("no memory is left for a forward of this size")
        return x

    def _store(
        self, tokens: int, start: Tensor, index: Tensor, kv: KVView | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int], int]:
        """Where keys and values go, each token's place in it, each row's first key and how many it has, and strides."""
        c = self.config
        if kv is None:
            store = torch.empty(2, tokens, c.kv_heads, c.head_dim, dtype=self.cell)
            count = start.diff()
            place = torch.arange(tokens) - start[:-1].repeat_interleave(count)
            return store, place, start[:-1] * store.stride(1), count, (store.stride(2), store.stride(1)), 0
        if kv.data.dtype != self.cell:
            raise TypeError(f"these kernels keep keys and values in {_name(self.cell)}, not {_name(kv.data.dtype)}")
        stride = kv.data.stride()
        place = (kv.index.expand(len(kv.slots), -1) if kv.ragged is None else kv.index).long()
        base = kv.slots.long() * stride[2]
        return kv.data, place, base, torch.full_like(base, kv.length), (stride[3], stride[4]), stride[0]

    def norm(self, x: Tensor) -> Tensor:
        """The final norm: [..., D] -> [..., D] in fp32."""
        x = x.float().contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        self.library.norm(pointer(x), pointer(self.last), self.config.norm_eps, x.numel() // width, width, pointer(y))
        return y

    def head(self, normed: Tensor) -> Tensor:
        """Logits in fp32: [..., D] -> [..., V]."""
        x = normed.float().contiguous()
        rows = x.numel() // x.shape[-1]
        y = torch.empty(*x.shape[:-1], self.out.n)
        if self.library.linear(self.out.packed, pointer(x), rows, pointer(y), torch.get_num_threads()):
            raise MemoryError(f"no memory is left for the logits of {rows} cells")
        return y

    def top(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row of fp32 logits [N, V] and its probability, [N] each, in one pass."""
        token, p = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
        self.library.top(pointer(logits), *logits.shape, pointer(token), pointer(p))
        return token, p


class Shared:
    """A tensor that a copy of its owner shares, since nobody changes it (oneDNN's cannot be copied)."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, object]) -> Shared:
        return self


def version(weight: Tensor) -> int:
    """How often a tensor was changed in place; 0 for one that nobody counts for."""
    return 0 if weight.is_inference() else weight._version


class PackedLinear(Linear):
    """A linear map whose weight oneDNN has laid out for this processor (AMX, where it has that)."""

    def __init__(self, linear: Linear, *, keep: bool) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.packed = Shared(OPS._reorder_linear_weight(linear.weight.detach(), 32))
        self.weight, self.bias = linear.weight, linear.bias
        if not keep:
            self.weight = _gone(self.weight)
        self.version = version(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        packed = self.packed.tensor
        if not torch.is_grad_enabled() and input.dtype == packed.dtype and version(self.weight) == self.version:
            return OPS._linear_pointwise(input, packed, self.bias, "none", [], "")
        if self.weight.is_meta:
            raise RuntimeError(RELEASED)
        return super().forward(input)


def split(dtype: str) -> tuple[str, str]:
    """(dtype of a model, how its matrices are rounded) for the dtype a user names: "int8" is bfloat16 with int8."""
    return ("bfloat16", "int8") if dtype == "int8" else (dtype, "")


def check(compile: str, weights: str, device: torch.device) -> None:
    """UserError for settings of `accelerate` that are none, or do not go together."""
    if compile not in MODES:
        raise UserError(f"compile is {' or '.join(MODES)}, not {compile!r:.80}")
    if weights not in ("", "int8"):
        raise UserError(f"weights are kept as they are, or rounded to int8, not {weights!r:.80}")
    if weights and device.type != "cpu":
        raise UserError(f"int8 weights are for a CPU, not {device.type!r}; use bfloat16")
    if weights and compile == "off":
        raise UserError("int8 weights need the compiled kernels; leave compile at auto")


def accelerate(model: Transformer, *, compile: str = "auto", weights: str = "", keep: bool = True) -> Transformer:
    """The same model on its processor's fast path, in place; inference only.

    `compile`: "auto" takes the C kernels, compiled on first use and kept on disk, or oneDNN's prepacked products where
    those are faster (AMX) or there is no compiler; "off" leaves the model as it is. `weights` "int8" rounds matrices to
    8 bits (a scale an output, activations rounded by row): an approximation, on the kernels alone. `keep=False` gives
    up each matrix when it is packed: half of the memory, and no way back. On CUDA, "auto" captures graphs over a few
    shapes (`models.graphs`). UserError for int8 without kernels; a warning for what keeps a model off its fast path.
    """
    device = model.embed.weight.device
    check(compile, weights, device)
    if device.type == "cuda" and compile == "auto":
        from unmask.models.graphs import Graphs

        model.graphs = Graphs(model)
    if compile == "off" or device.type != "cpu":
        return model
    try:
        if reason := unfit(model):
            raise Unavailable(reason, told=False)
        kind = weights or _name(model.dtype)
        if not (units := NEEDED[kind] & set(native.units())) and NEEDED[kind]:
            warnings.warn(f"this processor has no {kind} units, so float32 may be as fast", stacklevel=2)
        if kind != "bfloat16" or "amx" not in units:
            model.native, model.released = Native(model, kind, keep=keep), not keep
            return model
    except Unavailable as error:
        if weights:
            raise UserError(f"int8 weights need the compiled kernels, and {error}; use float32 or bfloat16") from None
        if error.told:
            warnings.warn(f"decoding without compiled kernels, which is slower: {error}", stacklevel=2)
    return prepacked(model, keep=keep)


def unfit(model: Transformer) -> str:
    """Why a model cannot run on the kernels, or ""."""
    c = model.config
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"there are no kernels for {_name(model.dtype)}"
    if c.experts is not None:
        return "there are no kernels for experts"
    if c.rotary % 2:
        return f"the kernels rotate an even number of dimensions, not {c.rotary}"
    if any(size % 4 for size in (c.d_model, c.ff, c.heads * c.head_dim)) or c.head_dim % 2:
        return f"the kernels take widths that are multiples of 4, not {c.d_model}, {c.ff} and heads of {c.head_dim}"
    return ""


def prepacked(model: Transformer, *, keep: bool = True) -> Transformer:
    """A bfloat16 model with prepacked products, if this build of torch has them; another as it is."""
    if model.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and OPS._is_mkldnn_bf16_supported():
        for module in list(model.modules()):
            for name, part in list(module.named_children()):
                if isinstance(part, Linear):
                    setattr(module, name, PackedLinear(part, keep=keep))
    return model


def _norms(block: torch.nn.Module) -> list[Tensor | None]:
    """The norms of a block in fp32: before attention, before the MLP, of queries, of keys."""
    assert isinstance(block, Block)
    found = (block.attn_norm, block.mlp_norm, block.attn.q_norm, block.attn.k_norm)
    return [weight.detach().float() if (weight := getattr(n, "weight", None)) is not None else None for n in found]


def _matrices(block: torch.nn.Module) -> list[Linear]:
    assert isinstance(block, Block)
    assert isinstance(block.mlp, MLP)
    return [block.attn.qkv, block.attn.out, block.mlp.gate_up, block.mlp.down]


def _packed(linear: Linear, kind: str, arena: Arena, keep: bool) -> Weight:
    found = Weight(linear.weight, linear.bias, kind, arena)
    if not keep:
        linear.weight = _gone(linear.weight)
    return found


def _gone(weight: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight.detach().to("meta"), requires_grad=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
