"""`unmask verify`: exact caches are seen to be exact, approximate ones by how much they are not."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

import embedded
from laws.common import BLOCK, OPEN, line, model, ragged, results, run, small
from unmask.cli import main
from unmask.decode import Blocks, Canvas, Draft, Recipe, decode, drawn, everything, parse
from unmask.decode.belief import Joint
from unmask.denoise import Plain
from unmask.errors import UserError
from unmask.generate import load
from unmask.models.config import Layout, ModelConfig
from unmask.models.joint import JointSampler, digest, save_sampler
from unmask.models.kv import KVPool
from unmask.study import verify as study
from unmask.study import verify_plot
from unmask.study.results import read
from unmask.study.verify import CACHES, COSINES, Recomputed, Watched, compare, pooled, reached, summarise, verify

FULL = CACHES["full"]
LAYERS = 2  # of the toys


@lru_cache
def verified(name: str, kind: str) -> tuple[list, list]:
    network = model(kind)
    return verify(network, small(name), ragged(), guide=model("causal") if small(name).guided else None)


def whole(name: str, kind: str) -> dict:
    steps, last = verified(name, kind)
    return summarise(steps, last, cached=small(name).cached, tolerance=1e-9)


# What is exact


@pytest.mark.parametrize(("name", "kind"), [("ar", "causal"), ("d2f", "block"), ("freecache-lag", "block")])
def test_an_exact_cache_is_exact(name: str, kind: str) -> None:
    found = whole(name, kind)
    assert found["verdict"] == "exact" and found["stale"] > 0
    assert found["max_delta_logit"] <= 1e-9 and found["max_delta_probability"] <= 1e-9
    assert (found["token_agreement"], found["text_agreement"], found["cell_agreement"]) == (1, 1, 1)
    assert found["parted_at"] is None and found["forwards"] == found["exact_forwards"]
    for side in COSINES:
        assert min(found[side] + found[f"{side}_min"] + found[f"{side}_known"]) > 1 - 1e-9


@pytest.mark.parametrize("name", [n for n in OPEN if not small(n).cached])
def test_no_cache_is_exact(name: str) -> None:
    found = whole(name, "shifted")
    assert found["verdict"] == "exact" and found["why"] == "no cache: exact by definition"
    assert max(found["max_delta_logit"], found["mean_delta_logit"], found["max_delta_probability"]) <= 1e-9
    assert found["stale"] == found["missing"] == 0 and found["by_construction"]
    assert found["key_cosine"] is None and found["text_agreement"] == 1


def test_a_cache_that_reuses_nothing_is_exact_by_construction() -> None:
    recipe = replace(small("dkv"), query=everything | small("dkv").query)
    found = summarise(*verify(model("full"), recipe, ragged()), cached=recipe.cached, tolerance=1e-9)
    assert recipe.cached and found["why"] == "nothing was reused: exact by construction"
    assert found["max_delta_logit"] == 0 and found["key_cosine"] is None
    assert found["key_cosine_known"] == pytest.approx([1.0] * LAYERS)


# What is not


@pytest.mark.parametrize("kind", ["full", "shifted"])
@pytest.mark.parametrize("name", FULL)
def test_an_approximate_cache_is_seen(name: str, kind: str) -> None:
    found = whole(name, kind)
    assert found["verdict"] == "approximate" and found["why"] == "some |delta logit| > 1e-09"
    assert 0 < found["mean_delta_logit"] < found["max_delta_logit"]
    assert 0 < found["max_delta_probability"] <= 1 and found["token_agreement"] < 1
    assert found["key_cosine"][-1] < 1 and found["value_cosine"][-1] < 1
    assert 0 < found["stale_share"] < 1 and found["stale_age"] >= 1


def test_a_freeze_one_forward_later_under_block_causal_attention() -> None:
    """Lag 0 keeps the keys of the mask, already in the layer that reads only the cell itself; lag 1 keeps none."""
    early, late = whole("freecache", "block"), whole("freecache-lag", "block")
    assert (early["verdict"], late["verdict"]) == ("approximate", "exact")
    assert early["key_cosine_min"][0] < 0.9 < late["key_cosine_min"][0]
    lag = whole("freecache-lag", "full")
    assert lag["key_cosine_min"][0] > 1 - 1e-9 > lag["key_cosine_min"][1]


@pytest.mark.parametrize("name", FULL)
def test_a_step_with_nothing_stale_is_exact(name: str) -> None:
    """The first one of each: nothing is kept yet. Several rows round as they are packed."""
    steps = verified(name, "full")[0]
    for step in steps:
        assert step["stale"] + step["missing"] or step["max_delta_logit"] <= 1e-9
    assert all(s["stale"] == 0 and s["max_delta_logit"] == 0 for s in steps if s["step"] == 1)


@pytest.mark.parametrize("kind", ["full", "shifted"])
@pytest.mark.parametrize("name", FULL)
def test_the_exact_run_is_the_recipe_with_everything_computed(name: str, kind: str) -> None:
    recipe, canvas = small(name), ragged()
    uncached = replace(recipe, query=everything)
    end, _ = run(Plain(model(kind), slots=4, length=21, cached=False), uncached, canvas)
    exact, _ = run(Recomputed(model(kind), slots=4, length=21, cached=False), recipe, canvas)
    assert results(exact) == results(end)
    assert [e["exact_forwards"] for e in verified(name, kind)[1]] == end.step.tolist()


@pytest.mark.parametrize(("name", "kind"), [("dual", "full"), ("dkv", "shifted"), ("d2f", "block"), ("ar", "causal")])
def test_watching_changes_nothing(name: str, kind: str) -> None:
    recipe, canvas = small(name), ragged()
    watched = Watched(model(kind), slots=4, length=21, cached=recipe.cached)
    plain = Plain(model(kind), slots=4, length=21, cached=recipe.cached)
    assert results(run(watched, recipe, canvas)[0]) == results(run(plain, recipe, canvas)[0])
    assert [e["forwards"] for e in verified(name, kind)[1]] == run(plain, recipe, canvas)[0].step.tolist()


def test_with_a_guide_the_model_is_what_is_watched() -> None:
    found = whole("freecache-guided", "full")
    assert found["verdict"] == "approximate" and 0 < found["text_agreement"] <= 1


@pytest.mark.parametrize(
    ("query", "verdict"), [("everything", "exact"), ("b | everything.when(b.entered)", "approximate")]
)
def test_with_a_joint_sampler_the_model_is_what_is_watched(query: str, verdict: str) -> None:
    sampler = JointSampler(model("full").config).initialise(1, gain=1.0).double()
    recipe = Recipe(parse(query, {"b": Blocks(BLOCK)}), Blocks(BLOCK) >> drawn, beliefs=(Joint(2),))
    found = summarise(*verify(model("full"), recipe, ragged(), sampler=sampler), cached=recipe.cached, tolerance=1e-9)
    assert found["verdict"] == verdict and (found["text_agreement"] == 1) == (verdict == "exact")


# Batches


@pytest.mark.parametrize(("name", "kind"), [(n, "full") for n in FULL] + [("dual", "shifted"), ("d2f", "block")])
def test_a_row_of_a_ragged_batch_is_the_row_alone(name: str, kind: str) -> None:
    canvas = ragged()
    steps, last = verified(name, kind)
    for row in range(len(canvas)):
        width = int(canvas.valid[row].sum())
        one = canvas[row : row + 1]
        one = one._map(lambda _, t, w=width: t if t.dim() == 1 else t[:, :w])
        alone, end = verify(model(kind), small(name), one)
        own = [s for s in steps if s["row"] == row]
        assert len(alone) == len(own) and end == [last[row]]
        for a, b in zip(alone, own, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == pytest.approx(b[key], abs=1e-9), key


# By hand


CONFIG = ModelConfig(vocab_size=6, d_model=4, layers=1, heads=2, ff=4, max_positions=8, mask_id=5, token_count=5)


def pool(values: list[list[float]]) -> KVPool:
    """One layer, two heads of two numbers; `values` are the keys of three cells, each value is its key times -2."""
    made = KVPool(CONFIG, 1, 3, dtype=torch.float64)
    keys = torch.tensor(values, dtype=torch.float64).view(3, 2, 2).transpose(0, 1)
    made.data[0, 0, 0, :, :3], made.data[0, 1, 0, :, :3] = keys, -2 * keys
    return made


def hand() -> tuple[Canvas, tuple[Draft, Draft], tuple[KVPool, KVPool]]:
    """Two given cells, computed at steps 1 and 3, and a hole, which step 5 computes alone."""
    canvas = Canvas.new([[1, 2]], 1, mask_id=5, dtype=torch.float64)
    canvas = replace(canvas, step=torch.tensor([4]), cached_at=torch.tensor([[1, 3, 4]]))
    computed = torch.tensor([[False, False, True]])
    never = -math.inf
    ours = torch.tensor([[0.0, 1.0, math.log(3), 0.0, never, never]], dtype=torch.float64)
    theirs = torch.tensor([[0.0, 2.0, math.log(3), 0.5, never, never]], dtype=torch.float64)
    drafts = Draft(computed, computed, ours), Draft(computed, computed, theirs)
    exact = [[1.0, 0, 0, 0], [3, 0, 0, 4], [1, 1, 1, 1]]
    kept = [[0.0, 1, 0, 0], [4, 0, 0, 3], [2, 2, 2, 2]]
    return canvas, drafts, (pool(kept), pool(exact))


def test_by_hand() -> None:
    canvas, drafts, pools = hand()
    (found,) = compare(canvas, drafts, pools, Layout())
    assert (found["row"], found["step"], found["compared"]) == (0, 5, 1)
    assert found["max_delta_logit"] == pytest.approx(1) and found["mean_delta_logit"] == pytest.approx(1.5 / 4)
    assert found["token_agreement"] == 0  # token 2, of 3 parts in 5 + e, against token 1
    p, q = (3 / (5 + math.e), 3 / (4 + math.e**2 + math.e**0.5))
    assert found["max_delta_probability"] == pytest.approx(p - q)
    assert (found["computed"], found["attended"], found["stale"], found["missing"]) == (1, 3, 2, 0)
    assert found["stale_age"] == 3  # 4 and 2 steps
    for side in COSINES:  # a right angle, 24 / 25, and the same direction
        assert found[side] == pytest.approx([(0 + 0.96) / 2]) and found[f"{side}_min"] == pytest.approx([0])
        assert found[f"{side}_known"] == pytest.approx([(0 + 0.96 + 1) / 3])


def test_a_pool_corrupted_by_a_known_amount() -> None:
    """A stale key that is turned round has cosine -1, in the layer and the step it was turned in."""
    canvas, recipe = line(3, 2 * BLOCK), small("freecache-lag")
    watched = Watched(model("block"), slots=1, length=3 + 2 * BLOCK)
    steps = decode(watched, recipe, canvas)
    while not watched.rows or not watched.rows[-1]["stale"]:
        next(steps)
    assert watched.rows[-1]["key_cosine"] == pytest.approx([1.0, 1.0])
    watched.pool.data[1, 0, 0, :, 0] *= -1
    next(steps)
    last = watched.rows[-1]
    stale = last["stale"]
    assert last["key_cosine"] == pytest.approx([1.0, (stale - 2) / stale])
    assert last["key_cosine_min"] == pytest.approx([1.0, -1.0])
    assert last["value_cosine"] == pytest.approx([1.0, 1.0]) and last["max_delta_logit"] > 0


def test_who_is_attended_to() -> None:
    canvas = replace(line(2, 4), cached_at=torch.tensor([[1, -1, 1, 1, 1, -1]]))
    computed = torch.tensor([[False, False, False, True, False, False]])
    for layout, seen, missing in (
        (Layout(), [0, 2, 3, 4], [1, 5]),
        (Layout("causal"), [0, 2, 3], [1]),
        (Layout("block", size=2), [0, 2, 3], [1]),
    ):
        found = [cells[0].nonzero()[:, 0].tolist() for cells in reached(canvas, computed, layout)]
        assert found == [seen, missing]


def test_cells_out_of_reach_are_no_cache_hits() -> None:
    """A block that attends to nothing but itself keeps nothing, and is wrong."""
    block = small("dual").query.left
    found = summarise(
        *verify(model("full"), Recipe(block, small("dual").unmask), ragged()), cached=True, tolerance=1e-9
    )
    assert found["missing"] > 0 and not found["by_construction"] and found["verdict"] == "approximate"


def test_a_broken_number_is_not_exact() -> None:
    canvas, (ours, theirs), pools = hand()
    ours.logits[0, 0] = math.nan
    assert compare(canvas, (ours, theirs), pools, Layout())[0]["max_delta_logit"] == math.inf


def test_means_are_over_cells() -> None:
    made = [
        {**dict.fromkeys(study.COUNTS, n), "max_delta_probability": n / 9, "max_delta_logit": n, "stale_age": n}
        | {"mean_delta_logit": n, "token_agreement": 1 / n}
        | {f"{side}{end}": [float(n), 0.0] for side in COSINES for end in ("", "_min", "_known")}
        for n in (1, 3)
    ]
    none = {**made[0], "compared": 0, "stale": 0, "mean_delta_logit": None, "token_agreement": None, "stale_age": None}
    none |= {f"{side}{end}": None for side in COSINES for end in ("", "_min")}
    found = pooled([*made, none])
    assert found["mean_delta_logit"] == found["stale_age"] == (1 * 1 + 3 * 3) / 4
    assert found["token_agreement"] == (1 * 1 + 3 / 3) / 4 and found["max_delta_logit"] == 3
    assert found["key_cosine"] == [2.5, 0] and found["key_cosine_min"] == [1, 0]
    assert found["key_cosine_known"] == pytest.approx([(1 + 9 + 1) / 5, 0]) and found["stale_share"] == 4 / 5


# The command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(embedded.build(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def command(capsys, tmp_path):
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(("verify", *arguments, "--out", str(tmp_path / "results")))
        return code, *capsys.readouterr()

    return call


KEYS = {
    *("recipe", "verdict", "max_delta_logit", "mean_delta_logit", "token_agreement", "text_agreement"),
    *("key_cosine", "value_cosine", "stale_share", "forwards", "exact_forwards", "steps", "texts", "expression"),
}


def test_json_and_results(command) -> None:
    code, out, _ = command("--items", "2", "--recipe", "freecache", "--recipe", "freecache-lag", "--json")
    told = json.loads(out)
    assert code == 0 and {"model", "machine", "recipes"} <= told.keys() and told["model"] == "dllm"
    assert [r["recipe"] for r in told["recipes"]] == ["freecache", "freecache-lag"]
    for one in told["recipes"]:
        assert one.keys() >= KEYS and one["verdict"] == "approximate" and len(one["texts"]) == 2
        assert len(one["key_cosine"]) == len(one["value_cosine"]) == 6
        assert [s["step"] for s in one["steps"]] == list(range(1, len(one["steps"]) + 1))
        assert all(s["key_cosine"] is None or len(s["key_cosine"]) == 6 for s in one["steps"])
        assert one["max_delta_logit"] == max(s["max_delta_logit"] for s in one["steps"])
    early, late = told["recipes"]
    assert late["mean_delta_logit"] < early["mean_delta_logit"] and late["key_cosine"][0] > early["key_cosine"][0]
    head, rows, summary = read(told["results"])
    assert summary["recipes"] == told["recipes"] and head["config"]["prompts"] == 2
    assert {(r["recipe"], r["prompt"]) for r in rows} == {
        (n, p) for n in ("freecache", "freecache-lag") for p in (0, 1)
    }
    assert max(r["max_delta_logit"] for r in rows if r["recipe"] == "freecache") == early["max_delta_logit"]


def test_the_twin_is_exact(command) -> None:
    code, out, _ = command("twin", "--items", "2")
    assert code == 0 and "ar: exact (every |delta logit| <= 0.0001)" in out


def test_tables(command, tiny) -> None:
    code, out, _ = command(tiny, "--prompt", embedded.PROMPT, "--length", "12", "--steps", "--block", "4")
    assert code == 0
    for name in FULL:
        assert f"\n{name}: " in out and f"{name}, step by step" in out
    assert "freecache, layer by layer" in out and "\nlowest" in out
    assert "…" not in out and max(map(len, out.splitlines()[:6])) <= 80


def test_an_expression_is_told_in_full(command, tiny) -> None:
    recipe = "Recipe(query=everything, unmask=best(2), beliefs=[joint(1)])"
    code, out, _ = command(tiny, "--prompt", embedded.PROMPT, "--length", "6", "--recipe", recipe)
    assert code == 0 and f"\n{recipe}: exact (no cache: exact by definition)\n" in out


def test_a_file_of_prompts(command, tiny, tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": embedded.PROMPT}) + "\n{}\n")
    asked = (tiny, "--batch", str(file), "--length", "8", "--recipe", "prefix", "--json")
    assert command(*asked)[0] == 2
    code, out, _ = command(*asked, "--keep-going")
    assert code == 1 and len(json.loads(out)["recipes"][0]["texts"]) == 1


MISTAKES = [
    (("--recipe", "duall"), "did you mean 'dual'"),
    (("--recipe", "ar"), "which only a causal model can"),
    (("--recipe", "d2f"), "block-causal model"),
    (("--recipe", "dual", "--block", "40"), "does not fit into a response of 24"),
    (("--recipe", "dream", "--block", "4"), "no setting block"),
    (("--recipe", "freecache-guided"), "needs a guide"),
    (("--recipe", "dual", "--guide", "twin"), "none of the recipes asks a guide; leave guide out, or use 'guided'"),
    (("--recipe", "dual", "--recipe", "prefix", "--sampler", "x"), "none of the recipes asks a sampler"),
    (("--recipe", "adjust", "--sampler", "x", "--block", "8"), "x is not a joint sampler; give the folder"),
    (("--recipe", "ice"), "recipe 'ice' writes into a template"),
    (("--recipe", "ice", "--template", "{think} so {think}"), "the template has none"),
    (("--items", "0"), "--items must be at least 1"),
    (("--items", "2", "--prompt", "x"), "give one of"),
    (("--prompt", " "), "the prompt is empty"),
    (("--length", "500"), "this model has 160"),
    (("--batch", "/nowhere/at/all"), "cannot read /nowhere/at/all"),
    (("--plot", "/nowhere/at/all.png"), "cannot write /nowhere/at/all.png"),
    (("--plot", "plot.jpg"), "a plot is a png or svg file"),
    (("--dtype", "float99"), "unknown dtype"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(command, tiny, tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(tiny, *(("--length", "24") if "--length" not in arguments else ()), *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_recipes_with_a_template_a_guide_and_a_sampler(command, tiny, tmp_path) -> None:
    twin = str(embedded.build(tmp_path / "twin", layout=Layout("causal")))
    network = load(tiny).network
    save_sampler(JointSampler(network.config).initialise(1, gain=0.5), tmp_path / "joint", base=digest(network))
    said = ("--prompt", embedded.PROMPT, "--length", "12", "--json")
    second = (
        "--guide",
        twin,
        "--sampler",
        str(tmp_path / "joint"),
        "--recipe",
        "prefix + guided",
        "--recipe",
        "joint(2)",
    )
    code, out, err = command(tiny, *said, *second, "--recipe", "prefix", "--block", "4")
    assert (code, err) == (0, "") and [one["recipe"] for one in json.loads(out)["recipes"]][-1] == "prefix"
    code, out, err = command(tiny, *said, "--recipe", "ice", "--template", "{think} so {answer:2}")
    assert (code, err) == (0, "") and json.loads(out)["recipes"][0]["verdict"] == "exact"


def test_an_unknown_model_or_a_folder_that_is_none(command, tiny, tmp_path) -> None:
    assert "did you mean 'dllm'" in command("dllmm")[2]
    (tmp_path / "results").write_text("a file")
    code, _, err = command(tiny, "--length", "8", "--recipe", "prefix", "--items", "1")
    assert code == 2 and err.startswith("error: cannot write into")


# The plot

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib (the bench extra)")
def test_plot(command, tiny, tmp_path) -> None:
    file = tmp_path / "plot.svg"
    asked = ("--recipe", "threshold", "--recipe", "freecache", "--length", "16", "--items", "1")
    assert command(tiny, *asked, "--plot", str(file))[0] == 0
    assert file.read_text().startswith("<?xml")


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib (the bench extra)")
def test_plot_of_what_has_no_cache(tmp_path) -> None:
    verify_plot.draw([{"recipe": "threshold", **whole("threshold", "full")}], tmp_path / "plot.png", "a toy")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot write"):
        verify_plot.draw([{"recipe": "dual", **whole("dual", "full")}], tmp_path / "no" / "plot.png", "a toy")


def test_a_plot_without_matplotlib(command, tiny, tmp_path, monkeypatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = command(tiny, "--plot", str(tmp_path / "plot.png"))
    assert (code, out) == (2, "") and "pip install 'unmask[bench]'" in err
    assert not list(tmp_path.iterdir())
