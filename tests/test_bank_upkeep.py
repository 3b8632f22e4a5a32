"""Erasing, hashed ids, gathering, verifying, compacting, merging, copying, and banks of version 1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from processes import FAST, in_child, succeeded

from steer.bank import Bank, UserHash, hub
from steer.bank import upkeep as upkeep_module
from steer.bank import writing as writing_module
from steer.bank.migrate import migrate
from steer.errors import Damage, SteerError, UnknownUser
from steer.files import draft_folder
from steer.interop import state_files
from steer.state import Artifact, Fingerprint, Provenance, UserState

MODEL = Fingerprint("tiny", '{"hidden_size": 4}', tuple(range(256)))
VERSION_1 = Path(__file__).parent / "data" / "bank-v1"


def state(number: float, size: int = 8, /, text: str = "", **provenance: Any) -> UserState:
    described: dict[str, Any] = {"method": "style", "version": 1, "model": MODEL, "sites": ("embed",)}
    return UserState(Provenance(**described | provenance), {"v": torch.full((size,), number)}, {"text": text})


def secret(number: int) -> tuple[UserState, list[bytes]]:
    """A state, and patterns that are in its bytes only."""
    mark = f"S{number:010d}S".encode()
    vector = torch.frombuffer(bytearray(mark * 4), dtype=torch.float32)
    data = {"text": f"secret text {number:010d}"}
    records = (f"record-{number:010d}",)
    patterns = [mark, data["text"].encode(), records[0].encode()]
    return UserState(Provenance("style", 1, MODEL, ("embed",), records=records), {"v": vector}, data), patterns


def holds(folder: Path, *patterns: bytes) -> list[str]:
    return [
        f"{path.name}: {pattern!r}"
        for path in folder.rglob("*")
        if path.is_file()
        for pattern in patterns
        if pattern in path.read_bytes()
    ]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        yield Path(name)


@pytest.fixture
def bank(folder: Path) -> Bank:
    return Bank(folder / "people.bank")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a few states, so that there are many."""
    for module in (writing_module, upkeep_module):
        monkeypatch.setattr(module, "LARGEST", 2048)
    monkeypatch.setattr(writing_module, "SMALLEST", 256)


# Erasing


@pytest.mark.parametrize("how", ["delete", "forget", "del", "replace"])
def test_nothing_is_left_of_what_is_deleted(bank: Bank, how: str) -> None:
    gone, patterns = secret(1)
    stays, others = secret(2)
    user = "somebody-with-a-long-id"
    bank.update({(user, "style"): gone, ("bob", "style"): stays})
    assert len(holds(bank.path, *patterns)) == 3
    reader = Bank(bank.path)
    if how == "delete":
        bank.delete([(user, "style")])
    elif how == "forget":
        assert bank.forget([user, "nobody"]) == 1
    elif how == "del":
        del bank[user, "style"]
    else:
        bank[user, "style"] = state(3.0)
    assert holds(bank.path, *patterns) == []
    assert len(holds(bank.path, *others)) == 3
    assert bool(holds(bank.path, user.encode())) == (how == "replace")
    for own in (bank, reader, Bank(bank.path)):
        assert torch.equal(own["bob", "style"].tensors["v"], stays.tensors["v"])
        assert ((user, "style") in own) == (how == "replace")
    assert bank.verify() == []


def test_the_index_tells_nothing_after_thousands_of_changes(bank: Bank) -> None:
    """SQLite keeps copies of deleted rows in pages that were split, whatever `secure_delete` says."""
    users = [f"person-{number:05d}@example.org" for number in range(1500)]
    for start in range(0, 1500, 300):
        bank.update({(user, "style"): secret(number)[0] for number, user in enumerate(users[start : start + 300])})
        bank.forget(users[start : start + 300 : 2])
    bank.forget(users)
    assert len(bank) == 0
    assert holds(bank.path, b"@example.org", b"record-", b"secret text") == []


def test_an_unknown_key_deletes_nothing(bank: Bank) -> None:
    bank["ada", "style"] = state(1.0)
    with pytest.raises(UnknownUser, match=r"no state 'memory' for user 'ada', who has only 'style'"):
        bank.delete([("ada", "style"), ("ada", "memory")])
    with pytest.raises(UnknownUser):
        del bank["bob", "style"]
    assert list(bank) == [("ada", "style")]


