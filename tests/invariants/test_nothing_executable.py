"""What is loaded cannot run code, and a state finds only the model that it was made for."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, WIDTH, tiny, tokenizer

import steer
import steer.encoders
import steer.experiments
import steer.kernels
from steer.state import Fingerprint, Provenance

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "eval", "exec", "compile", "__import__"}


def sources() -> list[Path]:
    packages = (steer, steer.kernels, steer.encoders, steer.experiments)
    # An editable installation may consist of links.
    walks = [os.walk(Path(package.__file__ or "").parent, followlinks=True) for package in packages]
    found = {Path(folder, file) for walk in walks for folder, _, files in walk for file in files}
    return sorted(path for path in found if path.suffix == ".py")


# Loading with torch's restricted unpickler, which takes tensors and plain containers only, and one file that does it.
RESTRICTED = "torch.load(weights_only=True)"
READS_PT = Path(steer.__file__).parent / "interop" / "vector_files.py"


def weights_only(call: ast.Call) -> bool:
    """Whether the call says so itself, so that nothing can say otherwise; other arguments say what to run."""
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return len(call.args) == 1 and said == {"map_location": "'cpu'", "weights_only": "True"}


def findings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            yield node.module or ""
        elif isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in FORBIDDEN_CALLS:
            yield RESTRICTED if called == "torch.load" and weights_only(node) else called
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            yield node.arg


def test_the_source_has_nothing_that_runs_what_it_loads() -> None:
    paths = sources()
    assert len(paths) > 30
    found = {path: found for path in paths if (found := list(findings(path.read_text(encoding="utf-8"))))}
    assert found == {READS_PT: [RESTRICTED]}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, map_location='cpu', weights_only=False)",
        "torch.load(path, map_location='cpu', weights_only=flag)",
        "torch.load(path, map_location='cpu', **{'weights_only': True})",
        "torch.load(path, map_location='cpu', weights_only=True, pickle_module=module)",
        "eval(text)",
        "f(x, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    found = list(findings(source))
    assert len(found) == 1
    assert found != [RESTRICTED]


def fingerprint(name: str, seed: int = 0, *dtypes: torch.dtype) -> Fingerprint:
    model = tiny(name, seed=seed)
    for dtype in dtypes:
        model = model.to(dtype)
    with steer.wrap(model) as lm:
        return lm.fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_fingerprint_is_the_same_in_every_dtype(arch: str, dtype: torch.dtype) -> None:
    if arch == "llama_int8":
        pytest.skip("quantized weights keep their dtype")
    assert fingerprint(arch, 0, dtype) == fingerprint(arch)
    assert fingerprint(arch, 0, dtype, torch.float32) == fingerprint(arch)


def test_a_fingerprint_survives_storage(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with steer.load(str(tmp_path), device="cpu", dtype=dtype) as lm:
            assert lm.dtype == dtype
            assert lm.fingerprint == fingerprint("llama")
            assert Fingerprint.from_json(json.loads(json.dumps(lm.fingerprint.to_json()))) == lm.fingerprint


def test_fingerprints_of_other_models_differ() -> None:
    prints = [fingerprint(name, seed) for name in ARCHITECTURES for seed in (0, 1)]
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])
    assert len({str(print_) for print_ in prints}) == len(prints)


def test_a_fine_tuned_model_is_another_model() -> None:
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    with steer.wrap(model) as lm:
        assert lm.fingerprint != fingerprint("llama")


def test_a_state_of_another_model_is_refused_and_both_are_named(llama: steer.FrozenLM) -> None:
    other = fingerprint("llama", seed=1)
    state = steer.UserState(
        Provenance("style_vector", 1, other, ("resid_post[1]",), settings={"positions": "response"}),
        {"resid_post[1]": torch.ones(WIDTH)},
    )
    with pytest.raises(steer.SteerError) as error:
        llama.generate(["x"], states=[state])
    assert str(other) in str(error.value)
    assert str(llama.fingerprint) in str(error.value)
