# SPDX-License-Identifier: Apache-2.0
"""Sources: the stream, its determinism, files and bad input."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ksae.activations import ArraySource, open_source
from ksae.activations.rows import all_finite
from ksae.errors import UserError

N, D = 1000, 6


@pytest.fixture
def x() -> torch.Tensor:
    """Column 0 is the row number."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(N)
    return x


def windowed(x: torch.Tensor, y: torch.Tensor | None = None) -> ArraySource:
    """The path of data larger than the buffer, over shards of unequal size."""
    sizes = [130, 1, 600, len(x) - 731]
    return ArraySource(
        x.split(sizes),
        None if y is None else y.split(sizes),
        mapped=True,
        buffer_tokens=100,
        block_tokens=7,
    )


SOURCES = {"memory": lambda x: ArraySource([x]), "windowed": windowed}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("batch_size", [1, 64, 999, 2300])
def test_an_epoch_holds_every_row_once(kind: str, batch_size: int, x: torch.Tensor) -> None:
    stream = SOURCES[kind](x).batches(batch_size, seed=3)
    epochs = 3
    rows = torch.cat([b for b, _ in islice(stream, -(-epochs * N // batch_size))])[: epochs * N]
    orders = rows[:, 0].long().view(epochs, N)
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(N))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(rows, x[rows[:, 0].long()])


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("start", [1, 7, 15, 16, 40])
def test_a_resumed_stream_is_the_same_stream(kind: str, start: int, x: torch.Tensor) -> None:
    source = SOURCES[kind](x)
    whole = list(islice(source.batches(64, seed=1), 50))
    resumed = list(islice(source.batches(64, seed=1, start_step=start), 50 - start))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[start:], resumed, strict=True))
    other = next(source.batches(64, seed=2))[0]
    assert not torch.equal(other, whole[0][0])


def test_resuming_reads_only_the_windows_it_needs(x: torch.Tensor) -> None:
    source = windowed(x)
    loads: list[int] = []
    load = source._load_blocks
    source._load_blocks = lambda blocks: loads.append(len(blocks)) or load(blocks)  # type: ignore
    next(source.batches(10, start_step=1_000_000))
    assert len(loads) == 1
    assert sum(loads) * 7 < 2 * 100


def test_the_windowed_shuffle_mixes(x: torch.Tensor) -> None:
    """Neighbours in a batch come from all over the data, and the start of an epoch does too."""
    order = next(windowed(x).batches(100))[0][:, 0]
    assert (order.diff().abs() > 20).float().mean() > 0.8
    assert order.min() < 200
    assert order.max() > 800


def test_targets_stay_with_their_rows(x: torch.Tensor) -> None:
    y = 2 * x[:, :3]
    for source in (ArraySource([x], [y]), windowed(x, y), open_source(x, y)):
        assert (source.d_in, source.d_out) == (D, 3)
        for bx, by in islice(source.batches(33), 40):
            assert by is not None
            assert torch.equal(by, 2 * bx[:, :3])


@pytest.mark.parametrize("kind", SOURCES)
def test_sweep_is_the_data_in_order(kind: str, x: torch.Tensor) -> None:
    parts = [b for b, _ in SOURCES[kind](x).sweep(300)]
    assert [len(b) for b in parts] == [300, 300, 300, 100]
    assert torch.equal(torch.cat(parts), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_pass_unchanged(dtype: torch.dtype, x: torch.Tensor) -> None:
    for source in (ArraySource([x.to(dtype)]), windowed(x.to(dtype))):
        batch, _ = next(source.batches(50))
        assert batch.dtype == source.dtype == dtype
        assert torch.equal(batch, x.to(dtype)[batch[:, 0].long()]) or dtype == torch.bfloat16


def test_gather_across_shards(x: torch.Tensor) -> None:
    rows = torch.tensor([999, 0, 130, 131, 129, 0])
    assert torch.equal(windowed(x).gather(rows)[0], x[rows])


def write(path: Path, x: torch.Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix == ".pt":
        torch.save(x, path)
    else:
        save_file({"anything": x.contiguous()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_files_are_mapped(suffix: str, tmp_path: Path, x: torch.Tensor) -> None:
    source = open_source(write(tmp_path / f"a{suffix}", x), buffer_tokens=100)
    assert (source.d_in, source.d_out, source.num_tokens) == (D, None, N)
    rows = torch.cat([b for b, _ in islice(source.batches(100), 10)])
    assert torch.equal(rows[rows[:, 0].argsort()], x)
    target = open_source(x, str(write(tmp_path / f"y{suffix}", x[:, :2])))
    assert target.d_out == 2


def test_mapped_data_is_not_read_into_memory(tmp_path: Path) -> None:
    """A file of 128 MB costs a few MB of private memory."""
    rows, d = 1 << 17, 256
    array = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float32, (rows, d))
    array[:, 0] = np.arange(rows)
    array.flush()
    del array

    def private() -> int:
        fields = Path("/proc/self/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * 4096  # resident less shared with files

    before = private()
    source = open_source(tmp_path / "big.npy", buffer_tokens=4096)
    seen = torch.cat([b[:, 0].clone() for b, _ in islice(source.batches(1024), 64)])
    assert len(seen.unique()) == 64 * 1024
    assert private() - before < 64 << 20


def test_bfloat16_safetensors_with_targets(tmp_path: Path, x: torch.Tensor) -> None:
    save_file(
        {"x": x.bfloat16(), "y": x[:, :2].bfloat16().contiguous()}, tmp_path / "a.safetensors"
    )
    source = open_source(tmp_path / "a.safetensors")
    bx, by = next(source.batches(9))
    assert source.dtype == torch.bfloat16
    assert by is not None
    assert torch.equal(bx[:, :2], by)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite(dtype: torch.dtype) -> None:
    x = torch.full((40, 5), torch.finfo(dtype).max, dtype=dtype)
    x[::2] *= -1
    assert all_finite(x)
    assert all_finite(x.abs())  # the sum overflows
    assert all_finite(x[:0])
    for value in (float("inf"), -float("inf"), float("nan")):
        for row in (0, 39):
            y = x.clone()
            y[row, 3] = value
            assert not all_finite(y)
            assert not all_finite(y.t())


@pytest.mark.parametrize("kind", SOURCES)
def test_non_finite_rows_are_named(kind: str, x: torch.Tensor) -> None:
    x[417, 2] = float("nan")
    with pytest.raises(UserError, match=r"\(step \d+\): row 417 holds a non-finite") as caught:
        list(islice(SOURCES[kind](x).batches(64), 20))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="row 417"):
        list(SOURCES[kind](x).sweep(64))


def test_a_part_names_the_row_of_the_whole(x: torch.Tensor) -> None:
    x[417, 2] = float("nan")
    part = ArraySource([x[:300], x[300:]]).part(200, N).part(50, N - 200)
    with pytest.raises(UserError, match="row 417 holds"):
        list(part.sweep(64))


def test_a_source_passes_through(x: torch.Tensor) -> None:
    source = ArraySource([x])
    assert open_source(source) is source
    assert open_source(x.numpy()).num_tokens == N


def bad_specs(folder: Path) -> dict[str, tuple[object, object, str]]:
    (folder / "text.npy").write_text("not an array")
    (folder / "text.pt").write_text("not an array")
    (folder / "text.safetensors").write_text("not an array")
    (folder / "a.csv").write_text("1,2")
    (folder / "empty").mkdir()
    np.save(folder / "object.npy", np.array([{}], dtype=object))
    for suffix in (".npy", ".pt", ".safetensors"):
        path = write(folder / f"cut{suffix}", torch.randn(50, 4))
        path.write_bytes(path.read_bytes()[:-100])
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, folder / "two.safetensors")
    torch.save({"x": torch.randn(3, 2), "note": "hello"}, folder / "note.pt")
    x = torch.randn(10, 4)
    return {
        "missing": (folder / "none.npy", None, "no such file"),
        **{f"not {s}": (folder / f"text{s}", None, "not a") for s in (".npy", ".safetensors")},
        "not pt": (folder / "text.pt", None, "text.pt: "),
        **{
            f"cut {s}": (folder / f"cut{s}", None, "trunc") for s in (".npy", ".pt", ".safetensors")
        },
        "objects": (folder / "object.npy", None, "not a .npy"),
        "suffix": (folder / "a.csv", None, "must be one of .npy"),
        "keys": (folder / "two.safetensors", None, 'keys "x" and "y"'),
        "values": (folder / "note.pt", None, "must hold tensors only"),
        "no rows": (torch.empty(0, 4), None, "at least one row"),
        "3-d": (torch.empty(2, 3, 4), None, r"shape \[N, d\], got \[2, 3, 4\]"),
        "integers": (torch.zeros(3, 4, dtype=torch.int64), None, "float16, bfloat16"),
        "strings": (np.array(["a"]), None, "array of floats"),
        "type": (3, None, "a tensor, an array or a path, got int"),
        "rows differ": (x, torch.randn(9, 4), "target: must have the 10 rows of activations"),
        "foreign folder": (folder / "empty", None, "not an activation cache"),
    }


def test_bad_specs_are_one_line_errors(tmp_path: Path) -> None:
    for case, (spec, target, message) in bad_specs(tmp_path).items():
        with pytest.raises(UserError, match=message) as caught:
            open_source(spec, target)
        assert "\n" not in str(caught.value), case


def test_bad_stream_arguments(x: torch.Tensor) -> None:
    for arguments in (
        {"batch_size": 0},
        {"batch_size": 1, "seed": -1},
        {"batch_size": 1, "start_step": -1},
    ):
        with pytest.raises(UserError, match="batches: "):
            next(ArraySource([x]).batches(**arguments))
    with pytest.raises(UserError, match="agree in d"):
        ArraySource([x, x[:, :2]])
