"""What `fmxnn train` is told."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fmxnn.activations import ActivationStore
from fmxnn.activations.places import Layer


@dataclass(frozen=True)
class Arguments:
    """What to train, on what, and where to put it. The defaults are the fmxcoders paper's for GPT2-Small.

    ```python
    from fmxnn.reports.train_arguments import Arguments

    Arguments(model="examples/tiny-lm", layers=(1, 2, 3), latents=512, k=8, tokens=100_000)
    ```
    """

    model: str = "openai-community/gpt2"
    """A transformers causal language model: a folder or a Hub name."""
    text: tuple[str, ...] = ("Skylion007/openwebtext",)
    """Text or JSONL files, or the Hub name of one dataset with a "text" column."""
    layers: tuple[Layer, ...] = (2, 3, 4, 5, 6, 7, 8, 9)
    """The blocks that are read, from zero, or places by name, such as embed."""
    at: str = "block_out"
    """Where in each block: the residual stream after it, or another place that `harvest` knows."""
    to: str | None = None
    """Where the targets of a transcoder are read, such as mlp_out with --at mlp_in; left out: x itself is rebuilt."""
    activations: Path | None = None
    """A folder that `fmxnn harvest` wrote, in place of model, text, layers, at, to and context."""
    weight: str = "tr"
    """dense, tr, tr-wide (r1 r2 >= d_model), cp, or any pattern with its bonds' sizes: "latents r, d_model r, layers r;
    r=512".
    """
    share: float = 1.0
    """Parameters of a tr or cp weight as a share of the dense one's."""
    latents: int = 16384
    k: int = 64
    """Latents that fire a token, on average."""
    mask_p: float = 0.05
    """The probability that a layer is hidden from the encoder."""
    start: Literal["gaussian", "tied", "isometric", "data"] = "gaussian"
    """gaussian is the paper's; data, from activations, had the lowest error in our runs, then isometric."""
    scale: bool = True
    """Train on activations scaled to a mean norm of sqrt(d_model); folded into the weights before saving."""
    auxiliary: bool = False
    """Add the auxiliary loss that revives dead latents."""
    dead_after: int = 10_000_000
    """Tokens of silence after which the auxiliary loss takes a latent for dead."""
    tokens: int = 300_000_000
    heldout: int = 200_000
    """Tokens of the text, from its start, that are kept for evaluation."""
    context: int = 128
    batch: int = 4096
    """Tokens a step."""
    learning_rate: float = 3e-4
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["bfloat16", "float32"] = (
        "bfloat16"
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        else "float32"
    )
    """bfloat16 where the GPU has it: products under autocast; parameters, thresholds and the optimiser stay float32."""
    seed: int = 0
    out: Path = Path("runs/crosscoder")
    resume: bool = False
    """Go on from the newest whole checkpoint in `out`."""
    checkpoint_every: int = 1000
    evaluate_every: int = 5000
    logger: Literal["none", "trackio", "wandb"] = "none"
    """A JSONL log is always written to `out`."""

    def fixed(self) -> dict[str, object]:
        """What a resumed run must share with the run it resumes."""
        free = {"activations", "out", "resume", "logger", "device", "checkpoint_every", "evaluate_every"}
        if (self.at, self.to) == ("block_out", None):
            free |= {"at", "to"}  # runs that are older than these two go on
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in free
        }

    def completed(self) -> "Arguments":
        """The same with the model, layers and places of stored activations, where there are any."""
        if self.activations is None:
            return self
        for name in ("model", "text", "layers", "at", "to", "context"):
            if getattr(self, name) != getattr(Arguments, name):
                raise ValueError(f"activations on disk are of one model, text and layers; leave out --{name}")
        store = ActivationStore(self.activations)
        places = store.identity()
        at, to = places.get("at", "block_out"), places.get("to")
        return replace(self, model=store.name, text=(), layers=store.layers, at=at, to=to)
