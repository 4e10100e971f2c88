"""Open a denoiser by name or path."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from unveil.denoisers import hub
from unveil.denoisers.base import Denoiser, MaskedDenoiser
from unveil.denoisers.folder import read_config
from unveil.denoisers.image import ImageDenoiser
from unveil.denoisers.pipelines import INDEX, PipelineDenoiser, PipelineOptions, read_index
from unveil.denoisers.pretrained import Dtype, PretrainedDenoiser
from unveil.denoisers.score import ScoreDenoiser
from unveil.denoisers.transformer import TransformerDenoiser
from unveil.denoisers.unmask import FILE
from unveil.registry import UserError, did_you_mean

KINDS: dict[str, type[TransformerDenoiser] | type[ImageDenoiser]] = {
    kind.model_type: kind for kind in (TransformerDenoiser, ScoreDenoiser, ImageDenoiser)
}
EMBEDDED = Path(__file__).parent.parent / "models"
"""The small base models that ship inside the package, one folder each."""
PUBLISHED = {
    "llada": "llada:LladaDenoiser",
    "llada2_moe": "llada2:Llada2Denoiser",
    "Dream": "dream:DreamDenoiser",
    "a2d-qwen3": "decoders:DecoderDenoiser",
    "a2d-qwen2": "decoders:DecoderDenoiser",
    "a2d-llama": "decoders:DecoderDenoiser",
    "bert": "bert:BertDenoiser",
    "modernbert": "bert:BertDenoiser",
    "mdlm": "mdlm:MdlmDenoiser",
    "sedd": "sedd:SeddDenoiser",
    "diffusion_gemma": "diffusion_gemma:DiffusionGemmaDenoiser",
}
"""Adapter of each model_type in a published config.json."""
CONVERTED = "decoders:DecoderDenoiser"
"""Adapter of the models that `convert` made, whose model_type is that of the autoregressive one."""
PIPELINES = {
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion:StableDiffusionXl",
    "StableDiffusion3Pipeline": "flow_transformers:StableDiffusion3",
    "FluxPipeline": "flow_transformers:Flux",
}
"""Adapter of each class in a published model_index.json."""


def embedded_models() -> list[str]:
    """Names of the base models inside the package."""
    return sorted(path.parent.name for path in EMBEDDED.glob("*/config.json"))


def model_folder(name_or_path: str | Path) -> Path:
    """The folder of an embedded model's name, of a model folder, of a run (its final model), or of a model on the hub.

    ``owner/name`` is looked up on the hub unless there is a folder ``owner``.

    Raises:
        UserError: there is no such model.
    """
    path = Path(name_or_path)
    for candidate in (path, path / "model", EMBEDDED / str(name_or_path)):
        if (candidate / "config.json").is_file() or (candidate / INDEX).is_file():
            return candidate
    if path.is_dir():
        raise UserError(
            f"model {str(name_or_path)!r}: the folder holds no config.json or {INDEX} (neither it nor its model/)"
        )
    if hub.NAME.fullmatch(str(name_or_path)) and not Path(str(name_or_path).split("/")[0]).exists():
        return hub.download(str(name_or_path))
    hint = did_you_mean(str(name_or_path), embedded_models())
    raise UserError(f"model {str(name_or_path)!r}: no such folder or embedded model{hint}")


def fingerprint(name_or_path: str | Path) -> str:
    """Digest of a model's weights, configuration and tokenizer: equal for equal files, wherever they lie.

    Raises:
        UserError: there is no such model.
    """
    folder = model_folder(name_or_path)
    digest = hashlib.blake2b(digest_size=16)
    files = [*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("tokenizer*.json")]
    if (folder / INDEX).is_file():
        files = [folder / INDEX, *folder.glob("*/*.safetensors"), *folder.glob("*/*.json")]
    for path in sorted(files):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def load_denoiser(
    name_or_path: str | Path,
    *,
    dtype: Dtype = "fp32",
    chat: bool = False,
    gradient_checkpointing: bool = False,
    pipeline: PipelineOptions | None = None,
) -> Denoiser:
    """Open a denoiser in evaluation mode, with the unmasking policy that lies beside it, if there is one.

    Args:
        name_or_path: an embedded model, a model folder, a run, or a model on the hub.
        dtype: of the weights. The embedded models are fp32.
        chat: wrap prompts into the model's chat template.
        gradient_checkpointing: recompute activations in the backward pass.
        pipeline: how a published image pipeline is used.

    Raises:
        UserError: there is no such model, its files are broken, its type is not known, or an option does not fit it.
    """
    folder = model_folder(name_or_path)
    if (folder / INDEX).is_file():
        if chat:
            raise UserError(f"model {str(name_or_path)!r}: chat is an option of models of text only")
        return pipeline_adapter(str(read_index(folder).get("_class_name")), folder / INDEX).from_pretrained(
            folder, dtype=dtype, options=pipeline, gradient_checkpointing=gradient_checkpointing
        )
    if pipeline is not None:
        raise UserError(f"model {str(name_or_path)!r}: pipeline is an option of published image pipelines only")
    config = read_config(folder)
    model_type = config.get("model_type")
    if model_type is None and {"graph", "noise", "tokens"} <= config.keys():
        model_type = "sedd"  # whose published configuration names no type
    denoiser: Denoiser
    if isinstance(model_type, str) and model_type in KINDS:
        for option, given in (("dtype", dtype != "fp32"), ("chat", chat)):
            if given:
                raise UserError(f"model {str(name_or_path)!r}: {option} is an option of published models only")
        denoiser = KINDS[model_type].from_pretrained(folder)
        if gradient_checkpointing:
            denoiser.checkpoint_gradients()
    else:
        adapter = _adapter(config, model_type, folder)
        denoiser = adapter.from_pretrained(
            folder, dtype=dtype, chat=chat, gradient_checkpointing=gradient_checkpointing
        )
    if isinstance(denoiser, MaskedDenoiser) and (folder / FILE).is_file():
        denoiser.load_unmask(folder / FILE)
    return denoiser.eval()


def load_masked(name_or_path: str | Path, *, dtype: Dtype = "fp32", chat: bool = False) -> MaskedDenoiser:
    """`load_denoiser` for those who need a model of text.

    Raises:
        UserError: as there, or the model is of something else.
    """
    denoiser = load_denoiser(name_or_path, dtype=dtype, chat=chat)
    if not isinstance(denoiser, MaskedDenoiser):
        raise UserError(f"model {str(name_or_path)!r}: is of kind {denoiser.medium!r} (allowed: models of text)")
    return denoiser


def _adapter(config: Mapping[str, Any], model_type: object, folder: Path) -> type[PretrainedDenoiser]:
    adapter = PUBLISHED.get(str(model_type))
    if config.get("is_causal") is False and "mask_token_id" in config:
        adapter = adapter or CONVERTED
    if adapter is None:
        where = f"{folder / 'config.json'}: model_type {model_type!r}"
        if importlib.util.find_spec("transformers") is not None and model_type in _decoders():
            raise UserError(f"{where}: an autoregressive model (`unveil pretrain convert` makes a masked one of it)")
        raise UserError(f"{where} cannot be opened{did_you_mean(str(model_type), [*KINDS, *PUBLISHED])}")
    return _found(adapter, f"{folder}: a model of type {model_type!r}", "transformers", "hf")


def _decoders() -> Collection[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def pipeline_adapter(name: str, where: str | Path) -> type[PipelineDenoiser]:
    """The adapter of pipelines of class ``name``; ``where`` says whose it is.

    Raises:
        UserError: there is none, or the extra is not installed.
    """
    if name not in PIPELINES:
        raise UserError(f"{where}: a pipeline of class {name!r} cannot be opened{did_you_mean(name, PIPELINES)}")
    return _found(PIPELINES[name], f"{where}: a pipeline of class {name!r}", "diffusers", "diffusers")


def _found(place: str, what: str, package: str, extra: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs an extra (pip install 'unveil[{extra}]')")
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"unveil.denoisers.{module}"), name)
