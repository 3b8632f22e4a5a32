"""The bank beside plain SQLite, LMDB and one file per user: what it costs to keep many users' vectors on disk.

    python -P benchmarks/bank.py --users 10000 1000000 --widths 576 4096

needs Linux and `pip install lmdb matplotlib`; a store whose package is not there is left out, and the file says why.
Every user has one float32 vector, and every store gives back the same: a tensor `[user, width]` of a batch of users, in
their order. Each batch that is timed is compared with what was stored, outside of the time. README.md in this folder
says how each store is used and what the figures are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out
import harness
import source_tree

source_tree.use()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from safetensors.torch import load, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

import steer  # noqa: E402
from steer.view.figures import DPI, new_figure  # noqa: E402

try:
    import lmdb
except ImportError as error:
    lmdb, MISSING = None, {"lmdb": str(error)}
else:
    MISSING = {}

COMMIT = 10_000
NAME, SITE = "style", "resid_post[14]"
PROVENANCE = steer.Provenance(
    method="style_vector", version=1, sites=(SITE,), calibration={"reference_norm": {SITE: 201.25}}
)
# What is left free on the disk.
RESERVE = 4 << 30
CACHES = Path("/proc/sys/vm/drop_caches")
STDERR = Console(stderr=True)


class WrongRow(Exception):
    """A store gave back something else than was stored."""


# What is stored: it follows from the numbers of the users, so that nobody has to remember it.


def user(number: int) -> str:
    """An id; those of consecutive users are in no order, as those of real ones are not."""
    return blake2b(number.to_bytes(8, "big"), digest_size=8).hexdigest()


def expected(numbers: Sequence[int], width: int) -> Tensor:
    """The users' vectors `[user, width]`."""
    vectors = np.empty((len(numbers), width), np.float32)
    for row, number in zip(vectors, numbers, strict=True):
        np.random.default_rng((width, number)).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(vectors)


def draw(seed: int, users: int, batch: int, count: int) -> list[list[int]]:
    """Batches of different users."""
    random_ = random.Random(seed)
    return [random_.sample(range(users), batch) for _ in range(count)]


# How it is stored.


class Store(ABC):
    """A float32 vector for each user, in files of a folder."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.width = width

    @abstractmethod
    def create(self) -> None:
        """Opens an empty store for writing."""

    def prepared(self, users: Sequence[str], vectors: Tensor) -> Any:
        """What `put` takes: the objects of those who use the store. Not timed."""
        return users, vectors

    @abstractmethod
    def put(self, prepared: Any) -> None:
        """Stores users and their vectors in one commit."""

    @abstractmethod
    def open(self) -> None:
        """Opens the store for reading."""

    @abstractmethod
    def gather(self, users: Sequence[str]) -> Any:
        """The users' vectors, in order."""

    def tensor(self, gathered: Any) -> Tensor:
        """The vectors as a tensor `[user, width]`. Not timed."""
        return gathered

    @abstractmethod
    def close(self) -> None:
        """Lets go of the files."""


class Steer(Store):
    """The tensors alone, as for those who bind them themselves."""

    def create(self) -> None:
        self._bank = steer.Bank(self.folder)

    def prepared(self, users: Sequence[str], vectors: Tensor) -> Any:
        return {
            (user, NAME): steer.UserState(PROVENANCE, {SITE: row}) for user, row in zip(users, vectors, strict=True)
        }

    def put(self, prepared: Any) -> None:
        self._bank.update(prepared)

    def open(self) -> None:
        self._bank = steer.Bank(self.folder, create=False)
        self._gather = self._bank.gatherer(NAME)

    def gather(self, users: Sequence[str]) -> Any:
        return self._gather(users).tensors[SITE]

    def close(self) -> None:
        self._bank.close()


