"""Mixtures of experts: what the router chooses, what the experts add, and what no cast may change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.models import Experts, ModelConfig, Transformer, load_checkpoint, save_checkpoint
from unmask.models.config import ROUTERS
from unmask.models.experts import Mixture, Router

WIDTH = 16
ROUTED = Experts(8, 3, 12, shared=4, router="sigmoid", bias=True, groups=4, top_groups=2, normalise=True, scale=2.5)


@st.composite
def mixtures(draw: st.DrawFn) -> Experts:
    groups = draw(st.sampled_from([1, 2, 4]))
    count = groups * draw(st.integers(2, 4))
    top_groups = draw(st.integers(1, groups))
    top = draw(st.integers(1, count // groups * top_groups))
    flags = {"bias": draw(st.booleans()), "normalise": draw(st.booleans())}
    router = draw(st.sampled_from(ROUTERS))
    shared = draw(st.sampled_from([0, 6]))
    return Experts(
        count, top, 5, shared=shared, router=router, groups=groups, top_groups=top_groups, **flags, scale=1.5
    )


def made(experts: Experts, seed: int) -> Mixture:
    """A mixture with random weights, its bias among them."""
    mixture = Mixture(ModelConfig(8, WIDTH, 1, 1, 4, experts=experts))
    generator = torch.Generator().manual_seed(seed)
    for p in mixture.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return mixture


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def plainly(mixture: Mixture, x: Tensor) -> Tensor:
    """The mixture, token by token, as its definition says."""
    e, router, bank = mixture.router.experts, mixture.router, mixture.experts
    out = []
    for token in x.flatten(0, -2):
        logits = router.weight @ token
        score = logits.sigmoid() if e.router == "sigmoid" else logits.softmax(-1)
        rank = (score if router.bias is None else score + router.bias).tolist()
        size = e.count // e.groups
        members = [list(range(g * size, (g + 1) * size)) for g in range(e.groups)]
        best = sorted(members, key=lambda group: -sum(sorted((rank[i] for i in group), reverse=True)[:2]))
        allowed = [i for group in best[: e.top_groups] for i in group] if e.groups > 1 else list(range(e.count))
        chosen = sorted(allowed, key=lambda i: -rank[i])[: e.top]
        total = score[chosen].sum() if e.normalise else 1.0
        y = torch.zeros_like(token)
        for i in chosen:
            gate_up = bank.gate_up.weight[i * 2 * e.ff : (i + 1) * 2 * e.ff]
            down = bank.down.weight[i * WIDTH : (i + 1) * WIDTH]
            y = y + e.scale * score[i] / total * swiglu(token, gate_up, down)
        if mixture.shared is not None:
            y = y + swiglu(token, mixture.shared.gate_up.weight, mixture.shared.down.weight)
        out.append(y)
    return torch.stack(out).view_as(x)


@settings(max_examples=40, deadline=None)
@given(experts=mixtures(), seed=st.integers(0, 1000))
def test_a_mixture_is_what_its_definition_says(experts: Experts, seed: int) -> None:
    mixture = made(experts, seed).double()
    if mixture.router.bias is not None:
        mixture.router.bias.data = mixture.router.bias.data.float()
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(mixture(x), plainly(mixture, x))


def test_the_bias_chooses_and_weighs_nothing() -> None:
    router = made(ROUTED, 0).router
    assert router.bias is not None
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
    share, chosen = router(x)
    router.bias.data += 3.0
    assert torch.equal(router(x)[1], chosen)
    torch.testing.assert_close(router(x)[0], share)
    router.bias.data[chosen[0, 0]] -= 100
    assert chosen[0, 0] not in router(x)[1]


def test_a_token_is_the_same_in_any_company() -> None:
    mixture = made(ROUTED, 2)
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(3))
    for i in range(3):
        torch.testing.assert_close(mixture(x[i : i + 1]), mixture(x)[i : i + 1])


def test_experts_that_no_token_goes_to_are_not_computed() -> None:
    mixture = made(ROUTED, 4)
    x = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(5))
    chosen = set(mixture.router(x[0])[1].flatten().tolist())
    other = [i for i in range(ROUTED.count) if i not in chosen]
    expected = mixture(x)
    for i in other:
        mixture.experts.down.weight.data[i * WIDTH : (i + 1) * WIDTH] = float("nan")
    assert torch.equal(mixture(x), expected)


def test_gradients_reach_the_chosen_experts_the_router_and_the_shared_one() -> None:
    mixture = made(ROUTED, 6)
    mixture(torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(7))).pow(2).sum().backward()
    for name, p in mixture.named_parameters():
        assert (p.grad is None) == (name == "router.bias")
        assert p.grad is None or p.grad.abs().sum() > 0


CONFIG = ModelConfig(96, 32, 3, 4, 48, mask_id=2, rotary=4, experts=replace(ROUTED, dense=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_stays_in_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rounded to bf16 it would send tokens elsewhere: through casts, files and a load."""
    model = Transformer(CONFIG).initialise(0)
    routers = [m for m in model.modules() if isinstance(m, Router)]
    assert len(routers) == 2
    biases = [torch.randn(ROUTED.count, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for router, bias in zip(routers, biases, strict=True):
        assert router.bias is not None
        router.bias.data = bias
    save_checkpoint(model, tmp_path, dtype=dtype)
    loaded = load_checkpoint(tmp_path).model
    assert loaded.dtype == dtype
    assert loaded.config == CONFIG
    for cast in (model.to(torch.bfloat16), loaded, loaded.half()):
        found = [m.bias for m in cast.modules() if isinstance(m, Router)]
        assert all(f is not None and torch.equal(f, b) for f, b in zip(found, biases, strict=True))
        assert torch.isfinite(cast(torch.arange(8)[None])).all()


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"router": "tanh"}, "no router 'tanh'"),
        ({"groups": 3}, "8 experts do not make 3 groups"),
        ({"groups": 8, "top_groups": 4}, "8 experts do not make 8 groups of at least two"),
        ({"top_groups": 5}, "cannot be chosen"),
        ({"top": 5}, "5 experts of 2 groups cannot be chosen among 8 in 4"),
        ({"top": 0}, "must be positive"),
    ],
)
def test_what_no_router_can_do(wrong: dict[str, int | str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        replace(ROUTED, **wrong)


def test_a_part_of_a_head_is_rotated() -> None:
    """Positions matter to the rotated dimensions alone: without them, two orders of the same keys are one."""
    base = ModelConfig(96, 32, 1, 4, 48, mask_id=2)
    whole, part = (Transformer(replace(base, rotary=r)).initialise(1) for r in (8, 4))
    assert whole.cos.shape[1] == 4
    assert torch.equal(whole(torch.arange(9)[None]), Transformer(base).initialise(1)(torch.arange(9)[None]))
    assert part.cos.shape[1] == 2
    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(2))
    turned = part.blocks[0].attn.rotate(x, *part.rope(6, None, torch.float32))  # type: ignore[union-attr, operator]
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.allclose(turned[..., 1:, :4], x[..., 1:, :4])
