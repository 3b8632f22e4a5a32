"""Companions: other models whose logits take part in the mixtures of a batch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from transformers.generation.configuration_utils import GenerationMode

from steer.errors import SteerError
from steer.inject.stream_rows import pad_left

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import GenerationConfig

    from steer.model import FrozenLM


class Companion:
    """Rows of another model that read the tokens which are chosen for their owners: one forward pass a token.

    It decodes in its own cache, of the kind that the generation has, and compiled where that is.

    Args:
        lm: the other model.
        rows: token ids of the rows' prompts.
        owners: for each row, the batch's row whose tokens it reads.
        config: of the generation.
        tokens: how many may be chosen.
    """

    def __init__(
        self,
        lm: FrozenLM,
        rows: Sequence[Sequence[int]],
        owners: Int[Tensor, " stream"],
        config: GenerationConfig,
        tokens: int,
    ) -> None:
        self._lm, self._model = lm, cast(Any, lm.model)
        self._config = config
        self._owners = owners
        ids, mask = pad_left(rows, lm.pad_token_id)
        self._ids = ids.to(lm.device)
        self._kwargs: dict[str, Any] = {"attention_mask": mask.to(lm.device), "use_cache": True}
        if lm.attachment.architecture.takes_position_ids:
            self._kwargs["position_ids"] = (self._kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in inspect.signature(lm.model.forward).parameters:
            self._kwargs["logits_to_keep"] = 1
        self._model._prepare_cache_for_generation(
            _of_single_rows(config), self._kwargs, GenerationMode.GREEDY_SEARCH, len(rows), ids.shape[1] + tokens
        )
        self._step: Any = None

    def bound(self) -> AbstractContextManager[Any]:
        """Takes the model while the block lasts, so that nobody steers it meanwhile.

        Raises:
            SteerError: somebody steers or reads it.
        """
        return self._lm.steered(states=[None] * len(self._owners))

    def logits(self, input_ids: Int[Tensor, "row pos"]) -> Float[Tensor, "stream vocab"]:
        """Next-token logits: of the prompts in the first call, then after the newest token of the owners' rows."""
        model = self._model
        if self._step is None:
            self._step = model
            if model._valid_auto_compile_criteria(self._kwargs, self._config):
                self._step = model.get_compiled_call(self._config.compile_config)
            inputs = model.prepare_inputs_for_generation(self._ids, is_first_iteration=True, **self._kwargs)
            output = model(**inputs, return_dict=True)
        else:
            self._ids = input_ids[self._owners, -1:].to(self._ids.device)
            inputs = model.prepare_inputs_for_generation(self._ids, next_sequence_length=1, **self._kwargs)
            output = self._step(**inputs, return_dict=True)
        self._kwargs = model._update_model_kwargs_for_generation(output, self._kwargs)
        return output.logits[:, -1].to(input_ids.device)


def require_same_vocabulary(lm: FrozenLM, other: FrozenLM, name: str) -> None:
    """Raises SteerError unless the tokens of two models are the same ones, of the same numbers."""
    if (lm.tokenizer is None) != (other.tokenizer is None):
        which = "the steered model" if lm.tokenizer is None else f"the model {name!r}"
        raise SteerError(
            f"{which} was wrapped without a tokenizer, so nothing tells whether the tokens are the same; pass the "
            "tokenizer to steer.wrap"
        )
    if lm.vocabulary != other.vocabulary:
        raise SteerError(
            f"the model {name!r} has another vocabulary, so its logits are about other tokens. Only models that share "
            "the tokenizer can be mixed"
        )


def _of_single_rows(config: GenerationConfig) -> GenerationConfig:
    """transformers would make room for as many return sequences of each row."""
    config = copy.copy(config)
    config.num_return_sequences = 1
    return config
