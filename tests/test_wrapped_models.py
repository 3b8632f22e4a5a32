"""Models that something has been done to: adapters put into them, weights quantized, another model around them.

That they keep all that must always hold is in tests/invariants; here is what is their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import IMAGE, MULTIMODAL, WIDTH, in_int8, tiny, tokenizer, with_lora
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from rows import assert_close
from torch import Tensor

import steer
from steer.sites import Site

PROMPTS = ["a prompt", "x"]
IDS = torch.tensor([[5, 6, 7, 8], [20, 21, 22, 23]])
VECTORS = 3 * torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "o_proj"]


def edit(site: str = "resid_post[1]", vectors: Tensor = VECTORS) -> steer.ResidualEdit:
    return steer.ResidualEdit(Site.parse(site), vectors, positions="all")


def logits(lm: steer.FrozenLM, *edits: steer.ResidualEdit) -> Tensor:
    with torch.no_grad(), lm.steered(states=[None] * len(IDS), edits=edits):
        return lm.model(input_ids=IDS).logits


def fingerprint(model: Any) -> object:
    with steer.wrap(model) as lm:
        return lm.fingerprint


# Adapters.


def two_adapters() -> PeftModel:
    model = with_lora(tiny("llama"), TARGETS, "one")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_adapter("two", LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    return model


def test_adapters_change_the_fingerprint_and_disabled_ones_do_not() -> None:
    plain, model = fingerprint(tiny("llama")), two_adapters()
    with steer.wrap(model) as lm:
        one = lm.fingerprint
        model.set_adapter("two")
        two = lm.fingerprint
        assert plain != one != two != plain
        with model.disable_adapter():
            assert lm.fingerprint == plain
        model.set_adapter("one")
        assert lm.fingerprint == one
        model.merge_adapter()
        assert lm.fingerprint not in (plain, one, two)
        model.unmerge_adapter()
        assert lm.fingerprint == one


def test_one_adapted_layer_is_enough_to_be_another_model() -> None:
    prints = []
    for name in ("one", "two"):
        config = LoraConfig(r=1, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(len(prints))
            prints.append(fingerprint(get_peft_model(tiny("llama"), config, name)))
    assert prints[0] != prints[1]


def test_a_state_read_under_an_adapter_is_refused_under_another(histories: list[steer.History]) -> None:
    model = two_adapters()
    with steer.wrap(model, tokenizer()) as lm:
        state = steer.StyleVector(layer=1, neutral="field:bland").fit(lm, histories[0])
        lm.generate(["x"], states=[state], max_new_tokens=2)
        model.set_adapter("two")
        with pytest.raises(steer.SteerError, match="was read from"):
            lm.generate(["x"], states=[state], max_new_tokens=2)


def test_reading_and_steering_go_through_the_adapters() -> None:
    """As in the model that has them in its weights."""
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    with steer.wrap(with_lora(tiny("llama"), TARGETS), tokenizer()) as lm:
        adapted = logits(lm, edit("z[1]", vectors), edit())
    merged = with_lora(tiny("llama"), TARGETS).merge_and_unload()
    with steer.wrap(merged, tokenizer()) as lm:
        assert_close(adapted, logits(lm, edit("z[1]", vectors), edit()))


def test_adapters_that_transformers_has_put_in() -> None:
    injected = tiny("llama")
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, "default")))
        injected.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    with steer.wrap(with_lora(tiny("llama"), TARGETS)) as lm:
        expected = logits(lm, edit()), lm.fingerprint
    with steer.wrap(injected) as lm:
        assert_close(logits(lm, edit()), expected[0])
        assert lm.fingerprint == expected[1]


def test_adapters_that_come_after_wrapping_are_reported() -> None:
    model = tiny("llama")
    with steer.wrap(model, sites=["z[1]"]) as lm:
        with_lora(model, ["o_proj"])
        with pytest.raises(steer.SteerError, match=r"the module at z\[1\] was replaced"):
            logits(lm, edit("z[1]", torch.ones(2, 64)))


def test_a_model_and_its_wrapper_are_one_model() -> None:
    model = with_lora(tiny("llama"), TARGETS)
    with steer.wrap(model), pytest.raises(steer.SteerError, match="wrapped already"):
        steer.wrap(model.get_base_model())
    with steer.wrap(model.get_base_model()), pytest.raises(steer.SteerError, match="wrapped already"):
        steer.wrap(model)


def test_closing_gives_the_adapters_back_for_training() -> None:
    model = with_lora(tiny("llama"), TARGETS)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    with steer.wrap(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable


def test_virtual_tokens_are_refused() -> None:
    model = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(steer.SteerError, match=r"virtual tokens .* steer\.PrefixTuning"):
        steer.wrap(model)


# Quantized weights.


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def dynamically(model: Any) -> Any:
    """By PyTorch itself: other modules, whose weights are no parameters."""
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("quantize", [in_int8, dynamically])
def test_quantized_weights(quantize: Any) -> None:
    plain = fingerprint(tiny("llama"))
    with steer.wrap(quantize(tiny("llama")), tokenizer()) as lm:
        assert lm.fingerprint == fingerprint_again(quantize)
        # Other numbers, hence another model.
        assert lm.fingerprint != plain
        assert lm.dtype == torch.float32
        assert (lm.width_at(Site("z", 1)), lm.width_at(Site("attn_out", 1))) == (64, WIDTH)
        before = logits(lm)
        assert (logits(lm, edit("z[1]", torch.ones(2, 64))) - before).abs().max() > 0.1
        moved = logits(lm, edit("attn_out[1]"))
        assert_close(moved, logits(lm, edit("resid_mid[1]")))
        assert (moved - before).abs().max() > 0.1
        assert torch.equal(logits(lm), before)


def fingerprint_again(quantize: Any) -> object:
    return fingerprint(quantize(tiny("llama")))


# Multimodal models.


def test_the_text_part_is_the_model_that_it_is_alone(histories: list[steer.History]) -> None:
    """States that were read from it alone fit, and do the same."""
    outer = tiny("llava")
    alone = tiny("llama")
    alone.model.load_state_dict(outer.model.language_model.state_dict())
    alone.lm_head.load_state_dict(outer.lm_head.state_dict())
    with steer.wrap(alone, tokenizer()) as lm:
        state = steer.StyleVector(layer=1, neutral="field:bland").fit(lm, histories[0])
        expected = lm.generate(PROMPTS, states=[state, None], strength=2.0)
        assert expected != lm.generate(PROMPTS)
    with steer.wrap(outer, tokenizer()) as lm:
        assert lm.generate(PROMPTS, states=[state, None], strength=2.0) == expected


def with_an_image(name: str) -> dict[str, Any]:
    """A prompt of two texts with an image of four tokens between them."""
    ids = torch.tensor([[5, 6, 7, *[IMAGE] * 4, 8, 9]])
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "qwen2_5_vl":
        pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=generator)
        images = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).long()}
        return batch | images | {"pixel_values": pixels}
    return batch | {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_prompt_with_an_image(name: str) -> None:
    """Vectors begin at the last token of the prompt, and none of the image's tokens is moved."""
    vector = VECTORS[:1]
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    with steer.wrap(tiny(name), tokenizer()) as lm:
        batch = with_an_image(name)
        plain = lm.model.generate(**batch, **settings).hidden_states
        blind = lm.model.generate(**batch | {"pixel_values": -batch["pixel_values"]}, **settings).hidden_states
        with lm.steered(edits=[steer.ResidualEdit(Site("resid_post", 1), vector)]) as steering:
            steered = lm.model.generate(**batch, **steering.generate_kwargs(), **settings).hidden_states
    prefill, length = steered[0][2], batch["input_ids"].shape[1]
    assert torch.equal(prefill[:, :-1], plain[0][2][:, :-1])
    assert_close(prefill[:, -1], plain[0][2][:, -1] + vector)
    assert (blind[0][2] - plain[0][2])[0, length - 1].abs().max() > 1e-3
    # And later ones, of which only the step's own token passes the model.
    assert [step[2].shape[1] for step in steered[1:]] == [1, 1]
