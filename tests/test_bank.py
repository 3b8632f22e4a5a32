"""The bank behaves as a dictionary that survives crashes, and refuses what it cannot keep."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import FAST, in_child
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import steer
from steer.bank import Bank
from steer.errors import SteerError, UnknownUser
from steer.state import Artifact, Fingerprint, Provenance, UserState

MODEL = Fingerprint("tiny", '{"hidden_size": 4}', tuple(range(256)))
OTHER = Fingerprint("other", '{"hidden_size": 8}', tuple(range(256)))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64]


forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def state(vector: Tensor | float = 1.0, /, data: dict[str, Any] | None = None, **provenance: Any) -> UserState:
    described: dict[str, Any] = {"method": "style", "version": 1, "model": MODEL, "sites": ("resid_post[2]",)}
    tensor = vector if isinstance(vector, Tensor) else torch.full((4,), vector)
    return UserState(Provenance(**described | provenance), {"vector": tensor}, data or {})


def value(found: UserState | None) -> float:
    assert found is not None
    return float(found.tensors["vector"][0])


def assert_same(found: UserState, expected: UserState) -> None:
    assert found.provenance == expected.provenance
    assert found.data == expected.data
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert torch.equal(found.tensors[name], tensor)


def files(bank: Bank, folder: str = "segments") -> list[Path]:
    return sorted((bank.path / folder).iterdir())


def holding(bank: Bank, pattern: bytes) -> list[str]:
    """Names of the bank's files that hold some bytes."""
    return [path.name for path in bank.path.rglob("*") if path.is_file() and pattern in path.read_bytes()]


def place(bank: Bank, user: str, name: str = "style") -> tuple[Path, int]:
    """The file that holds a state's tensors, and where they begin in it."""
    index = bank._store.index
    (entry,) = index.find([bank._address((user, name))]).values()
    assert entry.segment is not None
    assert entry.at is not None
    segment = index.segment(entry.segment)
    return bank.path / "segments" / segment.file, segment.offset(entry.at)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.fixture
def bank() -> Iterator[Bank]:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        yield Bank(Path(folder) / "people.bank")


