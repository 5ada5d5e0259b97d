"""Harvesting beside SAELens' activation store and dictionary_learning's buffer, on one random GPT-2, in one run.

python benchmarks/harvest.py

It needs an interpreter with sae-lens 6, dictionary-learning 0.1 and the nnsight 0.3 that this was written for (with
`pip install --no-deps`, beside python-socketio, python-engineio, bidict, simple-websocket, wsproto, websocket-client,
diffusers and pillow). Each side reads the same made-up text, from strings to mixed batches, and mixes as many tokens.
A rate counts the tokens that went through the language model, so that no side pays for what its buffer keeps.

- fmxnn: `contexts` and `harvest`, all layers from one forward
- SAELens: its store for several hook points, all layers from one forward, over its own HookedTransformer (its default)
  and over the transformers model (HookedProxyLM)
- dictionary_learning: its buffer reads one submodule, so several layers are as many buffers, one after another, each
  over a share of the text
"""

import argparse
import importlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fmxnn.activations import contexts, harvest

CONTEXT, BATCH, MIXED = 128, 1024, 64
"""Tokens of a context and of a batch, and contexts that are mixed."""
BLOCKS, WIDTH, HEADS = 12, 256, 4
Layers = tuple[int, ...]
Side = Callable[[list[str], Layers], float]
"""Reads texts to their end and gives how many tokens went through the model for all the layers."""


class Counted:
    """How many tokens a model has read."""

    def __init__(self, model: Any):
        self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _model: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = (one for one in (*args, *named.values()) if isinstance(one, torch.Tensor))
        self.tokens += next(given).numel()

    def since(self, before: int) -> int:
        """Those since another count."""
        return self.tokens - before


def made_up(tokenizer: Any, count: int) -> list[str]:
    """Texts of random tokens, each a little longer than a context, which is what the buffer cuts it to."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(300, len(tokenizer), (count, CONTEXT + 8), generator=draw)
    return tokenizer.batch_decode(ids.tolist())


def fmxnn(model: Any, tokenizer: Any) -> Side:
    """`contexts` and `harvest`."""
    counted = Counted(model)

    def read(texts: list[str], layers: Layers) -> float:
        before = counted.tokens
        text = contexts(texts, tokenizer, context=CONTEXT)
        for _ in harvest(model, text, layers=layers, batch=BATCH, block=MIXED // 2):
            pass
        return counted.since(before)

    return read


def sae_lens(model: Any, hooks: Callable[[int], str]) -> Side:
    """SAELens' store for several hook points, until it has read as many contexts as there are texts."""
    counted = Counted(model)
    store_of = importlib.import_module("sae_lens").ActivationsStore.from_config_multi_hook

    def read(texts: list[str], layers: Layers) -> float:
        before, names = counted.tokens, [hooks(layer) for layer in layers]
        store = store_of(
            model,
            dataset=importlib.import_module("datasets").Dataset.from_dict({"text": texts}),
            hook_names=names,
            hook_d_ins=dict.fromkeys(names, WIDTH),
            streaming=False,
            context_size=CONTEXT,
            n_batches_in_buffer=MIXED,
            total_training_tokens=1,
            store_batch_size_prompts=32,
            train_batch_size_tokens=BATCH,
        )
        for _ in store.get_multi_hook_data_loader():
            if counted.since(before) >= len(texts) * CONTEXT:
                break
        return counted.since(before)

    return read


def dictionary_learning(model: Any, tokenizer: Any) -> Side:
    """dictionary_learning's buffer, one layer after another; of several layers each reads half of the text."""
    counted, package = Counted(model), importlib.import_module("dictionary_learning.buffer")
    wrapped = importlib.import_module("nnsight").LanguageModel(model, tokenizer=tokenizer)

    def read(texts: list[str], layers: Layers) -> float:
        before = counted.tokens
        for layer in layers:
            buffer = package.ActivationBuffer(
                iter(texts if len(layers) == 1 else texts[: len(texts) // 2]),
                wrapped,
                wrapped.transformer.h[layer],
                d_submodule=WIDTH,
                n_ctxs=MIXED,
                ctx_len=CONTEXT,
                refresh_batch_size=32,
                out_batch_size=BATCH,
            )
            with suppress(StopIteration):  # the text ends within a refresh
                while True:
                    next(buffer)
        return counted.since(before) / len(layers)

    return read


def sides(tokenizer: Any) -> dict[str, Side]:
    """Every side on a random model of the same shape."""
    torch.manual_seed(0)
    sizes = GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(sizes).eval()
    lens = importlib.import_module("transformer_lens")
    hooked = lens.HookedTransformer(
        lens.HookedTransformerConfig(
            n_layers=BLOCKS, d_model=WIDTH, n_ctx=CONTEXT, d_head=WIDTH // HEADS, n_heads=HEADS, act_fn="gelu_new",
            d_vocab=len(tokenizer), default_prepend_bos=False,
        ),
        tokenizer,
    )  # fmt: skip
    proxy = importlib.import_module("sae_lens.load_model").HookedProxyLM(
        GPT2LMHeadModel(sizes).eval(), tokenizer, hook_names=[f"transformer.h.{layer}" for layer in range(BLOCKS)]
    )
    return {
        "fmxnn": fmxnn(model, tokenizer),
        "SAELens, HookedTransformer": sae_lens(hooked, lambda layer: f"blocks.{layer}.hook_resid_post"),
        "SAELens, HookedProxyLM": sae_lens(proxy, lambda layer: f"transformer.h.{layer}"),
        "dictionary_learning": dictionary_learning(GPT2LMHeadModel(sizes).eval(), tokenizer),
    }


def rates(every: dict[str, Side], texts: list[str], layers: Layers, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each side in each round; the order turns from round to round."""
    found: dict[str, list[float]] = {name: [] for name in every}
    for turn in range(rounds):
        names = list(every)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            tokens = every[name](texts, layers)
            found[name].append(tokens / (time.perf_counter() - start))
    return found


def lines(found: dict[str, list[float]]) -> Iterator[str]:
    """The rate of each side, and how many times faster fmxnn is: the median round, the slowest and the fastest."""
    for name, some in found.items():
        ratios = [ours / theirs for ours, theirs in zip(found["fmxnn"], some, strict=True)]
        yield (
            f"  {name:28}{statistics.median(some):10,.0f} tokens/s   fmxnn {statistics.median(ratios):.2f} times "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    """Prints the table for eight layers and for one."""
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--contexts", type=int, default=192)
    read.add_argument("--rounds", type=int, default=3)
    read.add_argument("--only", nargs="*", help="sides, by the start of their names")
    arguments = read.parse_args()
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "examples" / "tiny-lm")
    tokenizer.pad_token = tokenizer.eos_token
    every = {
        name: side
        for name, side in sides(tokenizer).items()
        if not arguments.only or name.startswith(tuple(arguments.only))
    }
    texts = made_up(tokenizer, arguments.contexts)
    print(f"GPT-2 of {BLOCKS} x {WIDTH}, {torch.get_num_threads()} thread(s), {arguments.contexts} texts")
    for layers in (tuple(range(2, 10)), (9,)):
        rates(every, texts[: MIXED * 2], layers, 1)
        print(f"{len(layers)} layer(s), {arguments.rounds} rounds")
        for line in lines(rates(every, texts, layers, arguments.rounds)):
            print(line)


if __name__ == "__main__":
    main()
