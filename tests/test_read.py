"""Reading: what texts share is run once, memory does not grow, and nothing of this shows in what is read."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from models import BOS, VARIANTS, VOCABULARY, WIDTH, tiny, tokenizer
from rows import assert_close
from torch import Tensor

import steer
from steer.cache import Cache
from steer.encoders import Moments
from steer.read import Batch, Span, read, read_batches, response_span

SITE = steer.Site("resid_post", 1)


def random_ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(5, VOCABULARY) for _ in range(length)]


def sharing_spans(rng: random.Random, root: int = 11) -> list[Span]:
    """Pairs and triples that answer one prompt, prompts of their own, bare texts; all prompts begin alike."""
    beginning = random_ids(rng, root)
    prompts = [beginning + random_ids(rng, length) for length in (9, 21, 14, 9, 3, 12, 17)]
    spans = []
    for prompt, responses in zip(prompts, (2, 3, 2, 2, 2, 1, 1), strict=True):
        for _ in range(responses):
            ids = prompt + random_ids(rng, rng.randint(1, 19))
            spans.append(Span(ids, len(prompt), len(ids)))
    for length in (2, 30):
        spans.append(Span(random_ids(rng, length), 0, length))
    # Only a part of a response, and a prompt of a single token.
    spans.append(Span([*prompts[0], *random_ids(rng, 9)], len(prompts[0]) + 3, len(prompts[0]) + 6))
    spans.append(Span(random_ids(rng, 6), 1, 6))
    rng.shuffle(spans)
    return spans


@contextmanager
def counted(lm: steer.FrozenLM) -> Iterator[list[int]]:
    """The number of tokens, with padding, of each forward pass."""
    passes: list[int] = []
    handle = lm.attachment.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield passes
    handle.remove()


@pytest.mark.parametrize("architecture", VARIANTS)
@pytest.mark.parametrize("root", [0, 11], ids=["", "common-beginning"])
def test_what_texts_share_is_run_once_and_changes_nothing(architecture: str, root: int) -> None:
    spans = sharing_spans(random.Random(root), root)
    sites = [steer.Site("embed"), SITE, steer.Site("z", 2), steer.Site("attn_out", 0)]
    with steer.wrap(tiny(architecture), tokenizer()) as lm:
        for pool in ("last", "mean"):
            # A single text has nobody to share with.
            alone = [read(lm, [span], sites, pool=pool) for span in spans]
            for batch_tokens in (60, 4096):
                together = read(lm, spans, sites, pool=pool, batch_tokens=batch_tokens)
                for site in sites:
                    assert_close(together[site].pooled, torch.cat([one[site].pooled for one in alone]), 1e-5)
                    assert_close(together[site].norms, torch.cat([one[site].norms for one in alone]), 1e-5)


@pytest.mark.parametrize("site", ["embed", "resid_pre[0]", "resid_post[0]", "z[0]", "ln_final"])
def test_sharing_up_to_any_site(lm: steer.FrozenLM, site: str) -> None:
    """Up to the embedding there are no keys and values that could be shared."""
    spans = sharing_spans(random.Random(1))
    (together,) = read(lm, spans, [site]).values()
    alone = [next(iter(read(lm, [span], [site]).values())).pooled for span in spans]
    assert_close(together.pooled, torch.cat(alone), 1e-5)


def test_a_shared_prompt_is_not_run_twice(llama: steer.FrozenLM) -> None:
    rng = random.Random(2)
    prompts = [random_ids(rng, 40) for _ in range(6)]
    spans = [Span(prompt + random_ids(rng, 5), 40, 45) for prompt in prompts for _ in range(2)]
    with counted(llama) as passes:
        read(llama, spans, [SITE])
    # Each prompt once without its last token, which goes with the five of each response.
    assert passes == [6 * 39, 12 * 6]
    with counted(llama) as passes:
        read(llama, [spans[0], spans[2]], [SITE])
    assert passes == [2 * 45]


def test_half_precision_shares_too(arch: str) -> None:
    spans = sharing_spans(random.Random(3))
    with steer.wrap(tiny(arch, dtype=torch.bfloat16), tokenizer()) as lm:
        pooled = read(lm, spans, [SITE], pool="mean")[SITE].pooled
        alone = torch.cat([read(lm, [span], [SITE], pool="mean")[SITE].pooled for span in spans])
    assert_close(pooled, alone, 0.1)


def test_tokens_after_a_span_are_not_run(llama: steer.FrozenLM) -> None:
    ids = random_ids(random.Random(4), 40)
    with counted(llama) as passes:
        part = read(llama, [Span(ids, 3, 10)], [SITE])[SITE]
    assert passes == [10]
    assert_close(part.pooled, read(llama, [Span(ids[:10], 3, 10)], [SITE])[SITE].pooled)


def test_a_pool_may_be_a_function(lm: steer.FrozenLM) -> None:
    def largest(hidden: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        return torch.stack([h[max(a, 1) : b].amax(0) for h, a, b in zip(hidden, starts, ends, strict=True)])

    spans = sharing_spans(random.Random(5))
    pooled = read(lm, spans, [SITE], pool=largest)[SITE].pooled
    for row, span in zip(pooled, spans, strict=True):
        with torch.no_grad():
            hidden = lm.model(torch.tensor([list(span.ids)]), output_hidden_states=True).hidden_states[2][0]
        assert_close(row, hidden[max(span.start, 1) : span.end].amax(0), 1e-5)


def test_norms_are_each_texts_median(llama: steer.FrozenLM) -> None:
    spans = sharing_spans(random.Random(6))
    reading = read(llama, spans, [SITE])[SITE]
    medians = []
    for span in spans:
        with torch.no_grad():
            hidden = llama.model(torch.tensor([list(span.ids)]), output_hidden_states=True).hidden_states[2][0]
        norms = np.sort(hidden[max(span.start, 1) : span.end].norm(dim=1).numpy())
        medians.append(norms[(len(norms) - 1) // 2])
    np.testing.assert_allclose(reading.norms.numpy(), medians, rtol=1e-5)
    assert reading.norm == pytest.approx(np.mean(medians), rel=1e-6)


# Streams.


def test_a_stream_is_read_like_a_list(llama: steer.FrozenLM) -> None:
    spans = sharing_spans(random.Random(7)) * 3
    whole = read(llama, spans, [SITE], pool="mean")[SITE]
    streamed = read(llama, iter(spans), [SITE], pool="mean")[SITE]
    assert torch.equal(streamed.pooled, whole.pooled)
    pieces: dict[int, Tensor] = {}
    for batch in read_batches(llama, iter(spans), [SITE], pool="mean", window=7):
        pieces |= zip(batch.indices, batch.pooled[SITE], strict=True)
        # The model is free meanwhile.
        assert llama.generate_tokens([[5, 6]], max_new_tokens=1)
    assert sorted(pieces) == list(range(len(spans)))
    assert_close(torch.stack([pieces[i] for i in range(len(spans))]), whole.pooled, 1e-5)


def live() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    return sum(o.nbytes for o in gc.get_objects() if type(o) is Tensor and o.layout is torch.strided)


def test_memory_does_not_grow_with_the_number_of_texts(llama: steer.FrozenLM) -> None:
    rng, window = random.Random(8), 8
    made: list[weakref.ref[Span]] = []

    def stream(count: int) -> Iterator[Span]:
        for _ in range(count):
            span = Span(random_ids(rng, 8), 2, 8)
            made.append(weakref.ref(span))
            yield span

    def passed(count: int) -> tuple[int, int]:
        """The most spans and the most bytes there are at any batch, beyond those before."""
        before, spans, bytes_ = live(), 0, 0
        total: Moments | None = None
        for batch in read_batches(llama, stream(count), [SITE], pool="mean", window=window, batch_tokens=64):
            part = Moments.of(batch.pooled[SITE], covariance=True)
            total = part if total is None else total + part
            spans, bytes_ = max(spans, sum(one() is not None for one in made)), max(bytes_, live() - before)
        assert total is not None
        assert total.count == count
        return spans, bytes_

    few, many = passed(2 * window), passed(6 * window)
    assert few[0] <= window + 1
    assert many[0] <= window + 1
    assert many[1] <= 1.1 * few[1]


def test_moments_are_those_of_all_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    # Far from zero, where one-pass formulas in float32 lose everything.
    rows = 1000 + torch.randn(97, 7, generator=generator) * torch.arange(1, 8)
    parts = [Moments.of(part, covariance=True) for part in rows.split([1, 40, 13, 43])]
    total = parts[0] + (parts[1] + parts[2]) + parts[3]
    expected = rows.double().numpy()
    assert total.count == 97
    np.testing.assert_allclose(total.mean.numpy(), expected.mean(0), rtol=1e-14)
    np.testing.assert_allclose(total.covariance.numpy(), np.cov(expected.T), rtol=1e-10, atol=1e-10)
    rest, wanted = total - parts[1], np.delete(expected, np.s_[1:41], axis=0)
    assert rest.count == 57
    np.testing.assert_allclose(rest.mean.numpy(), wanted.mean(0), rtol=1e-13)
    np.testing.assert_allclose(rest.covariance.numpy(), np.cov(wanted.T), rtol=1e-9, atol=1e-9)
    assert (Moments.of(rows[:2]) + parts[1]).scatter is None


# What is refused, told and kept.


def test_readings_that_cannot_be(llama: steer.FrozenLM, tmp_path: Path) -> None:
    with pytest.raises(steer.SteerError, match="nothing to read"):
        read(llama, [], [SITE])
    with pytest.raises(steer.SteerError, match="nothing to read"):
        read(llama, [Span([5, 6], 0, 2)], [])
    with pytest.raises(steer.SteerError, match="pool='max' is not one of last, mean"):
        read(llama, [Span([5, 6], 0, 2)], [SITE], pool="max")  # type: ignore[arg-type]
    for pool, start, end, count in (("mean", 0, 1, 3), ("mean", 2, 2, 3), ("last", 2, 2, 3), ("last", 0, 4, 3)):
        with pytest.raises(steer.SteerError, match=rf"\[{start}, {end}\) of {count} tokens holds none"):
            read(llama, [Span([5] * count, start, end)], [SITE], pool=pool)  # type: ignore[arg-type]
    with pytest.raises(steer.SteerError, match="give pool by name"):
        read(llama, [Span([5, 6], 0, 2)], [SITE], pool=lambda h, a, b: h[:, 0], cache=Cache(tmp_path / "c"))
    assert llama.generate_tokens(["still free"], max_new_tokens=2)


def test_a_single_token_has_a_last_state_and_no_norm(llama: steer.FrozenLM) -> None:
    spans = [Span([7], 0, 1), Span([7, 8, 9], 1, 3)]
    reading = read(llama, spans, [SITE])[SITE]
    with torch.no_grad():
        expected = llama.model(torch.tensor([[7]]), output_hidden_states=True).hidden_states[2][0, 0]
    assert_close(reading.pooled[0], expected)
    assert reading.norms.isnan().tolist() == [True, False]
    assert reading.norm == pytest.approx(reading.norms[1].item())


def test_progress_counts_texts(llama: steer.FrozenLM) -> None:
    spans, told = sharing_spans(random.Random(9)), []
    read(llama, spans, [SITE], batch_tokens=100, on_progress=told.append)
    assert told == sorted(set(told))
    assert told[-1] == len(spans)
    assert len(told) > 3


def test_texts_in_a_cache_are_not_read_again(llama: steer.FrozenLM, tmp_path: Path) -> None:
    cache, spans = Cache(tmp_path / "readings"), sharing_spans(random.Random(10))
    sites = [SITE, steer.Site("z", 0)]
    first = read(llama, spans[:9], sites, pool="mean", cache=cache)
    with counted(llama) as passes:
        again = read(llama, spans[:9], sites, pool="mean", cache=cache)
    assert passes == []
    for site in sites:
        assert torch.equal(again[site].pooled, first[site].pooled)
        assert torch.equal(again[site].norms, first[site].norms)
    plain = read(llama, spans, sites, pool="mean")
    with counted(llama) as passes:
        more = read(llama, spans, sites, pool="mean", cache=cache)
    assert 0 < sum(passes) < sum(span.end for span in spans[9:]) + 60
    for site in sites:
        assert_close(more[site].pooled, plain[site].pooled, 1e-5)


def test_a_reading_is_kept_for_what_it_depends_on_only(llama: steer.FrozenLM, tmp_path: Path) -> None:
    cache, span = Cache(tmp_path / "readings"), Span([7, 8, 9, 10], 1, 4)
    read(llama, [span], [SITE], cache=cache)
    with (
        steer.wrap(tiny("llama", seed=1), tokenizer()) as other,
        steer.wrap(tiny("llama", dtype=torch.bfloat16), tokenizer()) as rounded,
    ):
        for lm, one, site, pool in [
            (llama, Span([7, 8, 9, 11], 1, 4), SITE, "last"),
            (llama, Span([7, 8, 9, 10], 2, 4), SITE, "last"),
            (llama, Span([7, 8, 9, 10], 1, 3), SITE, "last"),
            (llama, span, steer.Site("resid_post", 0), "last"),
            (llama, span, SITE, "mean"),
            (other, span, SITE, "last"),
            (rounded, span, SITE, "last"),
        ]:
            with counted(lm) as passes:
                read(lm, [one], [site], pool=pool, cache=cache)  # type: ignore[arg-type]
            assert len(passes) == 1
    # What stands after the span does not matter.
    with counted(llama) as passes:
        read(llama, [Span([7, 8, 9, 10, 11], 1, 4)], [SITE], cache=cache)
    assert passes == []


def test_batches_name_their_texts(llama: steer.FrozenLM) -> None:
    spans = sharing_spans(random.Random(11))
    batches: list[Batch] = list(read_batches(llama, spans, ["resid_pre[1]"], batch_tokens=50))
    (site,) = batches[0].pooled
    assert site == steer.Site("resid_post", 0)
    assert all(batch.pooled[site].shape == (len(batch.indices), WIDTH) for batch in batches)


@pytest.mark.parametrize("bos", [True, False])
def test_a_prompt_that_is_cut_keeps_its_bos_token(bos: bool) -> None:
    with steer.wrap(tiny("llama"), tokenizer(bos=bos)) as lm:
        whole = response_span(lm, "so it is.", "one two three four")
        span = response_span(lm, "so it is.", "one two three four", max_tokens=24)
        head = whole.ids[: whole.start]
        assert span.ids[: span.start] == ([BOS, *head[-11:]] if bos else head[-12:])
        assert span.ids[span.start :] == whole.ids[whole.start :]
