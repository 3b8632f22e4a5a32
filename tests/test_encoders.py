"""Pooling: over the right tokens, never over the first of a sequence."""

from __future__ import annotations

import pytest
import torch

from steer.encoders import last_token, mean_over_response, median_norm

HIDDEN = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
# The first token is the outlier that it is in real models.
HIDDEN[:, 0] *= 1000
STARTS, ENDS = torch.tensor([0, 2, 3]), torch.tensor([4, 6, 5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pooling(dtype: torch.dtype) -> None:
    hidden = HIDDEN.to(dtype)
    tokens = [hidden[row, max(start, 1) : end].float() for row, (start, end) in enumerate([(0, 4), (2, 6), (3, 5)])]
    mean, last, norms = (pool(hidden, STARTS, ENDS) for pool in (mean_over_response, last_token, median_norm))
    torch.testing.assert_close(mean, torch.stack([own.mean(0) for own in tokens]))
    assert torch.equal(last, torch.stack([own[-1] for own in tokens]))
    torch.testing.assert_close(norms, torch.stack([own.norm(dim=1).median() for own in tokens]))
    assert mean.dtype == last.dtype == norms.dtype == torch.float32


def test_padding_does_not_count() -> None:
    padded = torch.cat([HIDDEN, torch.full((3, 4, 5), 1e6)], dim=1)
    for pool in (mean_over_response, last_token, median_norm):
        torch.testing.assert_close(pool(padded, STARTS, ENDS), pool(HIDDEN, STARTS, ENDS))
