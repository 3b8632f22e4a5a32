"""Text encoders: the numbers of transformers and sentence-transformers, each text encoded once, and a copy to train."""

from __future__ import annotations

import copy
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel

import steer
from steer.cache import Cache
from steer.embedded import installed, resolve
from steer.encoders import SentenceEncoder
from steer.text_encoder import TextEncoder

WIDTH, LONGEST = 24, 40
TEXTS = ["hello there", "b", "", "a much longer text, which is cut in the end because it is so long", "hello there"]


def make(folder: Path, *, pooling: str = "mean", seed: int = 0, normalize: bool = True) -> Path:
    """A tiny random BERT in sentence-transformers' layout."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        max_position_embeddings=LONGEST,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder / "bert")
    tokenizer(bos=True).save_pretrained(folder / "bert")
    layers = [Transformer(str(folder / "bert")), Pooling(WIDTH, pooling), *([Normalize()] if normalize else [])]
    SentenceTransformer(modules=layers, device="cpu").save(str(folder / "tiny"), create_model_card=False)
    return folder / "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that a model was run on."""
    seen: list[str] = []
    tokenize = SentenceEncoder.tokenize

    def spy(self: SentenceEncoder, texts: list[str], prefix: str = "") -> dict[str, Any]:
        seen.extend(prefix + text for text in texts)
        return tokenize(self, texts, prefix)

    monkeypatch.setattr(SentenceEncoder, "tokenize", spy)
    return seen


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_those_of_transformers(tmp_path: Path, pooling: str, normalized: bool) -> None:
    folder = make(tmp_path, pooling=pooling)
    encoder = TextEncoder(folder, normalized=normalized, max_tokens=30, batch_tokens=50)
    found = encoder.encode(TEXTS)
    assert found.shape == (len(TEXTS), encoder.width) == (5, WIDTH)
    assert found.dtype == torch.float32
    bert, tokens = BertModel.from_pretrained(tmp_path / "bert").double().eval(), tokenizer(bos=True)
    for text, embedding in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokens(text).input_ids[:30]])
        with torch.no_grad():
            hidden = bert(ids).last_hidden_state[0].numpy()
        expected = hidden[0] if pooling == "cls" else hidden.mean(0)
        if normalized:
            expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(embedding.numpy(), expected, atol=1e-5)


def test_what_is_kept_does_not_depend_on_autocast(folder: Path, tmp_path: Path) -> None:
    plain = TextEncoder(folder, cache=None).encode(TEXTS)
    encoder = TextEncoder(folder, cache=Cache(tmp_path / "kept.sqlite"))
    with torch.autocast("cpu", torch.bfloat16):
        first = encoder.encode(TEXTS)
    assert torch.equal(first, plain)
    assert torch.equal(encoder.encode(TEXTS), plain)


@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_those_of_sentence_transformers(tmp_path: Path, normalize: bool) -> None:
    folder = make(tmp_path, normalize=normalize)
    peer = SentenceTransformer(str(folder), device="cpu")
    expected = peer.encode(TEXTS, normalize_embeddings=True, prompt="find: ")
    np.testing.assert_allclose(TextEncoder(folder).encode(TEXTS, prefix="find: ").numpy(), expected, atol=1e-5)


def test_no_text_is_encoded_twice(folder: Path, encoded: list[str], embeddings: Cache) -> None:
    first = TextEncoder(folder).encode(TEXTS)
    assert sorted(encoded) == sorted(set(TEXTS))
    # By another object, as in another process.
    again = TextEncoder(folder).encode([*TEXTS[::-1], "new"])
    assert torch.equal(again[:5], first.flip(0))
    assert sorted(encoded) == sorted([*set(TEXTS), "new"])
    assert embeddings.path.exists()
    # Not in what is kept of something else.
    TextEncoder(folder).encode(["new"], prefix="a ")
    TextEncoder(folder, normalized=False).encode(["new"])
    TextEncoder(folder, max_tokens=9).encode(["new"])
    TextEncoder(folder, cache=None).encode(["new"])
    TextEncoder(folder, cache=Cache(embeddings.path.with_name("other"))).encode(["new"])
    assert encoded.count("new") == 5
    assert encoded.count("a new") == 1


def test_a_prefix_is_kept_apart_from_the_text(folder: Path, encoded: list[str]) -> None:
    encoder = TextEncoder(folder)
    # Some models leave a prefix out of the mean.
    torch.testing.assert_close(encoder.encode(["c"], prefix="ab"), encoder.encode(["abc"]))
    assert encoded == ["abc", "abc"]


def test_more_texts_than_are_looked_at_at_once(
    folder: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"text {i // 2 % 17} {'x' * (i // 2 % 5)}" for i in range(60)]
    whole = TextEncoder(folder, cache=None).encode(texts)
    assert len(encoded) == len(set(texts))
    monkeypatch.setattr("steer.text_encoder._WINDOW", 7)
    told: list[int] = []
    parts = TextEncoder(folder, batch_tokens=40).encode(texts, told.append)
    torch.testing.assert_close(parts, whole)
    assert told == sorted(set(told))
    assert told[-1] == 60
    assert TextEncoder(folder).encode([]).shape == (0, WIDTH)


