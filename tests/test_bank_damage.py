"""Files of a bank are damaged at random: what is read is right, or there is one clear error."""

from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes import FAST, in_child, succeeded
from safetensors import safe_open
from safetensors.torch import load_file

from steer.bank import Bank
from steer.bank.layout import Layout
from steer.bank.upkeep import NoArtifact
from steer.errors import Damage, SteerError
from steer.interop import state_files
from steer.state import Artifact, Fingerprint, Provenance, UserState

MODEL = Fingerprint("tiny", '{"hidden_size": 4}', tuple(range(256)))
ARTIFACT = Artifact("style", 1, MODEL, {"population": torch.ones(16)})
KEYS = [(f"user-{number}", name) for number in range(40) for name in ("style", "memory")]


def state(number: int, name: str) -> UserState:
    source = Provenance(
        "style", 1, MODEL, ("resid_post[2]",) if name == "style" else ("resid_mid[1]",),
        ARTIFACT.hash, (f"r{number}",), {"number": number}, {"norm": 2.5},
    )  # fmt: skip
    return UserState(source, {"v": torch.full((16 + number % 3,), float(number))}, {"text": f"I am {number}."})


def expected(key: tuple[str, str]) -> UserState:
    user, name = key
    return state(int(user.partition("-")[2]) + (100 if name == "memory" else 0), name)


def is_same(found: UserState, wanted: UserState) -> bool:
    return (
        found.provenance == wanted.provenance
        and found.data == wanted.data
        and found.tensors.keys() == wanted.tensors.keys()
        and all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.tensors.items())
    )


@pytest.fixture(scope="module")
def whole() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        path = Path(folder) / "people.bank"
        with Bank(path) as bank:
            bank.put_artifact(ARTIFACT)
            for start in range(0, len(KEYS), 20):
                bank.update({key: expected(key) for key in KEYS[start : start + 20]})
            assert bank.verify() == []
        yield path


