"""The Python interface: settings under every name, recipes that fit or are refused, streaming, and plain errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import embedded
import unmask
from unmask import Recipe, UserError, recipes
from unmask.decode import best, ended, everything, finished
from unmask.generate import Model
from unmask.models.config import Layout
from unmask.models.joint import JointSampler, digest, save_sampler
from unmask.settings import ALIASES, REFUSED, Settings, choose, from_expression, resolve
from unmask.train.vocabulary import EOS, MASK

PROMPT = embedded.PROMPT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return unmask.load(embedded.build(folder / "dllm"))


@pytest.fixture(scope="module")
def sampler(folder, model):
    save_sampler(
        JointSampler(model.network.config).initialise(1, gain=0.5), folder / "joint", base=digest(model.network)
    )
    return folder / "joint"


@pytest.fixture(scope="module")
def twin(folder) -> Model:
    return unmask.load(embedded.build(folder / "twin", layout=Layout("causal")))


@pytest.fixture(scope="module")
def blockwise(folder) -> Model:
    return unmask.load(embedded.build(folder / "block", layout=Layout("block", size=8)))


@pytest.fixture(scope="module")
def student(folder, blockwise) -> Model:
    """The same weights, as if they had been trained on noisy earlier blocks."""
    made = unmask.load(folder / "block")
    made.network.config = replace(made.network.config, in_flight=True)
    return made


@pytest.fixture(scope="module")
def absolute(folder) -> Model:
    layout = Layout("block", size=8, grid="absolute", prompt="blocks")
    return unmask.load(embedded.build(folder / "absolute", layout=layout))


def test_generate(model):
    out = model.generate(PROMPT, length=16)
    assert out.text == str(out) == model.tokenizer.decode(out.tokens)
    assert out.recipe.name == "threshold"
    assert out.recipe.stop.walk() and any(rule is ended or rule == ended for rule in out.recipe.stop.walk())
    assert out.ledger.forwards == out.forwards >= 1
    assert len(out.tokens) == out.ledger.useful_tokens
    assert MASK not in out.tokens and EOS not in out.tokens
    assert model.network.dtype == torch.float32


def test_same_seed_same_text(model):
    drawn = [model.generate(PROMPT, length=16, temperature=1.0, seed=seed).canvas.tokens for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_list_is_one_output_each_and_equal_to_alone(model):
    prompts = [PROMPT, "Tom has 7 eggs ."]
    outputs = model.generate(prompts, length=16, temperature=0.7, seed=4)
    alone = [model.generate(p, length=16, temperature=0.7, seed=4 + i) for i, p in enumerate(prompts)]
    assert [o.tokens for o in outputs] == [o.tokens for o in alone]
    assert outputs[0].ledger.rows == 2


def test_conversation(model):
    assert (
        model.generate([{"role": "user", "content": PROMPT}], length=8).tokens
        == model.generate(PROMPT, length=8).tokens
    )


def test_literal_mask_text_stays_text(model):
    out = model.generate("Tom <mask> has <eos> 5", length=8)
    given = out.canvas.tokens[0][out.canvas.given[0]]
    assert MASK not in given and EOS not in given
    assert model.tokenizer.decode(given.tolist()).replace(" ", "").startswith("Tom<mask>has<eos>5")


def test_suffix_is_given(model):
    out = model.generate(PROMPT, length=8, suffix="#### 9")
    tail = model.tokenizer.encode("#### 9")
    assert out.canvas.tokens[0, -len(tail) :].tolist() == tail
    assert out.canvas.given[0, -len(tail) :].all()
    assert len(out.tokens) <= 8


@pytest.mark.parametrize("name", sorted(recipes.entries()))
def test_every_recipe_runs_where_it_fits(name, model, twin, blockwise, absolute, sampler):
    serial = name.startswith(("sdar", "llada2", "fast-dllm-v2"))
    chosen = {"ar": twin, "d2f": blockwise}.get(name, absolute if serial else model)
    settings: dict[str, Any] = {"block": 8} if "block" in recipes.entry(name).defaults else {}
    made = recipes.get(name)
    settings |= {"guide": twin} if made.guided else {}
    settings |= {"sampler": sampler} if made.joint else {}
    settings |= {"template": "{think} #### {answer:2}"} if name.startswith("ice") else {}
    out = chosen.generate(PROMPT, recipe=name, length=20, **settings)
    assert out.recipe.name == name
    assert out.ledger.forwards <= 24 + out.ledger.revised


@pytest.mark.parametrize("length", [1, 5, 8, 21])
def test_a_block_causal_model_is_written_as_it_was_trained(length, student, blockwise, absolute):
    """Blocks trained on decided ones before them are written one by one; a response may be shorter than a block."""
    assert student.generate(PROMPT, length=length).recipe.name == "d2f"
    for model in (blockwise, absolute):
        out = model.generate([PROMPT, "Q1 a"], length=length)
        assert [o.recipe.name for o in out] == ["fast-dllm-v2"] * 2  # its logits are shifted
        assert all(len(o.tokens) <= length and o.canvas.done.all() for o in out)
        grid = f"blocks(8{', grid=' + repr('absolute') if model is absolute else ''})"
        for family, shift, name in (
            ("sdar", False, "sdar"),
            ("llada2", False, "llada2"),
            ("unmask", False, "llada2"),
            ("fast_dllm_v2", True, "fast-dllm-v2"),
        ):
            config = replace(model.network.config, family=family, shift=shift)
            recipe = choose(Settings(threshold=0.7), config, length)
            assert recipe.name == name and grid in repr(recipe) and "0.7" in repr(recipe)
            if not shift:
                with pytest.raises(UserError, match="logits are not shifted; use 'sdar' or 'llada2'"):
                    choose(Settings(recipe="fast-dllm-v2"), config, length)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("length", [5, 21])
def test_one_block_at_a_time_is_exact_where_blocks_begin_behind_the_prompt(length, shift, folder):
    """The default of what `train block` makes: no later block is begun, and its cache changes nothing."""
    model = unmask.load(folder / "block")
    model.network.config = replace(model.network.config, shift=shift)
    found, begun = {}, []

    def watch(canvas, event):
        begun.append(int((~canvas.masked & ~canvas.given)[0].sum()))
        own = event.pick[0].nonzero()[:, 0] - canvas.origin[0]
        assert len({int(cell) // 8 for cell in own}) <= 1

    for cached in (True, False):
        recipe = choose(Settings(), model.network.config, length)
        assert recipe.name == ("fast-dllm-v2" if shift else "llada2")
        recipe = recipe if cached else replace(recipe, query=everything)
        prompts = ["Tom has 7 eggs .", PROMPT]
        found[cached] = [o.tokens for o in model.generate(prompts, recipe=recipe, length=length)]
        model.generate(PROMPT, recipe=recipe, length=length, on_step=watch)
    assert found[True] == found[False] and max(begun) > 0


CACHED = [
    ({"steps": 12}, "freecache_lag + window(0) + quota", "quota(12)", "llada"),
    ({"by": "margin"}, "freecache_lag + window(0) + quota", "by='margin'", "llada"),
    ({"remasking": "random"}, "freecache_lag + window(0) + quota", "by='random'", "llada"),
    ({"steps": 10, "block_length": 4}, "freecache_lag + window(0) + quota", "blocks(4)", "llada"),
    ({"factor": 0.7}, "freecache_lag + window(0) + factor", "factor(0.7", "factor"),
    ({"factor": 0.7, "block": 16}, "freecache_lag + window(0) + factor", "blocks(16)", "factor"),
]


@pytest.mark.parametrize(("said", "name", "part", "uncached"), CACHED)
def test_a_setting_does_not_cost_a_block_causal_model_its_cache(said, name, part, uncached, blockwise, folder):
    """What it says arrives, and the text is that of the recipe without a cache, over the same blocks."""
    out = blockwise.generate(PROMPT, length=20, **said)
    assert out.recipe.name == name and part in repr(out.recipe)
    assert out.ledger.cache_hits > 0
    size = said.get("block", said.get("block_length", 8))
    model, said = unmask.load(folder / "block", block=size), {"block": size, **said}
    plain = model.generate(PROMPT, length=20, recipe=uncached, **{k: v for k, v in said.items() if k != "block_length"})
    assert plain.tokens == out.tokens and plain.ledger.cache_hits == 0


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_asked_for_by_name_is_taken_on_a_block_causal_model(cache, blockwise):
    for others, name in (({}, cache), ({"steps": 12}, f"{cache}-quota"), ({"factor": 1.0}, f"{cache}-factor")):
        assert choose(Settings(cache=cache, **others), blockwise.network.config, 20).name == name


def test_settings_of_a_stack_that_it_has_not_are_refused(blockwise):
    with pytest.raises(UserError, match="'freecache_lag \\+ window\\(0\\) \\+ factor' has a setting steps"):
        blockwise.generate(PROMPT, length=16, factor=1.0, steps=4)
    with pytest.raises(UserError, match="3 steps are fewer than the 4 blocks"):
        blockwise.generate(PROMPT, length=32, steps=3)


def test_llada_commits_one_cell_a_step(model):
    out = model.generate(PROMPT, recipe=Recipe(*_parts("llada", 20)), length=20)
    assert out.ledger.tokens <= out.ledger.forwards
    out = model.generate(PROMPT, recipe="llada", length=20, block=8)
    assert out.ledger.tokens <= out.ledger.forwards


def _parts(name: str, length: int):
    recipe = recipes.get(name, block=length, steps=length)
    return recipe.query, recipe.unmask


PAIRS = [  # what a caller of another library writes, and what we call it
    ({"max_new_tokens": 16}, {"length": 16}),
    (
        {"gen_length": 16, "block_length": 8, "steps": 4, "remasking": "random"},
        {"length": 16, "block": 8, "steps": 4, "by": "random"},
    ),
    ({"remasking": "low_confidence"}, {"by": "score"}),
    ({"alg": "entropy", "steps": 9}, {"recipe": "dream", "by": "entropy", "steps": 9}),
    ({"alg": "origin"}, {"recipe": "dream-origin"}),
    ({"use_cache": True, "dual_cache": True}, {"cache": "dual"}),
    ({"use_cache": True, "dual_cache": False}, {"cache": "prefix"}),
    ({"do_sample": True}, {"temperature": 1.0}),
    ({"do_sample": True, "temperature": 0.3}, {"temperature": 0.3}),
    ({"do_sample": False}, {"temperature": 0.0}),
    ({"cfg_scale": 0.0, "mask_id": 7, "num_beams": 1}, {}),
    ({"length": 16, "gen_length": 16}, {"length": 16}),
    ({"confidence_threshold": 0.8}, {"threshold": 0.8}),
]


@pytest.mark.parametrize(("said", "meant"), PAIRS)
def test_aliases(said, meant):
    own = {k: v for k, v in said.items() if k not in ALIASES and k not in REFUSED and k != "mask_id"}
    assert resolve(own, {k: v for k, v in said.items() if k not in own}, mask_id=7) == Settings(**meant)


def test_published_call_equals_ours(model):
    theirs = model.generate(PROMPT, gen_length=16, block_length=8, steps=8, remasking="low_confidence", cfg_scale=0.0)
    ours = model.generate(PROMPT, recipe="llada", length=16, block=8, steps=8)
    assert theirs.recipe == ours.recipe
    assert theirs.tokens == ours.tokens


DEFAULTS = [
    ({}, "threshold"),
    ({"steps": 16}, "llada"),
    ({"factor": 1.0}, "factor"),
    ({"use_cache": True}, "prefix"),
    ({"use_cache": True, "dual_cache": True, "factor": 1.0}, "dual-factor"),
    ({"use_cache": True, "steps": 16}, "prefix-quota"),
    ({"alg": "topk_margin"}, "dream"),
]


@pytest.mark.parametrize(("settings", "name"), DEFAULTS)
def test_recipe_follows_from_the_settings(model, settings, name):
    assert model.generate(PROMPT, length=16, **settings).recipe.name == name


REFUSALS = [
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": " \n"}, "the prompt is empty"),
    ({"prompt": []}, "there is no prompt"),
    ({"length": 150}, "this model has 160"),
    ({"prompt": PROMPT * 20}, "this model has 160"),
    ({"length": 0}, "length must be a whole number of at least 1"),
    ({"length": 8, "block": 9}, "a block of 9 cells does not fit into a response of 8"),
    ({"block": 0}, "block must be a whole number of at least 1"),
    ({"length": 16, "block": 4, "recipe": "llada", "steps": 3}, "3 steps are fewer than the 4 blocks"),
    ({"recipe": "duall"}, "did you mean 'dual'"),
    ({"recipe": "d2f", "length": 32}, "attends to all that follow"),
    ({"recipe": "ar"}, "only a causal model can"),
    ({"recipe": "llada", "threshold": 0.5}, "has no setting threshold"),
    ({"recipe": "nowhere.toml"}, "cannot read the recipe nowhere.toml"),
    ({"recipe": "blocks(8) >> bets(1)"}, "did you mean 'best'"),
    ({"recipe": "blocks(8) >> confident(.9)"}, "may commit nothing"),
    ({"recipe": "blocks(8) >> best(1)", "threshold": 0.9}, "write them into the expression"),
    ({"recipe": Recipe(everything, best(1)), "block": 8}, "a Recipe already holds its own"),
    ({"gen_lenght": 8}, "did you mean 'gen_length'"),
    ({"cfg_scale": -1.5}, "cfg must be a finite number >= 0"),
    ({"alg_temp": 0.5}, "noise on the order of commits is not implemented"),
    ({"mask_id": 99}, "mask_id is the model's own"),
    ({"remasking": "low-confidence"}, "did you mean 'low_confidence'"),
    ({"length": 16, "gen_length": 32}, "contradict each other"),
    ({"temperature": -1.0}, "temperature must be a finite number >= 0"),
    ({"temperature": float("nan")}, "temperature must be a finite number >= 0"),
    ({"temperature": float("inf")}, "temperature must be a finite number >= 0"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p must be a number above 0"),
    ({"top_p": 2}, "top_p must be a number above 0 and at most 1"),
    ({"top_p": "all"}, "top_p must be a number above 0 and at most 1"),
    ({"temperature": 1.0, "top_k": 1.5}, "top_k must be a whole number of at least 0"),
    ({"top_k": -3}, "top_k must be a whole number of at least 0"),
    ({"seed": 2**70}, "seed must be a whole number between"),
    ({"recipe": "dream", "eps": 5}, "eps is the noise"),
    ({"prompt": 3}, "a prompt is a text, a list of messages or a list of texts"),
    ({"prompt": b"Anna"}, "a prompt is a text, a list of messages or a list of texts"),
    ({"prompt": [PROMPT, 3]}, "a prompt is a text or a list of messages"),
    ({"suffix": 3}, "the suffix is a text"),
    ({"streamer": 3}, "a streamer has the methods put and end"),
    ({"on_step": 3}, "on_step is a function"),
    ({"guide": "twin"}, "recipe 'threshold' asks no guide; leave guide out, or use 'guided'"),
    ({"recipe": "adjust", "guide": "twin"}, "recipe 'adjust' asks no guide"),
    ({"sampler": "/nonexist"}, "recipe 'threshold' asks no sampler; leave sampler out, or use 'adjust'"),
    ({"recipe": "joint(1)", "sampler": "/nonexist"}, "asks no sampler"),
    ({"recipe": "adjust", "sampler": "/nonexist"}, "/nonexist is not a joint sampler; give the folder `sampler` that"),
    ({"recipe": "adjust", "sampler": 5}, "5 is not a joint sampler; give the folder"),
    ({"recipe": "adjust", "sampler": ["a"]}, "is not a joint sampler; give the folder"),
    ({"recipe": "ice"}, "recipe 'ice' writes into a template; give template="),
    ({"recipe": "ice-quota"}, "recipe 'ice-quota' writes into a template"),
    ({"recipe": "prefix + one + ice"}, "writes into a template"),
    ({"recipe": "prefer(region(1), best(1))"}, "writes into a template"),
    ({"recipe": "dual | threshold"}, "dual is a lever, and levers are joined by \\+ alone"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refused(model, call, message):
    with pytest.raises(UserError, match=message) as error:
        model.generate(**{"prompt": PROMPT, "length": 16, **call})
    assert "\n" not in str(error.value)


def test_models_and_recipes_that_do_not_go_together(twin, blockwise, student):
    with pytest.raises(UserError, match="autoregressive; use recipe 'ar'"):
        twin.generate(PROMPT, length=8, recipe="dual")
    with pytest.raises(UserError, match="cannot write towards a suffix"):
        twin.generate(PROMPT, length=8, suffix="#### 9")
    for length in (5, 8):  # also where the suffix begins within the last block: all others would not see it
        with pytest.raises(UserError, match="cannot write towards a suffix; use a model with full attention"):
            blockwise.generate(PROMPT, length=length, suffix="#### 9")
    with pytest.raises(UserError, match="only a causal model can; use 'fast-dllm-v2' or 'freecache-lag'"):
        blockwise.generate(PROMPT, length=8, recipe="ar")
    with pytest.raises(UserError, match="only a causal model can; use 'd2f' or 'freecache-lag'"):
        student.generate(PROMPT, length=8, recipe="ar")
    with pytest.raises(UserError, match="attends in blocks of 8"):
        blockwise.generate(PROMPT, length=16, recipe="d2f", block=5)


def test_recipes_as_file_expression_and_value(model, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        '[defaults]\nthreshold = 0.9\n[recipe]\nquery = "everything"\nunmask = "confident(threshold) | best(1)"\n'
    )
    forms = [
        str(file),
        "confident(0.9) | best(1)",
        from_expression("Recipe(query=everything, unmask=confident(.9) | best())"),
    ]
    outputs = [model.generate(PROMPT, length=16, recipe=form) for form in forms]
    assert len({o.recipe.hash for o in outputs}) == 1
    assert model.generate(PROMPT, length=16, recipe=file, threshold=0.2).recipe != outputs[0].recipe


def test_expression_reads_back_what_a_recipe_prints():
    for name in recipes.entries():
        recipe = recipes.get(name)
        assert from_expression(repr(recipe)) == recipe


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.settled: list[list[int]] = []
        self.drafts: list[list[int]] = []
        self.ended = 0

    def put(self, value) -> None:
        self.settled.append(value.tolist())

    def put_draft(self, value) -> None:
        self.drafts.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("recipe", ["llada", "dual", "threshold"])
def test_streamer(model, recipe):
    seen = Recorder()
    out = model.generate(PROMPT, recipe=recipe, length=16, block=8, streamer=seen)
    written = [token for part in seen.settled[1:] for token in part]
    assert seen.settled[0] == model.encode(PROMPT)
    assert [t for t in written if t != EOS] == out.tokens
    assert seen.ended == 1
    assert all(MASK not in draft or recipe == "dual" for draft in seen.drafts)


def test_streamer_without_drafts_and_several_prompts(model):
    class Plain:
        put = end = lambda self, *ids: None

    model.generate(PROMPT, length=8, streamer=Plain())
    with pytest.raises(UserError, match="a streamer shows one response"):
        model.generate([PROMPT, PROMPT], length=8, streamer=Plain())


def test_time_of_the_caller_is_not_decoding(model):
    import time

    out = model.generate(PROMPT, recipe="llada", length=8, on_step=lambda canvas, event: time.sleep(0.05))
    assert out.ledger.seconds < 0.05 * out.ledger.forwards


@pytest.mark.parametrize("device", ["tpu9", "cuda:99"])
def test_device_that_is_not_here(folder, model, device):
    with pytest.raises(UserError, match=f"the device '{device}' cannot be used here") as error:
        unmask.load(folder / "dllm", device=device)
    assert "\n" not in str(error.value)


def test_unknown_model(tmp_path):
    with pytest.raises(UserError, match="unknown model 'twni'; did you mean 'twin'"):
        unmask.load("twni")
    with pytest.raises(UserError):
        unmask.load(tmp_path / "nowhere")


def test_finished_stop_is_kept(blockwise):
    assert blockwise.generate(PROMPT, recipe="d2f", length=16, block=8).recipe.stop == finished


def test_embedded_lengths():
    from unmask import zoo

    assert zoo.length(PROMPT) < zoo.length("Q1 a Q2 b Q3 c") < zoo.length("Q8 a" + " Q1 b" * 7)
    assert zoo.length("name[The Mill], eatType[pub]") != zoo.length(PROMPT)
    with pytest.raises(UserError, match="unknown embedded model"):
        zoo.path("dlm")


@pytest.mark.parametrize(
    "setting", [{"by": "margin", "steps": 24}, {"cache": "dual"}, {"recipe": "dream", "eps": 0.01}]
)
def test_recipe_settings_are_accepted_by_their_own_names(model, setting):
    assert model.generate("Tom has 3 apples .", length=24, **setting).recipe is not None


def test_edit_goes_on_after_its_end_until_nothing_changes(model):
    out = model.generate(PROMPT, recipe="edit", length=20, block=8)
    assert out.recipe.stop == recipes.get("edit").stop
    eager = model.generate(PROMPT, recipe=replace(out.recipe, stop=out.recipe.stop | ended), length=20)
    assert out.forwards >= eager.forwards
    canvas = out.canvas
    text = canvas.position <= canvas.first(canvas.ended)[:, None]
    last = int(canvas.decided_at.masked_fill(~text, 0).max())
    assert last < out.forwards or not (canvas.revocable & text).any()
