"""Vectors of other programs: read and written, against these programs themselves where they can be run."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models import LAYERS, WIDTH, tiny, tokenizer
from safetensors.torch import save_file
from torch import Tensor

import steer
from steer.interop import state_files, vector_files, vector_objects
from steer.state import Provenance

PROMPTS = ["a prompt", "another, longer one"]


def vectors(*layers: int, seed: int = 0, width: int = WIDTH, name: str = "resid_post") -> dict[steer.Site, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {steer.Site(name, layer): 3 * torch.randn(width, generator=generator) for layer in layers}


def given(*layers: int, **more: Any) -> steer.UserState:
    return steer.GivenVector().state(vectors(*layers, **more))


def assert_same(actual: steer.UserState, expected: steer.UserState) -> None:
    assert actual.provenance == expected.provenance
    assert dict(actual.data) == dict(expected.data)
    assert list(actual.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert actual.tensors[name].dtype == tensor.dtype
        assert torch.equal(actual.tensors[name], tensor)


def batch(lm: steer.FrozenLM) -> dict[str, Tensor]:
    """Two prompts, padded on the left."""
    rows = [lm.encode(prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def logits(lm: steer.FrozenLM, state: steer.UserState | None, strength: float = 1.0) -> Tensor:
    inputs = batch(lm)
    if not lm.attachment.architecture.takes_position_ids:
        del inputs["position_ids"]
    real = inputs["attention_mask"].bool()
    lengths = real.sum(1).tolist()
    scale = {} if state is None else {"strength": strength}
    with lm.steered(states=[state] * len(PROMPTS), prompt_lengths=lengths, **scale), torch.no_grad():
        return lm.model(**inputs).logits[real]


class TestGivenVector:
    def test_what_is_given_is_added(self, llama: steer.FrozenLM) -> None:
        own = vectors(0, 2)
        hooks = [
            llama.model.model.layers[site.layer].register_forward_hook(lambda m, a, out, v=vector: out + 0.5 * v)
            for site, vector in own.items()
        ]
        expected = logits(llama, None)
        for hook in hooks:
            hook.remove()
        state = steer.GivenVector().state({str(site): vector for site, vector in own.items()}, lm=llama)
        torch.testing.assert_close(logits(llama, state, 0.5), expected)
        assert (expected - logits(llama, None)).abs().max() > 0.1

    def test_positions(self, llama: steer.FrozenLM) -> None:
        own = vectors(1)
        (site,), (vector,) = own.keys(), own.values()
        lengths = batch(llama)["attention_mask"].sum(1).tolist()
        for positions in ("response", "prompt", "generated"):
            edit = steer.ResidualEdit(site, torch.stack([vector, vector]), positions)
            with llama.steered(edits=[edit], prompt_lengths=lengths), torch.no_grad():
                expected = llama.model(**batch(llama)).logits[batch(llama)["attention_mask"].bool()]
            assert torch.equal(logits(llama, steer.GivenVector(positions).state(own)), expected)

    def test_a_dose_needs_reference_norms(self, llama: steer.FrozenLM) -> None:
        own = vectors(1)
        (vector,) = own.values()
        plain = steer.GivenVector().state(own, lm=llama)
        with pytest.raises(steer.SteerError, match=r"no reference norm is known at resid_post\[1\].*give a strength"):
            llama.generate(["x"], states=[plain], dose=0.5)
        known = steer.GivenVector().state(own, lm=llama, reference_norms={"resid_post[1]": 10.0})
        for rows in ([known, None], [known, known]):
            by_dose = llama.generate(PROMPTS, states=rows, dose=0.5, max_new_tokens=4)
            by_strength = llama.generate(PROMPTS, states=rows, strength=5 / vector.norm().item(), max_new_tokens=4)
            assert by_dose == by_strength
        with pytest.raises(steer.SteerError, match="no reference norm is known"):
            llama.generate(PROMPTS, states=[known, plain], dose=0.5)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({}, "there is no vector"),
            ({"resid_post[1]": torch.ones(2, WIDTH)}, r"no vector but float32 \[2, 48\]"),
            ({"resid_post[1]": torch.ones(())}, r"no vector but float32 \[\]"),
            ({"resid_post[1]": torch.ones(0)}, r"no vector but float32 \[0\]"),
            ({"resid_post[1]": torch.ones(3, dtype=torch.int64)}, r"no vector but int64 \[3\]"),
            ({"resid_post[1]": torch.tensor([1.0, float("nan")])}, "not finite"),
            ({"resid_post[1]": torch.tensor([1.0, 1e300], dtype=torch.float64)}, "not finite"),
            ({"resid_post[0]": torch.ones(3), "resid_pre[1]": torch.ones(3)}, r"two vectors for resid_post\[0\]"),
            (
                {"resid_post[0]": torch.ones(3), "mlp_out[1]": torch.ones(4)},
                r"resid_post\[0\] is 3 wide.*mlp_out\[1\] 4",
            ),
            ({"layer 3": torch.ones(3)}, "'layer 3' is not a site"),
        ],
    )
    def test_what_is_no_vector_is_refused(self, wrong: dict[str, Tensor], message: str) -> None:
        with pytest.raises(steer.SteerError, match=message):
            steer.GivenVector().state(wrong)

    @pytest.mark.parametrize("norms", [{}, {"resid_post[1]": 0.0}, {"resid_post[1]": float("nan")}, {"embed": 1.0}])
    def test_reference_norms_are_checked(self, norms: dict[str, float]) -> None:
        with pytest.raises(
            steer.SteerError, match=r"reference norms are above 0, one for each site; for resid_post\[1\]"
        ):
            steer.GivenVector().state(vectors(1), reference_norms=norms)

    def test_a_model_is_checked_at_once_or_when_it_is_used(self, llama: steer.FrozenLM) -> None:
        for wrong, message in (
            (vectors(1, width=40), r"resid_post\[1\] are 40 wide, the model is 48 wide there"),
            (vectors(LAYERS), "the model has 3 layers"),
            (vectors(0, width=10, name="z"), r"z\[0\] are 10 wide, the model is 64 wide there"),
            (vectors(9, name="z"), "the model has 3 layers"),
        ):
            with pytest.raises(steer.SteerError, match=message):
                steer.GivenVector().state(wrong, lm=llama)
            with pytest.raises(steer.SteerError, match=message):
                llama.generate(["x"], states=[steer.GivenVector().state(wrong)])
        with steer.wrap(tiny("llama", seed=1), tokenizer()) as other:
            state = steer.GivenVector().state(vectors(1), lm=other)
        with pytest.raises(steer.SteerError, match="was read from llama"):
            llama.generate(["x"], states=[state])

    def test_a_bank_may_hold_vectors_of_other_models(self, llama: steer.FrozenLM, tmp_path: Path) -> None:
        bank = steer.Bank(tmp_path / "people.bank")
        bank["wide", "style"] = given(1, width=64)
        bank["deep", "style"] = given(40)
        bank["ann", "style"] = given(1)
        alone = llama.generate(["hello"], states=[bank["ann", "style"]], max_new_tokens=4)
        assert llama.generate(["hello", "x"], bank=bank, users=["ann", None], max_new_tokens=4)[:1] == alone
        with pytest.raises(steer.SteerError, match="64 wide, the model is 48 wide"):
            llama.generate(["hello", "x"], bank=bank, users=["ann", "wide"])

    def test_of_other_methods(self, llama: steer.FrozenLM, histories: list[steer.History]) -> None:
        method = steer.StyleVector(layer=[0, 1], neutral="field:bland", sites=["attn_out[2]"])
        state = method.fit(llama, histories[0])
        made = steer.GivenVector.of(state)
        assert made.provenance.model == llama.fingerprint
        assert made.provenance.records == state.provenance.records
        assert torch.equal(logits(llama, made), logits(llama, state))
        assert llama.generate(["x"], states=[made], dose=0.3) == llama.generate(["x"], states=[state], dose=0.3)

    def test_of_a_state_with_a_common_vector(self, llama: steer.FrozenLM, histories: list[steer.History]) -> None:
        method = steer.TrainedVector(layer=1, shared_steps=1, steps=1)
        artifact = method.train(llama, histories)
        assert artifact is not None
        state = method.fit(llama, histories[0])
        with pytest.raises(steer.SteerError, match="needs the artifact"):
            steer.GivenVector.of(state)
        expected = state.tensors["resid_post[1]"] + artifact.tensors["resid_post[1]"]
        assert torch.equal(steer.GivenVector.of(state, artifact).tensors["resid_post[1]"], expected)

    def test_of_what_is_no_vector(self, llama: steer.FrozenLM, histories: list[steer.History]) -> None:
        for method in (steer.PrefixTuning(length=2, steps=1), steer.CoS(records=2)):
            with pytest.raises(steer.SteerError, match="is no plain vector"):
                steer.GivenVector.of(method.fit(llama, histories[0]))
        perfit = steer.PerFit(layer=1, shared_epochs=1, epochs=1)
        artifact = perfit.train(llama, histories)
        with pytest.raises(steer.SteerError, match="is no plain vector"):
            steer.GivenVector.of(perfit.fit(llama, histories[0]), artifact)
        with pytest.raises(steer.SteerError, match="found elsewhere and not fitted"):
            steer.GivenVector().fit(llama, histories[0])


@pytest.fixture
def repeng(monkeypatch: pytest.MonkeyPatch) -> Any:
    # repeng 0.4 is of NumPy 1, and names one of its types in annotations.
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    return pytest.importorskip("repeng")


def control_vector(repeng: Any, *layers: int) -> Any:
    directions = {site.layer: vector.numpy() for site, vector in vectors(*layers).items()}
    return repeng.ControlVector("llama", directions)


class TestRepeng:
    @pytest.mark.parametrize("arch", ["llama", "gpt2"])
    def test_its_model_and_ours_give_the_same_logits(self, repeng: Any, arch: str) -> None:
        vector = control_vector(repeng, 0, 2)
        with steer.wrap(tiny(arch), tokenizer()) as lm:
            inputs = batch(lm)
            ours = logits(lm, vector_objects.from_repeng(vector, lm=lm), 1.5)
        model = repeng.ControlModel(tiny(arch), [0, 2])
        model.set_control(vector, 1.5)
        with torch.no_grad():
            theirs = model(**inputs).logits[inputs["attention_mask"].bool()]
            model.reset()
            plain = model(**inputs).logits[inputs["attention_mask"].bool()]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (theirs - plain).abs().max() > 0.1

    def test_objects_there_and_back(self, repeng: Any) -> None:
        vector = control_vector(repeng, 0, 2)
        state = vector_objects.from_repeng(vector)
        assert list(state.tensors) == ["resid_post[0]", "resid_post[2]"]
        assert vector_objects.to_repeng(state) == vector
        assert vector_objects.to_repeng(state, model_type="other").model_type == "other"

    def test_files_there_and_back(self, repeng: Any, tmp_path: Path) -> None:
        vector = control_vector(repeng, 0, 2, 1)
        vector.export_gguf(tmp_path / "theirs.gguf")
        state = vector_files.read(tmp_path / "theirs.gguf")
        assert list(state.tensors) == ["resid_post[0]", "resid_post[1]", "resid_post[2]"]
        assert vector_objects.to_repeng(state) == vector
        vector_files.write_gguf(tmp_path / "ours.gguf", vector_files.read(tmp_path / "theirs.gguf", layers=[1, 2]))
        assert repeng.ControlVector.import_gguf(tmp_path / "ours.gguf") == control_vector(repeng, 0, 2, 1).__class__(
            "llama", {layer: vector.directions[layer] for layer in (1, 2)}
        )

    def test_without_it_the_error_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "repeng", None)
        with pytest.raises(steer.SteerError, match="repeng cannot be imported"):
            vector_objects.to_repeng(given(1))


# Architectures in which the packages' modules differ: names, residuals within modules, norms after them.
THEIRS = ["llama", "gpt2", "gpt_neox", "bloom", "falcon", "opt", "gemma3", "olmo2"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestSteeringVectors:
    @pytest.mark.parametrize("arch", THEIRS)
    @pytest.mark.parametrize("kind", ["decoder_block", "self_attn", "mlp", "post_attention_layernorm"])
    def test_theirs_and_ours_give_the_same_logits(self, arch: str, kind: Any) -> None:
        theirs = pytest.importorskip("steering_vectors")
        vector = theirs.SteeringVector({at.layer: values for at, values in vectors(0, 1).items()}, kind)
        with steer.wrap(tiny(arch), tokenizer()) as lm:
            norms = arch in ("gemma3", "olmo2")
            if (kind == "post_attention_layernorm" and not norms) or (kind in ("self_attn", "mlp") and norms):
                with pytest.raises(steer.SteerError, match=f"no tensor in common for layer_type='{kind}'"):
                    vector_objects.from_steering_vector(vector, lm=lm)
                return
            state = vector_objects.from_steering_vector(vector, lm=lm)
            back = vector_objects.to_steering_vector(state, lm=lm)
            ours, plain, inputs = logits(lm, state), logits(lm, None), batch(lm)
            if not lm.attachment.architecture.takes_position_ids:
                del inputs["position_ids"]
        assert back.layer_type == kind
        assert {at: values.tolist() for at, values in back.layer_activations.items()} == {
            at: values.tolist() for at, values in vector.layer_activations.items()
        }
        if arch == "opt" and kind == "mlp":
            # It finds no module of that name in OPT, whose feed-forward is none.
            return
        model = tiny(arch)
        with torch.no_grad(), vector.apply(model):
            expected = model(**inputs).logits[inputs["attention_mask"].bool()]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert (expected - plain).abs().max() > 0.1

    def test_without_a_model_only_blocks_are_known(self, llama: steer.FrozenLM) -> None:
        pytest.importorskip("steering_vectors")
        assert vector_objects.to_steering_vector(given(0, 2)).layer_type == "decoder_block"
        for kind in ("self_attn", "input_layernorm"):
            vector = SimpleNamespace(layer_activations={1: torch.ones(WIDTH)}, layer_type=kind)
            with pytest.raises(steer.SteerError, match="depends on the model, so pass lm"):
                vector_objects.from_steering_vector(vector)
        with pytest.raises(steer.SteerError, match="no tensor in common for layer_type='input_layernorm'"):
            vector_objects.from_steering_vector(vector, lm=llama)
        with pytest.raises(steer.SteerError, match="depends on the model, so pass lm"):
            vector_objects.to_steering_vector(given(1, name="attn_out"))
        both = steer.GivenVector().state(vectors(1) | vectors(1, name="attn_out"))
        with pytest.raises(steer.SteerError, match="one kind of site"):
            vector_objects.to_steering_vector(both, lm=llama)
        with pytest.raises(steer.SteerError, match=r"no tensor in common for resid_mid\[1\]"):
            vector_objects.to_steering_vector(given(1, name="resid_mid"), lm=llama)

    @pytest.mark.parametrize(
        "thing", [None, 3, SimpleNamespace(layer_activations=[1]), SimpleNamespace(directions="x")]
    )
    def test_other_objects_are_refused(self, thing: Any) -> None:
        with pytest.raises(steer.SteerError, match="so it is not a SteeringVector"):
            vector_objects.from_steering_vector(thing)
        with pytest.raises(steer.SteerError, match="so it is not a ControlVector"):
            vector_objects.from_repeng(thing)

    @pytest.mark.parametrize("layer", [-1, "1", 1.0])
    def test_layers_are_numbers_from_0(self, layer: Any) -> None:
        with pytest.raises(steer.SteerError, match="layers count from 0"):
            vector_objects.from_repeng(SimpleNamespace(directions={layer: np.ones(4)}, model_type="llama"))


def write_raw(path: Path, tensors: dict[str, np.ndarray], arch: str = "controlvector", **strings: str) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in strings.items():
        writer.add_string(f"controlvector.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestGGUF:
    def test_a_written_file_is_what_llama_cpp_takes(self, tmp_path: Path) -> None:
        """Its `common_control_vector_load_one` wants float32, one dimension, one length, and layers from 1 on."""
        state = given(2, 1)
        vector_files.write_gguf(tmp_path / "x.gguf", state, model_hint="llama")
        reader = gguf.GGUFReader(tmp_path / "x.gguf")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        assert fields["general.architecture"] == "controlvector"
        assert fields["controlvector.model_hint"] == "llama"
        assert fields["controlvector.layer_count"] == 2
        assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
        for tensor in reader.tensors:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            assert tensor.shape.tolist() == [WIDTH]
            own = state.tensors[f"resid_post[{tensor.name.removeprefix('direction.')}]"]
            assert tensor.data.tolist() == own.tolist()
        assert os.listdir(tmp_path) == ["x.gguf"]

    @pytest.mark.parametrize("positions", ["all", "response"])
    def test_there_and_back(self, tmp_path: Path, positions: Any, llama: steer.FrozenLM) -> None:
        source = {"format": "gguf", "model_hint": "llama"}
        state = steer.GivenVector(positions).state(vectors(1, 2), source=source)
        vector_files.write_gguf(tmp_path / "x.gguf", state)
        assert_same(vector_files.read(tmp_path / "x.gguf"), state)
        only = vector_files.read(tmp_path / "x.gguf", layers=[2], positions="prompt", lm=llama)
        assert list(only.tensors) == ["resid_post[2]"]
        assert only.provenance.settings["positions"] == "prompt"
        assert only.provenance.model == llama.fingerprint
        with pytest.raises(steer.SteerError, match=r"x.gguf: it has no vector for layer 0; there are resid_post\[1\]"):
            vector_files.read(tmp_path / "x.gguf", layers=[0, 2])

    def test_what_cannot_be_written_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for state, message in (
            (given(0, 1), "llama.cpp refuses a file with direction.0"),
            (given(1, name="attn_out"), r"this state adds at attn_out\[1\]"),
            (steer.UserState(Provenance("cos", 1), data={"context": "x", "lam": 1.0}), "no plain vector"),
        ):
            with pytest.raises(steer.SteerError, match=message):
                vector_files.write_gguf(tmp_path / "x.gguf", state)
        with pytest.raises(steer.SteerError, match="could not be written"):
            vector_files.write_gguf(tmp_path / "none" / "x.gguf", given(1))
        monkeypatch.setattr(
            gguf.GGUFWriter, "write_tensors_to_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
        )
        with pytest.raises(steer.SteerError, match="could not be written"):
            vector_files.write_gguf(tmp_path / "x.gguf", given(1))
        monkeypatch.setitem(__import__("sys").modules, "gguf", None)
        with pytest.raises(steer.SteerError, match=r"steer-toolkit\[embedded\]"):
            vector_files.write_gguf(tmp_path / "x.gguf", given(1))
        assert os.listdir(tmp_path) == []

    def test_half_precision_and_what_easysteer_adds_to(self, tmp_path: Path) -> None:
        path, half = tmp_path / "x.gguf", np.arange(4, dtype=np.float16)
        write_raw(path, {"direction.3": half})
        assert vector_files.read(path).tensors["resid_post[3]"].tolist() == [0.0, 1.0, 2.0, 3.0]
        for component, site in (
            (None, "resid_post[3]"),
            ("hidden_states", "resid_post[3]"),
            ("attention_heads", "z[3]"),
        ):
            described = json.dumps({"version": 1, "component": component, "metadata": None})
            write_raw(path, {"direction.3": half}, easysteer=described)
            assert list(vector_files.read(path).tensors) == [site]
        for wrong in (
            '{"version": 1, "component": "router_logits"}',
            '{"version": 2, "component": null}',
            "{",
            "[]",
            "1",
        ):
            write_raw(path, {"direction.3": half}, easysteer=wrong)
            with pytest.raises(steer.SteerError, match="EasySteer"):
                vector_files.read(path)

    @pytest.mark.parametrize(
        ("write", "message"),
        [
            (
                lambda path: write_raw(path, {"direction.1": np.ones(3, np.float32)}, arch="llama"),
                "it is 'llama'|is 'llama'",
            ),
            (lambda path: write_raw(path, {"weight": np.ones(3, np.float32)}), "'weight' of float32 is no direction.N"),
            (lambda path: write_raw(path, {"direction.-1": np.ones(3, np.float32)}), "'direction.-1' of float32 is no"),
            (lambda path: write_raw(path, {"direction.1": np.ones(3, np.int32)}), "'direction.1' of int32 is no"),
            (
                lambda path: write_raw(path, {"direction.1": np.ones((2, 3), np.float32)}),
                r"no vector but float32 \[2, 3\]",
            ),
            (lambda path: write_raw(path, {"direction.1": np.full(3, np.inf, np.float32)}), "not finite"),
            (lambda path: write_raw(path, {}), "there is no vector"),
            (
                lambda path: write_raw(path, {f"direction.{n}": np.ones(3, np.float32) for n in ("1", "01")}),
                "two tensors for layer 1",
            ),
            (
                lambda path: write_raw(
                    path, {"direction.1": np.ones(3, np.float32), "direction.2": np.ones(4, np.float32)}
                ),
                "3 wide",
            ),
            (lambda path: path.write_bytes(b""), "no readable GGUF file"),
            (lambda path: path.write_bytes(b"GGUF"), "no readable GGUF file"),
            (lambda path: path.write_bytes(b"ELF" * 100), "no readable GGUF file"),
            # 2⁶⁰ fields, an array of 2⁶⁰ bytes, a name of 2⁶⁰ letters.
            (lambda path: path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 1 << 60)), "it ends too early"),
            (
                lambda path: path.write_bytes(
                    struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"a", 9, 0, 1 << 60) + b"\0" * 8
                ),
                "it ends too early",
            ),
            (lambda path: path.write_bytes(struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 60)), "no readable GGUF file"),
        ],
    )
    def test_broken_files(self, tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
        write(tmp_path / "x.gguf")
        with pytest.raises(steer.SteerError, match=message) as error:
            vector_files.read(tmp_path / "x.gguf")
        assert str(error.value).count("x.gguf") == 1


def states(llama: steer.FrozenLM, histories: list[steer.History]) -> Iterator[steer.UserState]:
    history, perfit = histories[0], steer.PerFit(layer=1, shared_epochs=1, epochs=1)
    perfit.train(llama, histories)
    yield steer.StyleVector(layer=[0, 1], neutral="field:bland").fit(llama, history)
    yield steer.PrefixTuning(length=2, steps=1).fit(llama, history)
    yield steer.CoS(records=2).fit(llama, history)
    yield perfit.fit(llama, history)
    yield given(1, 2)
    odd = {
        "a b/c": torch.arange(6).reshape(2, 3).T,
        "": torch.tensor(1.5, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
    }
    yield steer.UserState(
        Provenance("unknown", 7, artifact="0" * 64), odd, {"text": "ein Wörtchen\0\u202e", "n": [1, None]}
    )


class TestSafetensors:
    def test_any_state_there_and_back(
        self, llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path
    ) -> None:
        for number, state in enumerate(states(llama, histories)):
            path = tmp_path / f"{number}.safetensors"
            state_files.write(path, state)
            back = vector_files.read(path)
            # Files of safetensors are sorted by name.
            tensors = {name: back.tensors[name] for name in state.tensors}
            assert_same(replace(back, tensors=tensors), state)
            assert_same(replace(vector_files.read(path, lm=llama), provenance=state.provenance, tensors=tensors), state)
        assert len(os.listdir(tmp_path)) == number + 1
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask()

    def test_a_state_of_another_model_is_refused(self, llama: steer.FrozenLM, tmp_path: Path) -> None:
        state_files.write(tmp_path / "x.safetensors", steer.GivenVector().state(vectors(1), lm=llama))
        assert vector_files.read(tmp_path / "x.safetensors", layers=[1]).provenance.model == llama.fingerprint
        with (
            steer.wrap(tiny("llama", seed=1)) as other,
            pytest.raises(steer.SteerError, match=r"x.safetensors: the state was read from llama.*this model is llama"),
        ):
            vector_files.read(tmp_path / "x.safetensors", lm=other)

    def test_layers_and_positions_of_what_is_no_vector(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        state_files.write(path, steer.UserState(Provenance("cos", 1), data={"context": "x", "lam": 1.0}))
        for chosen in ({"layers": [1]}, {"positions": "all"}):
            with pytest.raises(steer.SteerError, match="a cos state, whose layers and positions are not to be chosen"):
                vector_files.read(path, **chosen)

    def test_plain_files(self, tmp_path: Path, llama: steer.FrozenLM) -> None:
        path = tmp_path / "x.safetensors"
        save_file(
            {"1": torch.ones(WIDTH), "attn_out[0]": torch.ones(WIDTH).half(), "resid_pre[1]": torch.ones(WIDTH)}, path
        )
        state = vector_files.read(path, lm=llama)
        assert list(state.tensors) == ["attn_out[0]", "resid_post[0]", "resid_post[1]"]
        assert {tensor.dtype for tensor in state.tensors.values()} == {torch.float32}
        assert state.provenance.model == llama.fingerprint
        assert list(vector_files.read(path, layers=[0]).tensors) == ["attn_out[0]", "resid_post[0]"]

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({}, "there is no vector"),
            ({"1": torch.ones(3), "resid_post[1]": torch.ones(3)}, r"two tensors for resid_post\[1\]"),
            ({"resid_pre[1]": torch.ones(3), "resid_post[0]": torch.ones(3)}, r"two tensors for resid_post\[0\]"),
            ({"layer_1": torch.ones(3)}, "layer_1"),
            ({"1": torch.ones(3, 3)}, r"no vector but float32 \[3, 3\]"),
            ({"1": torch.tensor([float("nan")])}, "not finite"),
            ({"1": torch.ones(3, dtype=torch.uint8)}, "no vector but uint8"),
        ],
    )
    def test_plain_files_that_are_refused(self, tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(steer.SteerError, match=message) as error:
            vector_files.read(tmp_path / "x.safetensors")
        assert str(error.value).count("x.safetensors") == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, "version 2 of the format, this library reads 1"),
            ({"version": None}, "version None of the format"),
            ({"data": []}, "do not describe a state"),
            ({"provenance": None}, "do not describe a state"),
            ({"provenance": {}}, "do not describe a state"),
            ({"provenance.method": 3}, "method is 3"),
            ({"provenance.sites": "embed"}, "sites is 'embed'"),
            ({"provenance.records": [1]}, "one of the records is 1"),
            ({"provenance.model": {"name": "x", "config": "y", "weights": "zz"}}, "do not describe a state"),
            ({"provenance.model": {}}, "do not describe a state"),
            ({"provenance.settings": {"positions": "nowhere"}}, "positions='nowhere' is not one of"),
            ({"provenance.settings": {}}, "not those of its vectors"),
            ({"provenance.calibration": {"reference_norm": 3}}, "not those of its vectors"),
            ({"provenance.calibration": {"reference_norm": {}}}, "reference norms are above 0"),
        ],
    )
    def test_metadata_that_are_refused(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        described: Any = {"version": 1, "provenance": given(1).provenance.to_json(), "data": {}}
        for path, value in change.items():
            whole, _, part = path.partition(".")
            if part:
                described[whole][part] = value
            else:
                described[whole] = value
        self.refused(tmp_path, json.dumps(described), message)

    @pytest.mark.parametrize("text", ["", "{", "null", "3", '"text"', "[" * 100_000])
    def test_metadata_that_are_no_description(self, text: str, tmp_path: Path) -> None:
        self.refused(tmp_path, text, "do not describe a state")

    @staticmethod
    def refused(folder: Path, text: str, message: str) -> None:
        save_file(dict(given(1).tensors), folder / "x.safetensors", {"steer": text})
        with pytest.raises(steer.SteerError, match=message) as error:
            vector_files.read(folder / "x.safetensors")
        assert str(error.value).count("x.safetensors") == 1

    def test_what_cannot_be_written_is_refused(self, tmp_path: Path) -> None:
        for state, message in (
            (steer.UserState(Provenance("x", 1), data={"a": object()}), "cannot be stored as JSON"),
            (steer.UserState(Provenance("x", 1), data={1: "a"}), "cannot be stored as JSON"),
            (steer.UserState(Provenance("x", 1), data={"a": float("nan")}), "cannot be stored as JSON"),
            (steer.UserState(Provenance("x", 1), {"a": torch.eye(3).long().to_sparse()}), "tensor that is not stored"),
        ):
            with pytest.raises(steer.SteerError, match=message):
                state_files.write(tmp_path / "x.safetensors", state)
        with pytest.raises(steer.SteerError, match="could not be written"):
            state_files.write(tmp_path / "none" / "x.safetensors", given(1))
        assert os.listdir(tmp_path) == []


class Bomb:
    """What a pickle of it runs when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class TestPt:
    def test_rows_are_layers(self, tmp_path: Path, llama: steer.FrozenLM) -> None:
        rows = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
        for held in (rows, {"vector": rows, "regime": {"scale": 1.5}}, rows.T.contiguous().T, torch.nn.Parameter(rows)):
            torch.save(held, tmp_path / "x.pt")
            state = vector_files.read(tmp_path / "x.pt", layers=[2, 0], lm=llama)
            assert list(state.tensors) == ["resid_post[0]", "resid_post[2]"]
            assert torch.equal(state.tensors["resid_post[2]"], rows[2])
            assert not state.tensors["resid_post[2]"].requires_grad
        torch.save(rows[1].bfloat16(), tmp_path / "x.pt")
        state = vector_files.read(tmp_path / "x.pt", layers=[1, 2])
        assert torch.equal(state.tensors["resid_post[1]"], rows[1].bfloat16().float())
        assert torch.equal(state.tensors["resid_post[1]"], state.tensors["resid_post[2]"])

    @pytest.mark.parametrize(
        ("held", "message"),
        [
            (torch.ones(3, 4, 5), r"float32 \[3, 4, 5\]; expected floats \[layers, d\]"),
            (torch.ones(3, 4, dtype=torch.int64), "int64"),
            (torch.full((3, 4), float("inf")), "not finite"),
            (torch.ones(2, 4), "2 layers, 0 to 1, and layer 2 is asked for"),
            ({"a": torch.ones(3), "b": torch.ones(3)}, "holds 2 tensors"),
            ({}, "holds 0 tensors"),
            ([torch.ones(3)], "holds a list and no tensor"),
            ("text", "holds a str and no tensor"),
            (torch.ones(1, 1).expand(3, 1 << 40), "no plain dense tensor"),
            (torch.eye(4).to_sparse(), "no plain dense tensor"),
            (torch.ones(3, 4, device="meta"), "no plain dense tensor"),
        ],
    )
    def test_what_is_no_vector_is_refused(self, held: Any, message: str, tmp_path: Path) -> None:
        torch.save(held, tmp_path / "x.pt")
        with pytest.raises(steer.SteerError, match=message) as error:
            vector_files.read(tmp_path / "x.pt", layers=[2])
        assert str(error.value).count("x.pt") == 1

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Detected pickle protocol")
    def test_nothing_is_run(self, tmp_path: Path) -> None:
        path, made = tmp_path / "x.pt", tmp_path / "made"
        for write in (
            lambda held: torch.save(held, path),
            lambda held: torch.save(held, path, _use_new_zipfile_serialization=False),
            lambda held: path.write_bytes(pickle.dumps(held)),
        ):
            write({"vector": torch.ones(3, 4), "more": Bomb(made)})
            with pytest.raises(
                steer.SteerError, match="could run code; where you trust it, save its tensors as safetens"
            ):
                vector_files.read(path, layers=[1])
            assert not made.exists()
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
        with pytest.raises(steer.SteerError, match="weights only"), pytest.warns(match="TorchScript"):
            vector_files.read(path, layers=[1])

    def test_layers_must_be_said(self, tmp_path: Path) -> None:
        torch.save(torch.ones(3, 4), tmp_path / "x.pt")
        with pytest.raises(steer.SteerError, match=r"say which: layers=\[20\]"):
            vector_files.read(tmp_path / "x.pt")


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.npy").touch()
    (tmp_path / "folder.gguf").mkdir()
    for name, message in (
        ("x.npy", "vector files end in .gguf, .safetensors, .pt"),
        ("none.gguf", "there is no such file"),
        ("folder.gguf", "there is no such file"),
    ):
        with pytest.raises(steer.SteerError, match=message):
            vector_files.read(tmp_path / name)


@pytest.mark.parametrize("ending", [".gguf", ".safetensors", ".pt"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused(ending: str, tmp_path: Path) -> None:
    """Cut short, or with other bytes: a state of finite vectors, or one clear error."""
    path, chance = tmp_path / f"x{ending}", random.Random(0)
    match ending:
        case ".gguf":
            vector_files.write_gguf(path, given(1, 2, width=8))
        case ".safetensors":
            state_files.write(path, given(1, 2, width=8))
        case _:
            torch.save(torch.ones(3, 8), path)
    whole, refused = path.read_bytes(), 0
    cuts = [whole[:length] for length in range(0, len(whole), 7)]
    changed = []
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 1, 4])):
            content[chance.randrange(len(whole))] = chance.randrange(256)
        changed.append(bytes(content))
    for content in cuts + changed:
        path.write_bytes(content)
        found = outcome(path)
        if isinstance(found, str):
            refused += 1
            assert found.startswith(f"{path}: ")
            assert found.count(path.name) == 1
        else:
            assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())
    assert len(cuts) < refused < len(cuts) + len(changed)


def outcome(path: Path) -> steer.UserState | str:
    try:
        return vector_files.read(path, layers=[1])
    except steer.SteerError as error:
        return str(error)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