def test_bytes_that_cannot_be_erased_are_reported_and_erased_later(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, patterns = secret(1)
    bank.update({("ada", "style"): gone, ("bob", "style"): state(2.0)})

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(bank._store.segments.__class__, "erase", refuse)
        with pytest.raises(SteerError, match=r"no longer in the index, .*could not be erased yet \(.*Input/output"):
            del bank["ada", "style"]
    assert ("ada", "style") not in bank
    assert holds(bank.path, *patterns) != []
    Bank(bank.path)
    assert holds(bank.path, *patterns) == []
    assert list(bank) == [("bob", "style")]


def test_what_a_killed_writer_left_is_erased_on_opening(bank: Bank) -> None:
    bank["bob", "style"] = state(2.0)
    left, patterns = secret(1)
    child = os.fork()
    if child == 0:
        try:
            # Dies after its bytes are in place, and before the commit.
            writing_module.Writer.put = lambda *_: os._exit(7)  # type: ignore[method-assign]
            Bank(bank.path)["ada", "style"] = left
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(holds(bank.path, *patterns)) == 3
    reopened = Bank(bank.path)
    assert holds(bank.path, *patterns) == []
    assert list(reopened) == [("bob", "style")]
    assert reopened.verify() == []


# Hashed ids


def test_a_hashed_bank_does_not_know_its_users(folder: Path) -> None:
    bank = Bank(folder / "hashed.bank", hashed=True)
    bank.update({("ada@example.org", "style"): state(1.0), ("bob@example.org", "style"): state(2.0)})
    assert holds(bank.path, b"example.org") == []
    again = Bank(bank.path)
    assert again.hashed
    assert float(again["bob@example.org", "style"].tensors["v"][0]) == 2
    assert ("carol@example.org", "style") not in again
    (first, _), _ = list(again)
    assert isinstance(first, UserHash)
    assert float(again[first, "style"].tensors["v"][0]) == 1
    assert [row.user for row in again.rows()] == [user for user, _ in again]
    # The digits alone are an id like any other.
    assert (str(first), "style") not in again
    assert again.forget([first]) == 1
    assert ("ada@example.org", "style") not in again


def test_two_banks_hash_the_same_user_differently(folder: Path) -> None:
    banks = [Bank(folder / name, hashed=True) for name in ("one", "two")]
    for bank in banks:
        bank["ada", "style"] = state(1.0)
    assert banks[0].users() != banks[1].users()
    with pytest.raises(SteerError, match="keeps only hashes of user ids"):
        banks[0].merge(banks[1])
    with pytest.raises(SteerError, match="only a bank that keeps hashes takes"):
        Bank(folder / "plain")[UserHash(banks[0].users()[0]), "style"]


def test_how_ids_are_kept_is_for_good(folder: Path) -> None:
    Bank(folder / "plain")["somebody", "style"] = state(1.0)
    with pytest.raises(SteerError, match="keeps user ids as they are; to change that, merge it into a new one"):
        Bank(folder / "plain", hashed=True)
    Bank(folder / "hashed", hashed=True).merge(Bank(folder / "plain"))
    assert float(Bank(folder / "hashed")["somebody", "style"].tensors["v"][0]) == 1
    assert holds(folder / "hashed", b"somebody") == []
    with pytest.raises(SteerError, match="keeps only hashes of user ids"):
        Bank(folder / "hashed", hashed=False)


# Gathering


def test_gathered_rows_are_those_of_the_states(bank: Bank) -> None:
    sizes = {"v": (5,), "keys": (2, 3), "n": ()}
    generator = np.random.default_rng(0)
    kept = {
        f"user-{number}": {name: generator.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
        for number in range(50)
    }
    source = Provenance("m", 1)
    bank.update(
        {
            (user, "memory"): UserState(
                source, {name: torch.from_numpy(np.array(own)) for name, own in tensors.items()}
            )
            for user, tensors in kept.items()
        }
    )
    gather = bank.gatherer("memory")
    batch = ["user-7", None, "user-49", "nobody", "user-7", "user-0"]
    rows = gather(batch)
    assert rows.found.tolist() == [True, False, True, False, True, True]
    for name, size in sizes.items():
        expected = np.stack([kept[user][name] if user in kept else np.zeros(size, np.float32) for user in batch])
        assert rows.tensors[name].dtype == torch.float32
        assert np.array_equal(rows.tensors[name].numpy(), expected)
    # The next batch does not change this one's.
    before = rows.tensors["v"].clone()
    gather(["user-1"] * 6)
    assert torch.equal(rows.tensors["v"], before)
    # Unless that is asked for.
    again = gather(["user-2", None], into=rows)
    assert again.packed.data_ptr() == rows.packed.data_ptr()
    assert np.array_equal(again.tensors["v"][0].numpy(), kept["user-2"]["v"])
    assert not again.tensors["v"][1].any()
    assert gather(["user-2"] * 7, into=rows).packed.data_ptr() != rows.packed.data_ptr()
    with pytest.raises(SteerError, match="into is on meta, and these rows are to be on cpu"):
        gather(["user-2"], into=replace(rows, packed=rows.packed.to("meta")))
    empty = gather([None, None])
    assert not empty.found.any()
    assert empty.tensors["keys"].shape == (2, 2, 3)


@pytest.mark.parametrize("dtypes", [[torch.int8, torch.float64, torch.float16], [torch.bool, torch.bfloat16]])
def test_tensors_of_several_dtypes_are_gathered(bank: Bank, dtypes: list[torch.dtype]) -> None:
    def make(number: int) -> dict[str, torch.Tensor]:
        return {str(dtype): torch.arange(number, number + 3).to(dtype) for dtype in dtypes}

    bank.update({(f"user-{number}", "x"): UserState(Provenance("m", 1), make(number)) for number in range(5)})
    rows = bank.gatherer("x")(["user-3", "user-0"])
    for name, tensor in rows.tensors.items():
        assert torch.equal(tensor, torch.stack([make(3)[name], make(0)[name]]))
        assert tensor.dtype == make(3)[name].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_order_of_tensors_does_not_matter(bank: Bank, folder: Path, dtype: torch.dtype) -> None:
    """A file has them in another order."""

    def make(number: int) -> UserState:
        v = torch.tensor(number)
        return UserState(Provenance("m", 1), {"z": torch.arange(3) + v, "n": v.to(dtype), "a": v.repeat(2, 2)})

    bank.update({(f"user-{number}", "x"): make(number) for number in range(6)})
    for number in (1, 4):
        state_files.write(folder / "x.safetensors", bank[f"user-{number}", "x"])
        turned = state_files.read(folder / "x.safetensors")
        assert isinstance(turned, UserState)
        assert list(turned.tensors) != list(make(number).tensors)
        bank[f"user-{number}", "x"] = turned
    batch = [4, 0, None, 1, 5, 4]
    rows = bank.gatherer("x")([None if number is None else f"user-{number}" for number in batch])
    for name in ("z", "n", "a"):
        expected = [make(number or 0).tensors[name] * (number is not None) for number in batch]
        assert torch.equal(rows.tensors[name], torch.stack(expected))


def test_states_that_make_no_batch_are_refused(bank: Bank) -> None:
    bank.update(
        {
            ("ada", "style"): state(1.0),
            ("bob", "style"): state(1.0, 9),
            ("dan", "style"): state(1.0, sites=("z[1]",)),
            ("eve", "style"): state(1.0, version=2),
            ("fay", "style"): state(1.0, model=Fingerprint("other", "long" * 1000, (1,))),
        }
    )
    gather = bank.gatherer("style")
    for user, told in [
        ("bob", r"tensors v float32 \[8\] and tensors v float32 \[9\]"),
        ("dan", r"sites \('embed',\) and sites \('z\[1\]',\)"),
        ("eve", "version 1 and version 2"),
        ("fay", r"model tiny \([0-9a-f]{10}\) and model other \([0-9a-f]{10}\)"),
    ]:
        with pytest.raises(SteerError, match=rf"do not fit into one batch: there are {told}. Use"):
            gather(["ada", user])
        assert gather([user]).found.all()
    with pytest.raises(SteerError, match="nobody has a state 'memory'"):
        bank.gatherer("memory")(["ada"])
    with pytest.raises(SteerError, match="cannot name a state"):
        bank.gatherer("no name")


def test_memory_does_not_grow_with_the_number_of_users(bank: Bank) -> None:
    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    gather, chance = bank.gatherer("style"), np.random.default_rng(0)
    used = []
    for count in (2_000, 20_000):
        for start in range(0, count, 2_000):
            bank.update({(f"user-{start + number}", "style"): state(1.0, 256) for number in range(2_000)})
        before = anonymous()
        for _ in range(50):
            gather([f"user-{number}" for number in chance.integers(0, count, 64)])
        used.append(anonymous() - before)
    # The ten times larger bank has 18 MB more of vectors.
    assert used[1] < used[0] + 3_000_000


# Compacting


@pytest.mark.usefixtures("small")
def test_compaction_packs_and_gives_back_space(bank: Bank) -> None:
    for number in range(200):
        bank[f"user-{number}", "style"] = state(float(number), text="x" * number)
    bank.forget(f"user-{number}" for number in range(0, 200, 3))
    order = list(bank)
    shares: list[float] = []
    done = bank.compact(shares.append)
    assert done.segments_after < done.segments_before
    assert done.nbytes_after < done.nbytes_before
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert list(bank) == order
    for reader in (bank, Bank(bank.path)):
        assert [float(reader[key].tensors["v"][0]) for key in order] == [n for n in range(200) if n % 3]
    assert bank.verify() == []
    again = bank.compact()
    assert again.segments_before == again.segments_after == done.segments_after
    bank["new", "style"] = state(7.0)
    assert bank.verify() == []


def test_an_empty_bank_is_compacted_to_no_segments(bank: Bank) -> None:
    bank["ada", "style"] = state(1.0)
    bank.forget(["ada"])
    assert bank.compact().segments_after == 0
    assert list((bank.path / "segments").iterdir()) == []
    bank["ada", "style"] = state(2.0)
    assert float(bank["ada", "style"].tensors["v"][0]) == 2


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
def test_readers_beside_a_writer_who_replaces_and_compacts(bank: Bank, processes: bool) -> None:
    users = [f"user-{number}" for number in range(30)]

    def write(round_: int) -> None:
        bank.update({(user, "style"): state(float(1000 * round_ + number)) for number, user in enumerate(users)})

    def read(own: Bank, rounds: int) -> set[int]:
        seen = set()
        gather = own.gatherer("style")
        for _ in range(rounds):
            for vectors in (
                gather(users).tensors["v"][:, 0],
                torch.stack([found.tensors["v"][0] for found in own.get_many(users, "style") if found]),
            ):
                (round_,) = set((vectors // 1000).tolist())
                assert torch.equal(vectors, 1000 * round_ + torch.arange(30.0))
                seen.add(int(round_))
            assert set(own.users()) - {"guest"} == set(users)
        return seen

    write(0)
    stop = threading.Event()
    failures: list[BaseException] = []
    if processes:
        children = [in_child(lambda: read(Bank(bank.path), 60)) for _ in range(2)]
    else:
        seen: list[set[int]] = []

        def reading(own: Bank) -> None:
            try:
                while not stop.is_set():
                    seen.append(read(own, 1))
            except BaseException as error:
                failures.append(error)

        readers = [threading.Thread(target=reading, args=(own,)) for own in (bank, bank, Bank(bank.path))]
        for reader in readers:
            reader.start()
    for round_ in range(1, 25):
        write(round_)
        if round_ % 3 == 0:
            bank.compact()
        if round_ % 8 == 0:
            bank.update({("guest", "style"): state(0.0)})
            bank.forget(["guest"])
    if processes:
        assert [succeeded(child) for child in children] == [True, True]
    else:
        stop.set()
        for reader in readers:
            reader.join()
        assert failures == []
        assert len(set.union(*seen)) > 2
    assert bank.verify() == []


# Merging and copying


def test_merging_goes_by_pages_and_takes_artifacts(folder: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.bank.bank._TOGETHER", 7)
    artifact = Artifact("style", 1, MODEL, {"population": torch.ones(4)})
    other = Bank(folder / "other.bank")
    digest = other.put_artifact(artifact)
    other.update({(f"user-{number}", "style"): state(float(number), artifact=digest) for number in range(20)})
    bank["user-3", "style"] = state(-1.0)
    before = list(bank)
    with pytest.raises(SteerError, match="both banks have a state 'style' of 'user-3'"):
        bank.merge(other)
    assert list(bank) == before
    assert bank.merge(other, conflict="keep") == 19
    assert float(bank["user-3", "style"].tensors["v"][0]) == -1
    shares: list[float] = []
    assert bank.merge(other, conflict="replace", on_progress=shares.append) == 20
    assert shares[-1] == 1
    assert [float(bank[f"user-{number}", "style"].tensors["v"][0]) for number in range(20)] == list(range(20))
    assert bank.artifact(digest).hash == digest
    assert len(other) == 20
    with pytest.raises(SteerError, match="not one of"):
        bank.merge(other, conflict="mine")  # type: ignore[arg-type]


def test_a_copy_is_packed_and_independent(folder: Path, bank: Bank) -> None:
    bank.update({("ada", "style"): state(1.0), ("bob", "style"): state(2.0)})
    copy = bank.copy(folder / "copy.bank")
    assert list(copy) == list(bank)
    assert copy.verify() == []
    bank.forget(["ada"])
    assert ("ada", "style") in copy
    with pytest.raises(SteerError, match="exists already"):
        bank.copy(folder / "copy.bank")
    assert sorted(path.name for path in folder.iterdir()) == ["copy.bank", "people.bank"]


def test_errors_name_the_place_that_was_given(folder: Path) -> None:
    def fail() -> None:
        with draft_folder(folder / "new.bank") as draft:
            draft.mkdir()
            raise Damage(f"{draft}/segments: damaged")

    with pytest.raises(Damage, match=f"^{folder}/new.bank/segments: damaged$"):
        fail()
    assert list(folder.iterdir()) == []


def test_a_bank_cannot_take_the_place_of_a_mounted_file_system(folder: Path) -> None:
    place = folder / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system")
    try:
        with pytest.raises(SteerError, match="mounted: a file system is mounted here"):
            Bank(place)
        with Bank(place / "people.bank") as bank:
            assert len(bank) == 0
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_hashed_bank_can_be_merged_into_its_copy(folder: Path) -> None:
    bank = Bank(folder / "hashed", hashed=True)
    bank["ada", "style"] = state(1.0)
    copy = bank.copy(folder / "copy")
    bank["bob", "style"] = state(2.0)
    assert copy.merge(bank, conflict="keep") == 1
    assert float(copy["bob", "style"].tensors["v"][0]) == 2


# Version 1


@pytest.mark.parametrize("hashed", [False, True])
def test_a_bank_of_version_1_is_migrated(folder: Path, hashed: bool) -> None:
    old = folder / "old.bank"
    shutil.copytree(VERSION_1, old)
    with pytest.raises(SteerError, match=r"version 1 .*reads version 2; `steer bank migrate .* NEW` makes a new one"):
        Bank(old)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    bank = migrate(old, folder / "new.bank", hashed=hashed)
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    assert bank.hashed == hashed
    assert len(bank) == 5
    if not hashed:
        assert list(bank) == [
            ("ada", "style"), ("bob", "style"), ("zoë", "style"), ("bob", "about"), ("zoë", "memory")
        ]  # fmt: skip
    ada, bob = bank["ada", "style"], bank["bob", "style"]
    assert ada.provenance.records == ("ada-3",)
    assert bob.provenance.records == ("bob-1", "bob-2")
    assert bob.provenance.model == MODEL
    assert bob.provenance.calibration == {"reference_norm": {"resid_post[2]": 2.5}}
    assert torch.equal(ada.tensors["resid_post[2]"], torch.full((4,), 9.0))
    assert torch.equal(bob.tensors["resid_post[2]"], torch.full((4,), 2.0))
    assert bank["bob", "about"].data["context"] == "I am a retired sailor."
    memory = bank["zoë", "memory"]
    assert torch.equal(memory.tensors["keys"], torch.ones(2, 3, dtype=torch.bfloat16))
    assert (int(memory.tensors["n"]), memory.data) == (7, {"k": [1, None]})
    assert torch.equal(bank.artifact(str(ada.provenance.artifact)).tensors["resid_post[2]"], torch.arange(4.0))
    assert bank.verify() == []


@pytest.mark.parametrize("file", ["segments/00000001-*", "index.sqlite", "artifacts/*"])
def test_a_damaged_bank_of_version_1_is_not_migrated(folder: Path, file: str) -> None:
    old = folder / "old.bank"
    shutil.copytree(VERSION_1, old)
    (path,) = old.glob(file)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[: len(content) // 2] if file == "index.sqlite" else content)
    with pytest.raises(SteerError, match="damaged"):
        migrate(old, folder / "new.bank")
    assert [path.name for path in folder.iterdir()] == ["old.bank"]


# The Hub


def test_a_bank_goes_to_a_folder_and_comes_back(folder: Path, bank: Bank) -> None:
    digest = bank.put_artifact(Artifact("style", 1, MODEL, {"population": torch.ones(4)}))
    bank.update({("ada", "style"): state(1.0, artifact=digest), ("bob", "style"): state(2.0)})
    hub.push(bank, folder / "pushed")
    (folder / "pushed" / "notes.txt").write_text("not part of a bank")
    pulled = hub.pull(folder / "pushed", folder / "pulled.bank")
    assert list(pulled) == list(bank)
    assert pulled.artifact(digest).hash == digest
    assert not (folder / "pulled.bank" / "notes.txt").exists()
    with pytest.raises(SteerError, match="exists already"):
        hub.push(bank, folder / "pushed")
    with pytest.raises(SteerError, match="exists already"):
        hub.pull(folder / "pushed", folder / "pulled.bank")


@pytest.mark.parametrize("how", ["bit", "trigger", "missing"])
def test_a_damaged_bank_is_not_pulled(folder: Path, bank: Bank, how: str) -> None:
    import sqlite3

    bank.update({("ada", "style"): state(1.0)})
    hub.push(bank, folder / "pushed")
    segment = max((folder / "pushed" / "segments").iterdir(), key=lambda path: path.stat().st_size)
    if how == "bit":
        content = bytearray(segment.read_bytes())
        content[4100] ^= 1
        segment.write_bytes(content)
    elif how == "missing":
        segment.unlink()
    else:
        with sqlite3.connect(folder / "pushed" / "index.sqlite") as index:
            index.execute("CREATE TRIGGER t AFTER DELETE ON entries BEGIN DELETE FROM entries; END")
    with pytest.raises(SteerError, match=r"damaged|not the index of a bank"):
        hub.pull(folder / "pushed", folder / "pulled.bank")
    assert not (folder / "pulled.bank").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_goes_to_the_hub(folder: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Hub: its client is replaced by one that keeps what it is given in a folder."""
    remote = folder / "remote"
    calls: list[dict[str, Any]] = []

    class Client:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append({"repo_id": repo_id, **options})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> None:
            calls.append({"repo_id": repo_id, **options})
            shutil.copytree(folder_path, remote)

    def download(repo_id: str, *, local_dir: Path, **patterns: Any) -> str:
        calls.append({"repo_id": repo_id, **patterns})
        there = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
        for path in filter_repo_objects(there, **patterns):
            (local_dir / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(remote / path, local_dir / path)
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)
        return str(local_dir)

    monkeypatch.setattr(hub, "HfApi", Client)
    monkeypatch.setattr(hub, "snapshot_download", download)
    # That its artifact is not there is no damage.
    bank.update({("ada", "style"): state(1.0, artifact="ab" * 32)})
    hub.push(bank, "hf://somebody/people")
    (remote / "README.md").touch()
    (remote / "segments" / "more").mkdir()
    (remote / "segments" / "more" / "x.safetensors").touch()
    pulled = hub.pull("hf://somebody/people", folder / "pulled.bank")
    assert list(pulled) == [("ada", "style")]
    assert [call["repo_id"] for call in calls] == ["somebody/people"] * 3
    assert calls[0]["private"]
    assert calls[1]["delete_patterns"] == calls[1]["allow_patterns"] == calls[2]["allow_patterns"]
    assert sorted(path.name for path in pulled.path.iterdir()) == [
        "artifacts", "commits", "index.sqlite", "manifest.json", "segments"
    ]  # fmt: skip
    assert all(path.is_file() for path in (pulled.path / "segments").iterdir())


def test_the_hub_cannot_be_reached(folder: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.setattr(hub.HfApi, "create_repo", refuse)
    with pytest.raises(SteerError, match="cannot be fetched from the Hub"):
        hub.pull("hf://somebody/people", folder / "pulled.bank")
    with pytest.raises(SteerError, match="did not take the bank"):
        hub.push(bank, "hf://somebody/people")
    assert [path.name for path in folder.iterdir()] == ["people.bank"]


def test_the_manifest_can_be_read_by_people(bank: Bank) -> None:
    manifest = json.loads((bank.path / "manifest.json").read_text())
    assert set(manifest) == {"format", "version", "created_by", "created", "users", "salt"}
    assert len(bytes.fromhex(manifest["salt"])) == 16
