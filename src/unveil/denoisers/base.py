"""What every denoiser declares and does, and what a masked-token denoiser adds.

The normal form of masked tokens: ``features(ids, valid)[b, i]`` is what predicts the token AT position i. Networks that
predict position i + 1 from position i (Dream, converted autoregressive models) shift inside their adapter, so nothing
above ever asks. Features and head are apart because a vocabulary of 126k makes logits the memory hog: callers put the
head only on the positions that they read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unveil.denoisers.kept import KeyValues
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.unmask import FILE, UnmaskNetwork, load_unmask, read_unmask_header, save_unmask
from unveil.processes.masked import MaskedProcess
from unveil.processes.score_entropy import Method, Noise, ScoreEntropyProcess
from unveil.processes.uniform import UniformProcess
from unveil.registry import UserError

_UNMASK = "unmask_module"


@dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """What a sampler, likelihood or task needs to know of a denoiser."""

    vocab_size: int
    mask_id: int
    """What a place to fill holds on a canvas: the mask; -1, no token at all, where the vocabulary has none."""
    pad_id: int
    end_ids: tuple[int, ...]
    """Tokens that end a response; everything after the first one is not text."""
    forbidden_ids: tuple[int, ...]
    """Tokens that are never produced; always holds the mask id, if there is a mask."""
    context_length: int
    """The longest canvas (prompt + response)."""
    logit_shift: int = 0
    """1 for networks whose head at position i predicts position i + 1; already undone by `features`."""
    time_conditioned: bool = False
    """True if `features` must be told the time of every canvas."""
    prediction: Literal["logits", "log_score"] = "logits"
    """What the head gives: logits of x_0, or log-scores log p_t(x with y)/p_t(x) (SEDD). The softmax of either is the
    distribution of x_0; the sum of scores also says how soon a token appears."""
    noise: Noise | None = None
    """The noise schedule that log-scores belong to."""
    feature_dim: int = 0
    """D of `features`; 0 where nothing but the head may read them."""
    keeps_keys: bool = False
    """True if the network has a `window`: features of some columns, with kept keys and values of the others."""
    attention_block: int | None = None
    """Positions see their block of so many tokens, counted from the first token of the canvas, and all blocks before
    it. None: all positions see one another."""
    corruption: Literal["mask", "uniform"] = "mask"
    """What noise is made of: masks, or random tokens (`UniformDenoiser`)."""
    canvas_length: int | None = None
    """Tokens that are denoised at a time behind a causal prefix, where the network fixes it."""

    @property
    def uniform(self) -> UniformProcess:
        """The process of a network whose noise is random tokens."""
        return UniformProcess(vocab_size=self.vocab_size)

    def process(self, method: Method = "tweedie") -> MaskedProcess | ScoreEntropyProcess:
        """The masked process whose reverse step takes this network's predictions; ``method`` is for scores alone."""
        if self.noise is None:
            return MaskedProcess(mask_id=self.mask_id)
        return ScoreEntropyProcess(mask_id=self.mask_id, noise=self.noise, method=method)


