# SPDX-License-Identifier: Apache-2.0
"""Running a language model over contexts and keeping the activations at a hook."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ksae.activations.cache import SHARD_TOKENS, CacheWriter, open_cache, writing
from ksae.activations.contexts import Contexts
from ksae.activations.fingerprint import of_identity
from ksae.activations.gradients import LOSSES, capture_gradient, gradient_dtype
from ksae.activations.hooks import capture, resolve_hook
from ksae.activations.models import model_fingerprint
from ksae.activations.progress import Progress
from ksae.activations.rows import FLOATS, Rows, all_finite
from ksae.activations.shuffle import Loaded, shuffled
from ksae.activations.sources import ActivationSource, ArraySource, RowOrigin
from ksae.activations.spread import in_turn, told
from ksae.errors import UserError
from ksae.parallel.ranks import Ranks

STREAM_BUFFER_TOKENS = 32_768


class _Runner:
    """A model, its hooks and the contexts, as a function from context numbers to rows."""

    def __init__(
        self,
        model: nn.Module,
        contexts: Contexts,
        hook: str,
        target_hook: str | None,
        batch_size: int,
        dtype: torch.dtype | None,
        exclude_special: bool,
        gradient: str | None,
        loss_mask: Tensor | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        if batch_size < 1:
            raise UserError(f"harvest: batch_size must be at least 1, got {batch_size}")
        if dtype is not None and dtype not in FLOATS:
            raise UserError(f"harvest: dtype must be a float dtype, got {dtype}")
        for name in (hook, target_hook):
            if name is not None:
                resolve_hook(model, name)
        self.model, self.contexts, self.dtype = model, contexts, dtype
        self.hook, self.target_hook = hook, target_hook
        self.exclude_special = exclude_special
        self.batch_size = batch_size
        if gradient is not None and gradient not in LOSSES:
            raise UserError(
                f"harvest: gradient must be one of {', '.join(LOSSES)}, got {gradient!r}"
            )
        if loss_mask is not None and gradient is None:
            raise UserError("harvest: loss_mask must be None where gradient is None")
        if loss_mask is not None and loss_mask.shape != contexts.ids.shape:
            raise UserError(
                f"harvest: loss_mask must have shape {list(contexts.ids.shape)}, that of the "
                f"contexts, got {list(loss_mask.shape)}"
            )
        self.gradient = gradient
        self.attended = contexts.attended()
        self.used = contexts.mask(exclude_special)  # [contexts, length]
        self.predicted = self.used if loss_mask is None else self.used & loss_mask.bool().cpu()
        self.counts: Rows = self.used.sum(dim=1).numpy().astype(np.int64)  # rows per context
        self.device = next(model.parameters()).device
        if not self.counts.any():
            raise UserError(
                f"harvest: the {len(contexts)} contexts hold no token to use: nothing but padding "
                "and special tokens"
            )
        largest, vocabulary = int(contexts.ids.max()), _vocabulary(model)
        if vocabulary is not None and largest >= vocabulary:
            raise UserError(
                f"harvest: token ids must be below the model's vocabulary of {vocabulary},"
                f" got {largest}: these are another tokenizer's"
            )
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if limit is not None and contexts.ids.shape[1] > limit:
            raise UserError(
                f"harvest: contexts must have at most the model's {limit} positions, "
                f"got {contexts.ids.shape[1]}"
            )

    def identity(self, model_name: str | None = None) -> dict[str, Any]:
        """All that the activations follow from, as JSON values."""
        model = self.model
        config = getattr(model, "config", None)
        identity = {
            "model": model_name or str(getattr(config, "name_or_path", type(model).__name__)),
            "model_fingerprint": model_fingerprint(model),
            "hook": self.hook,
            "target_hook": self.target_hook,
            "dtype": str(self.dtype or next(model.parameters()).dtype).removeprefix("torch."),
            "dataset_fingerprint": self.contexts.fingerprint(),
            "exclude_special": self.exclude_special,
            "tokens": int(self.counts.sum()),
        }
        if self.gradient is not None:
            identity["gradient"] = self.gradient
            identity["predictions"] = hashlib.blake2b(
                self.predicted.contiguous().numpy().data, digest_size=16
            ).hexdigest()
        return identity

    def batches(self, numbers: Tensor) -> Iterator[tuple[dict[str, Tensor], int]]:
        """The rows of some contexts, a batch of contexts at a time, with the count of contexts."""
        training = self.model.training
        self.model.eval()
        try:
            if self.ranks is not None:
                yield from in_turn(self.ranks, self._run, numbers, self.batch_size)
                return
            for begin in range(0, len(numbers), self.batch_size):
                chosen = numbers[begin : begin + self.batch_size]
                yield self._run(chosen), len(chosen)
        finally:
            self.model.train(training)

    def _run(self, chosen: Tensor) -> dict[str, Tensor]:
        width = int(self.contexts.lengths[chosen].max())
        ids = self.contexts.ids[chosen, :width].long().to(self.device)
        attended, used = self.attended[chosen, :width], self.used[chosen, :width]
        inputs: dict[str, Any] = {"input_ids": ids}
        if not attended.all():
            inputs["attention_mask"] = attended.long().to(self.device)
        hooks = [self.hook] if self.target_hook is None else [self.hook, self.target_hook]
        g = None
        if self.gradient is None:
            found = capture(self.model, hooks, inputs)
        else:
            predicted = self.predicted[chosen, :width].to(self.device)
            found, g = capture_gradient(
                self.model, hooks, inputs, predicted, loss=self.gradient, seeds=chosen.tolist()
            )
        result = {"x": self._rows(found[self.hook], used, self.hook)}
        if self.target_hook is not None:
            result["y"] = self._rows(found[self.target_hook], used, self.target_hook)
        if g is not None:
            rows = self._select(g, used, hooks[-1])
            result["g"] = rows.to("cpu", gradient_dtype(result["x"].dtype))
        where = used.nonzero()  # [rows, 2]
        result["tokens"] = self.contexts.ids[chosen, :width][used]
        result["contexts"] = chosen[where[:, 0]].int()
        result["positions"] = where[:, 1].int()
        return result

    def _select(self, activation: Tensor, used: Tensor, hook: str) -> Tensor:
        """The rows [rows, d] of the positions in use."""
        if activation.ndim == 2 and len(activation) == used.numel():
            activation = activation.view(*used.shape, -1)  # OPT's MLP sees a list of tokens
        if activation.shape[:2] != used.shape:
            raise UserError(
                f"hook {hook}: must give activations of shape {list(used.shape)} + [d], "
                f"got {list(activation.shape)}"
            )
        return activation.flatten(2)[used.to(activation.device)]

    def _rows(self, activation: Tensor, used: Tensor, hook: str) -> Tensor:
        rows = self._select(activation, used, hook)
        rows = rows.to("cpu", self.dtype or rows.dtype)
        if not all_finite(rows):
            raise UserError(
                f"hook {hook}: the model gives non-finite activations in {rows.dtype}; load or "
                "store it in another dtype"
            )
        return rows


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model knows, where it says so."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None)


def harvest(
    model: nn.Module,
    contexts: Contexts,
    hook: str,
    out_dir: str | Path | None = None,
    *,
    target_hook: str | None = None,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
    exclude_special: bool = True,
    gradient: str | None = None,
    loss_mask: Tensor | None = None,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
    model_name: str | None = None,
    ranks: Ranks | None = None,
) -> ArraySource:
    """The activations of all contexts at a hook, in memory or in a cache folder.

    Args:
        out_dir: a cache folder: written in shards, then opened memory-mapped. An unfinished one is
            gone on with, a finished one of the same model, contexts and hook is reused, any other
            is refused. None keeps the rows in memory.
        target_hook: a second hook, for a transcoder's targets.
        batch_size: contexts in one forward pass.
        dtype: of the stored rows; by default the model's.
        exclude_special: leave out BOS and the tokenizer's other special tokens.
        gradient: also keep the gradient of a loss at the hook (a transcoder: at target_hook); the
            name of the loss, one of `ksae.activations.LOSSES`. The loss is a sum over tokens, and
            the rows are stored in the dtype of x, in bfloat16 where x is in float16.
        loss_mask: [contexts, length] bool: the tokens whose prediction is part of that loss; by
            default, and at most, those whose activations are kept.
        progress: show a bar on a terminal, a line at each tenth elsewhere.
        model_name: for the cache's description; by default the model's own.
        ranks: processes that all call it and share the work; rank 0 writes, on a disk that all see.
    """
    runner = _Runner(
        model,
        contexts,
        hook,
        target_hook,
        batch_size,
        dtype,
        exclude_special,
        gradient,
        loss_mask,
        ranks,
    )
    if out_dir is None:
        return _in_memory(runner, progress)
    if ranks is not None and ranks.rank > 0:
        _help(runner, ranks)
        return open_cache(out_dir)
    with told(ranks), writing(Path(out_dir)):
        writer = CacheWriter(out_dir, runner.identity(model_name), shard_tokens)
        _to_cache(runner, writer, progress)
    if ranks is not None:
        ranks.agree("harvest", {"the cache": "finished"})
    return open_cache(out_dir)


def _help(runner: _Runner, ranks: Ranks) -> None:
    """Do one's share of the rows that are not in the cache, which rank 0 writes."""
    ranks.agree("harvest", {"the cache": "open"})
    left = int(ranks.broadcast(None, 0)["left"])
    if left >= 0:  # not finished
        for _ in runner.batches(torch.arange(len(runner.contexts) - left, len(runner.contexts))):
            pass
    ranks.agree("harvest", {"the cache": "finished"})


