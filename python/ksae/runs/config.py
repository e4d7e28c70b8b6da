# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: one tree of dataclasses, read from and written to YAML.

Each key states its default and its help; `describe()` returns key, type, default and help of all of
them for the command line.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ksae.errors import UserError
from ksae.files.atomic import write_atomic
from ksae.runs.model_config import PENALIZED, ModelConfig, setting

T = TypeVar("T")


@dataclass
class DataConfig:
    activations: str | None = setting(
        None, ".npy, .safetensors or .pt file, or the folder of a cache; or else:"
    )
    targets: str | None = setting(
        None, "transcoder: file of the outputs, row for row with activations"
    )
    model: str | None = setting(
        None, "language model: smollm2-135m, a folder, or a Hugging Face name"
    )
    hook: str | None = setting(None, "where its activations are read, as layers.9.resid_post")
    target_hook: str | None = setting(None, "transcoder: where the outputs are read")
    gradient: Literal["labels", "sampled", "entropy", "logsumexp", "max_logit"] = setting(
        "labels", "with model.beta: the loss whose gradient is harvested"
    )
    text: str | None = setting(None, ".txt, .jsonl or .parquet file, folder of them, pydoc or kjv")
    field: str = setting(
        "text", "key or column of the text, or of its token ids, in .jsonl, .parquet and datasets"
    )
    separator: str | None = setting(
        None, r"what divides a .txt file into documents, as \n\n; default nothing"
    )
    context: int = setting(128, "tokens of a context, special ones included")
    bos: Literal["auto", "always", "never"] = setting(
        "auto", "whether contexts start with a BOS token"
    )
    exclude: str | None = setting(
        None, "tokens left out beside special ones: ids or names, as '<|im_end|> 198'"
    )
    model_revision: str | None = setting(
        None, "branch, tag or commit of a Hugging Face name; default main"
    )
    model_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "of the language model"
    )
    max_tokens: int | None = setting(None, "of the text that are used")
    cache: str | None = setting(
        None, "folder to keep the activations in, which another run takes as activations"
    )
    stream: bool = setting(False, "make the activations while training, and keep none")
    holdout: float = setting(0.05, "share of the documents (rows of a file) kept for evaluation")
    unquoted: bool = setting(False, "hold out no context that quotes the training text")

    def __post_init__(self) -> None:
        if self.separator is not None:  # a shell or a quoted YAML text hands over \n as it is typed
            for typed, meant in ((r"\n", "\n"), (r"\t", "\t"), (r"\r", "\r")):
                self.separator = self.separator.replace(typed, meant)


@dataclass
class TrainConfig:
    batch_size: int = setting(2048, "tokens per step")
    steps: int = setting(10_000, "length of the run")
    tokens: int | None = setting(None, "length of the run in tokens; overrides steps")
    lr: float = setting(3e-4, "Adam's learning rate")
    decoder_lr: float | None = setting(
        None, "the decoder's rate as a multiple of lr; default 3 for an sae with unit rows, else 1"
    )
    warmup: int | None = setting(
        None, "steps of linear warm-up; default 100, a tenth of a shorter run"
    )
    decay: float = setting(0.2, "share of the run, at its end, over which the rate falls")
    decay_shape: Literal["linear", "cosine"] = setting("linear", "of that fall")
    beta1: float = setting(0.9, "Adam")
    beta2: float = setting(0.999, "Adam")
    eps: float = setting(1e-8, "Adam")
    k_start: int | None = setting(
        None, "latents per token at the first step, from which they go to model.k; null: model.k"
    )
    k_steps: int | None = setting(None, "of k_start: steps that takes; default a tenth of the run")
    penalty_warmup: int = setting(
        0, "steps in which the penalty of jump_relu, relu or gated grows to its weight"
    )
    clip_norm: float | None = setting(
        1.0, "largest norm of the whole gradient; null turns clipping off"
    )
    clip: Literal["above", "always"] = setting(
        "always", "scale the gradient to clip_norm where its norm is larger, or at every step"
    )
    init_tokens: int = setting(
        32_768, "tokens that the first biases are set from; 0 leaves them at 0"
    )
    encoder_scale: float = setting(
        0.1, "length of the encoder's first rows in an sae that selects by k; the decoder's are 1"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "of the weights")
    device: str | None = setting(None, "default cuda if there is one, else cpu")
    fused: bool = setting(True, "the fused step; false runs autograd and torch's Adam")
    graph: Literal["auto", "off"] = setting(
        "auto", "on a GPU: steps of one shape are replays of a CUDA graph, where they can be"
    )
    seed: int = setting(0, "of the weights and of the order of the data")
    timeout: float = setting(600.0, "several processes: seconds that they wait for each other")
    replicas: int | None = setting(None, "several processes: copies; default what sends least")
    threads: int | None = setting(None, "CPU threads; default torch's")
    prefetch: int = setting(2, "batches read ahead in a thread; 0 reads in the training loop")
    checkpoint_every: int = setting(1000, "steps between checkpoints")
    keep_last: int = setting(2, "checkpoints kept")
    eval_tokens: int = setting(65_536, "held-out tokens measured at the end; 0 measures none")