class SteerStates(Steer):
    """Whole states, with all that describes them."""

    def gather(self, users: Sequence[str]) -> Any:
        return self._bank.get_many(users, NAME)

    def tensor(self, gathered: Any) -> Tensor:
        return torch.stack([state.tensors[SITE] for state in gathered])


class Sqlite(Store):
    """One table. Of the page sizes from 4 to 64 KiB, with row ids and without, the best for both widths."""

    @property
    def _file(self) -> Path:
        return self.folder / "vectors.sqlite"

    def create(self) -> None:
        self.folder.mkdir()
        self._db = sqlite3.connect(self._file, isolation_level=None)
        self._db.execute("PRAGMA page_size = 16384")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("CREATE TABLE vectors (user TEXT PRIMARY KEY, vector BLOB NOT NULL)")

    def put(self, prepared: Any) -> None:
        users, vectors = prepared
        # In the order of the keys, which is faster.
        rows = sorted((user, row.tobytes()) for user, row in zip(users, vectors.numpy(), strict=True))
        self._db.execute("BEGIN")
        self._db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
        self._db.execute("COMMIT")

    def open(self) -> None:
        self._db = sqlite3.connect(f"{self._file.as_uri()}?mode=ro", uri=True, isolation_level=None)

    def gather(self, users: Sequence[str]) -> Any:
        vectors = torch.empty(len(users), self.width)
        memory, query = vectors.numpy(), "SELECT vector FROM vectors WHERE user = ?"
        self._db.execute("BEGIN")
        # Faster than one query with IN.
        for row, user in enumerate(users):
            memory[row] = np.frombuffer(self._db.execute(query, (user,)).fetchone()[0], np.float32)
        self._db.execute("COMMIT")
        return vectors

    def close(self) -> None:
        self._db.close()


class MappedSqlite(Sqlite):
    """The same read through a mapping, of as much as SQLite was built to map, usually 2 GiB."""

    def open(self) -> None:
        super().open()
        self._db.execute(f"PRAGMA mmap_size = {1 << 40}")


class Lmdb(Store):
    """The main database of an environment, its vectors copied straight from the mapping."""

    def create(self) -> None:
        self._environment = lmdb.open(str(self.folder), map_size=1 << 40)

    def put(self, prepared: Any) -> None:
        users, vectors = prepared
        # In the order of the keys, which is faster.
        rows = sorted((user.encode(), row.tobytes()) for user, row in zip(users, vectors.numpy(), strict=True))
        with self._environment.begin(write=True) as transaction:
            transaction.cursor().putmulti(rows)

    def open(self) -> None:
        # Without it a page that is not in memory brings all that the system reads ahead, here megabytes.
        self._environment = lmdb.open(str(self.folder), readonly=True, readahead=False)

    def gather(self, users: Sequence[str]) -> Any:
        vectors = torch.empty(len(users), self.width)
        memory = vectors.numpy()
        with self._environment.begin(buffers=True) as transaction:
            for row, user in enumerate(users):
                memory[row] = np.frombuffer(transaction.get(user.encode()), np.float32)
        return vectors

    def close(self) -> None:
        self._environment.close()


class Files(Store):
    """A safetensors file for each user, in 256 folders. Nothing waits until they are on the disk."""

    def _file(self, user: str) -> str:
        return f"{self.folder}/{zlib.crc32(user.encode()) & 255:02x}/{user}.safetensors"

    def create(self) -> None:
        for number in range(256):
            (self.folder / f"{number:02x}").mkdir(parents=True)

    def put(self, prepared: Any) -> None:
        for user, row in zip(*prepared, strict=True):
            save_file({SITE: row}, self._file(user))

    def open(self) -> None:
        pass

    def gather(self, users: Sequence[str]) -> Any:
        vectors = torch.empty(len(users), self.width)
        for row, user in enumerate(users):
            # Faster than `load_file` and `safe_open`, which map the file.
            with open(self._file(user), "rb") as file:
                vectors[row] = load(file.read())[SITE]
        return vectors

    def close(self) -> None:
        pass


