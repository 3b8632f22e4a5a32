"""What goes on between writers, readers and interruptions: each of these once lost or mixed up somebody's state."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FAST, in_child, succeeded

from steer.bank import Bank, UserHash, hub
from steer.bank import bank as bank_module
from steer.bank import connection as connection_module
from steer.bank import index as index_module
from steer.bank import segment as segment_module
from steer.bank import writing as writing_module
from steer.bank.index import Writer
from steer.bank.segment import Segment, Segments
from steer.errors import SteerError
from steer.state import Artifact, Fingerprint, Provenance, UserState

MODEL = Fingerprint("tiny", '{"hidden_size": 4}', tuple(range(256)))

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def state(number: float, size: int = 4, **provenance: Any) -> UserState:
    return UserState(Provenance(**{"method": "m", "version": 1} | provenance), {"v": torch.full((size,), number)})


def value(bank: Bank, user: str, name: str = "style") -> float:
    return float(bank[user, name].tensors["v"][0])


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        yield Path(name)


@pytest.fixture
def bank(folder: Path) -> Bank:
    return Bank(folder / "people.bank")


# Interruptions


def test_the_next_commit_does_not_read_the_files_of_one_that_failed(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rolled back transaction gives the numbers of its segments out again."""
    bank["ada", "style"] = state(1.0)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", fail)
        with pytest.raises(KeyboardInterrupt):
            bank["bob", "style"] = state(2.0, 40_000)
    bank["bob", "style"] = state(3.0, 50_000)
    assert value(bank, "bob") == 3
    assert bank.verify() == []
    bank["carol", "style"] = state(4.0)
    bank.forget(["carol"])
    bank.compact()
    assert (value(bank, "ada"), value(bank, "bob")) == (1, 3)
    assert bank.verify() == []


# Python ignores an interrupt that comes while something is being cleaned up, and pytest warns of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_random_moments(bank: Bank) -> None:
    chance, armed = random.Random(0), False

    def interrupt(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    usual = signal.signal(signal.SIGALRM, interrupt)
    kept: dict[str, float] = {}
    interrupted = 0
    try:
        for number in range(150):
            user, before = f"user-{number % 20}", dict(kept)
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0002, 0.006))
                if number % 7 == 6:
                    kept.pop(user, None)
                    bank.forget([user])
                elif number % 11 == 10:
                    bank.compact()
                else:
                    kept[user] = float(number)
                    bank[user, "style"] = state(float(number), chance.choice([4, 4, 20_000]))
                armed = False
            except KeyboardInterrupt:
                armed = False
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            found = {user: value(bank, user) for user, _ in bank}
            assert found in (kept, before)
            kept = found
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert interrupted > 10
    bank["last", "style"] = state(1.0)
    assert bank.verify() == []
    assert value(Bank(bank.path), "last") == 1