@dataclass
class LogConfig:
    every: int = setting(10, "steps between lines of metrics.jsonl")
    progress: bool = setting(True, "bar on a terminal, a line at each tenth of the run elsewhere")
    tensorboard: bool = setting(False, "event files in out/tensorboard")
    wandb: str | None = setting(None, "Weights & Biases project to log to")


@dataclass
class RunConfig:
    out: str = setting("runs/sae", "folder of the run; must be new, unless the run is resumed")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)


def read(path: str | Path) -> RunConfig:
    """The configuration in a YAML file; keys that it leaves out have their defaults."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config: {path} must be YAML, got: {reason}") from None
    return from_dict({} if content is None else content, where=str(path))


def from_dict(content: Any, where: str = "config") -> RunConfig:
    """The configuration of a nested dict; `where` it is from is named in errors."""
    config = _build(RunConfig, content, where, "")
    check(config, where)
    return config


def override(config: RunConfig, settings: Mapping[str, Any] | Sequence[str]) -> RunConfig:
    """A copy with some keys set: {"train.lr": 1e-4}, or as text, ["train.lr=1e-4"]."""
    if not isinstance(settings, Mapping):
        pairs = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise UserError(f"config: a setting must be key=value, got {setting!r}")
            try:
                pairs[key.strip()] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise UserError(f"config: {key} must be a YAML value, got {value!r}") from None
        settings = pairs
    tree = dataclasses.asdict(config)
    for key, value in settings.items():
        node: Any = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"config: unknown key {key}: {parent} has no keys below it")
        node[last] = value  # unknown ones are found below
    return from_dict(tree)


def write(config: RunConfig, path: Path) -> None:
    """Write the complete configuration, defaults included."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    write_atomic(path, lambda file: file.write(text.encode()))


def describe() -> list[tuple[str, str, Any, str]]:
    """(dotted key, type, default, help) of every key, in order."""
    return list(_describe(RunConfig, ""))


