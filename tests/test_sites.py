"""Names of sites, and the descriptions of architectures that give them a place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import BOS, EOS, HEADS, LAYERS, PAD, WIDTH, tiny
from transformers import SmolLM3Config, SmolLM3ForCausalLM

import steer
from steer.architectures import ARCHITECTURES, Architecture
from steer.sites import PER_BLOCK, WHOLE_MODEL, Site

# TransformerLens' own names.
LENS = {
    "embed": "embed.hook_out",
    "ln_final": "ln_final.hook_out",
    "resid_pre[3]": "blocks.3.hook_resid_pre",
    "resid_mid[3]": "blocks.3.hook_resid_mid",
    "resid_post[3]": "blocks.3.hook_resid_post",
    "attn_out[3]": "blocks.3.hook_attn_out",
    "mlp_out[3]": "blocks.3.hook_mlp_out",
    "z[3]": "blocks.3.attn.hook_z",
}


@pytest.mark.parametrize("text", LENS)
def test_a_site_reads_back_as_it_is_written(text: str) -> None:
    site = Site.parse(text)
    assert str(site) == text
    assert Site.parse(site) is site
    assert site.lens_name == LENS[text]


def test_every_kind_of_site_is_in_the_table() -> None:
    assert {text.partition("[")[0] for text in LENS} == {*PER_BLOCK, *WHOLE_MODEL}


def test_one_tensor_has_one_canonical_name() -> None:
    assert Site("resid_pre", 3).canonical() == Site("resid_post", 2)
    for text in ("resid_pre[0]", "resid_post[3]", "resid_mid[3]", "embed", "attn_out[0]"):
        assert Site.parse(text).canonical() == Site.parse(text)


@pytest.mark.parametrize(
    "text", ["", "resid_post", "resid_post[-1]", "embed[0]", "resid_last[2]", "resid_post[2", "a b[1]"]
)
def test_what_is_no_site_is_refused(text: str) -> None:
    with pytest.raises(steer.SteerError, match="not a site"):
        Site.parse(text)


def test_a_layer_that_the_model_does_not_have(lm: steer.FrozenLM) -> None:
    # The input of the block after the last would be the output of the last.
    for name in set(PER_BLOCK) - {"resid_pre"}:
        with pytest.raises(steer.SteerError, match=f"the model has {LAYERS} layers"):
            lm.declare(f"{name}[{LAYERS}]")


def test_widths(lm: steer.FrozenLM) -> None:
    widths = {name: lm.width_at(Site(name, 1)) for name in PER_BLOCK}
    # Where the width of a head is set, it is so that all heads are wider than the stream.
    heads = HEADS * (getattr(lm.model.config.get_text_config(), "head_dim", None) or WIDTH // HEADS)
    assert widths == dict.fromkeys(PER_BLOCK, WIDTH) | {"z": heads}
    with pytest.raises(steer.SteerError, match=rf"vectors for z\[1\] are 7 wide, the model is {heads} wide there"):
        lm.steered(edits=[steer.ResidualEdit(Site("z", 1), torch.ones(1, 7))]).__enter__()


def smollm3() -> SmolLM3ForCausalLM:
    config = SmolLM3Config(
        vocab_size=100,
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return SmolLM3ForCausalLM(config).eval()


def test_another_architecture_is_refused_with_the_way_to_describe_it() -> None:
    with pytest.raises(steer.SteerError, match="no description of the architecture 'smollm3'") as error:
        steer.wrap(smollm3())
    assert 'register_architecture("smollm3", ARCHITECTURES["llama"])' in str(error.value)


def test_another_architecture_can_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steer.architectures, "ARCHITECTURES", dict(ARCHITECTURES))
    steer.register_architecture("smollm3", ARCHITECTURES["llama"])
    model, vector = smollm3(), torch.ones(1, WIDTH)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), steer.wrap(model) as lm:
        plain = model(ids, output_hidden_states=True).hidden_states[1]
        with lm.steered(edits=[steer.ResidualEdit(Site("resid_post", 0), vector, positions="all")]):
            steered = model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(steered, plain + 1)


def test_a_wrong_description_leaves_no_hook_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Architecture = dataclasses.replace(ARCHITECTURES["llama"], mid="no_such_norm")
    monkeypatch.setattr(steer.architectures, "ARCHITECTURES", {"llama": wrong})
    model = tiny("llama")
    with pytest.raises(AttributeError, match="no_such_norm"):
        steer.wrap(model, sites=["embed", "resid_mid[1]"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
