"""Reading and writing go through the same sites, and the sites are where their names say."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from models import LAYERS, VARIANTS, WIDTH, tiny, tokenizer
from rows import assert_close, text
from torch import Tensor, nn

import steer
from steer.read import Span, read
from steer.sites import PER_BLOCK, Site
from steer.view import read_tokens

LAST = LAYERS - 1


def pair(seed: int) -> tuple[list[int], list[int]]:
    """Two prompts that differ in their last token only."""
    rng = random.Random(seed)
    ids = tokenizer()(text(rng, 5, 14)).input_ids
    return ids, [*ids[:-1], ids[-1] - 1]


PAIRS = [pair(seed) for seed in range(4)]
HERE, THERE = [a for a, _ in PAIRS], [b for _, b in PAIRS]
# Single tokens, so that an edit of every position is an edit of one.
ONES, OTHERS = [[20], [30], [40]], [[50], [60], [21]]


@pytest.fixture(params=VARIANTS)
def lm(request: pytest.FixtureRequest) -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny(request.param), tokenizer()) as lm:
        yield lm


def parallel(lm: steer.FrozenLM) -> bool:
    return lm.attachment.architecture.mid is None


def post_norm(lm: steer.FrozenLM) -> bool:
    """Whether the stream itself is normed after every addition."""
    return not getattr(lm.model.config.get_text_config(), "do_layer_norm_before", True)


def states(lm: steer.FrozenLM, site: Site | str, prompts: Sequence[list[int]] = HERE) -> Tensor:
    """What the model has at a site, at the last token of each prompt."""
    site = Site.parse(site)
    spans = [Span(ids, 0, len(ids)) for ids in prompts]
    return read(lm, spans, [site], batch_tokens=20)[site.canonical()].pooled


def last_site(lm: steer.FrozenLM) -> Site:
    """What the head reads."""
    return Site("resid_post", LAST) if lm.attachment.architecture.final_norm is None else Site("ln_final")


def single_states(lm: steer.FrozenLM, site: Site | str, prompts: Sequence[list[int]]) -> Tensor:
    """The same for prompts of one token, which `read` leaves to others: a first token never counts."""
    site = Site.parse(site).canonical()
    return torch.cat([read_tokens(lm, ids, [site])[site] for ids in prompts])


def run(lm: steer.FrozenLM, prompts: Sequence[list[int]], **kwargs: object) -> tuple[Tensor, list[Tensor]]:
    """Logits and hidden states at the last token of each prompt, from one left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    arguments = {"input_ids": ids, "attention_mask": mask}
    if lm.attachment.architecture.takes_position_ids:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        output = lm.model(**arguments, output_hidden_states=True)
    return output.logits[:, -1], [hidden[:, -1] for hidden in output.hidden_states]


def steered(
    lm: steer.FrozenLM,
    site: Site | str,
    vectors: Tensor,
    prompts: Sequence[list[int]] = HERE,
    positions: str = "response",
) -> tuple[Tensor, list[Tensor]]:
    edit = steer.ResidualEdit(Site.parse(site), vectors, positions)  # type: ignore[arg-type]
    with lm.steered(edits=[edit], prompt_lengths=[len(ids) for ids in prompts]):
        return run(lm, prompts)


def test_reading_agrees_with_transformers_hidden_states(lm: steer.FrozenLM) -> None:
    _, hidden = run(lm, HERE)
    assert_close(states(lm, "resid_pre[0]"), hidden[0])
    for layer in range(LAST):
        assert_close(states(lm, f"resid_post[{layer}]"), hidden[layer + 1])
    # The last entry is what the head reads.
    last, norm = states(lm, f"resid_post[{LAST}]"), lm.attachment.architecture.final_norm
    assert_close(last if norm is None else lm.attachment.decoder.get_submodule(norm)(last), hidden[-1])
    if norm is not None:
        assert_close(states(lm, "ln_final"), hidden[-1])


def test_the_parts_add_up(lm: steer.FrozenLM) -> None:
    logits, _ = run(lm, HERE)
    assert_close(states(lm, "embed"), lm.model.get_input_embeddings()(torch.tensor([ids[-1] for ids in HERE])))
    head, cap = (
        lm.model.get_output_embeddings(),
        getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None),
    )
    read_by_head = head(states(lm, last_site(lm)))
    assert_close(read_by_head if cap is None else cap * torch.tanh(read_by_head / cap), logits)
    for layer in range(LAYERS):
        before, after = states(lm, f"resid_pre[{layer}]"), states(lm, f"resid_post[{layer}]")
        attention, feed_forward = states(lm, f"attn_out[{layer}]"), states(lm, f"mlp_out[{layer}]")
        block = lm.attachment.blocks[layer]
        if post_norm(lm):
            mid = block.self_attn_layer_norm(before + attention)
            assert_close(block.final_layer_norm(mid + feed_forward), after)
        else:
            mid = before + attention
            assert_close(mid + feed_forward, after)
        if not parallel(lm):
            assert_close(states(lm, f"resid_mid[{layer}]"), mid)
        projected = block.get_submodule(lm.attachment.architecture.z)(states(lm, f"z[{layer}]"))
        if lm.model.config.get_text_config().model_type in ("gemma2", "gemma3_text", "olmo2"):
            projected = block.post_attention_layernorm(projected)
        assert_close(attention, projected)