# What is stored comes back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3)])
def test_tensors_come_back_in_dtype_and_shape(bank: Bank, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    saved = UserState(Provenance("any", 1), {"a": (torch.randn(shape) * 50).to(dtype), "b": torch.ones(2)})
    bank.update({("alice", "x"): state(7.0), ("bob", "x"): saved})
    assert_same(Bank(bank.path)["bob", "x"], saved)


def test_provenance_and_data_come_back(bank: Bank) -> None:
    saved = state(
        data={"text": 'a "quoted" ünïcode text \ud83d', "parts": [1, 2.5, None, {"deep": True}]},
        method="m", version=3, artifact="ab" * 32, records=("r1", "r2"), sites=("embed", "z[3]"),
        settings={"layer": 2, "k": 0.1}, calibration={"reference_norm": {"resid_post[2]": 201.3}},
    )  # fmt: skip
    bank["alice", "style"] = saved
    assert_same(bank["alice", "style"], saved)


def test_a_state_without_tensors_or_model(bank: Bank) -> None:
    saved = UserState(Provenance("cos", 1), data={"context": "I like tea."})
    bank["alice", "context"] = saved
    assert_same(Bank(bank.path)["alice", "context"], saved)
    assert holding(bank, b"I like tea.") == [file.name for file in files(bank)]


def test_a_view_is_saved_without_its_base(bank: Bank) -> None:
    base = torch.randn(1000, 400)
    views = {"row": base[7], "column": base.T[3, :50], "flipped": base.flip(0)[::2, 1]}
    bank["alice", "x"] = UserState(Provenance("any", 1), views)
    assert_same(bank["alice", "x"], UserState(Provenance("any", 1), views))
    assert all(file.stat().st_size < 80_000 for file in files(bank))


def test_tensors_with_gradients_are_detached(bank: Bank) -> None:
    bank["alice", "x"] = state(torch.ones(4, requires_grad=True) * 2)
    assert not bank["alice", "x"].tensors["vector"].requires_grad


def test_a_read_tensor_owns_its_memory(bank: Bank) -> None:
    bank.update({(f"user{i}", "x"): state(float(i)) for i in range(100)})
    vector = bank["user7", "x"].tensors["vector"]
    assert vector.untyped_storage().nbytes() == 16
    vector.zero_()
    assert value(bank["user7", "x"]) == 7


@pytest.mark.parametrize(
    "user", ["../../etc/passwd", "a/b\\c", "\u202eabc אבג", "'; DROP TABLE entries; --", 'the "user"', "x" * 1024]
)
def test_any_text_is_a_user(bank: Bank, user: str) -> None:
    bank[user, "style"] = state(3.0)
    assert value(Bank(bank.path)[user, "style"]) == 3
    assert list(bank) == [(user, "style")]
    inside = {path.relative_to(bank.path).parts[0] for path in bank.path.rglob("*")}
    assert inside == {"manifest.json", "index.sqlite", "segments", "artifacts", "commits"}
    # SQLite may keep copies of what it deletes, so it is not told.
    assert user.encode() not in (bank.path / "index.sqlite").read_bytes()


users = st.sampled_from(["alice", "bob", "böb", "A/../b", "'"])
names = st.sampled_from(["style", "memory.v2"])
tensors = st.dictionaries(
    st.sampled_from(["vector", "keys", "a:b"]),
    st.builds(
        lambda shape, dtype, seed: torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from(DTYPES),
        st.integers(0, 99),
    ),
    max_size=2,
)
provenances = st.builds(
    Provenance,
    method=st.sampled_from(["a", "b"]),
    version=st.integers(1, 2),
    model=st.sampled_from([None, MODEL, OTHER]),
    sites=st.sampled_from([(), ("embed",), ("embed", "z[1]")]),
    artifact=st.sampled_from([None, "ab" * 32]),
    records=st.lists(st.text(max_size=3), max_size=2).map(tuple),
    settings=st.dictionaries(st.text(max_size=3), st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
)
states = st.builds(UserState, provenances, tensors, st.dictionaries(st.text(max_size=3), st.text(max_size=3)))


@settings(max_examples=40, deadline=None)
@given(commits=st.lists(st.dictionaries(st.tuples(users, names), states, max_size=5), max_size=4))
def test_a_bank_is_a_dictionary(commits: list[dict[tuple[str, str], UserState]]) -> None:
    expected: dict[tuple[str, str], UserState] = {}
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        bank = Bank(folder)
        for commit in commits:
            bank.update(commit)
            expected.update(commit)
        for reader in (bank, Bank(folder, create=False)):
            assert list(reader) == list(expected)
            assert len(reader) == len(expected)
            assert reader.users() == sorted({user for user, _ in expected})
            assert reader.names() == sorted({name for _, name in expected})
            for user in ["alice", "bob", "böb", "A/../b", "'"]:
                assert reader.names_of(user) == sorted(name for own, name in expected if own == user)
            for key, saved in expected.items():
                assert key in reader
                assert_same(reader[key], saved)
            kinds = {_kind(name, saved.provenance) for (_, name), saved in expected.items()}
            templates = [_kind(name, provenance) for name, provenance, _ in reader.templates()]
            assert len(templates) == len(kinds)
            assert set(templates) == kinds


def _kind(name: str, source: Provenance) -> tuple[object, ...]:
    return name, source.method, source.version, source.model, source.sites, source.artifact


# Questions to a bank


def test_an_entry_can_be_replaced(bank: Bank) -> None:
    bank.update({("alice", "style"): state(1.0), ("bob", "style"): state(2.0)})
    bank["alice", "style"] = state(torch.arange(6.0), method="new")
    assert len(bank) == 2
    assert list(bank) == [("alice", "style"), ("bob", "style")]
    assert bank["alice", "style"].provenance.method == "new"
    assert value(bank["bob", "style"]) == 2


def test_get_many_follows_the_batch(bank: Bank) -> None:
    bank.update({(user, "style"): state(number) for user, number in [("alice", 1.0), ("bob", 2.0), ("carol", 3.0)]})
    bank["bob", "style"] = state(4.0)
    bank["dan", "memory"] = state(5.0)
    batch = bank.get_many(["carol", None, "bob", "nobody", "alice", "dan", "carol"], "style")
    assert [found and value(found) for found in batch] == [3, None, 4, None, 1, None, 3]
    assert bank.get_many([], "style") == []


def test_rows_describe_entries_without_reading_tensors(bank: Bank) -> None:
    bank["alice", "style"] = state(torch.ones(3, 2, dtype=torch.bfloat16), records=("r1", "r2"))
    bank["bob", "context"] = UserState(Provenance("cos", 1), data={"context": "tea"})
    place(bank, "alice")[0].unlink()
    alice, bob = bank.rows()
    assert (alice.user, alice.name, alice.method, alice.model) == ("alice", "style", "style", "tiny")
    assert (alice.sites, alice.nbytes, alice.records) == (("resid_post[2]",), 12, 2)
    assert alice.tensors == {"vector": ("bfloat16", (3, 2))}
    assert (bob.model, bob.sites, bob.nbytes, bob.tensors) == (None, (), 0, {})
    assert list(bank.rows("bob")) == [bob]
    assert list(bank.rows("nobody")) == []


def test_iteration_passes_page_borders_and_allows_writing_meanwhile(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.bank.index._PAGE", 3)
    bank.update({(f"user{i}", "x"): state() for i in range(10)})
    keys = []
    for key in bank:
        bank[key] = state(2.0)
        keys.append(key)
    assert keys == [(f"user{i}", "x") for i in range(10)]
    assert [row.user for row in bank.rows()] == [user for user, _ in keys]


def test_templates_name_each_kind_that_still_occurs(bank: Bank) -> None:
    bank.update({(f"user{i}", "style"): state(torch.ones(4), settings={"seed": i}) for i in range(5)})
    bank["alice", "style"] = state(torch.ones(8), model=OTHER)
    bank["alice", "memory"] = state(torch.ones(2, 4), sites=("resid_mid[1]",))
    found = [(name, source.model, source.sites, shapes) for name, source, shapes in bank.templates()]
    assert found == [
        ("style", MODEL, ("resid_post[2]",), {"vector": (4,)}),
        ("style", OTHER, ("resid_post[2]",), {"vector": (8,)}),
        ("memory", MODEL, ("resid_mid[1]",), {"vector": (2, 4)}),
    ]
    bank["alice", "style"] = state()
    assert [source.model for name, source, _ in bank.templates() if name == "style"] == [MODEL]
    bank["alice", "memory"] = state(method="other")
    assert [source.method for name, source, _ in bank.templates() if name == "memory"] == ["other"]


def test_each_model_is_stored_once(bank: Bank) -> None:
    rounded = Fingerprint("tiny in float16", MODEL.config, tuple(word + (word % 20 == 0) for word in MODEL.weights))
    assert rounded == MODEL
    bank.update({("alice", "x"): state(), ("bob", "x"): state(model=OTHER), ("dan", "x"): state(model=rounded)})
    bank["carol", "x"] = state(model=rounded)
    with sqlite3.connect(bank.path / "index.sqlite") as index:
        assert index.execute("SELECT COUNT(*) FROM models").fetchone() == (2,)
    assert Bank(bank.path)["carol", "x"].provenance.model == MODEL
    assert Bank(bank.path)["bob", "x"].provenance.model == OTHER


# Artifacts


def test_artifacts_come_back_by_hash(bank: Bank) -> None:
    base = torch.randn(6, 4)
    artifact = Artifact("pplug", 2, MODEL, {"up": base.T, "same": base[1:3], "bias": torch.tensor(1.5)}, {"rank": 4})
    digest = bank.put_artifact(artifact)
    assert digest == artifact.hash == bank.put_artifact(artifact)
    assert [file.name for file in files(bank, "artifacts")] == [f"{digest}.safetensors"]
    found = Bank(bank.path).artifact(digest)
    assert (found.method, found.version, found.model, found.settings) == ("pplug", 2, MODEL, {"rank": 4})
    assert set(found.tensors) == {"up", "same", "bias"}
    for name, tensor in artifact.tensors.items():
        assert torch.equal(found.tensors[name], tensor)


def test_artifacts_are_verified(bank: Bank) -> None:
    digest = bank.put_artifact(Artifact("pplug", 1, MODEL, {"up": torch.ones(64)}))
    (file,) = files(bank, "artifacts")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(SteerError, match=rf"{file.name}: damaged.*hash"):
        bank.artifact(digest)
    # The model is no part of the hash.
    file.write_bytes(whole.replace(b"hidden_size", b"hidden_sizf"))
    with pytest.raises(SteerError, match=rf"{file.name}: damaged.*not what was saved"):
        bank.artifact(digest)
    assert len(bank.verify()) == 1
    # Earlier versions had no checksum of it.
    with safe_open(file, "pt") as opened:
        described = opened.metadata()["artifact"]
    save_file({"up": torch.ones(64)}, file, {"artifact": described})
    assert Bank(bank.path).artifact(digest).hash == digest
    file.write_bytes(whole[:-9])
    with pytest.raises(SteerError, match=rf"{file.name}: damaged"):
        bank.artifact(digest)
    with pytest.raises(SteerError, match="has no artifact 0000"):
        bank.artifact("0" * 64)
    with pytest.raises(SteerError, match="64 hexadecimal"):
        bank.artifact("../../secret")
    with pytest.raises(SteerError, match=r"JSON.*18"):
        bank.put_artifact(Artifact("pplug", 1, MODEL, {"up": torch.ones(1)}, {"layers": {18: 0.5}}))


# What a bank refuses


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (("", "style"), "not empty"),
        ((7, "style"), "7 cannot be a user id"),
        ((None, "style"), "None cannot be a user id"),
        (("a\0b", "style"), "NUL"),
        (("ü" * 513, "style"), "1026 bytes, at most 1024"),
        (("\ud800", "style"), "not valid Unicode"),
        (("alice", "my style"), "'my style' cannot name a state"),
        (("alice", "style\n"), "cannot name a state"),
        (("alice", ""), "cannot name a state"),
        (("alice", "x" * 65), "cannot name a state"),
        (("alice", "stÿle"), "cannot name a state"),
        ("alice", "by user and name"),
    ],
)
def test_bad_keys_are_refused_and_nothing_is_written(bank: Bank, key: Any, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        bank.update({("bob", "style"): state(), key: state()})
    with pytest.raises(SteerError, match=message):
        bank[key]
    assert key not in bank
    assert len(bank) == 0
    assert files(bank) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(2), "expected a UserState, found Tensor"),
        (state(torch.eye(2, dtype=torch.int64).to_sparse()), "sparse"),
        (state(torch.ones(2, dtype=torch.complex64)), "complex64"),
        (state(data={"layers": {18: 1}}), "data of state 'x' of user 'alice': .*key 18 is not text"),
        (state(data={"tags": {"a", "b"}}), "data of state 'x'.*set"),
        (state(settings={"k": float("nan")}), "settings of state 'x'"),
    ],
)
def test_bad_states_are_refused_and_nothing_is_written(bank: Bank, bad: Any, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        bank.update({("bob", "x"): state(), ("alice", "x"): bad})
    assert len(bank) == 0
    assert files(bank) == []


def test_an_unknown_user_is_told_what_there_is(bank: Bank) -> None:
    bank.update({("alice", "style"): state(), ("alice", "memory"): state(), ("bob", "prefix"): state()})
    with pytest.raises(UnknownUser, match=r"'prefix' for user 'alice', who has only 'memory', 'style'; other users"):
        bank["alice", "prefix"]
    with pytest.raises(UnknownUser, match=r"'style' for user 'carol', who has no states at all; other users have"):
        bank["carol", "style"]
    with pytest.raises(UnknownUser, match=r"who has only 'prefix'; nobody has 'stile'"):
        bank["bob", "stile"]
    assert ("carol", "style") not in bank


def test_opening_what_is_no_bank_touches_nothing(tmp_path: Path) -> None:
    folder, file, foreign = tmp_path / "photos", tmp_path / "file", tmp_path / "foreign"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"cat")
    file.write_text("text")
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"format": "web-extension", "version": 1}')
    before = sorted(tmp_path.rglob("*"))
    for create in (True, False):
        for path, message in [(folder, "no manifest.json"), (file, "but a file"), (foreign, "does not say 'steer-b")]:
            with pytest.raises(SteerError, match=message):
                Bank(path, create=create)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bank_is_created_only_where_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "people.bank"
    with pytest.raises(SteerError, match="no bank here"):
        Bank(path, create=False)
    assert not path.parent.exists()
    Bank(path)["alice", "x"] = state()
    assert len(Bank(path, create=False)) == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["people.bank"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["users"]) == ("steer-bank", 2, "plain")