def damaged(whole: Path, target: Path, file: str, how: str, where: float, seed: int) -> None:
    shutil.copytree(whole, target)
    (path,) = target.glob(file)
    content, chance = bytearray(path.read_bytes()), random.Random(seed)
    # Most of a segment is not used; aim at what is.
    used = len(content.rstrip(b"\0")) + 64
    at = min(int(where * used), len(content) - 1)
    if how == "bit":
        content[at] ^= 1 << chance.randrange(8)
    elif how == "byte":
        content[at] = chance.choice([0, 1, 127, 128, 255])
    elif how == "stretch":
        end = min(at + chance.randrange(1, 200), len(content))
        content[at:end] = chance.randbytes(end - at)
    elif how == "page":
        start = at // 4096 * 4096
        content[start : start + 4096] = chance.randbytes(min(4096, len(content) - start))
    elif how == "swap":
        # Two pages in each other's place, each of them sound.
        one, other = sorted(chance.randrange(-(-len(content) // 4096)) * 4096 for _ in range(2))
        content[one : one + 4096], content[other : other + 4096] = (
            content[other : other + 4096],
            content[one : one + 4096],
        )
    else:
        del content[at:]
    path.write_bytes(content)


DAMAGE = {
    "file": st.sampled_from(
        ["index.sqlite"] * 4 + [f"segments/0000000{n}-*" for n in (1, 2)] * 2 + ["manifest.json", "artifacts/*"]
    ),
    "how": st.sampled_from(["bit", "byte", "stretch", "page", "swap", "cut"]),
    "where": st.floats(0, 1),
    "seed": st.integers(0, 10**6),
}


@pytest.mark.parametrize("examples", [40, pytest.param(200, marks=pytest.mark.full)])
def test_damage_is_an_error_and_never_somebody_elses_state(whole: Path, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(**DAMAGE)
    @example(file="index.sqlite", how="swap", where=0.0, seed=5)
    def survives(file: str, how: str, where: float, seed: int) -> None:
        _damage_is_told(whole, file, how, where, seed)

    survives()


def test_an_index_that_leads_to_somebody_elses_entry_is_damaged(whole: Path, tmp_path: Path) -> None:
    # SQLite, sent through a tree that is out of order, may come back with the entry beside the one it was asked for.
    target = tmp_path / "people.bank"
    shutil.copytree(whole, target)
    file = target / "index.sqlite"
    sound = file.read_bytes()
    with closing(sqlite3.connect(file)) as db:
        users = [row[0] for row in db.execute("SELECT DISTINCT user FROM entries")]
    for user in users:
        at = sound.find(user)
        while at >= 0:
            file.write_bytes(sound[: at + 3] + bytes([sound[at + 3] ^ 64]) + sound[at + 4 :])
            with suppress(SteerError):
                assert set(Bank(target, create=False)) == set(KEYS)
            at = sound.find(user, at + 1)


def _damage_is_told(whole: Path, file: str, how: str, where: float, seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        target = Path(folder) / "people.bank"
        damaged(whole, target, file, how, where, seed)
        try:
            bank = Bank(target, create=False)
        except SteerError:
            return
        wrong = 0
        for key in KEYS:
            try:
                assert is_same(bank[key], expected(key))
            except SteerError:
                wrong += 1
        for name in ("style", "memory"):
            try:
                rows = bank.gatherer(name)([KEYS[0][0], KEYS[6][0], None])
            except SteerError:
                continue
            for row, number in ((0, 0), (1, 3)):
                if rows.found[row]:
                    wanted = expected((f"user-{number}", name)).tensors["v"]
                    assert torch.equal(rows.tensors["v"][row], wanted)
        try:
            assert set(bank) == set(KEYS)
        except SteerError:
            wrong += 1
        for ask in (len, Bank.users, Bank.templates, lambda bank: list(bank.rows())):
            try:
                ask(bank)
            except SteerError:
                wrong += 1
        try:
            assert bank.artifact(ARTIFACT.hash).hash == ARTIFACT.hash
        except SteerError:
            wrong += 1
        faults = bank.verify()
        assert faults or not wrong
        told: list[Damage] = []
        with suppress(SteerError), bank.copy(Path(folder) / "saved.bank", on_damage=told.append) as saved:
            assert set(saved) == set(KEYS) or told
            assert all(isinstance(fault, NoArtifact) for fault in saved.verify())
        readable = [key for key in KEYS if _reads(bank, key)]
        for change in (
            lambda: bank.update({("new", "style"): state(7, "style"), KEYS[0]: expected(KEYS[0])}),
            lambda: bank.delete([KEYS[5]]),
            lambda: bank.compact(),
        ):
            with suppress(SteerError):
                change()
        # Whatever could be changed, the rest is as it was; but SQLite may lose its way in a damaged file of its own.
        sound = not any(fault.file.name == "index.sqlite" for fault in faults)
        for key in readable:
            assert _reads(bank, key) or not sound or key == KEYS[5], key
        bank.close()


def _reads(bank: Bank, key: tuple[str, str]) -> bool:
    try:
        found = bank[key]
    except SteerError:
        return False
    assert is_same(found, expected(key))
    return True


@pytest.mark.parametrize("file", ["segments/00000001-*", "segments/00000002-*", "index.sqlite"])
def test_what_is_sound_is_saved_into_a_new_bank(whole: Path, file: str) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        target, damages = Path(folder) / "people.bank", []
        shutil.copytree(whole, target)
        (path,) = target.glob(file)
        if file == "index.sqlite":
            # The tree by which places are found; the entries can still be read one after another.
            with sqlite3.connect(path) as index:
                index.execute("PRAGMA writable_schema = ON")
                index.execute("UPDATE sqlite_master SET rootpage = 2 WHERE name = 'sqlite_autoindex_entries_3'")
        else:
            content = bytearray(path.read_bytes())
            content[4100] ^= 1
            path.write_bytes(content)
        bank = Bank(target, create=False)
        assert bank.verify()
        with pytest.raises(SteerError, match="damaged"):
            bank.copy(Path(folder) / "strict.bank")
        assert not (Path(folder) / "strict.bank").exists()
        saved = bank.copy(Path(folder) / "saved.bank", on_damage=damages.append)
        assert saved.verify() == []
        lost = set(KEYS) - set(saved)
        assert len(lost) == (0 if file == "index.sqlite" else 1)
        assert len(damages) >= len(lost)
        assert all(_reads(saved, key) for key in set(KEYS) - lost)


@pytest.mark.parametrize("which", range(5))
def test_a_bit_of_a_users_hash_costs_nobody_unnoticed(whole: Path, which: int) -> None:
    """The hash of each user is in the index several times; SQLite leaves rows out whose copies do not agree."""
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        target, damages = Path(folder) / "people.bank", []
        shutil.copytree(whole, target)
        index = bytearray((target / "index.sqlite").read_bytes())
        user, _ = KEYS[3]
        with Bank(target, create=False) as bank:
            digest, names = bank._hash(user), [name for who, name in KEYS if who == user]
        places = [at for at in range(len(index)) if index.startswith(digest, at)]
        index[places[which * len(places) // 5]] ^= 0x80
        (target / "index.sqlite").write_bytes(index)
        with Bank(target, create=False) as bank:
            with suppress(SteerError):
                assert set(bank) == set(KEYS)
            with pytest.raises(SteerError, match="damaged"):
                bank.copy(Path(folder) / "strict.bank")
            with bank.copy(Path(folder) / "saved.bank", on_damage=damages.append) as saved:
                assert damages
                assert saved.verify() == []
                # No other state may be lost by it.
                assert {key for key in KEYS if key[0] != user} <= set(saved)
            with suppress(SteerError):
                assert bank.forget([user]) == len(names)


# Where one may not write, and where there is no room


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_read_only_bank_can_be_read(whole: Path) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        target = Path(folder) / "people.bank"
        shutil.copytree(whole, target)
        Path(folder).chmod(0o755)

        def work() -> None:
            give_up_writing(target)
            bank = Bank(target)
            assert all(_reads(bank, key) for key in KEYS)
            assert bank.gatherer("style")([KEYS[0][0]]).found.all()
            assert bank.verify() == []
            for change in (
                lambda: bank.update({("new", "style"): state(1, "style")}),
                lambda: bank.delete([KEYS[0]]),
                lambda: bank.forget([KEYS[0][0]]),
                lambda: bank.compact(),
                lambda: bank.put_artifact(Artifact("style", 1, MODEL, {"population": torch.zeros(16)})),
            ):
                with pytest.raises(SteerError, match=r"readonly|[Pp]ermission denied"):
                    change()
            assert all(_reads(bank, key) for key in KEYS)
            with pytest.raises(SteerError, match="could not be written"):
                Bank(Path(folder) / "new.bank")

        before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
        assert succeeded(in_child(work))
        assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
        for path in (target, *target.rglob("*")):
            path.chmod(0o755)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_a_killed_writer_left_is_told_where_one_may_not_erase_it(whole: Path) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        target = Path(folder) / "people.bank"
        shutil.copytree(whole, target)
        Path(folder).chmod(0o755)
        file = max((target / "segments").iterdir())
        content = bytearray(file.read_bytes())
        content[-3] = 7
        file.write_bytes(content)

        def work() -> None:
            give_up_writing(target)
            (fault,) = Bank(target).verify()
            assert fault.file == file
            assert "holds bytes that belong to no state, and they cannot be erased" in str(fault)

        assert succeeded(in_child(work))
        for path in (target, *target.rglob("*")):
            path.chmod(0o755)
        assert Bank(target).verify() == []


def give_up_writing(target: Path) -> None:
    """From here on this process may not write to a folder."""
    if os.getuid() == 0:
        # Root may write anywhere.
        os.setuid(65534)
    else:
        for path in (target, *target.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_full_disk_costs_nothing(whole: Path) -> None:
    """Files may not grow beyond a limit in the process that writes, so that every write fails at some point."""
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        target = Path(folder) / "people.bank"
        shutil.copytree(whole, target)
        secret = "a text that is not to stay"

        def work() -> None:
            bank = Bank(target)
            failures = 0
            for kilobytes in range(8, 400, 8):
                resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, resource.RLIM_INFINITY))
                many = {(f"new-{number}", "style"): state(number, "style") for number in range(60)}
                text = UserState(Provenance("cos", 1), data={"context": secret})
                long = UserState(Provenance("m", 1), {"v": torch.ones(20_000)})
                told = ""
                try:
                    bank.update(many | {("new", "text"): text, ("new", "long"): long})
                except SteerError as error:
                    told = str(error)
                failures += bool(told)
                assert told == "" or "could not be written to" in told or "the index of the bank cannot be used" in told
                assert (("new", "text") in bank) == (told == "")
                if not told:
                    bank.delete([("new", "text"), ("new", "long"), *many])
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                assert all(_reads(bank, key) for key in KEYS)
                bank["other", "style"] = state(5, "style")
                assert not any(secret.encode() in path.read_bytes() for path in target.rglob("*") if path.is_file())
            assert failures > 5
            assert bank.verify() == []

        assert succeeded(in_child(work))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_files_of_tensors_that_find_no_room(whole: Path, tmp_path: Path) -> None:
    large = Artifact("style", 1, MODEL, {"population": torch.ones(100_000)})

    def work() -> None:
        bank = Bank(whole)
        before = sorted(path.name for path in (whole / "artifacts").iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(SteerError, match=rf"{large.hash}.safetensors: could not be written \(File too large\)"):
            bank.put_artifact(large)
        assert sorted(path.name for path in (whole / "artifacts").iterdir()) == before
        with pytest.raises(SteerError, match=r"ada.safetensors: could not be written \(File too large\)"):
            state_files.write(tmp_path / "ada.safetensors", UserState(Provenance("m", 1), dict(large.tensors)))
        assert list(tmp_path.iterdir()) == []

    assert succeeded(in_child(work))


def test_a_full_file_system_costs_nothing(whole: Path) -> None:
    """A file system of one megabyte, for those who may mount one."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("only root can mount a file system")
        try:
            target, other = Path(folder) / "people.bank", Path(folder) / "other"
            shutil.copytree(whole, target)
            other.write_bytes(bytes(200_000))
            bank = Bank(target)
            stored = 0

            def fill() -> None:
                nonlocal stored
                for stored in range(1000):
                    bank[f"new-{stored}", "style"] = UserState(Provenance("m", 1), {"v": torch.full((2000,), 1.0)})

            with pytest.raises(SteerError, match=r"No space left|disk is full"):
                fill()
            assert stored > 20
            assert all(_reads(bank, key) for key in KEYS)
            assert [(f"new-{number}", "style") in bank for number in (0, stored - 1, stored)] == [True, True, False]
            # Some room is needed to begin with.
            other.unlink()
            bank.forget(f"new-{number}" for number in range(stored))
            bank.compact()
            assert bank.verify() == []
            bank["new-0", "style"] = UserState(Provenance("m", 1), {"v": torch.full((2000,), 1.0)})
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 0),
        struct.pack("<Q", 4088) + b"[" * 4088,
        struct.pack("<Q", 4088) + b'{"values":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,399999999996]}}',
        struct.pack("<Q", 4088) + b'{"values":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}',
        struct.pack("<Q", 4088) + b'{"values":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
    ],
)
def test_a_hostile_header_is_never_parsed(whole: Path, header: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        target = Path(folder) / "people.bank"
        shutil.copytree(whole, target)
        for path in (target / "segments").iterdir():
            content = path.read_bytes()
            path.write_bytes(header.ljust(4096)[:4096] + content[4096:])
        bank = Bank(target)
        for key in KEYS:
            with pytest.raises(SteerError, match="its header is not that of a segment"):
                bank[key]
        faults = bank.verify()
        assert len({fault.file for fault in faults}) == len(list((target / "segments").iterdir()))


def test_segments_are_safetensors_files(whole: Path) -> None:
    """The library itself reads what we write, header and all."""
    values = torch.cat([load_file(path)["values"].float() for path in (whole / "segments").iterdir()])
    for key in KEYS:
        assert torch.isin(expected(key).tensors["v"], values).all()
    with safe_open(next((whole / "segments").iterdir()), "pt") as opened:
        assert opened.metadata() == {"format": "steer-bank"}


@pytest.mark.parametrize(
    "text",
    ["", "3", "[[1]]", '[["v", "f32", [1]]]', '[["v", "bool", [-1]]]', '[["v", "bool", [1]], ["v", "bool", [2]]]'],
)
def test_what_is_no_layout_is_damage(text: str) -> None:
    with pytest.raises(Damage, match="is not the layout of a state"):
        Layout.from_json(text)