class Denoiser(nn.Module):
    """A network that guesses x_0: what the trainer, snapshots, checkpoints and commands need of any."""

    medium: ClassVar[str]
    """What its finished samples are (``unveil.tasks.medium``); only tasks of that medium can judge them."""
    spec: Any
    """What a sampler or likelihood needs to know of it; each kind of denoiser has its own."""
    output_layers: ClassVar[tuple[str, ...]] = ()
    """Names of linear layers that get no adapter by default: they share the embedding's weights, or dwarf the rest."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and whatever else opens the model again."""

    def save_adapter(self, wrapped: Any, folder: Path) -> None:
        """Write the low-rank adapters that ``peft`` put into it (``wrapped``) in the standard format."""
        wrapped.save_pretrained(str(folder))

    def checkpoint_gradients(self) -> None:
        """From now on trade time for memory in training: recompute activations in the backward pass.

        Raises:
            UserError: this network cannot.
        """
        raise UserError(f"model.gradient_checkpointing: {type(self).__name__} has none (allowed: published networks)")

    @property
    def unmask(self) -> nn.Module | None:
        """The network of a learned unmasking rule that is trained and saved beside the denoiser's own weights."""
        return None

    def save_unmask(self, folder: Path) -> None:
        """Write that network into the folder of an adapter, if there is one."""

    def own_state(self) -> dict[str, Tensor]:
        """The weights of the denoiser itself, without anything that it carries."""
        return {name: value.contiguous() for name, value in self.state_dict().items()}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class MaskedDenoiser(Denoiser):
    """A network that answers with logits of x_0 at every position of a partly masked canvas."""

    medium = "text"
    spec: DenoiserSpec
    tokenizer: TextTokenizer
    unmask_network: UnmaskNetwork | None = None
    """The shape of the learned unmasking rule that the denoiser carries, if any; see `attach`."""
    unmask_action: Mapping[str, Any] | None = None
    """Recipe data of the action that the rule was trained with; it is saved with it."""

    @abstractmethod
    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        """Aligned features (B, L, D) of the canvas ``ids`` (B, L); padding where ``valid`` (B, L) is False.

        ``t`` (B,) is the time of each canvas, 1 all masks; networks without time conditioning ignore it. Padding never
        changes the features of valid positions: a padded batch equals single calls to 1e-5.
        """

    def window(self, ids: Tensor, valid: Tensor, kept: KeyValues, columns: Tensor | None = None) -> Tensor:
        """Features (n, W, D) at some columns of the canvases ``ids`` (n, L), which attend to ``kept`` at the others.

        The keys and values of ``columns`` are replaced by new ones. Only for networks whose spec `keeps_keys`.

        Args:
            kept: the memory of these n canvases.
            columns: (n, W) ascending, neighbours but for repetitions, inside each row's valid part; None: all L, which
                is `features` and fills the memory.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no keys")

    @abstractmethod
    def head(self, features: Tensor) -> Tensor:
        """The prediction (..., V), see `DenoiserSpec.prediction`, of features (..., D); -inf at the forbidden ids."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, with what the model expects around it. Nothing in the text becomes a control token."""
        return self.tokenizer.encode(text)

    def forward(self, ids: Tensor, valid: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) at every position. For tests and small models: it holds the whole vocabulary."""
        if valid is None:
            valid = torch.ones_like(ids, dtype=torch.bool)
        return self.head(self.features(ids, valid, t))

    def idle(self) -> Tensor:
        """The sum of the features of the shortest canvas: what a rank computes to keep step with others."""
        ids = torch.full((1, 1), self.spec.mask_id, device=self.device)
        times = torch.ones(1, device=self.device) if self.spec.time_conditioned else None
        return self.features(ids, torch.ones_like(ids, dtype=torch.bool), times).sum()

    @property
    def unmask(self) -> nn.Module | None:
        """The network of the learned unmasking rule."""
        return self._modules.get(_UNMASK)

    @property
    def unmask_reads_features(self) -> bool:
        return self.unmask_network is not None and self.unmask_network.reads_features

    def attach(self, network: UnmaskNetwork, module: nn.Module) -> None:
        """Carry the network of a learned unmasking rule: it is trained, moved and saved with this model."""
        self.unmask_network = network
        self.add_module(_UNMASK, module.to(self.device))

    def save_unmask(self, folder: Path) -> None:
        """Write FOLDER/unmask.safetensors, if the denoiser carries a learned unmasking rule."""
        if self.unmask is not None and self.unmask_network is not None:
            save_unmask(self.unmask_network, self.unmask, folder / FILE, self.unmask_action)

    def load_unmask(self, path: Path) -> None:
        """Attach the network of a file written by `save_unmask`.

        Raises:
            UserError: the file is no unmasking policy, or does not fit this model.
        """
        self.attach(*load_unmask(path, self.spec.feature_dim))
        self.unmask_action = read_unmask_header(path)["action"]

    def own_state(self) -> dict[str, Tensor]:
        """The weights of the denoiser itself, without a learned unmasking rule."""
        return {
            name: value.contiguous() for name, value in self.state_dict().items() if not name.startswith(f"{_UNMASK}.")
        }
