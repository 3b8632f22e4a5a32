"""The model is bit-identical after any use, and `close()` leaves it as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny, tokenizer
from rows import Row, cross_attention, edits_of, generate, random_row
from torch import nn

import steer
from steer import TrainableMethod
from steer.read import response_span
from steer.train import train_method

ROWS = [random_row(1, share=1.0), Row("plain"), random_row(2)]


def contents(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "keys": list(model.state_dict()),
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
    }


def manners(model: nn.Module) -> dict[str, Any]:
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_forward_hooks_with_kwargs",
    )
    return {
        "hooks": {name: [dict(getattr(m, kind)) for kind in hooks] for name, m in model.named_modules()},
        "training": {name: m.training for name, m in model.named_modules()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": sorted(vars(model)),
    }


def assert_contents(model: nn.Module, before: dict[str, Any]) -> None:
    after = contents(model)
    assert after["keys"] == before["keys"]
    assert after["gradients"] == []
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        # Quantized ones cannot be compared as they are.
        assert torch.equal(after["tensors"][name].dequantize(), tensor.dequantize()), name


@pytest.fixture
def used(arch: str) -> Iterator[steer.FrozenLM]:
    """A wrapped model that was half in training before; checked after the test, and again after `close()`."""
    model = tiny(arch).train()
    next(module for name, module in model.named_modules() if "norm" in name or "ln_" in name).eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    inside, outside = contents(model), manners(model)
    lm = steer.wrap(model, tokenizer())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    yield lm
    assert_contents(model, inside)
    lm.close()
    lm.close()
    assert_contents(model, inside)
    assert manners(model) == outside


def test_steered_generation(used: steer.FrozenLM) -> None:
    generate(used, ROWS, cross_attention())


def test_steered_forward_pass(used: steer.FrozenLM) -> None:
    rows = [row.without_context() for row in ROWS]
    with used.steered(edits=edits_of(rows, cross_attention())[:-1], prompt_lengths=[9, 9, 9]) as steering:
        used.model(**steering.prepare([row.prompt for row in rows]))


def test_reading(used: steer.FrozenLM) -> None:
    sites = ["embed", "ln_final", *(f"{name}[1]" for name in ("resid_pre", "resid_post", "attn_out", "mlp_out", "z"))]
    steer.read(used, [response_span(used, "some text", "a prompt")], sites)


METHODS: dict[str, Callable[[], steer.Method]] = {
    "style_vector": lambda: steer.StyleVector(layer=[0, 1], neutral_tokens=4),
    "population": lambda: steer.StyleVector(layer=1, neutral="population"),
    "cos": lambda: steer.CoS(records=2),
    "mod": lambda: steer.MOD([0.5, 0.5], "forward-kl"),
    "knn_lm": lambda: steer.KNNLM(),
    "prefix_tuning": lambda: steer.PrefixTuning(length=2, steps=2),
    "user_llm": lambda: steer.UserLLM(layer=1, read_layer=1, heads=4, steps=2),
    "commer": lambda: steer.ComMer(tokens=2, rank=2, dropout=0.0),
}


# Of so few records, nothing is set aside.
ALL_OF_IT: dict[str, Any] = {"later": 0, "strangers": 0}


@pytest.mark.parametrize("method", METHODS)
def test_every_method(used: steer.FrozenLM, histories: list[steer.History], method: str, tmp_path: Path) -> None:
    fitted = METHODS[method]()
    if isinstance(fitted, TrainableMethod):
        artifact, _ = train_method(used, fitted, histories, out=tmp_path / "out", steps=2, batch=2, **ALL_OF_IT)
    else:
        artifact = fitted.train(used, histories)
    states = [fitted.fit(used, history) for history in histories]
    used.generate(["one", "two"], states=states, artifacts=[artifact] if artifact else [], max_new_tokens=2)


class Stop(Exception):
    pass


def test_an_exception_inside_generation(used: steer.FrozenLM) -> None:
    def fail(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 30:
            raise Stop
        return scores

    before = generate(used, ROWS, cross_attention())
    with pytest.raises(Stop):
        generate(used, ROWS, cross_attention(), logits_processor=[fail], max_new_tokens=40)
    # The model is free again, and behaves.
    after = generate(used, ROWS, cross_attention())
    assert torch.equal(after.logits, before.logits)


def test_an_exception_while_a_method_trains(
    used: steer.FrozenLM, histories: list[steer.History], tmp_path: Path
) -> None:
    def fail(*told: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        steer.PrefixTuning().fit(used, histories[0], on_step=fail)
    with pytest.raises(Stop):
        steer.UserLLM(layer=1, read_layer=1, heads=4).train(used, histories, on_step=fail)
    with pytest.raises(Stop):
        train_method(used, METHODS["commer"](), histories, out=tmp_path, epochs=1, on_progress=fail, **ALL_OF_IT)


def test_an_exception_while_wrapping() -> None:
    model = tiny("llama").train()
    before = manners(model)
    with pytest.raises(steer.SteerError, match="3 layers"):
        steer.wrap(model, sites=["resid_post[1]", "resid_post[3]"])
    assert manners(model) == before


def test_a_closed_model_can_be_wrapped_again_and_an_open_one_cannot(llama: steer.FrozenLM) -> None:
    with pytest.raises(steer.SteerError, match="wrapped already"):
        steer.wrap(llama.model)
    llama.close()
    steer.wrap(llama.model).close()


def test_a_model_that_nobody_needs_is_freed_although_it_was_never_closed() -> None:
    lm = steer.wrap(tiny("llama"), tokenizer())
    generate(lm, ROWS, cross_attention())
    parts = [weakref.ref(lm.model), weakref.ref(lm.attachment.decoder)]
    del lm
    gc.collect()
    assert [part() for part in parts] == [None, None]
