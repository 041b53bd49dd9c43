"""Loops of a user's clone beside ours: a loop that decodes as ours does agrees in every token and forward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.cli import main

LOOP = """
import torch

def generate(model, prompt, steps, gen_length, block_length, temperature, mask_id):
    start = prompt.shape[1]
    x = torch.cat([prompt, torch.full((1, gen_length), mask_id)], 1)
    for begin in range(start, start + gen_length, block_length):
        for _ in range(steps * block_length // gen_length):
            peak, token = model(x).logits.softmax(-1).max(-1)
            own = torch.arange(x.shape[1])
            open = (x[0] == mask_id) & (own >= begin) & (own < begin + block_length)
            cell = int(torch.where(open, peak[0], -1.0).argmax())
            x[0, cell] = token[0, cell]
    return x
"""
CACHED = """
import torch

def generate(model, prompt, steps, gen_length, block_length, temperature, mask_id, threshold):
    return run(model, prompt, gen_length, block_length, mask_id, threshold, None)

def generate_with_prefix_cache(model, prompt, steps, gen_length, block_length, temperature, mask_id, threshold):
    return run(model, prompt, gen_length, block_length, mask_id, threshold, "prefix")

def generate_with_dual_cache(model, prompt, steps, gen_length, block_length, temperature, mask_id, threshold):
    return run(model, prompt, gen_length, block_length, mask_id, threshold, "dual")

def run(model, prompt, length, block, mask_id, threshold, cache):
    start, forwards = prompt.shape[1], 0
    x = torch.cat([prompt, torch.full((1, length), mask_id)], 1)
    own = torch.arange(x.shape[1])
    for begin in range(start, start + length, block):
        mine, kept = (own >= begin) & (own < begin + block), None
        while bool((x[0, mine] == mask_id).any()):
            forwards += 1
            if cache is None or kept is None:
                out, first = model(x, use_cache=cache is not None), 0
                kept = out.past_key_values
                if cache == "prefix":
                    kept = [(k[:, :, :begin], v[:, :, :begin]) for k, v in kept]
            elif cache == "prefix":
                out, first = model(x[:, begin:], past_key_values=kept, use_cache=True), begin
            else:
                window = x[:, begin : begin + block]
                out = model(window, past_key_values=kept, use_cache=True, replace_position=mine[None])
                first = begin
            peak, token = out.logits.softmax(-1).max(-1)
            peak = torch.where(x[0, first : first + peak.shape[1]] == mask_id, peak[0], -1.0)
            peak[~mine[first : first + len(peak)]] = -1.0
            sure = peak > threshold
            sure[peak.argmax()] = True
            for i in sure.nonzero()[:, 0].tolist():
                x[0, first + i] = token[0, i]
    return x, forwards
"""


@pytest.fixture(scope="module")
def clones(tmp_path_factory) -> tuple[str, str]:
    """Loops of our own by the interfaces of the published ones."""
    root = tmp_path_factory.mktemp("clones")
    (root / "a").mkdir()
    (root / "a" / "generate.py").write_text(LOOP, encoding="utf-8")
    (root / "b" / "v1" / "llada").mkdir(parents=True)
    (root / "b" / "v1" / "llada" / "generate.py").write_text(CACHED, encoding="utf-8")
    return str(root / "a"), str(root / "b")


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(["bench", "peer", *arguments]), *capsys.readouterr()

    return call


def test_equal_loops_agree_in_tokens_and_forwards(run, clones, tmp_path):
    asked = ("--llada", clones[0], "--fast-dllm", clones[1], "--items", "2", "--length", "16", "--json")
    code, out, err = run(*asked, "--out", str(tmp_path))
    assert (code, err) == (0, "")
    told = {line["recipe"]: line for line in json.loads(out)["rows"]}
    assert told.keys() == {"llada", "threshold", "prefix", "dual"}
    for line in told.values():
        assert line["agreement"] == 1.0 and line["nfe_theirs"] == line["nfe_ours"], line
        assert line["ms_per_step_theirs"] > 0 and line["ms_ours"] > 0
        assert line["accuracy_theirs"] == line["accuracy_ours"]
    assert told["llada"]["nfe_ours"] == 16
    assert Path(json.loads(out)["folder"]).parent == tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no clone is given"),
        (("--llada", "nowhere"), "no generate.py in nowhere"),
        (("--llada", "broken"), "install what the published code needs"),
        (("--llada", "old"), "llada generate is not in the clone"),
        (("--llada", "good", "--items", "0"), "items must be at least 1"),
        (("--llada", "good", "--length", "10"), "multiple of the block"),
        (("--llada", "good", "--length", "100000"), "this model has 1024"),
    ],
)
def test_mistakes_write_nothing(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, text in (("broken", "import no_such_module_at_all"), ("old", ""), ("good", LOOP)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "generate.py").write_text(text, encoding="utf-8")
    code, out, err = run(*arguments, *(() if "--length" in arguments else ("--length", "8")))
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert not (tmp_path / "results").exists()