def _to_cache(runner: _Runner, writer: CacheWriter, progress: bool) -> None:
    """The rows that are not there yet."""
    if runner.ranks is not None:
        left = -1 if writer.complete else len(runner.contexts) - writer.contexts_done
        runner.ranks.agree("harvest", {"the cache": "open"})
        runner.ranks.broadcast({"left": torch.tensor(left)}, 0)
    if not writer.complete:
        done = writer.contexts_done
        with _progress(runner, done, progress) as bar:
            for rows, count in runner.batches(torch.arange(done, len(runner.contexts))):
                done += count
                writer.append(rows, done)
                bar.update(len(rows["x"]))
        writer.finish()


def _in_memory(runner: _Runner, progress: bool) -> ArraySource:
    total, done = int(runner.counts.sum()), 0
    # Filled in place: collecting parts and joining them would need the memory twice.
    columns: dict[str, Tensor] = {}
    with _progress(runner, 0, progress) as bar:
        for rows, _ in runner.batches(torch.arange(len(runner.contexts))):
            for name, part in rows.items():
                if name not in columns:
                    columns[name] = torch.empty(total, *part.shape[1:], dtype=part.dtype)
                columns[name][done : done + len(part)] = part
            done += len(rows["x"])
            bar.update(len(rows["x"]))
    return ArraySource(
        [columns["x"]],
        [columns["y"]] if "y" in columns else None,
        [columns["g"]] if "g" in columns else None,
        name=f"activations of {runner.hook}",
        origin=RowOrigin([columns["tokens"]], [columns["contexts"]], [columns["positions"]]),
        identity=runner.identity(),
    )


