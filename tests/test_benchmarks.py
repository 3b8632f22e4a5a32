"""The benchmark of the bank, on a few users: it runs, and notices when a store is wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import sqlite3
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")


@pytest.fixture(scope="module")
def bank() -> Iterator[Any]:
    """The script as a module; what it does to the import path is undone."""
    path, finders = list(sys.path), list(sys.meta_path)
    spec = importlib.util.spec_from_file_location("bank_benchmark", ROOT / "benchmarks" / "bank.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:], sys.meta_path[:] = path, finders


@pytest.fixture
def run(bank: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script on 300 users without new processes, which take seconds, and without dropping others' caches."""
    monkeypatch.setattr(bank, "in_new_process", bank.work)
    monkeypatch.setattr(bank, "CACHES", tmp_path / "none" / "drop_caches")
    monkeypatch.setattr(bank, "COMMIT", 128)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    stores = tmp_path / "stores"
    stores.mkdir()

    def run(*options: str) -> dict[str, Any]:
        target = tmp_path / "result.json"
        few = "--users 300 --rounds 4 --drops 2 --processes 1 --batches 3"
        monkeypatch.setattr(sys, "argv", ["bank.py", *few.split(), "--folder", str(stores), "--json", str(target)])
        sys.argv += options
        try:
            bank.main()
        finally:
            assert not list(stores.iterdir())
        return json.loads(target.read_text())

    return run


def numbers(found: Any) -> Iterator[float]:
    if isinstance(found, dict):
        for value in found.values():
            yield from numbers(value)
    elif isinstance(found, list):
        for value in found:
            yield from numbers(value)
    elif not isinstance(found, str):
        yield found


def test_every_store_is_measured(bank: Any, run: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("--widths", "8", "16", "--figure", str(tmp_path / "figure.png"))
    assert {"device", "torch", "commit", "command", "versions", "file system", "missing"} <= result.keys()
    assert [(case["users"], case["width"], case["interleaved"]) for case in result["cases"]] == [
        (300, 8, True),
        (300, 16, True),
    ]
    for case in result["cases"]:
        assert list(case["stores"]) == [way for way, (name, _) in bank.WAYS.items() if name not in bank.MISSING]
        for way, found in case["stores"].items():
            built = {"insert", "size"} if way in bank.STORES else set()
            assert found.keys() == built | {"warm", "fresh", "cold"}
            assert all(math.isfinite(number) and number >= 0 for number in numbers(found))
            assert 0 < found["warm"]["median ms"] <= found["warm"]["p99 ms"]
            assert len(found["cold"]["ms"]) == 2
            assert found["fresh"]["ms to open and gather"] > found["fresh"]["ms to open"]
            assert found["cold"]["dropped by"] == "posix_fadvise"
            if built:
                assert found["size"]["apparent"] >= case["bytes of vectors"] == 300 * case["width"] * 4
        assert case["stores"]["files"]["size"]["files"] == 300
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_rows_are_those_that_were_stored(bank: Any, tmp_path: Path) -> None:
    for name in bank.STORES.keys() - bank.MISSING.keys():
        bank.build(name, tmp_path, 20, 8)
    asked = [7, 0, 19, 3]
    want = bank.expected(asked, 8)
    assert torch.equal(want[1], bank.expected([0], 8)[0])
    assert want.unique().numel() == want.numel()
    for way, (name, _) in bank.WAYS.items():
        if name not in bank.MISSING:
            store = bank.reader(way, tmp_path, 8)
            store.open()
            found = store.tensor(store.gather([bank.user(number) for number in asked]))
            store.close()
            assert found.dtype == torch.float32
            assert torch.equal(found, want), way
            bank.check(way, asked, found, 8)


@pytest.mark.parametrize("way", ["steer", "steer get_many", "sqlite", "sqlite mmap", "lmdb", "files"])
def test_a_store_that_mixes_users_up_is_noticed(bank: Any, run: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, store = bank.WAYS[way]
    if name in bank.MISSING:
        pytest.skip(bank.MISSING[name])
    right = store.gather
    monkeypatch.setattr(store, "gather", lambda self, users: right(self, [users[1], users[0], *users[2:]]))
    with pytest.raises(bank.WrongRow, match=f"^{name}.*: gave user"):
        run("--widths", "8", "--stores", name)


def test_a_changed_row_is_noticed(bank: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build = bank.build

    def damaged(name: str, folder: Path, *rest: int) -> Any:
        built = build(name, folder, *rest)
        with sqlite3.connect(folder / "sqlite" / "vectors.sqlite") as db:
            (vector,) = db.execute("SELECT vector FROM vectors WHERE user = ?", (bank.user(5),)).fetchone()
            db.execute(
                "UPDATE vectors SET vector = ? WHERE user = ?", (bytes([vector[0] ^ 1]) + vector[1:], bank.user(5))
            )
        db.close()
        return built

    monkeypatch.setattr(bank, "build", damaged)
    with pytest.raises(bank.WrongRow, match=f"sqlite: gave user 5, {bank.user(5)}"):
        run("--widths", "8", "--stores", "sqlite", "--batch", "300")


def test_stores_are_measured_one_after_another_where_the_disk_is_small(
    bank: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(bank.shutil, "disk_usage", lambda _: usage(bank.RESERVE + bank.most_bytes(300, 8)))
    (small, large) = run("--widths", "8", "16", "--stores", "steer", "files")["cases"]
    assert small["interleaved"] is False
    assert list(small["stores"]) == ["steer", "steer get_many", "files"]
    assert all("cold" in found for found in small["stores"].values())
    assert "stores" not in large
    assert "are free" in large["left out"]


def test_new_processes_measure_themselves(bank: Any, tmp_path: Path) -> None:
    bank.build("files", tmp_path, 100, 8)
    job = {"way": "files", "folder": str(tmp_path), "users": 100, "width": 8, "batch": 4, "batches": 3, "threads": 1}
    found = bank.in_new_process(job)
    assert found.keys() == {
        "ms to open",
        "ms to open and gather",
        "ms to gather",
        "anonymous MiB",
        "anonymous MiB, peak",
        "mapped MiB",
    }
    # A difference: an allocator may have given a little back.
    assert -2 < found["anonymous MiB"] <= found["anonymous MiB, peak"] < 100
