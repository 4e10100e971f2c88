"""Run folders and the two programs that fill them: `pretrain` and `train`."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from unveil import __version__
from unveil.denoisers.base import Denoiser, MaskedDenoiser
from unveil.denoisers.continuous import ContinuousDenoiser
from unveil.denoisers.convert import Conversion, convert
from unveil.denoisers.decoders import DecoderDenoiser
from unveil.denoisers.image import Classes, ImageDenoiser, ImageModel, ImageNetwork, Prompts
from unveil.denoisers.load import load_denoiser, model_folder
from unveil.denoisers.pipelines import PipelineOptions
from unveil.denoisers.pretrained import Dtype
from unveil.denoisers.score import ScoreConfig, ScoreDenoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.denoisers.unmask import UnmaskNetwork
from unveil.processes.gaussian import Flow, GaussianProcess, Prediction
from unveil.recipe import dump, to_yaml
from unveil.registry import UserError
from unveil.rewards.networks import JudgeShape
from unveil.seeds import derive_seed, generator
from unveil.tasks.images import image_task
from unveil.training.checkpoints import write_text
from unveil.training.denoising_job import DenoisingConfig, DenoisingEval, DenoisingJob
from unveil.training.distribution import RankLost, Ranks
from unveil.training.judge_job import JudgeData, JudgeEval, JudgeJob, fresh_judge
from unveil.training.log import LogConfig, RunLog
from unveil.training.lora import Adapter, LoraSettings
from unveil.training.matching_job import MatchingJob
from unveil.training.policy_config import PolicyConfig, PolicyEval
from unveil.training.policy_job import PolicyJob
from unveil.training.sharding import DistributedConfig, Shards
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, Job, OptimConfig, Trainer

Progress = Callable[[int, dict[str, Any]], None]


@dataclass(kw_only=True)
class NewImageModel:
    """A denoiser of images from scratch. The shape of its images is that of the first task."""

    network: ImageNetwork
    """The network."""
    prompts: Prompts | None = None
    """What it is conditioned on; None: the prompts that the first task has, one class each."""
    process: GaussianProcess = field(default_factory=Flow)
    """The path that it is trained on."""
    prediction: Prediction = "u"
    """What it predicts."""


@dataclass(kw_only=True)
class NewModel:
    """A denoiser from scratch, or the one that supervised fine-tuning starts from."""

    path: str | None = None
    """Start from this model; then the fields of a new one are not used, without it those of a model that there is."""
    convert: Conversion | None = None
    """``path`` is an autoregressive model, to be made a masked one."""
    dtype: Dtype = "fp32"
    """Of a published model's weights: fp32, or bf16 (with adapters; full training would round its updates away)."""
    chat: bool = False
    """Wrap prompts into a published model's chat template."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, a fraction of the memory."""
    lora: LoraSettings | None = None
    """Train low-rank adapters instead of all weights."""
    image: NewImageModel | None = None
    """A network over images; then the fields below, of a network over words, are not used."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """Its shape."""
    prediction: Literal["logits", "log_score"] = "logits"
    """``log_score``: a network that is told the time and learns scores by the score entropy (SEDD)."""
    largest_number: Annotated[int, Field(ge=0)] = 199
    """Every number from 0 to this is one token."""
    words: list[str] = field(default_factory=list)
    """All other words of prompts and responses."""


@dataclass(kw_only=True)
class PretrainRecipe:
    """What `unveil pretrain` runs."""

    model: NewModel = field(default_factory=NewModel)
    data: DenoisingConfig
    eval: DenoisingEval = field(default_factory=DenoisingEval)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)
    updates: Annotated[int, Field(ge=1)]
    """Optimiser steps."""
    seed: int = 0
    """Everything random derives from it."""


@dataclass(kw_only=True)
class BaseModel:
    """The denoiser that a policy starts from."""

    path: str
    """Model folder, run folder, name of an embedded model, or ``owner/name`` on the Hugging Face hub."""
    dtype: Dtype = "fp32"
    """Of a published model's weights: fp32, or bf16 (with adapters; full training would round its updates away)."""
    chat: bool = False
    """Wrap prompts into a published model's chat template."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, a fraction of the memory."""
    pipeline: PipelineOptions | None = None
    """How a published image pipeline is used: resolution, embedded guidance, prompt length."""
    lora: LoraSettings | None = None
    """Train low-rank adapters instead of all weights."""
    unmask: UnmaskNetwork | None = None
    """Give the model a fresh unmasking policy of this shape; None: it keeps the one that lies beside it, if any."""
    train: Literal["all", "denoiser", "unmask"] = "all"
    """What learns: everything, the denoiser alone, or the unmasking policy alone."""