def _progress(runner: _Runner, contexts_done: int, shown: bool) -> Progress:
    return Progress(
        int(runner.counts.sum()),
        f"harvest {runner.hook}",
        done=int(runner.counts[:contexts_done].sum()),
        shown=shown,
    )


class StreamSource(ActivationSource):
    """Activations made while training, for more of them than a disk holds: the model runs over a
    window of contexts drawn at random, its rows are shuffled, emitted and forgotten.

    Resuming replays nothing but the window it lands in. An epoch costs a pass of the model each
    time. Use it behind `prefetch`, so that the next window is made while the last is trained on.

    Args:
        buffer_tokens: rows of a window, held in memory. A batch of B rows shares about
            B * length / buffer_tokens of them with any context.
        Others as in `harvest`.
    """

    def __init__(
        self,
        model: nn.Module,
        contexts: Contexts,
        hook: str,
        *,
        target_hook: str | None = None,
        batch_size: int = 16,
        dtype: torch.dtype | None = None,
        exclude_special: bool = True,
        gradient: str | None = None,
        loss_mask: Tensor | None = None,
        buffer_tokens: int = STREAM_BUFFER_TOKENS,
    ) -> None:
        if buffer_tokens < 1:
            raise UserError(f"StreamSource: buffer_tokens must be at least 1, got {buffer_tokens}")
        self._runner = _Runner(
            model,
            contexts,
            hook,
            target_hook,
            batch_size,
            dtype,
            exclude_special,
            gradient,
            loss_mask,
        )
        self._buffer_tokens = buffer_tokens
        # Contexts with no row to give would be units of no rows.
        self._contexts = np.flatnonzero(self._runner.counts)
        self._starts = np.cumsum(self._runner.counts) - self._runner.counts
        x, y, _, _ = self._load(np.array([0]))
        self.has_gradient = gradient is not None
        self.name = f"activations of {hook}"
        self.d_in = x.shape[1]
        self.d_out = None if y is None else y.shape[1]
        self.dtype = x.dtype
        self.num_tokens: int = int(self._runner.counts.sum())

    def fingerprint(self) -> str:
        """A hash of what the rows are made from."""
        return of_identity(self._runner.identity())

    def _load(self, units: Rows) -> Loaded:
        numbers = self._contexts[units]
        parts = [rows for rows, _ in self._runner.batches(torch.from_numpy(numbers))]
        x = torch.cat([rows["x"] for rows in parts])
        y = torch.cat([rows["y"] for rows in parts]) if "y" in parts[0] else None
        g = torch.cat([rows["g"] for rows in parts]) if "g" in parts[0] else None
        counts = self._runner.counts
        rows = np.concatenate([self._starts[n] + np.arange(counts[n]) for n in numbers])
        return Loaded(x, y, g, rows)

    def _stream(self, batch_size: int, seed: int, start_step: int) -> Iterator[Loaded]:
        return shuffled(
            self._runner.counts[self._contexts],
            self._load,
            batch_size,
            buffer_tokens=self._buffer_tokens,
            seed=seed,
            start_step=start_step,
        )

    def _ordered(self, batch_size: int) -> Iterator[Loaded]:
        """Whole windows in order; a batch does not span two."""
        window = self._runner.batch_size
        for begin in range(0, len(self._contexts), window):
            end = min(begin + window, len(self._contexts))
            loaded = self._load(np.arange(begin, end))
            for start in range(0, len(loaded.rows), batch_size):
                stop = min(start + batch_size, len(loaded.rows))
                yield loaded.take(np.arange(start, stop))