def test_a_newer_format_is_refused_with_both_versions(bank: Bank) -> None:
    (bank.path / "manifest.json").write_text('{"format": "steer-bank", "version": 3}')
    with pytest.raises(SteerError, match=r"version 3 .*reads version 2; update"):
        Bank(bank.path)


GIVEN = {"method": "given_vector", "model": None, "settings": {"positions": "all", "widths": [48]}}
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": MODEL}, "was read from tiny .*this model is llama"),
    "width": ({"width": 40}, r"vectors for resid_post\[1\] are 40 and 48 wide, so some are of another model"),
    "site": ({"sites": ("resid_post[7]",), **GIVEN}, r"resid_post\[7\]: the model has 3 layers"),
    "version": ({"version": 99}, "version 99 of style_vector, this library reads version 1"),
    "method": ({"method": "magic"}, "fitted by 'magic', which is not loaded"),
    "artifact": ({"artifact": "ab" * 32}, r"needs the artifact abababab.*put_artifact"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_state_that_does_not_fit_is_refused_and_others_are_not(
    bank: Bank, llama: steer.FrozenLM, misfit: str
) -> None:
    def fitted(width: int = 48, **changes: Any) -> UserState:
        described: dict[str, Any] = {
            "method": "style_vector", "version": 1, "model": llama.fingerprint, "sites": ("resid_post[1]",),
            "settings": {"positions": "response"}, "calibration": {"reference_norm": {"resid_post[1]": 1.0}},
        }  # fmt: skip
        source = described | changes
        return UserState(Provenance(**source), {site: torch.full((width,), 5.0) for site in source["sites"]})

    changes, message = MISFITS[misfit]
    bank.update({("ada", "style"): fitted(), ("bob", "style"): fitted(**changes)})
    assert_same(bank["bob", "style"], fitted(**changes))
    with pytest.raises(SteerError, match=message), llama.steered(bank, users=["ada", "bob"]):
        pass
    prompt = torch.tensor([[3, 5, 7, 9]])
    plain = llama.model(prompt).logits
    with llama.steered(bank, users=["ada"], prompt_lengths=[4]):
        steered = llama.model(prompt).logits
    assert not torch.allclose(plain, steered)


# Damage


def test_a_truncated_segment_costs_only_its_own_entries(bank: Bank) -> None:
    bank["alice", "style"] = state(1.0)
    bank["bob", "style"] = state(torch.ones(4, dtype=torch.float16) * 2)
    damaged, _ = place(bank, "alice")
    whole = damaged.read_bytes()
    # Of a bank that has the file open, and of one that opens it.
    for reader in (bank, Bank(bank.path)):
        damaged.write_bytes(whole[:4100])
        with pytest.raises(SteerError, match=rf"'style' of user 'alice' cannot be read: .*{damaged.name}: damaged"):
            reader["alice", "style"]
        with pytest.raises(SteerError, match=damaged.name):
            reader.get_many(["bob", "alice"], "style")
        assert value(reader["bob", "style"]) == 2
    damaged.unlink()
    again = Bank(bank.path)
    with pytest.raises(SteerError, match=rf"'style' of user 'alice' cannot be read: .*{damaged.name}: .*missing"):
        again["alice", "style"]
    again["alice", "style"] = state(3.0)
    assert value(again["alice", "style"]) == 3
    assert [fault.file for fault in again.verify()] == [damaged]
    again.compact()
    assert again.verify() == []


def test_a_flipped_bit_is_noticed_and_costs_one_entry(bank: Bank) -> None:
    bank.update({("alice", "style"): state(1.0), ("bob", "style"): state(2.0)})
    file, at = place(bank, "bob")
    flip(file, at + 2)
    assert value(bank["alice", "style"]) == 1
    with pytest.raises(SteerError, match=rf"'style' of user 'bob' cannot be read: .*{file.name}: damaged"):
        bank["bob", "style"]
    (fault,) = bank.verify()
    assert (fault.user, fault.name, fault.file) == ("bob", "style", file)


def test_a_damaged_or_missing_index_is_reported(bank: Bank) -> None:
    index = bank.path / "index.sqlite"
    index.write_bytes(b"not a database, but quite long enough to be looked at as if it were one" * 10)
    with pytest.raises(SteerError, match=r"index\.sqlite: the index .*cannot be used"):
        len(Bank(bank.path))
    index.unlink()
    with pytest.raises(SteerError, match=r"lost its index\.sqlite"):
        Bank(bank.path)


def test_an_index_cannot_point_out_of_the_bank(bank: Bank) -> None:
    bank["alice", "style"] = state()
    shutil.copy(files(bank)[0], bank.path / "00000009-00000000.safetensors")
    with sqlite3.connect(bank.path / "index.sqlite") as index:
        index.execute("UPDATE segments SET file = '../' || id || '0000009-00000000.safetensors'")
    with pytest.raises(SteerError, match="not the name of a segment"):
        Bank(bank.path)["alice", "style"]


# Crashes, threads and processes


def test_the_segment_is_on_disk_before_the_index_refers_to_it(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync = os.fsync

    def note_fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(target.suffix or target.name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    connection = bank._store.index._writer._db
    connection.set_trace_callback(lambda statement: events.append(statement.split()[0]))
    bank["alice", "style"] = state()
    assert events[0] == "BEGIN"
    assert events[-1] == "COMMIT"
    assert events.count("COMMIT") == 1
    assert [event for event in events if not event.isupper()] == [".safetensors", ".safetensors", "segments"]
    # 3 is EXTRA: SQLite syncs its file, and the folder after its journal.
    assert connection.execute("PRAGMA synchronous").fetchone() == (3,)


def test_a_commit_that_fails_leaves_the_bank_as_it_was(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank["alice", "style"] = state(1.0)
    with sqlite3.connect(bank.path / "index.sqlite") as index:
        index.execute("CREATE TRIGGER full BEFORE INSERT ON layouts BEGIN SELECT RAISE(ABORT, 'full'); END")
    secret = torch.tensor([1.25, 3.5, -7.75, 9.0, 11.0])
    with pytest.raises(SteerError, match="full"):
        bank.update({("alice", "style"): state(2.0), ("dan", "style"): state(secret, model=OTHER)})
    assert list(bank) == [("alice", "style")]
    assert value(bank["alice", "style"]) == 1
    assert [source.model for _, source, _ in bank.templates()] == [MODEL]
    assert holding(bank, secret.numpy().tobytes()) == []

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with sqlite3.connect(bank.path / "index.sqlite") as index:
        index.execute("DROP TRIGGER full")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(SteerError, match="No space left"):
            bank["bob", "style"] = state(secret)
    assert ("bob", "style") not in bank
    assert value(bank["alice", "style"]) == 1
    bank["bob", "style"] = state(3.0)
    assert value(bank["bob", "style"]) == 3
    assert bank.verify() == []


def test_a_locked_index_is_reported(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.bank.connection._BUSY_SECONDS", 0.05)
    other = sqlite3.connect(bank.path / "index.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(SteerError, match="locked"):
        Bank(bank.path)["alice", "style"] = state()
    other.close()
    bank["alice", "style"] = state()


@forks
def test_kill_9_at_any_moment_leaves_whole_commits(bank: Bank) -> None:
    def write() -> None:
        for number in range(1_000_000):
            vectors = {user: state(float(number)) for user in ("alice", "bob")}
            bank.update({(user, "style"): vector for user, vector in vectors.items()} | {(f"u{number}", "x"): state()})

    chance = random.Random(0)
    seen = 0
    for _ in range(12):
        child = in_child(write)
        time.sleep(chance.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        alice, bob = bank.get_many(["alice", "bob"], "style")
        if alice or bob:
            assert value(alice) == value(bob)
            assert (f"u{value(alice):.0f}", "x") in bank
        for key in bank:
            bank[key]
        seen += len(bank)
        bank["parent", "x"] = state()
    assert seen > 0


@forks
def test_processes_take_turns_and_readers_see_whole_commits(bank: Bank) -> None:
    def write(writer: int) -> None:
        for number in range(40):
            vector = state(float(100 * writer + number))
            bank.update({("alice", "style"): vector, ("bob", "style"): vector, (f"{writer}-{number}", "x"): vector})

    bank.update({("alice", "style"): state(), ("bob", "style"): state()})
    children = [in_child(partial(write, writer)) for writer in (1, 2)]
    moments = set()
    while children:
        alice, bob = bank.get_many(["alice", "bob"], "style")
        assert value(alice) == value(bob)
        moments.add(value(alice))
        child, status = os.waitpid(children[0], os.WNOHANG)
        if child:
            assert status == 0
            children.pop(0)
    assert len(moments) > 2
    assert len(bank) == 2 + 2 * 40
    for writer in (1, 2):
        assert [value(bank[f"{writer}-{number}", "x"]) for number in range(40)] == [100 * writer + n for n in range(40)]


@forks
def test_a_child_of_a_busy_process_can_use_the_bank(bank: Bank) -> None:
    bank["alice", "style"] = state()
    inherited = bank._store.index._writer._db
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            assert len(bank) >= 1

    def write(number: int) -> None:
        bank[f"child{number}", "x"] = state()
        # SQLite forbids it, though it would mostly work.
        assert bank._store.index._writer._db is not inherited

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for number in range(10):
            child = in_child(partial(write, number))
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert len(bank) == 11


def test_threads_share_a_bank(bank: Bank) -> None:
    errors = []

    def work(worker: int) -> None:
        try:
            for number in range(15):
                bank[f"{worker}-{number}", "x"] = state(float(number))
                assert value(bank[f"{worker}-{number}", "x"]) == number
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []
    assert len(bank) == 60


def test_whoever_may_read_the_folder_may_read_the_tensors(bank: Bank) -> None:
    bank["alice", "style"] = state()
    bank.put_artifact(Artifact("pplug", 1, MODEL, {"up": torch.ones(4)}))
    usual = (bank.path / "manifest.json").stat().st_mode
    assert {file.stat().st_mode for file in files(bank) + files(bank, "artifacts")} == {usual}


def test_two_may_create_the_same_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "people.bank"
    rename = os.rename

    def come_second(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        Bank(path)["alice", "style"] = state(1.0)
        rename(source, target)

    monkeypatch.setattr(os, "rename", come_second)
    assert value(Bank(path)["alice", "style"]) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["people.bank"]
