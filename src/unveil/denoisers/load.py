"""Open a denoiser by name or path."""

from __future__ import annotations

from pathlib import Path

from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.score import ScoreDenoiser
from unveil.denoisers.transformer import TransformerDenoiser, read_config
from unveil.denoisers.unmask import FILE
from unveil.registry import UserError, did_you_mean

KINDS = {kind.model_type: kind for kind in (TransformerDenoiser, ScoreDenoiser)}
EMBEDDED = Path(__file__).parent.parent / "models"
"""The small base models that ship inside the package, one folder each."""


def embedded_models() -> list[str]:
    """Names of the base models inside the package."""
    return sorted(path.parent.name for path in EMBEDDED.glob("*/config.json"))


def model_folder(name_or_path: str | Path) -> Path:
    """The folder of an embedded model's name, of a model folder, or of a run (its final model).

    Raises:
        UserError: there is no such model.
    """
    path = Path(name_or_path)
    for candidate in (path, path / "model", EMBEDDED / str(name_or_path)):
        if (candidate / "config.json").is_file():
            return candidate
    if path.is_dir():
        raise UserError(f"model {str(name_or_path)!r}: the folder holds no config.json (neither it nor its model/)")
    hint = did_you_mean(str(name_or_path), embedded_models())
    raise UserError(f"model {str(name_or_path)!r}: no such folder or embedded model{hint}")


def load_denoiser(name_or_path: str | Path) -> MaskedDenoiser:
    """Open a denoiser in evaluation mode, with the unmasking policy that lies beside it, if there is one.

    Raises:
        UserError: there is no such model, its files are broken, or its type is not known.
    """
    folder = model_folder(name_or_path)
    model_type = read_config(folder).get("model_type")
    if model_type not in KINDS:
        allowed = ", ".join(KINDS)
        raise UserError(f"{folder / 'config.json'}: model_type {model_type!r} cannot be opened (allowed: {allowed})")
    denoiser: MaskedDenoiser = KINDS[model_type].from_pretrained(folder)
    if (folder / FILE).is_file():
        denoiser.load_unmask(folder / FILE)
    return denoiser.eval()
