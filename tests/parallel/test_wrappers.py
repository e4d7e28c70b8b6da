# SPDX-License-Identifier: Apache-2.0
"""Wrappers of torch.distributed around modules: what is counted is the whole batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import wrapper_jobs
from rank_cases import rows
from ranks import Failed, Pool
from wrapper_jobs import batch_of, model_of

import ksae
from ksae.coders.code import Code

STEPS = 6


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("how", ["ddp", "fsdp1", "fsdp"])
@pytest.mark.parametrize("case", ["plain", "saelens", "skip, all", "gradient"])
def test_two_processes_are_one(pool: Pool, case: str, how: str) -> None:
    """The mean of their losses, their counters, running norms and parameters."""
    model = model_of(case)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    want, revived = [], []
    for t in range(STEPS):
        inputs, more = batch_of(case, t)
        out = model(*inputs, **more)
        assert out.loss is not None and out.auxk_loss is not None
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        want.append(float(out.loss.detach()))
        revived.append(float(out.auxk_loss.detach()) > 0)
    assert any(revived) or case == "plain"
    (first, whole), (second, theirs) = pool.values(wrapper_jobs.wrapped, 2, case, how, STEPS)
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(
        want, rel=1e-6
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole[name], theirs[name]), name
        if name in ("tokens_since_fired", "grad_rows"):
            assert torch.equal(whole[name], tensor), name
        torch.testing.assert_close(whole[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_each_process_has_its_own_variance_unless_asked(pool: Pool) -> None:
    (first, _), (second, _) = pool.values(wrapper_jobs.wrapped, 2, "plain", "ddp", 1, False)
    (x,) = rows("plain", 0)
    own = [float(model_of("plain")(part).loss) for part in x.chunk(2)]
    assert [first[0], second[0]] == pytest.approx(own, rel=1e-6)
    assert sum(own) / 2 != pytest.approx(float(model_of("plain")(x).loss), rel=1e-4)


def test_batch_topk_learns_its_threshold_from_all(pool: Pool) -> None:
    """From the smallest value that any process has chosen among its own tokens."""
    model, want = model_of("batch"), []
    for t in range(3):
        (x,) = rows("batch", t)
        values = [ksae.batch_topk_encode(part, model.W_enc, model.b_enc, 5, model.b_dec)[0]
                  for part in x.chunk(2)]  # fmt: skip
        positive = torch.cat(values)
        least = positive[positive > 0].min()[None].detach()
        one = torch.zeros(1, dtype=torch.int64)
        model.activation.observe(model, Code(least, one, torch.tensor([0, 1])))
        want.append(float(model.get_buffer("threshold")))
    assert pool.values(wrapper_jobs.thresholds, 2, 3) == [want, want]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("shard", "sae must be whole, got one that is spread over ranks"),
        ("2-d", "mesh must have 1 dimension, got sizes (1, 2)"),
        ("type", "mesh must be a DeviceMesh, a ProcessGroup or None, got int"),
    ],
)
def test_what_there_is_not(pool: Pool, how: str, says: str) -> None:
    for answer in pool.run(wrapper_jobs.refused, 2, how):
        assert isinstance(answer, Failed)
        assert answer.message == f"count_over_ranks: {says}"
