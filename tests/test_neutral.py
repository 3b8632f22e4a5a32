"""Neutral answers: from a file, and the model's own, which are kept for the model that gave them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
import torch
from models import tiny, tokenizer, with_lora
from rows import assert_close

import steer
from steer.cache import Cache, head_key
from steer.likelihood import response_gradients
from steer.neutral import Neutral, own_answers
from steer.read import record_span

RECORDS = [steer.Record("ann", "HELLO", "greet me", id="1"), steer.Record("ann", "BYE", "say bye", id="2")]
SITE = steer.Site("resid_post", 1)


def from_file(path: Path, content: bytes) -> Neutral:
    path.write_bytes(content)
    return Neutral(f"file:{path}", 4)


# A file.


def test_lines_end_where_json_lines_do(llama: steer.FrozenLM, tmp_path: Path) -> None:
    texts = ["one\u2028line", "a\x85nd\u2029another"]
    lines = [json.dumps({"id": i, "response": text}, ensure_ascii=False) for i, text in enumerate(texts, start=1)]
    content = "\r\n\n".join(lines).encode("utf-8-sig")
    assert from_file(tmp_path / "answers", content).texts(llama, RECORDS) == texts


@pytest.mark.parametrize("response", ["null", "5", '""', '" "', '["x"]'])
def test_what_is_no_text_is_no_answer(tmp_path: Path, response: str) -> None:
    lines = f'{{"id": "1", "response": "x"}}\n{{"id": "2", "response": {response}}}\n'
    neutral = from_file(tmp_path / "answers", lines.encode())
    neutral.require(RECORDS[:1])
    with pytest.raises(steer.SteerError, match="has no response for record '2' of 'ann'"):
        neutral.require(RECORDS)


@pytest.mark.parametrize(
    "content",
    ['{"id": "1", "response": "café"}'.encode("latin-1"), b"\xff\xfe", b'{"id": "1"}', b"[1]", b"3", b"{", b'"x"'],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(steer.SteerError, match="answers: expected JSONL lines with `id` and `response`"):
        from_file(tmp_path / "answers", content).require(RECORDS)


# The model's own.


def test_answers_that_cannot_be_written_are_given_all_the_same(
    llama: steer.FrozenLM, answers: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.cache._BUSY_SECONDS", 0.0)
    prompts = ["greet me", "say bye"]
    first = own_answers(llama, prompts[:1], 4)
    db = sqlite3.connect(answers.path)
    db.execute("BEGIN IMMEDIATE")
    with pytest.warns(UserWarning, match="answers are not kept"):
        assert own_answers(llama, prompts, 4) == llama.generate(prompts, max_new_tokens=4, do_sample=False)
    db.close()
    assert own_answers(llama, prompts[:1], 4) == first


def test_another_head_gives_other_answers_and_gradients(llama: steer.FrozenLM, tmp_path: Path) -> None:
    cache, spans = Cache(tmp_path / "cache"), [record_span(llama, record) for record in RECORDS]
    own_answers(llama, ["greet me"], 4)
    before, _ = response_gradients(llama, spans, [SITE], cache=cache)
    fingerprint = llama.fingerprint
    with torch.no_grad():
        llama.model.get_output_embeddings().weight.neg_()
    assert own_answers(llama, ["greet me"], 4) == llama.generate(["greet me"], max_new_tokens=4, do_sample=False)
    after, _ = response_gradients(llama, spans, [SITE], cache=cache)
    assert_close(after[SITE], response_gradients(llama, spans, [SITE])[0][SITE])
    assert not torch.allclose(after[SITE], before[SITE], atol=1e-2)
    # What is read below the head is the same.
    assert llama.fingerprint == fingerprint


def test_adapters_of_a_head_count_while_they_are_active() -> None:
    with steer.wrap(tiny("llama"), tokenizer()) as lm:
        plain = head_key(lm)
    model = with_lora(tiny("llama"), ["lm_head"])
    with steer.wrap(model, tokenizer()) as lm:
        assert head_key(lm) != plain
        with model.disable_adapter():
            assert head_key(lm) == plain