def total_steps(train: TrainConfig) -> int:
    """Steps of the run: `tokens`, if given, rounded up to whole batches."""
    return train.steps if train.tokens is None else -(-train.tokens // train.batch_size)


def warmup_steps(train: TrainConfig) -> int:
    """Steps of warm-up: as given, or by the length of the run."""
    return min(100, total_steps(train) // 10) if train.warmup is None else train.warmup


def k_steps(train: TrainConfig) -> int | None:
    """Steps of annealing k: as given, or by the length of the run; None: it is not annealed."""
    if train.k_start is None or train.k_steps is not None:
        return train.k_steps
    return max(total_steps(train) // 10, 1)


def dead_after(config: RunConfig) -> int:
    """Tokens after which a silent latent is dead: as given, or by the length of the run."""
    if config.model.dead_after is not None:
        return config.model.dead_after
    return min(10_000_000, total_steps(config.train) * config.train.batch_size // 4)


def fitted(config: RunConfig) -> RunConfig:
    """A copy with what was left to the length of the run filled in, and with absolute paths, so
    that the run can be gone on with and evaluated from any folder."""
    from ksae.activations import PACKAGED, SMOLLM2  # with torch, which help does without

    check(config)

    def absolute(name: str | None) -> str | None:
        """If it is a path: it may be a name on a hub."""
        if name is None or name in (*PACKAGED, SMOLLM2) or not os.path.exists(name):
            return name
        return os.path.abspath(name)

    def path(name: str | None) -> str | None:
        return None if name is None else os.path.abspath(name)

    data = config.data
    return dataclasses.replace(
        config,
        out=os.path.abspath(config.out),
        model=dataclasses.replace(
            config.model, dead_after=dead_after(config), start=absolute(config.model.start)
        ),
        data=dataclasses.replace(
            data,
            activations=path(data.activations),
            targets=path(data.targets),
            cache=path(data.cache),
            model=absolute(data.model),
            text=absolute(data.text),
        ),
        train=dataclasses.replace(
            config.train, warmup=warmup_steps(config.train), k_steps=k_steps(config.train)
        ),
    )


def check(config: RunConfig, where: str = "config") -> None:
    """Refuse values that no run can have. What depends on the data is checked by the trainer."""
    train, model = config.train, config.model
    least = {
        "model.d_sae": 1, "model.k": 1, "model.auxk_alpha": 0, "model.k_aux": 1,
        "model.dead_after": 0, "model.beta": 0, "data.context": 1, "data.max_tokens": 1,
        "data.holdout": 0,
        "train.batch_size": 1, "train.steps": 0, "train.tokens": 1, "train.lr": 0,
        "train.warmup": 0, "train.decay": 0, "train.beta1": 0, "train.beta2": 0,
        "train.decoder_lr": 0, "train.init_tokens": 0, "train.seed": 0, "train.threads": 1,
        "train.prefetch": 0, "train.checkpoint_every": 1, "train.keep_last": 1,
        "train.eval_tokens": 0, "log.every": 1,
    }  # fmt: skip
    for key, low in least.items():
        value = _get(config, key)
        if value is not None and not value >= low:
            raise UserError(f"{where}: {key} must be at least {low}, got {value}")
    for key in ("train.beta1", "train.beta2", "data.holdout"):
        if not _get(config, key) < 1:
            raise UserError(f"{where}: {key} must be below 1, got {_get(config, key)}")
    if train.decay > 1:
        raise UserError(f"{where}: train.decay must be a share in [0, 1], got {train.decay}")
    if train.clip_norm is not None and not train.clip_norm > 0:
        raise UserError(f"{where}: train.clip_norm must be above 0 or null, got {train.clip_norm}")
    for key in ("train.lr", "train.decoder_lr", "model.auxk_alpha", "model.beta"):
        if _get(config, key) == float("inf"):
            raise UserError(f"{where}: {key} must be finite, got {_get(config, key)}")
    if not 0 < train.encoder_scale < float("inf"):
        got = train.encoder_scale
        raise UserError(f"{where}: train.encoder_scale must be finite and above 0, got {got}")
    if not train.eps > 0:
        raise UserError(f"{where}: train.eps must be above 0, got {train.eps}")
    if model.k > model.d_sae:
        raise UserError(
            f"{where}: model.k must be at most model.d_sae = {model.d_sae}, got {model.k}"
        )
    if model.start is None:  # else of its latents, by runs.model.start_from
        check_lists(model, where)
    if model.activation != "topk":
        from ksae.runs.activation import activation_of, check_activation, check_fused  # with torch

        check_activation(model, where)
        check_fused(activation_of(model), config, where)
    _check_schedules(config, where)
    if warmup_steps(train) > total_steps(train):
        raise UserError(
            f"{where}: train.warmup must be at most the {total_steps(train)} steps of the run, "
            f"got {train.warmup}"
        )
    if config.data.stream and config.data.cache is not None:
        raise UserError(f"{where}: data.cache must be null where data.stream is true")
    if config.data.separator == "":
        raise UserError(f"{where}: data.separator must be null or some text, got an empty one")
    if config.data.unquoted and config.data.activations is not None:
        raise UserError(f"{where}: data.unquoted must be false where data.activations is given")
    if model.skip and model.kind != "transcoder" and model.start is None:
        raise UserError(
            f"{where}: model.skip must be false for model.kind = {model.kind}, got true"
        )


def _check_schedules(config: RunConfig, where: str) -> None:
    """Of k and of penalties."""
    model, train = config.model, config.train
    name, start = model.activation, train.k_start
    if start is not None and name in (*PENALIZED, "group_max"):
        raise UserError(f"{where}: train.k_start must be null with {name}, got {start}")
    if start is not None and not 1 <= start <= model.d_sae:
        raise UserError(f"{where}: train.k_start must be in [1, {model.d_sae}], got {start}")
    if train.k_steps is not None and train.k_steps < 1:
        raise UserError(f"{where}: train.k_steps must be at least 1, got {train.k_steps}")
    if start is None and train.k_steps is not None:
        got = train.k_steps
        raise UserError(f"{where}: train.k_steps must be null without train.k_start, got {got}")
    warmup = train.penalty_warmup
    if warmup < 0 or (warmup and name not in PENALIZED and model.start is None):
        want = "at least 0" if warmup < 0 else f"0 with {name}"
        raise UserError(f"{where}: train.penalty_warmup must be {want}, got {warmup}")


def check_lists(model: ModelConfig, where: str) -> None:
    """Of numbers of latents."""
    widths, ks, F = model.prefixes, model.multi_k, model.d_sae
    if widths is not None and (
        widths[-1:] != (F,) or any(a >= b for a, b in itertools.pairwise((-1, *widths)))
    ):
        want = f"rise from 0 or more to model.d_sae = {F}"
        raise UserError(f"{where}: model.prefixes must {want}, got {list(widths)}")
    if ks is not None and (len(set(ks)) < len(ks) or not all(1 <= k <= F for k in ks)):
        want = f"different numbers in [1, {F}]"
        raise UserError(f"{where}: model.multi_k must be {want}, got {list(ks)}")
    if ks and model.multi_topk:
        raise UserError(f"{where}: model.multi_k must be null with multi_topk, got {list(ks)}")


def _get(config: RunConfig, key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name)
    return node


def _build(kind: type[T], content: Any, where: str, prefix: str) -> T:
    if not isinstance(content, dict):
        raise UserError(
            f"{where}: {prefix.rstrip('.') or 'the file'} must be keys with values, got {content!r}"
        )
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {prefix}{key}; valid keys: {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[key]):
            section = {} if value is None else value  # a section whose keys are all commented out
            values[key] = _build(typing.cast(Any, hints[key]), section, where, f"{prefix}{key}.")
        else:
            values[key] = _convert(hints[key], value, f"{where}: {prefix}{key}")
    return kind(**values)


def _convert(hint: Any, value: Any, place: str) -> Any:
    """`value` as `hint` asks: bool, int, float, str, a Literal, or one of them | None."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(arm for arm in hint.__args__ if arm is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        if value in hint.__args__:
            return value
    elif typing.get_origin(hint) is tuple:
        each = value.strip("[]").split(",") if isinstance(value, str) else value
        if isinstance(each, list | tuple):
            return tuple(_convert(hint.__args__[0], part, place) for part in each)
    elif hint is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4, which has no point, as text
        except (TypeError, ValueError):
            number = float("nan")
        if number == number:
            return number
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif hint is int and isinstance(value, str) and _whole(value):
        return int(float(value))  # 1e6
    elif type(value) is hint:
        return value
    raise UserError(f"{place} must be {_say(hint)}, got {value!r}")


def _whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def _say(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in hint.__args__)
    if typing.get_origin(hint) is tuple:
        return f"{_say(hint.__args__[0])}, or several in a list"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names[hint]


def _describe(kind: Any, prefix: str) -> Iterator[tuple[str, str, Any, str]]:
    hints = typing.get_type_hints(kind)
    for key in dataclasses.fields(kind):
        hint = hints[key.name]
        if dataclasses.is_dataclass(hint):
            yield from _describe(hint, f"{prefix}{key.name}.")
            continue
        arms = [arm for arm in getattr(hint, "__args__", [hint]) if arm is not types.NoneType]
        literal = typing.get_origin(hint) is Literal
        name = "|".join(arms) if literal else arms[0].__name__
        if typing.get_origin(arms[0]) is tuple:
            name = f"{arms[0].__args__[0].__name__},..."
        yield f"{prefix}{key.name}", name, key.default, key.metadata["help"]
