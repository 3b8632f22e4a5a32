"""Encoders of histories: their numbers, what empty histories and padding do, and how training starts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import steer
from steer.encoders import (
    InputAwareAttention,
    ItemTransformer,
    LearnedTokens,
    Merged,
    PerceiverResampler,
    Projector,
    masked_mean,
    to_norm,
    usual_norm,
)
from steer.encoders.blocks import Block

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# One item, none, all of them, and some.
LENGTHS = [1, 0, 5, 3]
MASK = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(width: int, *, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(4, 5, width, generator=generator(seed)), dim=-1)


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def perceiver(**settings: object) -> nn.Module:
    shape = {"scale": 3.0, "slots": 3, "width": 32, "heads": 4, "blocks": 2}
    return seeded(lambda: PerceiverResampler(13, 24, **shape | settings))


def items(**settings: object) -> nn.Module:
    shape = {"scale": 3.0, "width": 32, "heads": 4, "hidden": 40, "blocks": 2, "max_items": 12}
    return seeded(lambda: ItemTransformer(13, 24, **shape | settings))


OVER_ITEMS = {"perceiver": perceiver, "items": items, "causal": lambda: items(causal=True)}


# Aggregation.


@pytest.mark.parametrize("temperature", [1.0, 0.05, 7.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_the_papers(dtype: torch.dtype, temperature: float) -> None:
    query, keys, values = torch.randn(4, 7, generator=generator()), rows_of(7), rows_of(11, seed=1)
    query = nn.functional.normalize(query, dim=-1)
    query, keys, values = (x.to(dtype) for x in (query, keys, values))
    attention = InputAwareAttention(temperature)
    out, weights = attention(query, keys, values, MASK), attention.weights(query, keys, MASK)
    assert out.dtype == dtype
    for row, length in enumerate(LENGTHS):
        x, h, v = (t[row].double().numpy() for t in (query, keys, values))
        powers = np.exp(h[:length] @ x / temperature)
        expected = powers / powers.sum() if length else powers
        np.testing.assert_allclose(weights[row, :length].numpy(), expected, atol=1e-5)
        assert not weights[row, length:].any()
        np.testing.assert_allclose(
            out[row].double().numpy(), expected @ v[:length] if length else np.zeros(11), atol=tolerance(dtype)
        )


def test_a_high_temperature_is_the_mean_and_a_low_one_the_closest() -> None:
    query, keys, values = rows_of(7, seed=3)[:, 0], rows_of(7), rows_of(11, seed=1)
    torch.testing.assert_close(InputAwareAttention(1e6)(query, keys, values, MASK), masked_mean(values, MASK))
    closest = (keys @ query[..., None])[..., 0].masked_fill(~MASK, -math.inf).argmax(1)
    chosen = values[torch.arange(4), closest] * MASK.any(1, keepdim=True)
    torch.testing.assert_close(InputAwareAttention(1e-5)(query, keys, values, MASK), chosen)


def test_a_learned_temperature_gets_its_gradient() -> None:
    query, keys, values = rows_of(7, seed=3)[:, 0].double(), rows_of(7).double(), rows_of(11, seed=1).double()
    attention = InputAwareAttention(0.5, learned=True)

    def loss(temperature: float) -> float:
        return InputAwareAttention(temperature)(query, keys, values, MASK).square().sum().item()

    attention(query, keys, values, MASK).square().sum().backward()
    # By the temperature's logarithm.
    slope = (loss(0.5 * math.exp(1e-2)) - loss(0.5 * math.exp(-1e-2))) / 2e-2
    assert attention.log_temperature.grad.item() == pytest.approx(slope, rel=1e-2)
    assert not [p for p in InputAwareAttention(0.5).parameters() if p.requires_grad]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(steer.SteerError, match="is not a positive number"):
        InputAwareAttention(temperature)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_mean(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(4, 5, *shape, generator=generator()).to(dtype)
    means = masked_mean(values, MASK)
    assert means.dtype == dtype
    for row, length in enumerate(LENGTHS):
        own = values[row, :length].double().numpy()
        expected = own.mean(0) if length else np.zeros(shape)
        np.testing.assert_allclose(means[row].double().numpy(), expected, atol=tolerance(dtype))


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_nothing_comes_from_padding_or_from_empty_rows(junk: float) -> None:
    query = rows_of(7, seed=3)[:, 0].requires_grad_()
    keys, values = rows_of(7), rows_of(11, seed=1)
    dirty = [x.masked_fill(~MASK[..., None], junk).requires_grad_() for x in (keys, values)]
    attention = InputAwareAttention(0.3, learned=True)
    out = attention(query, *dirty, MASK)
    assert torch.equal(out, attention(query, keys, values, MASK))
    assert torch.equal(masked_mean(dirty[1], MASK), masked_mean(values, MASK))
    assert not out[1].any()
    out.square().sum().backward()
    for x in (query, *dirty, attention.log_temperature):
        assert x.grad.isfinite().all()
    assert not query.grad[1].any()
    assert not dirty[1].grad[~MASK].any()
    assert attention(query, keys[:, :0], values[:, :0], MASK[:, :0]).abs().sum() == 0


# Projection.


def test_the_second_moment_of_gelu() -> None:
    from steer.encoders.project import _GELU_SQUARE

    z = np.linspace(-12, 12, 200_001)
    gelu = z * np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in z])
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    assert np.sum(gelu**2 * density) * (z[1] - z[0]) == pytest.approx(_GELU_SQUARE, abs=1e-5)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_projector_is_two_layers_with_gelu(published: bool, normalized: bool) -> None:
    projector = seeded(lambda: Projector(7, 24, scale=540.0, normalized=normalized, published=published))
    vectors = rows_of(7)
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in projector.parameters())
    x = vectors.double().numpy() * (1 if published else math.sqrt(7))
    inner = x @ w1.T + b1
    out = inner * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(inner) @ w2.T + b2
    if normalized:
        out = out / np.linalg.norm(out, axis=-1, keepdims=True) * 540
    else:
        out = out * (540 if published else 540 / math.sqrt(24))
    found = projector(vectors)
    np.testing.assert_allclose(found.detach().numpy(), out, rtol=1e-4, atol=1e-3)
    assert projector.to(torch.bfloat16)(vectors.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("d_in", "d"), [(384, 64), (64, 1024), (768, 576)])
def test_soft_tokens_begin_at_the_scale_of_token_embeddings(d_in: int, d: int) -> None:
    vectors = nn.functional.normalize(torch.randn(64, 6, d_in, generator=generator(5)), dim=-1)
    mask = torch.ones(64, 6, dtype=torch.bool)
    made = {
        "projector": seeded(lambda: Projector(d_in, d, scale=3.0))(vectors),
        "learned": seeded(lambda: LearnedTokens(50, d_in, d, scale=3.0))(),
        "perceiver": seeded(lambda: PerceiverResampler(d_in, d, scale=3.0, width=128))(vectors, mask),
        "items": seeded(lambda: ItemTransformer(d_in, d, scale=3.0, width=96, hidden=128))(vectors, mask),
    }
    for name, tokens in made.items():
        assert tokens.norm(dim=-1).mean().item() == pytest.approx(3.0, rel=0.2), name


def test_published_weights_tell_people_apart_less_to_begin_with() -> None:
    vectors = nn.functional.normalize(torch.randn(200, 384, generator=generator()), dim=-1)

    def alike(projector: nn.Module) -> float:
        tokens = nn.functional.normalize(projector(vectors), dim=-1)
        return (tokens @ tokens.T).fill_diagonal_(0).sum().item() / (200 * 199)

    assert alike(seeded(lambda: Projector(384, 576, scale=3.0))) < 0.3
    assert alike(seeded(lambda: Projector(384, 576, scale=3.0, published=True))) > 0.8


def test_learned_tokens_are_projections_of_their_vectors() -> None:
    plain, published = (seeded(lambda p=p: LearnedTokens(3, 384, 24, scale=14.0, published=p)) for p in (False, True))
    assert torch.equal(plain(), plain.projector(plain.vectors))
    assert plain.vectors.norm(dim=-1).mean().item() == pytest.approx(1.0, rel=0.1)
    # PPlug's code: 540 / 7 in the place of 540.
    w1, b1, w2, b2 = published.projector.parameters()
    expected = nn.functional.gelu(published.vectors @ w1.T + b1) @ w2.T + b2
    torch.testing.assert_close(published(), expected * 2.0)
    plain().sum().backward()
    assert plain.vectors.grad.any()


def test_to_norm() -> None:
    vectors = torch.cat([rows_of(6)[0], torch.zeros(1, 6)])
    for dtype in DTYPES:
        norms = to_norm(vectors.to(dtype), 3.5).double().norm(dim=-1)
        torch.testing.assert_close(norms, torch.tensor([3.5] * 5 + [0.0]).double(), atol=0.02, rtol=0)


def test_the_usual_norm_is_that_of_trained_rows_and_with_the_models_own_factor() -> None:
    table = nn.Embedding(20_000, 4)
    table.weight.data = torch.tensor([3.0, 0.0, 4.0, 0.0]).repeat(20_000, 1)
    table.weight.data[::7] = 0

    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 10

    scaled = Scaled(20_000, 4)
    scaled.weight = table.weight
    assert usual_norm(table) == 5.0
    assert usual_norm(scaled) == 50.0


# Transformers over items.


def test_a_block_is_that_of_torch() -> None:
    block = seeded(lambda: Block(24, heads=3, hidden=40, depth=1)).double()
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator(), dtype=torch.float64)
    peer = nn.TransformerEncoderLayer(24, 3, 40, 0.0, "gelu", batch_first=True, norm_first=True).double().eval()
    names = {
        "self_attn.in_proj_weight": torch.cat([block.query.weight, block.key_value.weight]),
        "self_attn.in_proj_bias": torch.cat([block.query.bias, block.key_value.bias]),
        **{f"self_attn.out_proj.{k}": v for k, v in block.out.state_dict().items()},
        **{f"linear1.{k}": v for k, v in block.up.state_dict().items()},
        **{f"linear2.{k}": v for k, v in block.down.state_dict().items()},
        **{f"norm1.{k}": v for k, v in block.norm.state_dict().items()},
        **{f"norm2.{k}": v for k, v in block.mlp_norm.state_dict().items()},
    }
    peer.load_state_dict(names)
    x = torch.randn(4, 5, 24, generator=generator(), dtype=torch.float64)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(block(x, visible[None]), peer(x, src_mask=~visible))
    context = torch.randn(4, 2, 24, generator=generator(1), dtype=torch.float64)
    normed = peer.norm1(x)
    seen = torch.cat([context, normed], dim=1)
    attended = x + peer.self_attn(normed, seen, seen)[0]
    expected = attended + peer.linear2(nn.functional.gelu(peer.linear1(peer.norm2(attended))))
    torch.testing.assert_close(block(x, torch.ones(1, 1, 7, dtype=torch.bool), context), expected)


def test_item_transformer_is_torchs_encoder_between_its_own_ends() -> None:
    encoder = items().double()
    vectors = rows_of(13).double()
    x = encoder.input_norm(vectors[2:3] @ encoder.inputs.weight.T + encoder.inputs.bias)
    x = x + encoder.positions.weight[:5]
    for block in encoder.blocks:
        x = block(x, torch.ones(1, 5, 5, dtype=torch.bool))
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = (normed @ encoder.out.weight.T + encoder.out.bias) * 3.0 / math.sqrt(24)
    torch.testing.assert_close(encoder(vectors, MASK)[2:3], expected)


@pytest.mark.parametrize("name", OVER_ITEMS)
def test_each_row_is_what_it_is_alone(name: str) -> None:
    encoder, vectors = OVER_ITEMS[name](), rows_of(13)
    out = encoder(vectors.masked_fill(~MASK[..., None], math.nan), MASK)
    for row, length in enumerate(LENGTHS):
        alone = encoder(vectors[row : row + 1, :length], torch.ones(1, length, dtype=torch.bool))
        torch.testing.assert_close(out[row : row + 1, : alone.shape[1]], alone, atol=1e-5, rtol=1e-5)
        if name != "perceiver":
            assert not out[row, length:].any()


@pytest.mark.parametrize("name", OVER_ITEMS)
def test_padding_may_stand_in_front(name: str) -> None:
    encoder, vectors = OVER_ITEMS[name](), rows_of(13)
    front = MASK.flip(1)
    moved = torch.zeros_like(vectors)
    moved[front] = vectors[MASK]
    out, there = encoder(vectors, MASK), encoder(moved, front)
    if name == "perceiver":
        torch.testing.assert_close(there, out)
    else:
        torch.testing.assert_close(there[front], out[MASK])


@pytest.mark.parametrize("name", OVER_ITEMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_finite_and_reach_everything(name: str, dtype: torch.dtype) -> None:
    encoder = OVER_ITEMS[name]().to(dtype)
    vectors = rows_of(13).to(dtype).requires_grad_()
    out = encoder(vectors, MASK)
    assert out.dtype == dtype
    out[:, :, 0].square().sum().backward()
    assert vectors.grad.isfinite().all()
    assert not vectors.grad[~MASK].any()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
    torch.testing.assert_close(out.float(), OVER_ITEMS[name]()(vectors.float(), MASK), atol=0.15, rtol=0.1)


def test_the_perceiver_does_not_see_the_order_of_items() -> None:
    encoder, vectors = perceiver(), rows_of(13)
    order = torch.randperm(5, generator=generator())
    out = encoder(vectors, MASK)
    torch.testing.assert_close(encoder(vectors[:, order], MASK[:, order]), out)
    assert out.shape == (4, 3, 24)
    # But it sees the items, and nobody's latents are alike.
    assert (out - encoder(rows_of(13, seed=9), MASK)).abs().amax((1, 2))[[0, 2, 3]].min() > 0.01
    assert (out[:, 0] - out[:, 1]).abs().max() > 0.01


def test_a_perceiver_without_items_is_what_its_latents_are() -> None:
    encoder = perceiver()
    nobody = encoder(torch.zeros(1, 0, 13), torch.ones(1, 0, dtype=torch.bool))
    assert nobody.isfinite().all()
    assert nobody.any()
    torch.testing.assert_close(encoder(rows_of(13), MASK)[1:2], nobody)


def test_items_see_what_they_may() -> None:
    vectors, mask = rows_of(13), torch.ones(4, 5, dtype=torch.bool)
    for causal in (True, False):
        encoder = items(causal=causal)
        other = vectors.clone()
        other[:, 3] = vectors[:, 0]
        changed = (encoder(vectors, mask) - encoder(other, mask)).abs().amax((0, 2)) > 1e-4
        assert changed.tolist() == [not causal] * 3 + [True, True]


def test_items_have_positions() -> None:
    encoder, vectors = items(), rows_of(13)
    out = encoder(vectors, torch.ones(4, 5, dtype=torch.bool))
    turned = encoder(vectors.flip(1), torch.ones(4, 5, dtype=torch.bool)).flip(1)
    assert (out - turned).abs().max() > 0.01
    with pytest.raises(steer.SteerError, match="13 items in a row"):
        encoder(torch.zeros(1, 13, 13), torch.ones(1, 13, dtype=torch.bool))


@pytest.mark.parametrize("make", [perceiver, items])
def test_heads_divide_the_width(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(steer.SteerError, match="a width of 32 cannot be divided among 5 heads"):
        make(heads=5)


@pytest.mark.parametrize("name", [*OVER_ITEMS, "attention"])
def test_one_graph_whoever_is_in_the_batch(name: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    if name == "attention":
        inner = InputAwareAttention(0.1)
        encoder: Callable[..., torch.Tensor] = lambda x, mask: inner(x[:, 0], x, x, mask)  # noqa: E731
    else:
        encoder = OVER_ITEMS[name]()
    compiled = torch.compile(encoder, backend=count, fullgraph=True, dynamic=False)
    for seed in range(3):
        vectors, mask = rows_of(13, seed=seed), MASK.roll(seed, 0)
        torch.testing.assert_close(compiled(vectors, mask), encoder(vectors, mask))
    assert len(graphs) == 1


# Merging.


def documents(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 6, generator=generator(seed))


def test_merged_is_the_mean_of_all() -> None:
    all_of_them = documents(37)
    merged = Merged.of(all_of_them[:20]) + Merged.of(all_of_them[20:36]) + Merged.of(all_of_them[36:])
    assert merged.count == 37
    assert merged.mean.dtype == torch.float32
    np.testing.assert_allclose(merged.mean.numpy(), all_of_them.double().numpy().mean(0), rtol=1e-6, atol=1e-9)
    mask = torch.ones(1, 37, dtype=torch.bool)
    torch.testing.assert_close(merged.mean[None], masked_mean(all_of_them[None], mask))


def test_a_document_that_is_taken_out_leaves_no_trace() -> None:
    kept, gone = documents(50), documents(9, seed=1) * 100
    forgotten = Merged.of(kept[:25]) + Merged.of(gone) + Merged.of(kept[25:])
    for document in gone:
        forgotten = forgotten - Merged.of(document[None])
    assert torch.equal(forgotten.total, Merged.of(kept.flip(0)).total)
    assert forgotten.count == 50


def test_nothing_is_zeros_and_nothing_more_can_be_taken() -> None:
    nothing = Merged.of(documents(0))
    assert torch.equal(nothing.mean, torch.zeros(4, 6))
    one = Merged.of(documents(1))
    assert torch.equal((one - one).total, nothing.total)
    assert torch.equal((nothing + one).mean, documents(1)[0])
    with pytest.raises(steer.SteerError, match="1 documents cannot be taken out of 0"):
        _ = nothing - one
    with pytest.raises(steer.SteerError, match="soft tokens of 4 × 6 and 1 × 6"):
        _ = one + Merged.of(documents(1)[:, :1])