@dataclass(kw_only=True)
class TrainRecipe:
    """What `unveil train` runs."""

    system: str
    """The system that this recipe belongs to, as `unveil systems` lists it."""
    model: BaseModel
    policy: PolicyConfig
    eval: PolicyEval
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)
    updates: Annotated[int, Field(ge=1)]
    """Policy updates (batches of rollouts)."""
    seed: int = 0
    """Everything random derives from it."""


@dataclass(kw_only=True)
class JudgeRecipe:
    """What `unveil pretrain` runs for a network that judges images."""

    judge: JudgeShape
    """Its kind and shape."""
    data: JudgeData
    eval: JudgeEval = field(default_factory=JudgeEval)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    updates: Annotated[int, Field(ge=1)]
    """Optimiser steps."""
    seed: int = 0
    """Everything random derives from it."""


def teach(recipe: JudgeRecipe, run: Path, *, resume: bool = False, progress: Progress | None = None) -> bool:
    """Teach a network to judge images. Returns False if interrupted.

    Raises:
        UserError: before any work, if something in the recipe or the run folder does not fit.
    """
    ranks = Ranks()
    pupil = fresh_judge(recipe.judge, recipe.data.task, recipe.seed).to(ranks.device)
    trainer = Trainer(
        pupil, recipe.optim, recipe.checkpoint, SnapshotConfig(),
        updates=recipe.updates, eval_every=recipe.eval.every, run=run, ranks=ranks,
    )  # fmt: skip

    def make(log: RunLog) -> Job:
        return JudgeJob(trainer, recipe.data, recipe.eval, log, seed=recipe.seed)

    return _run(recipe, "judge", run, trainer, make, resume=resume, progress=progress)


def pretrain(recipe: PretrainRecipe, run: Path, *, resume: bool = False, progress: Progress | None = None) -> bool:
    """Train a denoiser on data. Returns False if interrupted.

    Raises:
        UserError: before any work, if something in the recipe or the run folder does not fit.
    """
    ranks = Ranks()
    model = recipe.model
    if model.convert is not None and model.convert.anneal >= recipe.updates:
        raise UserError(
            f"model.convert.anneal: {model.convert.anneal} updates leave none with open attention "
            f"(updates is {recipe.updates})"
        )
    if recipe.data.text is not None and model.chat:
        raise UserError("model.chat: true, but data.text has no prompts to wrap (allowed: false)")
    denoiser = _new_denoiser(model, recipe.data, recipe.seed)
    adapter = None
    if model.lora is not None:
        adapter = _adapter(denoiser, model.lora, recipe.seed, new=model.convert is not None)
    shards = _place(denoiser, recipe, ranks)
    trainer = Trainer(
        denoiser, recipe.optim, recipe.checkpoint, recipe.snapshots,
        updates=recipe.updates, eval_every=recipe.eval.every, run=run, ranks=ranks, adapter=adapter, shards=shards,
    )  # fmt: skip

    def make(log: RunLog) -> Job:
        if isinstance(denoiser, ContinuousDenoiser):
            return MatchingJob(trainer, recipe.data, recipe.eval, log, seed=recipe.seed)
        return DenoisingJob(trainer, recipe.data, recipe.eval, log, seed=recipe.seed, conversion=model.convert)

    return _run(recipe, "pretrain", run, trainer, make, resume=resume, progress=progress)


