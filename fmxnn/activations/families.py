"""Which part of a transformer stands at which place; one row a family, and a new family is one row more."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

BLOCKS = (
    "transformer.h",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
    "h",
    "layers",
    "language_model.layers",
)
"""Where models keep their blocks: GPT-2, GPT-NeoX, Llama and most others, multimodal ones; then the same headless."""
EMBED = ("wte", "embed_in", "embed_tokens")
FINAL_NORM = ("ln_f", "final_layer_norm", "final_layernorm", "norm")
"""What the embedding and the last norm are called, beside the blocks."""


class Family(NamedTuple):
    """Blocks with exactly these `parts`, and which of them gives what is added to the residual stream.

    - `attn_out`, `mlp_out`: the sublayer, or the norm after it; the MLP itself is always `mlp`
    - `unlike`: classes of blocks with the same parts that add something else

    ```python
    from fmxnn.activations.families import family_of

    family_of(nn.ModuleDict({"ln_1": nn.Identity(), "attn": nn.Identity(), "mlp": nn.Identity()})).names  # GPT-J, ...
    ```
    """

    names: str
    parts: str
    attn_out: str
    mlp_out: str = "mlp"
    unlike: tuple[str, ...] = ()


FAMILIES = (
    Family("GPT-2, GPT-Neo", "ln_1 attn ln_2 mlp", "attn", unlike=("Block",)),  # GPT-1 has norms on the stream
    Family("GPT-J, CodeGen", "ln_1 attn mlp", "attn"),
    Family(
        "GPT-NeoX, Pythia",
        "input_layernorm attention post_attention_layernorm mlp post_attention_dropout post_mlp_dropout",
        "attention",
    ),
    Family(
        "Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma, OLMo",
        "input_layernorm self_attn post_attention_layernorm mlp",
        "self_attn",
        unlike=("MiniMaxDecoderLayer",),  # scales both sides of the sum, as Beam does
    ),
    Family("StableLM", "input_layernorm self_attn post_attention_layernorm mlp dropout", "self_attn"),
    Family("Phi", "input_layernorm self_attn mlp resid_dropout", "self_attn"),
    Family(
        "Phi-3",
        "input_layernorm self_attn post_attention_layernorm mlp resid_attn_dropout resid_mlp_dropout",
        "self_attn",
    ),
    Family("Cohere", "input_layernorm self_attn mlp", "self_attn"),
    Family(
        "Gemma 2 and 3",
        "input_layernorm self_attn post_attention_layernorm pre_feedforward_layernorm mlp post_feedforward_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        unlike=("BeamDecoderLayer",),
    ),
    Family(
        "OLMo 2 and 3",
        "self_attn post_attention_layernorm mlp post_feedforward_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    Family(
        "GLM-4",
        "input_layernorm self_attn post_self_attn_layernorm post_attention_layernorm mlp post_mlp_layernorm",
        "post_self_attn_layernorm",
        "post_mlp_layernorm",
    ),
)


def family_of(block: nn.Module) -> Family | None:
    """The family whose parts a block has; None for a block that may add something else to the residual stream.

    Such a block has numbers of its own, as Granite's `residual_multiplier` and Doge's weights are.
    """
    block = uncompiled(block)
    parts = {name for name, _ in block.named_children()}
    own = [*block.parameters(recurse=False), *block.buffers(recurse=False)]
    if own or any(name.startswith("residual_") for name, value in vars(block).items() if isinstance(value, float)):
        return None
    fitting = (each for each in FAMILIES if set(each.parts.split()) == parts)
    return next((each for each in fitting if type(block).__name__ not in each.unlike), None)


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The path and the list of a transformer's blocks, at `path` or where a known family keeps them.

    Raises ValueError, saying where it looked.
    """
    tried = BLOCKS if path is None else (path,)
    for dotted in tried:
        found = submodule(model, dotted)
        if isinstance(found, nn.ModuleList):
            return dotted, found
    raise ValueError(
        f"{type(model).__name__} has no list of blocks at {', '.join(tried)}; give its place, as in "
        "path='transformer.h', or read modules by their paths, as in at='encoder.layer.{}'"
    )


def find_beside(model: nn.Module, place: str, path: str | None = None) -> nn.Module:
    """The token embedding or the final norm, which stand beside the blocks.

    Raises ValueError, saying where it looked.
    """
    dotted, _ = find_blocks(model, path)
    body = dotted.rpartition(".")[0]
    names = {"embed": EMBED, "final_norm": FINAL_NORM}[place]
    tried = [f"{body}.{name}" if body else name for name in names]
    found = (submodule(model, each) for each in tried)
    return _there(found, f"{type(model).__name__} has no place {place!r}: there is no module {' or '.join(tried)}")


def is_compiled(model: nn.Module, *more: str) -> bool:
    """Whether `torch.compile` compiled the model or a part of it; `more` are attributes that say so as well."""
    marks = ("_orig_mod", "_compiled_call_impl", *more)
    return any(getattr(module, mark, None) is not None for module in model.modules() for mark in marks)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or the one given: its own parts and hooks are what is read."""
    return getattr(module, "_orig_mod", module)


def submodule(model: nn.Module, dotted: str) -> nn.Module | None:
    """The module at a path, or None."""
    try:
        return model.get_submodule(dotted)
    except AttributeError:
        return None


def _there(found: Iterable[nn.Module | None], otherwise: str) -> nn.Module:
    for module in found:
        if module is not None:
            return module
    raise ValueError(f"{otherwise}; give the path of the module, as in layers=['transformer.wte']")
