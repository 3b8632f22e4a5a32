"""Where each architecture keeps what the sites name. Supporting another one means describing it here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from steer.errors import SteerError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Architecture:
    """Paths of modules: those of the model start at its decoder (`model.base_model`), those of a block at the block.

    Attributes:
        blocks: the list of decoder blocks.
        embed: the token embedding.
        final_norm: the norm before the head.
        attn_out: the module whose output is added to the residual as attention's part.
        mlp_out: the module whose output is added to the residual as the feed-forward's part.
        z: the attention's output projection; its input are the heads' outputs.
        mid: the norm that reads the residual between attention and feed-forward; None where the two run in parallel.
        takes_position_ids: False if the decoder derives positions itself.
    """

    blocks: str
    embed: str
    final_norm: str
    attn_out: str
    mlp_out: str
    z: str
    mid: str | None
    takes_position_ids: bool = True


_LLAMA = Architecture(
    blocks="layers",
    embed="embed_tokens",
    final_norm="norm",
    attn_out="self_attn",
    mlp_out="mlp",
    z="self_attn.o_proj",
    mid="post_attention_layernorm",
)

# Keyed by `config.model_type`.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": replace(
        _LLAMA,
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        mid="pre_feedforward_layernorm",
    ),
    "gpt2": Architecture(
        blocks="h", embed="wte", final_norm="ln_f", attn_out="attn", mlp_out="mlp", z="attn.c_proj", mid="ln_2"
    ),
    "gpt_neox": Architecture(
        blocks="layers",
        embed="embed_in",
        final_norm="final_layer_norm",
        attn_out="attention",
        mlp_out="mlp",
        z="attention.dense",
        mid=None,
    ),
    # Bloom adds the residual inside its attention and feed-forward modules, after their last projections.
    "bloom": Architecture(
        blocks="h",
        embed="word_embeddings",
        final_norm="ln_f",
        attn_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        z="self_attention.dense",
        mid="post_attention_layernorm",
        takes_position_ids=False,
    ),
}


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Describes a further architecture under its `config.model_type`."""
    ARCHITECTURES[model_type] = architecture


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Returns the description of a model. Raises SteerError, saying how to write one, if there is none."""
    model_type = config.model_type
    if model_type not in ARCHITECTURES:
        raise SteerError(
            f"no description of the architecture {model_type!r} (known: {', '.join(sorted(ARCHITECTURES))}). "
            f"If its blocks look like Llama's, write:\n"
            f"    from steer.architectures import ARCHITECTURES, register_architecture\n"
            f'    register_architecture("{model_type}", ARCHITECTURES["llama"])\n'
            f"and adapt the paths with dataclasses.replace(...) where they differ; docs/architectures.md shows how."
        )
    architecture = ARCHITECTURES[model_type]
    if model_type == "gpt_neox" and not config.use_parallel_residual:
        return replace(architecture, mid="post_attention_layernorm")
    if model_type == "bloom" and config.apply_residual_connection_post_layernorm:
        # The feed-forward's residual is then the norm's output, so its input is no longer the stream.
        return replace(architecture, mid=None)
    return architecture
