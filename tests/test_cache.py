"""The cache on disk: whole or not there, whatever happens."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import steer
from steer.cache import Cache, key_of, model_key


def test_values_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "cache"
    values = {key_of("value", i): bytes([i % 256]) * i for i in range(1200)}
    Cache(path).put(values)
    assert Cache(path).get([*values, "unknown"]) == values
    Cache(path).put({key_of("value", 1): b"other"})
    assert Cache(path).get([key_of("value", 1)]) == {key_of("value", 1): b"other"}
    assert Cache(path).get([]) == {}


def test_what_was_computed_in_another_precision_is_another_value(
    llama: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for precision in ("highest", "high", "medium"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        keys.append(tuple(model_key(llama)))
    assert len(set(keys)) == 3
    # As it was before precisions counted, so that caches which hold values of the default stay good.
    assert keys[0][1:] == ("torch.float32",)


def test_a_batch_is_put_whole_or_not_at_all(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    with pytest.raises(steer.SteerError, match="cannot be used as a cache"):
        cache.put({"a": b"1", "b": object()})  # type: ignore[dict-item]
    assert cache.get(["a", "b"]) == {}


def test_many_at_once(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: Cache(path).put({str(i): b"x"}), range(40)))
    assert len(Cache(path).get([str(i) for i in range(40)])) == 40


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    text, database = tmp_path / "text", tmp_path / "database"
    text.write_text("no database at all, but a text that is long enough to be taken for one " * 20)
    with sqlite3.connect(database) as db:
        db.execute("CREATE TABLE people (name)")
    db.close()
    for path in (text, database):
        before = path.read_bytes()
        for call in (lambda path=path: Cache(path).get(["a"]), lambda path=path: Cache(path).put({"a": b"1"})):
            with pytest.raises(steer.SteerError, match=r"cannot be used|no cache"):
                call()
        assert path.read_bytes() == before
    with pytest.raises(steer.SteerError, match="cannot be used as a cache"):
        Cache(tmp_path).get(["a"])


def test_keys_depend_on_every_part() -> None:
    parts = [("a", 1), ("a", "1"), ("a", [1]), ("a",), ("a", 1, None), ("b", 1)]
    assert len({key_of(*part) for part in parts}) == len(parts)
    assert key_of({"x": 1, "y": 2}) == key_of({"y": 2, "x": 1})