def test_sites_read_together_are_the_sites_read_one_by_one(lm: steer.FrozenLM) -> None:
    names = [name for name in PER_BLOCK if name != "resid_mid" or not parallel(lm)]
    sites = [Site(name, layer) for name in names for layer in range(LAYERS)]
    sites += [Site("embed"), *([] if last_site(lm).layer is not None else [Site("ln_final")])]
    together = read(lm, [Span(ids, 0, len(ids)) for ids in HERE], sites)
    # The input of a block is the output of the block before.
    assert len(together) == len(sites) - (LAYERS - 1)
    for site in sites:
        assert_close(together[site.canonical()].pooled, states(lm, site), 1e-5)


RESIDUAL = [
    "embed",
    "ln_final",
    *(f"{name}[{layer}]" for name in ("resid_pre", "resid_mid", "resid_post") for layer in range(LAYERS)),
]


@pytest.mark.parametrize("site", RESIDUAL)
def test_moving_the_residual_stream_from_one_prompt_to_another(lm: steer.FrozenLM, site: str) -> None:
    """All that the last position passes on goes through such a site, and what it looks back at is the same."""
    if "mid" in site and parallel(lm):
        pytest.skip("attention and feed-forward are parallel")
    if site == "ln_final" and last_site(lm).layer is not None:
        pytest.skip("the head reads the last block")
    there, hidden_there = run(lm, THERE)
    difference = states(lm, site, THERE) - states(lm, site, HERE)
    logits, hidden = steered(lm, site, difference)
    assert_close(logits, there)
    assert_close(hidden[-1], hidden_there[-1])
    assert (run(lm, HERE)[0] - there).abs().max(-1).values.min() > 0.1
    whole = single_states(lm, site, OTHERS) - single_states(lm, site, ONES)
    assert_close(steered(lm, site, whole, ONES, positions="all")[0], run(lm, OTHERS)[0])


@pytest.mark.parametrize(
    "site", ["embed", "resid_mid[1]", *(f"{name}[1]" for name in PER_BLOCK if name != "resid_mid")]
)
def test_a_clamped_projection_is_what_is_read_at_its_site(lm: steer.FrozenLM, site: str) -> None:
    """Exactly the target is seen behind the edit, and beside the direction nothing has moved."""
    where = lm.memory_site(Site.parse(site))
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(HERE), lm.width_at(where), generator=generator)
    units = directions / directions.norm(dim=1, keepdim=True)
    targets = torch.tensor([3.0, -1.0, 0.0, 10.0])
    before = states(lm, where)
    edit = steer.ProjectionEdit(where, directions, targets)
    seen: list[Tensor] = []
    with lm.steered(edits=[edit], prompt_lengths=[len(ids) for ids in HERE]):
        slot = lm.attachment.slots[where]
        slot.operators = (*slot.operators, lambda hidden: seen.append(hidden[:, -1].clone()) or hidden)
        run(lm, HERE)
    assert_close((seen[0] * units).sum(1), targets, 1e-5)
    beside = [hidden - (hidden * units).sum(1, keepdim=True) * units for hidden in (seen[0], before)]
    assert_close(*beside)
    assert (seen[0] - before).abs().max() > 0.1


@pytest.mark.parametrize("site", [site for site in RESIDUAL if site != "ln_final"])
def test_a_low_rank_map_moves_one_prompt_to_another(lm: steer.FrozenLM, site: str) -> None:
    """With R of rank 1 along the difference, W = 0, and b where the other prompt is on it."""
    if "mid" in site and parallel(lm):
        pytest.skip("attention and feed-forward are parallel")
    there = states(lm, site, THERE)
    difference = there - states(lm, site, HERE)
    rotation = (difference / difference.norm(dim=1, keepdim=True))[:, None]
    edit = steer.LowRankEdit(Site.parse(site), rotation, 0 * rotation, (there[:, None] * rotation).sum(-1))
    with lm.steered(edits=[edit], prompt_lengths=[len(ids) for ids in HERE]):
        logits, _ = run(lm, HERE)
    assert_close(logits, run(lm, THERE)[0])
    clamp = steer.ProjectionEdit(Site.parse(site), difference, (there * rotation[:, 0]).sum(1))
    with lm.steered(edits=[clamp], prompt_lengths=[len(ids) for ids in HERE]):
        assert_close(run(lm, HERE)[0], logits)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", ["attn_out", "mlp_out"])