def test_an_interrupt_while_waiting_for_the_lock_leaves_no_transaction(bank: Bank) -> None:
    bank["ada", "style"] = state(1.0)
    other = sqlite3.connect(bank.path / "index.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        threading.Timer(0.5, lambda: other.execute("ROLLBACK")).start()
        with pytest.raises(KeyboardInterrupt):
            bank["bob", "style"] = state(2.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    bank["bob", "style"] = state(3.0)
    Bank(bank.path)["carol", "style"] = state(4.0)
    assert [value(bank, user) for user in ("ada", "bob", "carol")] == [1, 3, 4]


def test_a_large_commit_that_failed_does_not_slow_down_the_next(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.update({(f"user-{number}", "style"): state(1.0, 3_000_000) for number in range(2)})

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", fail)
        with pytest.raises(SteerError, match="Input/output error"):
            bank["bob", "style"] = state(2.0, 2_000_000)
    files = list((bank.path / "segments").iterdir())
    # The zeros that took the place of what was written are holes.
    assert sum(file.stat().st_blocks * 512 for file in files) < 26_000_000
    assert bank.verify() == []


# Other processes, and other banks in the place of this


def test_a_folder_is_pulled_without_losing_locks(folder: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closes a file gives up all locks that the process has on it."""
    bank["ada", "style"] = state(1.0)
    put, go, pulled = Writer.put, folder / "go", folder / "pulled.bank"

    def write_when_told() -> None:
        while not go.exists():
            time.sleep(0.01)
        Bank(bank.path).update({("carol", "style"): state(3.0)})

    other = in_child(write_when_told)

    def slow(writer: Writer, rows: Any) -> None:
        if not go.exists():
            go.touch()
            hub.pull(bank.path, pulled).close()
            time.sleep(0.5)
        put(writer, rows)

    monkeypatch.setattr(Writer, "put", slow)
    bank["bob", "style"] = state(2.0)
    assert succeeded(other)
    assert [value(bank, user) for user in ("ada", "bob", "carol")] == [1, 2, 3]
    assert bank.verify() == []


def test_an_index_older_than_the_segments_erases_nothing(bank: Bank) -> None:
    bank.update({(f"user-{number}", "style"): state(float(number)) for number in range(50)})
    bank["more", "style"] = state(1.0)
    old = (bank.path / "index.sqlite").read_bytes()
    for number in range(50, 100):
        bank[f"user-{number}", "style"] = state(float(number))
    bank.compact()
    bank.close()
    new = (bank.path / "index.sqlite").read_bytes()
    (bank.path / "index.sqlite").write_bytes(old)
    before = {path.name: path.read_bytes() for path in (bank.path / "segments").iterdir()}
    restored = Bank(bank.path, create=False)
    with pytest.raises(SteerError, match=r"index\.sqlite is older than the other files.*nothing was changed"):
        restored["bob", "style"] = state(1.0)
    restored.close()
    assert {path.name: path.read_bytes() for path in (bank.path / "segments").iterdir()} == before
    (bank.path / "index.sqlite").write_bytes(new)
    again = Bank(bank.path)
    assert len(again) == 101
    assert again.verify() == []


def texts(users: Iterable[int]) -> dict[tuple[str, str], UserState]:
    # Of one dtype, so that a compaction is one commit.
    return {(f"user-{user}", "text"): UserState(Provenance("m", 1), data={"text": "x" * 3000}) for user in users}


@pytest.mark.parametrize(
    "commit",
    [
        lambda bank: bank.update(texts(range(50, 100))),
        lambda bank: bank.update(texts(range(10))),
        lambda bank: bank.delete(texts(range(10, 20))),
        lambda bank: bank.compact(),
        lambda bank: bank.put_artifact(Artifact("m", 1, MODEL, {"population": torch.ones(4)})),
    ],
    ids=["add", "replace", "delete", "compact", "artifact"],
)
@pytest.mark.parametrize("earlier", [0, 1], ids=["noted by this version", "noted by an earlier one"])
def test_an_index_one_commit_old_erases_nothing(bank: Bank, commit: Callable[[Bank], object], earlier: int) -> None:
    """It is not taken for what a killed writer left, which looks just the same from it."""
    bank.update(texts(range(30)))
    bank.update(texts(range(30, 50)))
    bank.delete(texts(range(20, 30)))
    assert bank._store.index.commits() == 3
    # Which noted the number of a commit when that began.
    (bank.path / "commits").write_text(f"{4 - earlier:019d}\n")
    bank.close()
    old = (bank.path / "index.sqlite").read_bytes()
    with Bank(bank.path) as again:
        commit(again)
        assert again._store.index.commits() == 4
        keys = set(again)
    new = (bank.path / "index.sqlite").read_bytes()
    (bank.path / "index.sqlite").write_bytes(old)
    before = {path: path.read_bytes() for path in bank.path.rglob("*") if path.is_file()}
    with Bank(bank.path) as restored, pytest.raises(SteerError, match=r"index\.sqlite is older than the other files"):
        restored["bob", "style"] = state(1.0)
    assert {path: path.read_bytes() for path in bank.path.rglob("*") if path.is_file()} == before
    (bank.path / "index.sqlite").write_bytes(new)
    with Bank(bank.path) as again:
        assert again.verify() == []
        assert set(again) == keys


@pytest.mark.parametrize("step", ["begin", "write", "put", "count", "note", "erase", "erased"])
@pytest.mark.parametrize("earlier", [0, 1], ids=["noted by this version", "noted by an earlier one"])
def test_a_writer_killed_between_two_steps(
    bank: Bank, step: str, earlier: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.update(texts(range(4)))
    (bank.path / "commits").write_text(f"{2 - earlier:019d}\n")

    def work() -> None:
        where, name = {
            "begin": (writing_module, "recover"),
            "write": (Segments, "write"),
            "put": (Writer, "put"),
            "count": (Writer, "count_commit"),
            "note": (writing_module, "_note_commit"),
            "erase": (Segments, "erase"),
            "erased": (Writer, "erased"),
        }[step]
        usual = getattr(where, name)

        def last(*arguments: Any) -> None:
            if step in ("write", "erase"):
                usual(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(where, name, last)
        bank.update(texts(range(2, 6)))

    bank.close()
    child = in_child(work)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    committed = step in ("note", "erase", "erased")
    with Bank(bank.path) as again:
        assert len(again) == (6 if committed else 4)
        assert again.verify() == []
        commits = again._store.index.commits()
        assert commits == (2 if committed else 1)
        assert int((bank.path / "commits").read_text()) == commits + 1
        assert again.update(texts(range(4, 8))) == 4
        assert again.verify() == []


def test_a_bank_that_was_replaced_is_not_written_to(bank: Bank) -> None:
    bank["ada", "style"] = state(1.0)
    path = bank.path
    shutil.rmtree(path)
    with pytest.raises(SteerError, match="is gone"):
        bank["ada", "style"] = state(2.0)
    Bank(path, hashed=True)["somebody", "style"] = state(3.0)
    for use in (lambda: bank.update({("ada", "style"): state(2.0)}), lambda: bank["somebody", "style"]):
        with pytest.raises(SteerError, match="if the bank was replaced, open it again"):
            use()
    assert len(Bank(path)) == 1
    assert Bank(path).verify() == []


def test_forks_beside_a_thread_that_writes_and_one_that_gathers(bank: Bank) -> None:
    bank.update({(f"user-{number}", "style"): state(float(number)) for number in range(10)})
    gather, stop = bank.gatherer("style"), threading.Event()
    failures: list[BaseException] = []

    def busy(work: Callable[[int], object]) -> None:
        number = 0
        try:
            while not stop.is_set():
                work(number)
                number += 1
        except BaseException as error:
            failures.append(error)

    def write(number: int) -> None:
        # Other layouts each time, so that the writer has to ask the reader's connection for them.
        bank[f"user-{number % 10}", "style"] = state(float(number % 10), 4 + number % 3)
        bank.forget([f"guest-{number}"])

    def child() -> None:
        for user in range(10):
            assert value(bank, f"user-{user}") == user
        gather(["user-1"])
        bank[f"child-{os.getpid()}", "style"] = state(1.0)

    threads = [
        threading.Thread(target=busy, args=(work,))
        for work in (write, lambda number: gather([f"user-{number % 10}"]), lambda _: bank.verify())
    ]
    for thread in threads:
        thread.start()
    try:
        assert all(succeeded(in_child(child)) for _ in range(15))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert len(bank) == 25


@pytest.mark.parametrize("where", ["the same bank", "another bank"])
def test_forks_beside_a_thread_that_opens_banks(folder: Path, bank: Bank, where: str) -> None:
    """SQLite has locks of its own, which would stay locked in a child for good."""
    bank["ada", "style"] = state(1.0)
    path = bank.path if where == "the same bank" else folder / "other.bank"
    stop = threading.Event()

    def open_and_close() -> None:
        while not stop.is_set():
            Bank(path).close()
            # One that is cleared away rather than closed.
            Bank(path)

    def child() -> None:
        bank[f"child-{os.getpid()}", "style"] = state(1.0)
        assert value(Bank(bank.path, create=False), "ada") == 1

    thread = threading.Thread(target=open_and_close)
    thread.start()
    try:
        assert all(succeeded(in_child(child)) for _ in range(25))
    finally:
        stop.set()
        thread.join()
    assert len(bank) == 26


def test_a_fork_waits_for_a_thread_that_opens_a_bank(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is born meanwhile would believe that it has the locks of that connection."""
    bank["ada", "style"] = state(1.0)
    tables, half_open, forker = index_module._tables, threading.Event(), threading.current_thread()

    def slow(db: sqlite3.Connection) -> Any:
        if threading.current_thread() is not forker and db.execute("PRAGMA database_list").fetchone()[2]:
            reading = db.execute("SELECT name FROM sqlite_master")
            reading.fetchone()
            half_open.set()
            time.sleep(0.3)
            reading.close()
        return tables(db)

    monkeypatch.setattr(index_module, "_tables", slow)
    monkeypatch.setattr(connection_module, "_BUSY_SECONDS", 2.0)
    thread = threading.Thread(target=Bank, args=(bank.path,))
    thread.start()
    half_open.wait()
    assert succeeded(in_child(lambda: bank.update({("child", "style"): state(2.0)})))
    thread.join()
    assert value(bank, "child") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_a_fork_waits_for_a_writer(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank["ada", "style"] = state(1.0)
    put, inside, go = Writer.put, threading.Event(), threading.Event()
    interrupts = []

    def slow(writer: Writer, rows: Any) -> None:
        inside.set()
        go.wait()
        put(writer, rows)

    def interrupt(*_: object) -> None:
        interrupts.append(go.is_set())
        # The writer goes on only now, however long the machine slept before.
        threading.Timer(0.4, go.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "put", slow)
    writer = threading.Thread(target=bank.update, args=({("bob", "style"): state(2.0)},))
    writer.start()
    inside.wait()
    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert succeeded(in_child(lambda: bank.update({("child", "style"): state(3.0)})))
    finally:
        signal.signal(signal.SIGALRM, usual)
    writer.join()
    assert interrupts == [False]
    for use in (
        lambda: bank.update({("carol", "style"): state(4.0)}),
        lambda: Bank(bank.path).update({("dan", "style"): state(5.0)}),
    ):
        other = threading.Thread(target=use, daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive()
    assert sorted(user for user, _ in bank) == ["ada", "bob", "carol", "child", "dan"]
    assert bank.verify() == []


def test_forks_beside_a_thread_that_opens_files(bank: Bank) -> None:
    bank["ada", "style"] = state(1.0)
    stop = threading.Event()

    def read() -> None:
        # As whenever somebody else has compacted the bank.
        bank._store.segments.forget()
        assert value(bank, "ada") == 1

    def read_on() -> None:
        while not stop.is_set():
            read()

    thread = threading.Thread(target=read_on)
    thread.start()
    try:
        assert all(succeeded(in_child(read)) for _ in range(40))
    finally:
        stop.set()
        thread.join()


def test_threads_that_open_more_files_than_are_kept(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_module, "_KEPT_OPEN", 1)
    dtypes = [torch.float32, torch.float16, torch.int8, torch.int64]
    bank.update(
        {
            (str(number), "style"): UserState(Provenance("m", 1), {"v": torch.full((4,), number, dtype=dtype)})
            for number, dtype in enumerate(dtypes)
        }
    )
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(300):
                user = chance.randrange(4)
                assert value(bank, str(user)) == user
                if seed == 0:
                    bank._store.segments.forget()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_bank_goes_to_workers_that_are_not_forked(bank: Bank) -> None:
    bank["ada", "style"] = state(1.0)
    assert value(pickle.loads(pickle.dumps(bank)), "ada") == 1
    assert Bank(bank.path.parent / "empty.bank")


# What is stored at the same time


@pytest.mark.parametrize("conflict", ["keep", "error"])
def test_what_is_stored_during_a_merge_is_not_replaced(
    folder: Path, bank: Bank, conflict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Bank(folder / "other.bank")
    other.update({("ada", "style"): state(-1.0), ("bob", "style"): state(-2.0)})
    packed = Bank._packed
    rival = Bank(bank.path)

    def slow(self: Bank, key: tuple[str, str], own: UserState) -> Any:
        if self is bank and key[0] == "bob":
            rival["ada", "style"] = state(777.0)
        return packed(self, key, own)

    monkeypatch.setattr(Bank, "_packed", slow)
    if conflict == "keep":
        assert bank.merge(other, conflict="keep") == 1
        assert value(bank, "bob") == -2
    else:
        with pytest.raises(SteerError, match="already"):
            bank.merge(other)
        assert ("bob", "style") not in bank
    assert value(bank, "ada") == 777


def test_a_bank_in_use_is_copied(folder: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "_TOGETHER", 10)
    bank.update({(f"user-{number}", "style"): state(float(number)) for number in range(1200)})
    rival, shares = Bank(bank.path), []

    def disturb(share: float) -> None:
        if not shares:
            del rival["user-3", "style"]
            rival["user-3", "style"] = state(777.0)
            rival["user-1199", "style"] = state(888.0)
        shares.append(share)

    copy = bank.copy(folder / "copy.bank", on_progress=disturb)
    assert {user: value(copy, user) for user, _ in copy} == {user: value(bank, user) for user, _ in bank}
    assert len(copy) == 1200
    assert (value(copy, "user-3"), value(copy, "user-1199")) == (777, 888)
    assert copy.verify() == []


def test_several_users_are_not_the_letters_of_one(bank: Bank) -> None:
    bank.update({(user, "style"): state(1.0) for user in ("ada", "a", "d")})
    for use in (bank.forget, lambda users: bank.get_many(users, "style"), bank.gatherer("style")):
        with pytest.raises(SteerError, match=r"several users are expected here; write \['ada'\]"):
            use("ada")
    assert len(bank) == 3


def test_a_hash_and_an_id_of_the_same_letters_are_two_users(folder: Path) -> None:
    bank = Bank(folder / "hashed.bank", hashed=True)
    bank["ada", "style"] = state(1.0)
    ((hashed, _),) = list(bank)
    digits = str(hashed)
    bank[digits, "style"] = state(2.0)
    assert isinstance(hashed, UserHash)
    found = bank.get_many([hashed, digits], "style")
    assert [float(one.tensors["v"][0]) for one in found if one] == [1, 2]


# What does not come back as it went in is not stored


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (UserState(Provenance("m", 1), {14: torch.ones(3)}), "tensor 14 is named by no text"),  # type: ignore[dict-item]
        (state(1.0, version=1.0), "version 1.0 is no whole number"),
        (state(1.0, version=True), "version True is no whole number"),
        (state(1.0, version=2**70), "is no whole number of a few digits"),
        (state(1.0, method=5), "method has 5, which is no text"),
        (state(1.0, method="m\udcff"), "more than ASCII"),
        (state(1.0, artifact=7), "artifact has 7, which is no text"),
        (state(1.0, sites=(5,)), "sites has 5, which is no text"),
        (state(1.0, records=(5,)), "records has 5, which is no text"),
    ],
)
def test_what_would_not_come_back_is_refused(bank: Bank, bad: UserState, message: str) -> None:
    bank["ada", "style"] = state(1.0)
    with pytest.raises(SteerError, match=f"state 'style' of user 'ada': .*{message}"):
        bank["ada", "style"] = bad
    assert value(bank, "ada") == 1
    bank["bob", "style"] = state(2.0)
    assert bank.verify() == []


def test_a_tensor_without_values_makes_no_state() -> None:
    with pytest.raises(SteerError, match="'v' is on the meta device and has no values"):
        UserState(Provenance("m", 1), {"v": torch.ones(3, device="meta")})


def test_a_negative_view_is_stored_as_it_looks(bank: Bank) -> None:
    view = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert view.is_neg()
    bank["ada", "style"] = UserState(Provenance("m", 1), {"v": view})
    assert bank["ada", "style"].tensors["v"].tolist() == [-2.0, 4.0]


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
def test_batches_of_any_size_of_mixed_and_empty_tensors(bank: Bank, batch: int) -> None:
    tensors = {
        "a": torch.tensor([1, 2, 3], dtype=torch.int8),
        "b": torch.tensor([1.5, 2.5]),
        "none": torch.empty(0, 4),
        "c": torch.tensor(7, dtype=torch.int64),
    }
    bank["ada", "style"] = UserState(Provenance("m", 1), tensors)
    bank["ada", "empty"] = UserState(Provenance("m", 1), {"none": torch.empty(0, 4)})
    for name in ("style", "empty"):
        rows = bank.gatherer(name)(["ada"] * batch)
        for label, tensor in rows.tensors.items():
            assert tensor.dtype == tensors[label].dtype
            assert torch.equal(tensor, torch.stack([tensors[label]] * batch) if batch else tensor)
            assert tensor.shape == (batch, *tensors[label].shape)


# Damage


def test_an_artifact_can_be_put_back_and_goes_along(folder: Path, bank: Bank) -> None:
    artifact = Artifact("m", 1, MODEL, {"population": torch.ones(4)})
    digest = bank.put_artifact(artifact)
    bank["ada", "style"] = state(1.0)
    # No state names it yet.
    assert bank.copy(folder / "copy.bank").has_artifact(digest)
    file = bank.path / "artifacts" / f"{digest}.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert [fault.file for fault in bank.verify()] == [file]
    damages: list[SteerError] = []
    with pytest.raises(SteerError, match="damaged"):
        Bank(bank.path).copy(folder / "strict.bank")
    saved = Bank(bank.path).copy(folder / "saved.bank", on_damage=damages.append)
    assert len(damages) == 1
    assert value(saved, "ada") == 1
    again = Bank(bank.path)
    assert again.put_artifact(artifact) == digest
    assert torch.equal(again.artifact(digest).tensors["population"], torch.ones(4))


@pytest.mark.parametrize("digest", ["ab" * 32, "../secret"])
def test_verify_says_which_artifact_is_not_there(bank: Bank, digest: str) -> None:
    bank["ada", "style"] = state(1.0, artifact=digest)
    (fault,) = bank.verify()
    assert f"has no artifact {digest}, which states need" in str(fault)
    assert "damaged" not in str(fault)


def test_a_senseless_row_costs_one_entry_and_is_listed(folder: Path, bank: Bank) -> None:
    bank.update({(f"user-{number}", "style"): state(float(number)) for number in range(10)})
    with sqlite3.connect(bank.path / "index.sqlite") as index:
        index.execute("UPDATE entries SET facts_length = 'long' WHERE number = 3")
    damages: list[SteerError] = []
    saved = bank.copy(folder / "saved.bank", on_damage=damages.append)
    assert len(saved) == 9
    assert len(damages) == 1
    assert bank.verify() != []


@pytest.mark.parametrize(
    "change",
    [
        "kind = 99 WHERE number = 0",
        "kind = 99 WHERE number = 1",
        "segment = NULL, at = NULL WHERE number = 1",
        "at = 4611686018427387904 WHERE number = 1",
        "layout = 99 WHERE number = 1",
        "facts_at = 9000000000000000000 WHERE number = 0",
    ],
)
def test_verify_lists_entries_that_cannot_be_read(bank: Bank, change: str) -> None:
    bank["context", "style"] = UserState(Provenance("cos", 1), data={"context": "tea"})
    bank.update({("ada", "style"): state(1.0), ("bob", "style"): state(2.0)})
    with sqlite3.connect(bank.path / "index.sqlite") as index:
        index.execute(f"UPDATE entries SET {change}")
    again, unreadable = Bank(bank.path), []
    for user in ("context", "ada", "bob"):
        try:
            again[user, "style"]
        except SteerError:
            unreadable.append(user)
    assert len(unreadable) == 1
    # By the hash of the id where that itself cannot be read.
    assert {unreadable[0], again._hash(unreadable[0]).hex()} & {fault.user for fault in again.verify()}
    with suppress(SteerError):
        again.gatherer("style")(["ada", "bob"])


def test_verify_beside_a_compaction_finds_what_is_wrong_and_nothing_else(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compaction comes after the segments were listed; it takes the damaged bytes along to a new one."""
    for number in range(40):
        bank[f"user-{number}", "style"] = state(float(number), 3000)
    bank.forget([f"user-{number}" for number in range(20)])
    (entry,) = bank._store.index.find([bank._address(("user-30", "style"))]).values()
    segment = bank._store.index.segment(entry.segment)
    with (bank.path / "segments" / segment.file).open("r+b") as file:
        file.seek(segment.offset(entry.at + 5))
        file.write(b"\1\2\3\4")
    list_segments, listed = bank._store.index.segments, []

    def compact_behind() -> Any:
        found = list_segments()
        if not listed:
            listed.append(found)
            with Bank(bank.path) as other:
                other.compact()
        return found

    monkeypatch.setattr(bank._store.index, "segments", compact_behind)
    (fault,) = bank.verify()
    assert (fault.user, fault.name) == ("user-30", "style")


@pytest.mark.parametrize("what", ["facts", "tensors"])
def test_an_index_that_asks_for_too_much_memory(bank: Bank, what: str) -> None:
    bank["ada", "style"] = state(1.0)
    bank.close()
    with closing(sqlite3.connect(bank.path / "index.sqlite")) as db, db:
        file = (
            bank.path
            / "segments"
            / db.execute(
                "SELECT file FROM segments WHERE dtype = ?", ("uint8" if what == "facts" else "float32",)
            ).fetchone()[0]
        )
        dtype = "uint8" if what == "facts" else "float32"
        db.execute("UPDATE segments SET capacity = ? WHERE dtype = ?", (1 << 50, dtype))
        if what == "facts":
            db.execute("UPDATE entries SET facts_length = ?", (1 << 46,))
        else:
            slots = json.loads(db.execute("SELECT tensors FROM layouts").fetchone()[0])
            db.execute("UPDATE layouts SET tensors = ?", (json.dumps(slots).replace("[4]", f"[{1 << 44}]"),))
        number = db.execute("SELECT id FROM segments WHERE dtype = ?", (dtype,)).fetchone()[0]
    with file.open("r+b") as out:
        out.write(Segment(number, file.name, dtype, 1 << 50).header)
    with Bank(bank.path, create=False) as found:
        asks = [lambda: list(found.rows())] if what == "facts" else [lambda: found.gatherer("style")(["ada"])]
        for ask in (lambda: found["ada", "style"], *asks):
            with pytest.raises(SteerError, match="damaged"):
                ask()
        assert found.verify()


@pytest.mark.parametrize("name", ["erasures_", "sqliteX", "sqlite_x", "sqlite_autoindex_erasures_1"])
def test_an_index_with_a_trigger_is_refused(bank: Bank, name: str) -> None:
    """It could keep what is deleted from being erased; SQLite lets nobody make one named like its own, but reads it."""
    bank["ada", "style"] = state(1.0)
    with sqlite3.connect(bank.path / "index.sqlite") as index:
        index.execute("CREATE TRIGGER own AFTER INSERT ON erasures BEGIN DELETE FROM erasures; END")
        index.execute("PRAGMA writable_schema = ON")
        index.execute(
            "UPDATE sqlite_master SET name = ?, sql = replace(sql, 'own', ?) WHERE name = 'own'", (name, name)
        )
    with pytest.raises(SteerError, match="has other tables"):
        Bank(bank.path)


def test_too_many_open_files_are_no_damage(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank["ada", "style"] = state(1.0)

    again, opened = Bank(bank.path), os.open
    again._store.segments.forget()

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if "segments" in str(path):
            raise OSError(24, "Too many open files")
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(SteerError, match="cannot be opened now") as caught:
            again["ada", "style"]
    assert "damaged" not in str(caught.value)