def train(recipe: TrainRecipe, run: Path, *, resume: bool = False, progress: Progress | None = None) -> bool:
    """Improve a policy by its rewards. Returns False if interrupted.

    Raises:
        UserError: before any work, if something in the recipe or the run folder does not fit.
    """
    ranks = Ranks()
    model = recipe.model
    denoiser: Denoiser = load_denoiser(
        model.path, dtype=model.dtype, chat=model.chat, gradient_checkpointing=model.gradient_checkpointing,
        pipeline=model.pipeline,
    )  # fmt: skip
    adapter = None if model.lora is None else _adapter(denoiser, model.lora, recipe.seed)
    if recipe.model.unmask is not None:
        if not isinstance(denoiser, MaskedDenoiser):
            raise UserError(f"model.unmask: an unmasking policy is for models of text, {model.path!r} is none")
        attach_unmask(denoiser, recipe.model.unmask, recipe.seed)
    if (action := recipe.policy.rollout.sampler.action) is not None and isinstance(denoiser, MaskedDenoiser):
        denoiser.unmask_action = dump(action)
    choose_trained(denoiser, recipe.model.train)
    shards = _place(denoiser, recipe, ranks)
    trainer = Trainer(
        denoiser, recipe.optim, recipe.checkpoint, recipe.snapshots,
        updates=recipe.updates, eval_every=recipe.eval.every, run=run, ranks=ranks, adapter=adapter,
        keep_reference=recipe.policy.keeps_reference, shards=shards,
    )  # fmt: skip

    def make(log: RunLog) -> Job:
        job = PolicyJob(trainer, recipe.policy, recipe.eval, log, seed=recipe.seed)
        for line in recipe.policy.warnings if ranks.main else []:
            print(f"warning: {line}", file=sys.stderr, flush=True)
        return job

    return _run(recipe, recipe.system, run, trainer, make, resume=resume, progress=progress)


def _adapter(denoiser: Denoiser, settings: LoraSettings, seed: int, *, new: bool = False) -> Adapter:
    """Adapters; in a model whose mask is ``new`` its embedding is trained too, or it would never mean anything."""
    torch.manual_seed(seed)  # peft draws its initial weights from the global generator
    rows = None
    if new:
        assert isinstance(denoiser, DecoderDenoiser)
        layer = denoiser.network.get_input_embeddings()
        name = next(name for name, module in denoiser.named_modules() if module is layer)
        rows = {name: [denoiser.spec.mask_id]}
    return Adapter(denoiser, settings, rows=rows)


def _place(denoiser: Denoiser, recipe: PretrainRecipe | TrainRecipe, ranks: Ranks) -> Shards | None:
    """Bring a denoiser to the device of this rank, or its part of it."""
    shard = recipe.distributed.shard
    if shard == "none" or ranks.world == 1:
        denoiser.to(ranks.device)
        return None
    return Shards(denoiser, shard, ranks, bf16=recipe.optim.precision == "bf16")


