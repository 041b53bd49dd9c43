"""Likelihoods: exact ones are those of the next tokens, and the masks of a bound weigh every cell alike."""

import math

import torch

import unmask
from unmask.study.harness_likelihood import elbo, exact, masks


def test_an_exact_likelihood_is_the_chain_rule():
    model = unmask.load("twin")
    ids = model.encode("Ann has 2 apples . How many ?")
    whole, _ = exact(model.network, ids[:2], ids[2:])
    parts = [exact(model.network, ids[:at], ids[at : at + 1])[0] for at in range(2, len(ids))]
    assert math.isclose(whole, sum(parts), rel_tol=1e-4)


def test_each_cell_has_weight_one_on_average_and_a_group_is_never_left_clear():
    group = torch.tensor([0, 0, 0, 1, 1])
    hidden, weight = masks(group, seed=3, sample=torch.arange(4096))
    assert bool(hidden[:, :3].any(1).all())
    assert bool(hidden[:, 3:].any(1).all())
    assert torch.allclose((hidden * weight).mean(0), torch.ones(5), atol=0.1)


def test_a_bound_is_the_same_for_the_same_seed_whatever_the_batch():
    model = unmask.load()
    ids = model.encode("Ann has 2 apples . How many ?")
    found = [elbo(model.network, ids[:3], ids[3:], samples=8, seed=1, batch=size) for size in (1, 8)]
    assert math.isclose(*found, rel_tol=1e-3)
    assert found[0] < 0
    assert found[0] != elbo(model.network, ids[:3], ids[3:], samples=8, seed=2)


def test_the_bound_of_a_single_token_is_its_likelihood_under_the_mask():
    model = unmask.load()
    c, ids = model.network.config, model.encode("Ann has 2 apples . How many ?")
    with torch.inference_mode():
        logits = model.network(torch.tensor([[*ids[:-1], c.mask_id]]))[..., -1 - int(c.shift), :].reshape(-1)
    logits = logits.clone()
    logits[c.mask_id] = -torch.inf
    logits[c.token_count :] = -torch.inf
    want = float(logits.float().log_softmax(0)[ids[-1]])
    assert math.isclose(elbo(model.network, ids[:-1], ids[-1:], samples=3, seed=5), want, rel_tol=1e-3)


def test_a_model_finds_its_own_answer_likelier_than_another():
    for name in ("dllm", "d2f"):
        model = unmask.load(name)
        ids = model.encode("Ann has 2 apples and buys 3 more . How many ?")
        own = model.tokenizer.encode(model.generate("Ann has 2 apples and buys 3 more . How many ?").text)
        given = {"samples": 8, "seed": 1}
        assert elbo(model.network, ids, own, **given) > elbo(model.network, ids, own[::-1], **given)