def test_what_a_part_adds_is_added_to_the_residual_stream(lm: steer.FrozenLM, name: str, layer: int) -> None:
    """The difference that the stream has after the part, put into the part, moves the stream."""
    if post_norm(lm):
        pytest.skip("the stream is normed after the addition")
    after = "resid_mid" if name == "attn_out" and not parallel(lm) else "resid_post"
    difference = states(lm, f"{after}[{layer}]", THERE) - states(lm, f"{after}[{layer}]", HERE)
    assert_close(steered(lm, f"{name}[{layer}]", difference)[0], run(lm, THERE)[0])


@pytest.mark.parametrize("name", ["attn_out", "mlp_out", "z"])
def test_parts_are_moved_as_a_hook_by_hand_would(lm: steer.FrozenLM, name: str) -> None:
    site, paths = Site(name, 1), lm.attachment.architecture
    here, there = states(lm, site), states(lm, site, THERE)
    module = lm.attachment.blocks[1].get_submodule(
        {"attn_out": paths.attn_out, "mlp_out": paths.mlp_out, "z": paths.z}[name]
    )

    def replace_last(hidden: Tensor) -> Tensor:
        shape = hidden.shape
        # OPT's feed-forward sees rows and positions as one dimension.
        hidden = hidden.view(len(HERE), -1, shape[-1])
        return torch.cat([hidden[:, :-1], there[:, None]], dim=1).view(shape)

    def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (replace_last(args[0]),)

    def after(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return (replace_last(output[0]), *output[1:]) if isinstance(output, tuple) else replace_last(output)

    handle = module.register_forward_pre_hook(before) if name == "z" else module.register_forward_hook(after)
    expected, _ = run(lm, HERE)
    handle.remove()
    assert_close(steered(lm, site, there - here)[0], expected)
    assert (expected - run(lm, HERE)[0]).abs().max() > 0.1


@pytest.mark.parametrize("captured_before", [False, True], ids=["fresh", "captured before wrapping"])
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_capture_shows_the_steered_values(name: str, captured_before: bool) -> None:
    model = tiny(name)
    if captured_before:
        model(torch.tensor(HERE[:1]), output_hidden_states=True)
    with steer.wrap(model, tokenizer()) as lm:
        vectors = torch.randn(len(HERE), lm.width, generator=torch.Generator().manual_seed(0))
        _, plain = run(lm, HERE)
        _, hidden = steered(lm, "resid_post[0]", vectors)
    assert torch.equal(hidden[0], plain[0])
    assert_close(hidden[1], plain[1] + vectors)
    assert not torch.isclose(hidden[2], plain[2] + vectors).all()


def test_gradients_pass_the_place_that_is_edited_in_place(lm: steer.FrozenLM) -> None:
    """By finite differences, in the direction of the gradient. Small ones, as OPT has a ReLU."""
    site = lm.memory_site(Site("resid_mid", 1))

    def loss(vectors: Tensor) -> Tensor:
        edit = steer.ResidualEdit(site, vectors)
        with lm.steered(edits=[edit], prompt_lengths=[len(HERE[0])]):
            return lm.model(torch.tensor([HERE[0]])).logits[0, -1].log_softmax(-1)[7]

    vectors = torch.zeros(1, lm.width, requires_grad=True)
    loss(vectors).backward()
    assert vectors.grad is not None
    step = 0.001 * vectors.grad / vectors.grad.norm()
    with torch.no_grad():
        slope = (loss(step) - loss(-step)) / (2 * 0.001)
    assert slope.item() == pytest.approx(vectors.grad.norm().item(), rel=0.05)
    assert slope > 0.01


def test_a_site_that_the_architecture_does_not_have() -> None:
    with steer.wrap(tiny("gpt_neox")) as lm, pytest.raises(steer.SteerError, match=r"parallel.*use resid_post\[1\]"):
        lm.declare("resid_mid[1]")


def test_the_head_of_a_model_without_a_final_norm() -> None:
    with steer.wrap(tiny("opt_post_norm")) as lm, pytest.raises(steer.SteerError, match=r"head reads resid_post\[2\]"):
        lm.declare("ln_final")


def test_embeddings_that_are_narrower_than_the_stream() -> None:
    with steer.wrap(tiny("opt_narrow"), tokenizer()) as lm:
        assert lm.width == WIDTH
        assert [lm.width_at(Site(name)) for name in ("embed", "ln_final")] == [32, 32]
        prefix = steer.PrefixEdit.from_rows([torch.randn(2, 32)], 32)
        assert lm.generate_tokens(["x"], edits=[prefix], max_new_tokens=4) != lm.generate_tokens(
            ["x"], max_new_tokens=4
        )
        with pytest.raises(steer.SteerError, match="prefixes are 48 wide, the model is 32 wide there"):
            lm.generate(["x"], edits=[steer.PrefixEdit.from_rows([torch.randn(2, WIDTH)], WIDTH)])


def test_nothing_is_read_while_the_model_is_steered(llama: steer.FrozenLM) -> None:
    edit = steer.ResidualEdit(Site("embed"), torch.ones(1, llama.width), positions="all")
    with llama.steered(edits=[edit]):
        run(llama, HERE[:1])
        with pytest.raises(steer.SteerError, match="already steered"):
            states(llama, "embed")