def attach_unmask(denoiser: MaskedDenoiser, network: UnmaskNetwork, seed: int) -> None:
    """Give the denoiser a fresh unmasking policy whose weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "unmask"))
        denoiser.attach(network, network.build(denoiser.spec.feature_dim))


def choose_trained(denoiser: Denoiser, what: Literal["all", "denoiser", "unmask"]) -> None:
    """Freeze what does not learn. With LoRA the denoiser's own weights are frozen already.

    Raises:
        UserError: the unmasking policy shall learn, and there is none.
    """
    policy = denoiser.unmask
    if what == "unmask" and policy is None:
        raise UserError("model.train: 'unmask', but the model carries no unmasking policy (give model.unmask)")
    own = set() if policy is None else set(policy.parameters())
    for parameter in denoiser.parameters():
        if parameter in own:
            parameter.requires_grad_(what != "denoiser")
        elif what == "unmask":
            parameter.requires_grad_(False)


def _run(
    recipe: PretrainRecipe | JudgeRecipe | TrainRecipe,
    system: str,
    run: Path,
    trainer: Trainer,
    make: Callable[[RunLog], Job],
    *,
    resume: bool,
    progress: Progress | None,
) -> bool:
    main = trainer.ranks.main
    resume_at: int | None = None
    if resume:
        if not (run / "recipe.yaml").is_file():
            raise UserError(f"{run}: not a run folder, nothing to resume")
    elif trainer.ranks.total(float(main and run.exists() and any(run.iterdir()))):  # asked once: rank 0 soon fills it
        raise UserError(f"{run}: the run folder is occupied (allowed: a new folder, or --resume to continue this run)")
    job = make(_draft_log(run))
    if resume:
        # Before anything is written: a checkpoint that does not fit must leave the run as it is.
        resume_at = trainer.resume(job)
    run.mkdir(parents=True, exist_ok=True)
    if main:
        write_text(run / "recipe.yaml", to_yaml(recipe))
    log = RunLog(
        run,
        recipe.log if main else LogConfig(tensorboard=False),
        resume_at=resume_at if main else None,
        title=run.name,
    )
    job.log = log  # type: ignore[attr-defined]
    if main:
        log.info(_facts(system, recipe.seed))
    finished = False
    status = "failed"
    try:
        finished = trainer.fit(job, log, progress)
        status = "finished" if finished else "interrupted"
        if finished:
            trainer.save_final()
    except RuntimeError as error:
        if trainer.ranks.lost(error):
            raise RankLost(f"update {trainer.done + 1}: another process of the run is gone: stopped") from error
        raise
    finally:
        if main:
            log.cost(trainer.cost)
            log.info({"status": status})
            log.close()
        trainer.ranks.close()
    return finished


def _draft_log(run: Path) -> RunLog:
    """A log that writes nothing yet: the job is checked before the run folder exists."""
    return RunLog(run, LogConfig(tensorboard=False))


def _new_denoiser(model: NewModel, data: DenoisingConfig, seed: int) -> Denoiser:
    options: dict[str, Any] = {
        "dtype": model.dtype, "chat": model.chat, "gradient_checkpointing": model.gradient_checkpointing,
    }  # fmt: skip
    if model.path is not None:
        if model.convert is not None:
            return convert(model_folder(model.path), model.convert, **options)
        return load_denoiser(model.path, **options)
    of_models = {"convert": model.convert is not None, "lora": model.lora is not None, **options}
    for key, given in of_models.items():
        if given not in (False, "fp32"):
            raise UserError(f"model.path: required for model.{key}, but missing")
    if model.image is not None:
        return _new_image_denoiser(model.image, data, seed)
    words = [str(number) for number in range(model.largest_number + 1)] + model.words
    try:
        tokenizer = TextTokenizer.of_words(words)
    except ValueError as error:
        raise UserError(f"model.words: {error}") from error
    denoiser: TransformerDenoiser
    if model.prediction == "log_score":
        denoiser = ScoreDenoiser(ScoreConfig(**vars(model.transformer)), tokenizer)
    else:
        denoiser = TransformerDenoiser(model.transformer, tokenizer)
    denoiser.initialise(generator(seed, "weights"))
    return denoiser


def _new_image_denoiser(model: NewImageModel, data: DenoisingConfig, seed: int) -> ImageDenoiser:
    if not data.tasks:
        raise UserError("data.tasks: needed for a model of images")
    task = image_task(data.tasks[0].task, "data.tasks.0")
    prompts = model.prompts or Classes(names=tuple(task.vocabulary))
    try:
        config = ImageModel(
            shape=task.shape, prompts=prompts, network=model.network, process=model.process, prediction=model.prediction
        )
        denoiser = ImageDenoiser(config)
    except UserError as error:
        raise UserError(f"model.image.{error}") from error
    denoiser.initialise(generator(seed, "weights"))
    return denoiser


def _facts(system: str, seed: int) -> dict[str, Any]:
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        "system": system,
        "command": " ".join(["unveil", *sys.argv[1:]]),
        "status": "running",
        "seed": seed,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git.stdout.strip() or None,
        "versions": {"unveil": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }
