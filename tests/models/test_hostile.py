"""Files from strangers: whatever stands in them, a model loads or one line says why not, and nobody forges a token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from unmask.errors import UserError
from unmask.models import (
    Experts,
    Layout,
    ModelConfig,
    RopeScaling,
    Tokenizer,
    Transformer,
    load_checkpoint,
    save_checkpoint,
)
from vocabularies import MASK, write

GOLDEN = Path(__file__).parents[1] / "golden_models" / "checkpoints"
EXPERTS = Experts(4, 2, 8, shared=4, dense=1, router="sigmoid", bias=True, groups=2, top_groups=1)
OWN = ModelConfig(
    96, 32, 2, 4, 48, layout=Layout("block", 4), rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16), rotary=4, experts=EXPERTS
)
STRANGE = [None, True, -1, 0, 1.5, "x", [], ["x"], {}, {"a": 1}, float("nan"), float("inf")]


def survives(directory: Path) -> None:
    """Load and run, or refuse in one line."""
    try:
        loaded = load_checkpoint(directory)
        loaded.model(torch.zeros(1, 3, dtype=torch.long))
    except UserError as error:
        assert str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "own",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llada-gqa", "llama-tied-llama3", "dream-mha-tied", "sdar-gqa", "llada2-bias", "llada_moe-mha")
        ),
    ],
)
def test_any_value_of_any_key(name: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    if name == "own":
        save_checkpoint(Transformer(OWN).initialise(0), directory)
    else:
        shutil.copytree(GOLDEN / name, directory)
    path = directory / "config.json"
    said: dict[str, Any] = json.loads(path.read_text())
    for key in [*said, "rope_scaling", "rope_parameters", "quantization_config", "eos_token_id"]:
        for value in STRANGE:
            path.write_text(json.dumps({**said, key: value}))
            survives(directory)
    for key in [k for k in said if isinstance(said[k], dict)]:
        for inner in said[key]:
            for value in STRANGE:
                path.write_text(json.dumps({**said, key: {**said[key], inner: value}}))
                survives(directory)
    path.write_text(json.dumps(said))
    for value in STRANGE:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value, "bos_token_id": value}))
        survives(directory)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("head_dim", 10**6, "has shape"),
        ("vocab_size", 10**9, "has shape"),
        ("num_hidden_layers", 10**6, "more than 4096 is not supported"),
        ("max_position_embeddings", 10**12, "max_positions is 1000000000000; more than"),
    ],
)
def test_sizes_that_the_weights_do_not_have_take_no_memory(
    key: str, value: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(shutil.copytree(GOLDEN / "llama-gqa", tmp_path / "m"))
    said = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**said, key: value}))
    monkeypatch.setattr(Transformer, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(UserError, match=expected):
        load_checkpoint(directory)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_without_a_word_of_it(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(GOLDEN / "llada-gqa", tmp_path / "m"))
    stored = load_file(directory / "model.safetensors")
    stored["model.transformer.blocks.0.q_proj.weight"] = torch.zeros(32, 32).to(dtype)
    save_file(stored, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"q_proj\.weight is stored as [IF]8"):
        load_checkpoint(directory)


def test_a_long_name_is_no_path() -> None:
    with pytest.raises(UserError, match="cannot look for a model"):
        load_checkpoint("a" * 5000)


ODD = [True, 0, 1.5, "x", [], [1], [None], {}, {"a": 1}, {"1": "x"}, {"1": {"content": 3}}, {"-5": {"content": "y"}}]
FILES = ["added_tokens.json", "special_tokens_map.json"]
KEYS = ["bos_token", "mask_token", "additional_special_tokens", "added_tokens_decoder", "chat_template"]


@pytest.mark.parametrize("kind", ["json", "vocab"])
@pytest.mark.parametrize("value", ODD)
def test_any_tokenizer_file(kind: str, value: Any, tmp_path: Path) -> None:
    for i, key in enumerate([*KEYS, "tokenizer_class", "add_bos_token", *FILES]):
        directory = write(tmp_path / str(i), kind, **({} if key in FILES else {key: value}))
        if key in FILES:
            (directory / key).write_text(json.dumps(value))
        try:
            Tokenizer.from_directory(directory).prompt("hello <|mask|>")
        except UserError as error:
            assert "\n" not in str(error)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    directory = write(tmp_path / "t", "json")
    (directory / "chat_template.jinja").write_bytes(b"\xff{{")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not text"):
        Tokenizer.from_directory(directory)


def test_a_class_whose_split_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="how a RobertaTokenizer splits text"):
        Tokenizer.from_directory(write(tmp_path / "t", "vocab", tokenizer_class="RobertaTokenizer"))


def test_generation_marks_are_read_over(tmp_path: Path) -> None:
    template = "a\n{%- generation %}\nb {% endgeneration -%}\nc"
    made = Tokenizer.from_directory(write(tmp_path / "t", "json", chat_template=template))
    assert made.decode(made.prompt("x")) == "ab c"


def test_a_greedy_template(tmp_path: Path) -> None:
    made = Tokenizer.from_directory(write(tmp_path / "t", "json", chat_template="{{ 'a' * 10 ** 15 }}"))
    with pytest.raises(UserError, match="cannot render"):
        made.prompt("x")


def test_published_truncation_and_padding_are_not_ours(tmp_path: Path) -> None:
    directory = write(tmp_path / "t", "json")
    plain = Tokenizer.from_directory(directory).encode("hello world again")
    inner = Inner.from_file(str(directory / "tokenizer.json"))
    inner.enable_truncation(3)
    inner.enable_padding(length=40, pad_token="<s>")
    inner.save(str(directory / "tokenizer.json"))
    assert Tokenizer.from_directory(directory).encode("hello world again") == plain


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    made = Tokenizer.from_directory(write(tmp_path / "t", "json"))
    assert made.encode("a\ud800b🙂") == made.encode("a\ufffdb🙂")
    assert made.decode(made.prompt("\udcff"), skip_special=False) == made.decode(made.prompt("\ufffd"), False)


@pytest.mark.parametrize("id", [-1, 2**31, 2**64])
def test_ids_outside_the_vocabulary_are_nothing(id: int, tmp_path: Path) -> None:
    made = Tokenizer.from_directory(write(tmp_path / "t", "json"))
    assert made.piece(id) == made.decode([id]) == ""


def test_the_model_reserves_its_mask(tmp_path: Path) -> None:
    """A mask token that its files call ordinary is still no text of a user's."""
    directory = write(tmp_path / "t", "json")
    said = json.loads((directory / "tokenizer.json").read_text())
    said["added_tokens"] = [{**t, "special": False} for t in said["added_tokens"]]
    (directory / "tokenizer.json").write_text(json.dumps(said))
    assert MASK in Tokenizer.from_directory(directory).encode("a <|mask|>")
    made = Tokenizer.from_directory(directory, reserved=(MASK, -1))
    assert MASK not in made.encode("a <|mask|>")
    assert MASK not in made.prompt("a <|mask|>")
    assert made.decode([MASK]) == ""


def test_a_checkpoint_reserves_its_mask(tmp_path: Path) -> None:
    inner = Inner(models.WordLevel({"a": 0, "b": 1, "c": 2}, "a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_tokens([AddedToken("<m>", normalized=False)])
    save_checkpoint(Transformer(ModelConfig(96, 32, 1, 4, 48, mask_id=3)), tmp_path)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_checkpoint(tmp_path).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode_markup("b <m>") == [1, 3]
    assert 3 not in tokenizer.encode("b <m>")


@pytest.mark.parametrize(("unknown", "expected"), [("<unk>", [2, 0, 3]), (None, [2, 3])])
def test_names_of_tokens_in_a_vocabulary_of_words(unknown: str | None, expected: list[int], tmp_path: Path) -> None:
    """Split at spaces, `<mask>` is a word of the vocabulary; from a user it is an unknown word."""
    inner = Inner(models.WordLevel({"<unk>": 0, "<mask>": 1, "a": 2, "b": 3}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(t, normalized=False) for t in ("<mask>", "<unk>")[: 2 if unknown else 1]])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_directory(tmp_path).encode("a <mask> b") == expected


def test_keys_cannot_forge_tokens(tmp_path: Path) -> None:
    made = Tokenizer.from_directory(write(tmp_path / "t", "json", chat_template="{{ messages[0].call | tojson }}"))
    ids = made.chat([{"role": "assistant", "call": {"<|end|>": "<|mask|>"}}])
    assert made.decode(ids) == '{"<|end|>": "<|mask|>"}'
    assert not set(ids) & set(made.special.values())
