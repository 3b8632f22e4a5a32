"""The wheel: what is in it, and that our `kernels` lives beside Hugging Face's package of that name."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# folder in the repository -> what it is installed as
FOLDERS = {
    "steer": "steer",
    "kernels": "steer/kernels",
    "encoders": "steer/encoders",
    "experiments": "steer/experiments",
}


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("wheel")
    # From a copy, since setuptools would take leftovers of earlier builds in the tree's build/ into the wheel.
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp / "tree" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.name in {"pyproject.toml", "README.md", "LICENSE"}:
            shutil.copy(file, tmp / "tree")
    run(sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp, tmp / "tree", cwd=tmp)
    (built,) = tmp.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    target = tmp_path_factory.mktemp("target")
    run(sys.executable, "-P", "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_every_module(wheel: Path) -> None:
    expected = {
        f"{installed}/{module.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for module in (ROOT / folder).rglob("*.py")
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert found == expected, "a package is missing from, or stale in, [tool.setuptools] packages in pyproject.toml"
    assert {f"{installed}/__init__.py" for installed in FOLDERS.values()} <= found


def test_wheel_holds_data_and_one_import_root(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"steer/py.typed", "steer/data/voices.jsonl"} <= names
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"steer"}


def test_kernels_of_the_wheel_and_of_hugging_face_coexist(target: Path, tmp_path: Path) -> None:
    code = """
import json
import kernels, steer, steer.kernels, transformers
transformers.LlamaForCausalLM
print(json.dumps({
    "kernels": kernels.__file__, "get_kernel": hasattr(kernels, "get_kernel"),
    "steer": steer.__file__, "steer.kernels": steer.kernels.__file__, "transformers": transformers.__file__,
}))
"""
    found = json.loads(run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()[-1])
    assert found["get_kernel"]
    assert Path(found["kernels"]).parent.parent == Path(found["transformers"]).parent.parent
    assert Path(found["steer"]) == target / "steer/__init__.py"
    assert Path(found["steer.kernels"]) == target / "steer/kernels/__init__.py"


def test_the_source_folder_says_that_it_is_not_the_package() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import steer"
    failed = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert "run `python -P`" in failed.stderr.splitlines()[-1]


def test_command_is_installed(target: Path, tmp_path: Path) -> None:
    helped = run(sys.executable, "-P", target / "bin" / "steer", "--help", cwd=tmp_path, PYTHONPATH=str(target))
    assert "demo" in helped


def test_tests_see_hugging_face_kernels() -> None:
    import kernels

    assert hasattr(kernels, "get_kernel")
    assert not Path(kernels.__file__).is_relative_to(ROOT / "kernels")
    assert importlib.metadata.packages_distributions()["kernels"] == ["kernels"]
    assert ROOT not in [Path(entry).resolve() for entry in sys.path], "the repository root must not be on sys.path"


def test_editable_install_resolves_our_kernels() -> None:
    import steer.kernels

    assert Path(steer.kernels.__file__).resolve() == ROOT / "kernels/__init__.py"