def test_a_batch_has_no_more_tokens_than_it_may(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = SentenceEncoder.forward

    def spy(self: SentenceEncoder, features: dict[str, Any]) -> torch.Tensor:
        shapes.append(tuple(features["input_ids"].shape))
        return forward(self, features)

    monkeypatch.setattr(SentenceEncoder, "forward", spy)
    texts = ["x" * length for length in (1, 5, 70, 9, 30, 2, 8, 7)]
    TextEncoder(folder, batch_tokens=45).encode(texts, prefix="ab")
    assert sum(rows for rows, _ in shapes) == len(texts)
    assert all(rows * longest <= 45 for rows, longest in shapes)
    assert len(shapes) < len(texts)


def test_embeddings_that_cannot_be_kept_are_given_all_the_same(
    folder: Path, embeddings: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.cache._BUSY_SECONDS", 0.0)
    expected = TextEncoder(folder).encode(TEXTS)
    db = sqlite3.connect(embeddings.path)
    db.execute("BEGIN EXCLUSIVE")
    with pytest.warns(UserWarning, match="embeddings are not kept"):
        found = TextEncoder(folder).encode([*TEXTS, "new"])
    db.close()
    torch.testing.assert_close(found[:5], expected)


# The copy to train.


@pytest.mark.parametrize("prefix", ["", "find: "])
def test_the_copy_begins_as_the_frozen_one(folder: Path, prefix: str) -> None:
    encoder = TextEncoder(folder, max_tokens=30)
    module = encoder.module()
    torch.testing.assert_close(module(module.tokenize(TEXTS, prefix)), encoder.encode(TEXTS, prefix=prefix))


def test_the_copy_is_trained_and_the_frozen_one_is_not(folder: Path) -> None:
    encoder = TextEncoder(folder, cache=None)
    before, module = encoder.encode(TEXTS), encoder.module()
    assert not any(parameter.requires_grad for parameter in encoder._encoder.parameters())
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    loss = -(module(module.tokenize(TEXTS[:1])) * torch.ones(WIDTH)).sum()
    loss.backward()
    for name, parameter in module.named_parameters():
        # BERT's own pooling is what embeddings do not depend on.
        assert parameter.requires_grad == (".pooler." not in name), name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # What is added to all keys of a query changes no weight.
            assert parameter.grad.any() or name.endswith("key.bias"), name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    after = -(module(module.tokenize(TEXTS[:1])) * torch.ones(WIDTH)).sum()
    assert after < loss - 0.1
    assert torch.equal(encoder.encode(TEXTS), before)


def test_the_copys_weights_come_back(folder: Path) -> None:
    encoder = TextEncoder(folder)
    trained, fresh = encoder.module(), encoder.module()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    features = trained.tokenize(TEXTS)
    kept = copy.deepcopy(features)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(features), trained(features))
    assert features.keys() == kept.keys()


# Which encoder it is.


def test_identity_is_that_of_what_is_computed(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "tiny")
    encoder = TextEncoder(folder)
    assert encoder.identity == TextEncoder(moved, max_tokens=LONGEST, batch_tokens=9).identity
    assert encoder.identity.startswith("tiny:")
    assert (encoder.width, encoder.max_tokens) == (WIDTH, LONGEST)
    others = [
        TextEncoder(folder, normalized=False),
        TextEncoder(folder, max_tokens=12),
        TextEncoder(make(tmp_path / "a", pooling="cls")),
        TextEncoder(make(tmp_path / "b", seed=1)),
        TextEncoder(shutil.copytree(folder, tmp_path / "named otherwise")),
    ]
    assert len({encoder.identity, *(other.identity for other in others)}) == 6
    # A layer that would only normalize is not computed.
    assert TextEncoder(make(tmp_path / "c", normalize=False)).identity == encoder.identity


# What goes wrong.


def test_sentence_transformers_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(steer.SteerError, match=r"pip install 'steer-toolkit\[soft\]'"):
        TextEncoder(folder)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(steer.SteerError, match="smollm2-135m is a causal-lm, not a sentence encoder"):
        TextEncoder("smollm2-135m")
    with pytest.raises(steer.SteerError, match="'no such encoder' is no model"):
        TextEncoder("no such encoder")
    with pytest.raises(steer.SteerError, match="could not be loaded as a sentence encoder"):
        TextEncoder(tmp_path)
    for tokens in (0, LONGEST + 1):
        with pytest.raises(steer.SteerError, match=f"max_tokens={tokens}: tiny reads texts of 1 to 40 tokens"):
            TextEncoder(folder, max_tokens=tokens)
    with pytest.raises(steer.SteerError, match="takes a list of texts"):
        TextEncoder(folder).encode("a text")


@pytest.mark.skipif(not installed("all-minilm-l6-v2"), reason="needs steer models pull all-minilm-l6-v2")
def test_the_default_is_the_embedded_minilm() -> None:
    texts = ["The cat sits on the mat.", "A kitten rests upon a rug.", "Interest rates rose by half a point."]
    encoder = TextEncoder()
    found = encoder.encode(texts)
    assert (encoder.name, encoder.width, encoder.max_tokens) == ("all-minilm-l6-v2", 384, 256)
    expected = SentenceTransformer(resolve("all-minilm-l6-v2"), device="cpu").encode(texts)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    alike = found @ found.T
    assert alike[0, 1] > alike[0, 2] + 0.3
    module = encoder.module()
    torch.testing.assert_close(module(module.tokenize(texts)), found, atol=1e-5, rtol=1e-4)