# What wrote the store, and what reads it.
WAYS: dict[str, tuple[str, type[Store]]] = {
    "steer": ("steer", Steer),
    "steer get_many": ("steer", SteerStates),
    "sqlite": ("sqlite", Sqlite),
    "sqlite mmap": ("sqlite", MappedSqlite),
    "lmdb": ("lmdb", Lmdb),
    "files": ("files", Files),
}
STORES = {way: store for way, (name, store) in WAYS.items() if way == name}


def reader(way: str, folder: Path, width: int) -> Store:
    """What reads the stores of a folder in one of the ways."""
    name, store = WAYS[way]
    return store(folder / name, width)


def check(way: str, numbers: Sequence[int], found: Tensor, width: int) -> None:
    """Raises WrongRow unless these are the users' vectors."""
    right = expected(numbers, width)
    if found.dtype != right.dtype or found.shape != right.shape:
        raise WrongRow(f"{way}: gave {found.dtype} {list(found.shape)}")
    for number, same in zip(numbers, (found == right).all(dim=1).tolist(), strict=True):
        if not same:
            raise WrongRow(
                f"{way}: gave user {number}, {user(number)}, another vector of width {width} than was stored"
            )


# What is measured.


def build(name: str, folder: Path, users: int, width: int) -> dict[str, Any]:
    """Fills a new store; how long that took, and how large it is."""
    store, seconds = STORES[name](folder / name, width), []
    start = time.perf_counter()
    store.create()
    created = time.perf_counter() - start
    steps = range(0, users, COMMIT)
    for first in track(steps, f"{users:,} × {width}: {name}", console=STDERR, transient=True):
        numbers = range(first, min(first + COMMIT, users))
        prepared = store.prepared([user(number) for number in numbers], expected(numbers, width))
        start = time.perf_counter()
        store.put(prepared)
        seconds.append(time.perf_counter() - start)
    store.close()
    start = time.perf_counter()
    os.sync()
    synced = time.perf_counter() - start
    last = max(len(seconds) // 10, 1)
    return {
        "insert": {
            "users per second": users / sum(seconds),
            "users per second, the last tenth": (users - steps[-last]) / sum(seconds[-last:]),
            "seconds": sum(seconds),
            "seconds to create": created,
            "seconds until all is on the disk": synced,
        },
        "size": size(folder / name, users * width * 4),
    }


def size(folder: Path, payload: int) -> dict[str, float]:
    """Bytes of a folder's files as they say, and as the disk keeps them, its folders included."""
    apparent = allocated = files = 0
    for parent, _, names in os.walk(folder):
        allocated += os.stat(parent).st_blocks * 512
        for name in names:
            status = os.stat(os.path.join(parent, name))
            apparent, allocated, files = apparent + status.st_size, allocated + status.st_blocks * 512, files + 1
    return {"files": files, "apparent": apparent, "allocated": allocated, "allocated / vectors": allocated / payload}


def warm(ways: Sequence[str], folder: Path, users: int, width: int, settings: argparse.Namespace) -> dict[str, Any]:
    """Batches whose vectors are in the page cache, as all ways have read them before; another batch every time."""
    batches = draw(1, users, settings.batch, settings.rounds + 1)
    stores = {way: reader(way, folder, width) for way in ways}
    for store in stores.values():
        store.open()
    for numbers in track(batches, f"{users:,} × {width}: checking", console=STDERR, transient=True):
        for way, store in stores.items():
            check(way, numbers, store.tensor(store.gather([user(number) for number in numbers])), width)
    asked = [[user(number) for number in numbers] for numbers in batches]

    def next_batch(store: Store, batches: Iterator[list[str]]) -> None:
        store.gather(next(batches))

    seconds = harness.in_turn(
        {way: partial(next_batch, store, iter(asked)) for way, store in stores.items()}, settings.rounds
    )
    for store in stores.values():
        store.close()
    return {
        way: {
            "median ms": 1e3 * statistics.median(each),
            "p99 ms": 1e3 * float(np.quantile(each, 0.99)),
            "batches": len(each),
        }
        for way, each in seconds.items()
    }


def cold(ways: Sequence[str], folder: Path, users: int, width: int, settings: argparse.Namespace) -> dict[str, Any]:
    """One batch each after the page cache was dropped and the store was opened anew, in a process that is warm."""
    opened: dict[str, list[float]] = {way: [] for way in ways}
    gathered: dict[str, list[float]] = {way: [] for way in ways}
    batches = draw(2, users, settings.batch, settings.drops)
    for numbers in track(batches, f"{users:,} × {width}: cold", console=STDERR, transient=True):
        asked = [user(number) for number in numbers]
        for way in ways:
            store = reader(way, folder, width)
            how = drop(store.folder)
            start = time.perf_counter()
            store.open()
            middle = time.perf_counter()
            found = store.gather(asked)
            end = time.perf_counter()
            store.close()
            check(way, numbers, store.tensor(found), width)
            opened[way].append(1e3 * (middle - start))
            gathered[way].append(1e3 * (end - middle))
    return {
        way: {
            "median ms": statistics.median(gathered[way]),
            "median ms to open": statistics.median(opened[way]),
            "ms": gathered[way],
            "dropped by": how,
        }
        for way in ways
    }


def drop(folder: Path) -> str:
    """Drops the page cache, or what it holds of a folder where one may not; says how."""
    try:
        with CACHES.open("w") as caches:
            os.sync()
            caches.write("1\n")
        return "drop_caches"
    except OSError:
        for file in folder.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        return "posix_fadvise"


def fresh(ways: Sequence[str], folder: Path, users: int, width: int, settings: argparse.Namespace) -> dict[str, Any]:
    """What new processes need to open a store and gather batches that are in the page cache; medians."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    steps = range(settings.processes)
    for _ in track(steps, f"{users:,} × {width}: processes", console=STDERR, transient=True):
        for way in ways:
            job = {"way": way, "folder": str(folder), "users": users, "width": width}
            job |= {"batch": settings.batch, "batches": settings.batches, "threads": settings.threads}
            found[way].append(in_new_process(job))
    return {
        way: {key: statistics.median(one[key] for one in each) for key in each[0]} | {"processes": len(each)}
        for way, each in found.items()
    }


def in_new_process(job: Mapping[str, Any]) -> dict[str, float]:
    """Lets a new process do the work."""
    command = [sys.executable, "-P", __file__, "--worker", json.dumps(job)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def work(job: Mapping[str, Any]) -> dict[str, float]:
    """Opens a store and gathers batches, in a process that has imported everything and touched nothing."""
    torch.set_num_threads(job["threads"])
    batches = draw(1, job["users"], job["batch"], job["batches"])
    asked = [[user(number) for number in numbers] for numbers in batches]
    store = reader(job["way"], Path(job["folder"]), job["width"])
    before = memory()
    start = time.perf_counter()
    store.open()
    opened = time.perf_counter()
    found = store.gather(asked[0])
    first = time.perf_counter()
    samples, seconds = [memory()], []
    for users in asked[1:]:
        begin = time.perf_counter()
        found = store.gather(users)
        seconds.append(time.perf_counter() - begin)
        samples.append(memory())
    after = samples[-1]
    store.close()
    check(job["way"], batches[-1], store.tensor(found), job["width"])
    return {
        "ms to open": 1e3 * (opened - start),
        "ms to open and gather": 1e3 * (first - start),
        "ms to gather": 1e3 * statistics.median(seconds),
        "anonymous MiB": after["RssAnon"] - before["RssAnon"],
        "anonymous MiB, peak": max(sample["RssAnon"] for sample in samples) - before["RssAnon"],
        "mapped MiB": after["RssFile"] - before["RssFile"],
    }


def memory() -> dict[str, float]:
    """MiB of this process that are in memory: its own, and of files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {key: int(found[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile")}


def most_bytes(users: int, width: int) -> int:
    """More than any store takes: pages that are half empty, an index, a file's own block."""
    return users * (8192 + int(1.3 * 4 * width))


def measure(names: Sequence[str], users: int, width: int, settings: argparse.Namespace) -> dict[str, Any]:
    """One number of users and one width: all stores in turn, or one after another where the disk cannot hold all."""
    free, need = shutil.disk_usage(settings.folder).free - RESERVE, most_bytes(users, width)
    case: dict[str, Any] = {"users": users, "width": width, "bytes of vectors": users * width * 4}
    if free < need:
        return case | {"left out": f"a store may take {need >> 20:,} MiB, and {max(free, 0) >> 20:,} are free"}
    together = free >= need * len(names)
    stores: dict[str, Any] = {}
    for group in [names] if together else [[name] for name in names]:
        with tempfile.TemporaryDirectory(prefix="steer-bank-", dir=settings.folder) as temporary:
            folder = Path(temporary)
            ways = [way for way, (name, _) in WAYS.items() if name in group]
            stores |= {way: {} for way in ways} | {name: build(name, folder, users, width) for name in group}
            for key, figures in (("warm", warm), ("fresh", fresh), ("cold", cold)):
                for way, each in figures(ways, folder, users, width, settings).items():
                    stores[way][key] = each
    return case | {"interleaved": together, "stores": stores}


def facts(folder: Path) -> dict[str, Any]:
    """What the figures depend on, beside what all benchmarks tell."""
    packages = ("numpy", "safetensors", *(["lmdb"] if lmdb else []))
    status = folder.stat()
    ahead = Path(f"/sys/dev/block/{os.major(status.st_dev)}:{os.minor(status.st_dev)}/queue/read_ahead_kb")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "versions": {name: version(name) for name in packages} | {"sqlite": sqlite3.sqlite_version},
        "memory": pages,
        "file system": file_system(folder),
        "read ahead, KiB": int(ahead.read_text()) if ahead.is_file() else None,
    }


def file_system(folder: Path) -> str:
    """The kind of file system that a folder lies on."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(place, kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(above, key=lambda mount: len(mount[0]))[1]


# What is shown.


def table(case: Mapping[str, Any]) -> Iterator[str]:
    """A case in lines."""
    yield f"{case['users']:,} users × {case['width']}: {case.get('left out', '')}"
    for way, found in case.get("stores", {}).items():
        insert, size_ = found.get("insert"), found.get("size")
        built = f"{insert['users per second']:9,.0f} users/s {size_['allocated'] / 2**20:9,.1f} MiB" if insert else ""
        yield (
            f"{way:15} {built:34} warm {found['warm']['median ms']:7.3f} p99 {found['warm']['p99 ms']:7.3f} "
            f"alone {found['fresh']['ms to gather']:7.3f} ms  "
            f"cold {found['cold']['median ms']:8.1f} ms  open {found['fresh']['ms to open']:7.2f} ms  "
            f"memory {found['fresh']['anonymous MiB']:6.2f} MiB"
        )


# Title, unit, whether the axis is logarithmic, and the figures: of the line, and of the ends of its whiskers.
PANELS = (
    ("gather, warm", "ms, median and 99th percentile", True, ("warm", "median ms"), ("warm", "p99 ms")),
    ("gather, cold", "ms, median", True, ("cold", "median ms"), None),
    ("insert", "users per second", True, ("insert", "users per second"), None),
    ("on disk", "bytes, over those of the vectors", False, ("size", "allocated / vectors"), None),
    ("anonymous memory", "MiB", False, ("fresh", "anonymous MiB"), None),
)
LOOKS = {
    "steer": ("#b2182b", "o", "-"),
    "steer get_many": ("#b2182b", "o", ":"),
    "sqlite": ("#2166ac", "s", "-"),
    "sqlite mmap": ("#2166ac", "s", ":"),
    "lmdb": ("#4d9221", "^", "-"),
    "files": ("#7f7f7f", "D", "-"),
}


def draw_figure(result: Mapping[str, Any], target: Path) -> None:
    """A row of panels for each width, over the number of users."""
    from matplotlib.ticker import LogLocator

    figure = new_figure(3.1 * len(PANELS), 0.9 + 2.7 * len({case["width"] for case in result["cases"]}))
    cases = [case for case in result["cases"] if "stores" in case]
    users, widths = (sorted({case[key] for case in cases}) for key in ("users", "width"))
    panels = figure.subplots(len(widths), len(PANELS), squeeze=False, sharex=True)
    for (i, width), (j, (title, unit, logarithmic, line, whisker)) in product(enumerate(widths), enumerate(PANELS)):
        axes = panels[i, j]
        for shift, (way, (colour, marker, style)) in enumerate(LOOKS.items()):
            found = [(case["users"], case["stores"].get(way, {})) for case in cases if case["width"] == width]
            found = [(n, each) for n, each in found if line[0] in each]
            # Beside each other, so that nothing hides what is the same.
            places = [n * 1.15 ** (shift - (len(LOOKS) - 1) / 2) for n, _ in found]
            values = [each[line[0]][line[1]] for _, each in found]
            if found:
                face = colour if style == "-" else "white"
                axes.plot(places, values, style, color=colour, marker=marker, mfc=face, markersize=5, label=way)
            if whisker:
                ends = [each[whisker[0]][whisker[1]] for _, each in found]
                axes.vlines(places, values, ends, color=colour, alpha=0.5)
        axes.set_xscale("log")
        axes.set_xlim(users[0] / 2.5, users[-1] * 2.5)
        axes.set_xticks(users, [f"{n:,}" for n in users])
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        else:
            axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.minorticks_off()
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_title(f"{title}, width {width}", fontsize=10, loc="left")
        if i == len(widths) - 1:
            axes.set_xlabel("users", fontsize=8)
    lines = {line.get_label(): line for line in panels[0, 0].lines}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=len(lines), frameon=False)
    figure.suptitle(f"{result['batch']} random users at once, one float32 vector each", fontsize=11)
    figure.savefig(target, dpi=DPI)


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    if arguments.draw:
        draw_figure(json.loads(arguments.draw.read_text()), arguments.figure)
        return
    # So that temporary folders go then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(arguments.threads)
    names = [name for name in arguments.stores if name not in MISSING]
    for name in set(arguments.stores) - set(names):
        print(f"{name} is left out: {MISSING[name]}", file=sys.stderr)
    load_ = [os.getloadavg()]
    cases: list[dict[str, Any]] = []
    for users in arguments.users:
        for width in arguments.widths:
            cases.append(measure(names, users, width, arguments))
            print(*table(cases[-1]), sep="\n", flush=True)
            result = {
                **facts(arguments.folder),
                "missing": MISSING,
                "batch": arguments.batch,
                "load average before and after": [*load_, os.getloadavg()],
                "cases": cases,
            }
            harness.write(arguments.json, result)
    if arguments.figure:
        draw_figure(result, arguments.figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[10_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 4096])
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=300, help="batches that are timed warm")
    parser.add_argument("--drops", type=int, default=10, help="batches that are timed cold")
    parser.add_argument("--processes", type=int, default=3, help="new processes for each store")
    parser.add_argument("--batches", type=int, default=200, help="that each of them gathers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the stores are made")
    parser.add_argument("--json", type=Path, default=harness.RESULTS / "bank-cpu.json")
    parser.add_argument("--figure", type=Path, help="a picture of the figures")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="measure nothing and draw the figure of this result")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
