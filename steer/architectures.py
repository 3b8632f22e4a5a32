"""Where each architecture keeps what the sites name. Supporting another one means describing it here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from steer.errors import SteerError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """Paths of modules: those of the model start at its decoder, those of a block at the block.

    Attributes:
        blocks: the list of decoder blocks; None where the model has an encoder, of which only `embed` is a site.
        embed: the token embedding.
        final_norm: what the head reads comes from here, mostly a norm; None where it is the last block.
        attn_out: the module whose output is added to the residual as attention's part.
        mlp_out: the module whose output is added to the residual as the feed-forward's part.
        z: the attention's output projection; its input are the heads' outputs.
        mid: what reads the residual between attention and feed-forward, mostly a norm; None where the two run in
            parallel.
        takes_position_ids: False if the decoder derives positions itself.
    """

    blocks: str | None
    embed: str
    final_norm: str | None
    attn_out: str
    mlp_out: str
    z: str
    mid: str | None
    takes_position_ids: bool = True

    def inside(self, path: str) -> Architecture:
        """The same with the decoder at this path, for a multimodal model that has it there."""
        if not path:
            return self
        blocks, embed = f"{path}.{self.blocks}", f"{path}.{self.embed}"
        return replace(self, blocks=blocks, embed=embed, final_norm=self.final_norm and f"{path}.{self.final_norm}")


_LLAMA = Architecture(
    blocks="layers",
    embed="embed_tokens",
    final_norm="norm",
    attn_out="self_attn",
    mlp_out="mlp",
    z="self_attn.o_proj",
    mid="post_attention_layernorm",
)

# What is added to the residual comes from norms after attention and feed-forward, and there are two more before them.
_GEMMA = replace(
    _LLAMA,
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    mid="pre_feedforward_layernorm",
)

# An encoder-decoder model takes soft tokens in what its encoder reads, so that is all there is to find in it.
_ENCODER = Architecture(
    blocks=None,
    embed="embed_tokens",
    final_norm=None,
    attn_out="",
    mlp_out="",
    z="",
    mid=None,
    takes_position_ids=False,
)
ONLY_PREFIXES = (
    "an encoder-decoder model takes soft tokens in what its encoder reads (PrefixEdit, PromptPrefix, methods such as "
    "PrefixTuning and PPlug), and nothing else"
)

# Keyed by `config.model_type`, in multimodal models that of the text's part.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_vl_text": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_oss": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    # Norms after attention and feed-forward only, so the feed-forward itself reads the residual.
    "olmo2": replace(_GEMMA, mid="mlp"),
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
    "gptj": Architecture(
        blocks="h", embed="wte", final_norm="ln_f", attn_out="attn", mlp_out="mlp", z="attn.out_proj", mid=None
    ),
    "falcon": Architecture(
        blocks="h",
        embed="word_embeddings",
        final_norm="ln_f",
        attn_out="self_attention",
        mlp_out="mlp",
        z="self_attention.dense",
        mid=None,
    ),
    # The feed-forward is no module of its own.
    "opt": Architecture(
        blocks="layers",
        embed="embed_tokens",
        final_norm="final_layer_norm",
        attn_out="self_attn",
        mlp_out="fc2",
        z="self_attn.out_proj",
        mid="final_layer_norm",
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
    "t5": _ENCODER,
    "mt5": _ENCODER,
    "umt5": _ENCODER,
    "bart": _ENCODER,
    "mbart": _ENCODER,
}


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Describes a further architecture under its `config.model_type`."""
    ARCHITECTURES[model_type] = architecture


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Returns the description of a model. Raises SteerError, saying how to write one, if there is none."""
    model_type = config.model_type
    # Of some encoder-decoder models the decoder is also a model of its own, of the same type.
    known = {kind for kind, found in ARCHITECTURES.items() if (found.blocks is None) == config.is_encoder_decoder}
    if model_type not in known:
        like, looks = (
            ("t5", "encoder looks like T5's") if config.is_encoder_decoder else ("llama", "blocks look like Llama's")
        )
        raise SteerError(
            f"no description of the architecture {model_type!r} (known: {', '.join(sorted(known))}). "
            f"If its {looks}, write:\n"
            f"    from steer.architectures import ARCHITECTURES, register_architecture\n"
            f'    register_architecture("{model_type}", ARCHITECTURES["{like}"])\n'
            f"and adapt the paths with dataclasses.replace(...) where they differ; docs/architectures.md shows how."
        )
    return _as_configured(ARCHITECTURES[model_type], config)


def _as_configured(architecture: Architecture, config: Any) -> Architecture:
    """The description of a model whose configuration changes what is added where."""
    match config.model_type:
        case "gpt_neox" if not config.use_parallel_residual:
            return replace(architecture, mid="post_attention_layernorm")
        case "falcon" if not (config.parallel_attn or config.new_decoder_architecture):
            return replace(architecture, mid="post_attention_layernorm")
        case "bloom" if config.apply_residual_connection_post_layernorm:
            # The feed-forward's residual is then the norm's output, so its input is no longer the stream.
            return replace(architecture, mid=None)
        case "opt":
            return _opt_as_configured(architecture, config)
    return architecture


def _opt_as_configured(architecture: Architecture, config: Any) -> Architecture:
    if not config.do_layer_norm_before:
        # The stream is normed after every addition, so the feed-forward itself reads it, and so does the head.
        architecture = replace(architecture, mid="fc1", final_norm=None)
    if config.word_embed_proj_dim != config.hidden_size:
        architecture = replace(architecture, final_norm="project_out")
    return architecture


def find_decoder(model: nn.Module) -> tuple[nn.Module, str]:
    """Finds what a forward pass of the model calls with the tokens, and the path in it of the text's decoder.

    The path is empty except in multimodal models, which embed the tokens and put images between them before they call
    their decoder. In an encoder-decoder model both are the encoder, which reads the prompt. Looks inside a model that
    PEFT has wrapped.

    Raises:
        SteerError: PEFT puts virtual tokens in front of the prompts, which moves all positions.
    """
    if hasattr(model, "get_base_model"):
        if any(config.is_prompt_learning for config in cast(Any, model).peft_config.values()):
            raise SteerError(
                "this PEFT model puts virtual tokens in front of every prompt, which cannot be steered; steer has soft "
                "prompts of its own, one for each user: steer.PrefixTuning"
            )
        model = cast(Any, model).get_base_model()
    model = cast("PreTrainedModel", model)
    if model.config.is_encoder_decoder:
        return model.get_encoder(), ""
    decoder = model.get_decoder()
    called = decoder if model.config.get_text_config() is model.config else model.base_model
    return called, next(path for path, module in called.named_modules() if module is decoder)
