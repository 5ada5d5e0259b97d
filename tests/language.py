"""Small language models and a tokenizer, made here."""

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_SIZES |= {"max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_GROUPED = _SIZES | {"num_key_value_heads": 1}
_GEMMA = _GROUPED | {"head_dim": 8}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_positions": 16,
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GEMMA)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)),
}
"""Four of different shape; tests that try each."""


def _gemma3_with_eyes():
    eyes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "image_size": 28,
    }
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=_GEMMA, vision_config=eyes | {"patch_size": 14}, mm_tokens_per_image=4)
    )


MORE_FAMILIES = {
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_layers=4,
            num_heads=2,
            attention_types=[[["global", "local"], 2]],
            max_position_embeddings=16,
        )
    ),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**_GPT, rotary_dim=4)),
    "gpt_neox_sequential": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES, use_parallel_residual=False)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_GEMMA)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GEMMA)),
    "gemma3_with_eyes": _gemma3_with_eyes,
    "llama_headless": lambda: tf.LlamaModel(tf.LlamaConfig(**_GROUPED)),
    "gpt2_headless": lambda: tf.GPT2Model(tf.GPT2Config(**_GPT)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GROUPED)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**_GROUPED, num_local_experts=4, experts_implementation="eager")
    ),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GEMMA)),
    "stablelm": lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**_GROUPED)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_SIZES)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GROUPED)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**_GROUPED)),
    "olmo": lambda: tf.OlmoForCausalLM(tf.OlmoConfig(**_GROUPED)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_GROUPED)),
    "olmo3": lambda: tf.Olmo3ForCausalLM(tf.Olmo3Config(**_GROUPED)),
    "glm4": lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**_GEMMA)),
}
"""More families, of which places are tested."""


def make_model(family="gpt2"):
    torch.manual_seed(0)
    return (FAMILIES | MORE_FAMILIES)[family]().double().eval()


def make_tokenizer(**special):
    words = {"<eos>": 0, "<unk>": 1, "<bos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or {"eos_token": "<eos>"}))


def words(count, seed=0):
    drawn = torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in drawn.tolist())
