# SPDX-License-Identifier: Apache-2.0
"""Where ranks say which mesh they were given, before anything is exchanged: ranks of different
meshes would wait for each other in different groups."""

from __future__ import annotations

import json
import time
from typing import Any

import torch.distributed as dist

from ..errors import RankError

PAUSE = 0.005  # seconds between two looks
TIMEOUT = 600.0  # seconds, where the group has none


def meet(what: str, members: list[int], mesh: str) -> None:
    """Wait until all `members`, this rank among them, have come with the same mesh, by its name.

    Raises:
        ValueError: another rank has another mesh. RankError: one could not take its own, or has not
            come within the time-out of the default group.
    """
    key = f"{sorted(members)}"
    _calls[key] = _calls.get(key, 0) + 1
    me = {"members": members, "mesh": mesh, "call": _calls[key], "waits": True}
    _say(me, key)
    end = time.monotonic() + time_limit()
    try:
        for rank in members:
            while not _is_here(what, me, key, rank):
                if time.monotonic() > end:
                    want = f"come with the mesh {mesh} of ranks {members}"
                    got = f"nothing from it within {time_limit():.0f} s"
                    raise RankError(f"{what}: rank {rank} must {want}, got {got}")
                time.sleep(PAUSE)
    except Exception as error:
        stay_away(error)
        raise
    _say(me | {"waits": False}, key)


def stay_away(error: Exception) -> None:
    """Let ranks that wait for this one know that it does not come."""
    _calls["errors"] = _calls.get("errors", 0) + 1
    said = f"{type(error).__name__}: {error}"
    _say({"error": said, "call": _calls["errors"], "waits": False})


_calls: dict[str, int] = {}  # of meetings by members, which all of these count; and of errors


def _is_here(what: str, me: dict[str, Any], key: str, rank: int) -> bool:
    """Whether a rank has come, in this call or since."""
    theirs = _hear(rank, key)
    if theirs is not None and theirs["call"] >= me["call"]:
        if theirs["call"] == me["call"] and theirs["mesh"] != me["mesh"]:
            raise ValueError(_differs(what, me, theirs, rank))
        return True
    theirs = _hear(rank)  # its last call, of whatever members
    if theirs is None:
        return False
    if "error" in theirs:  # of ranks that fail together each has counted it
        if theirs["call"] > _calls.get("errors", 0):
            raise RankError(f"{what}: rank {rank} has stopped with {theirs['error']}")
        return False
    other = sorted(theirs["members"]) != sorted(me["members"])
    if other and theirs["waits"] and dist.get_rank() in theirs["members"]:
        raise ValueError(_differs(what, me, theirs, rank))  # each waits for the other
    return False


def _differs(what: str, me: dict[str, Any], theirs: dict[str, Any], rank: int) -> str:
    said = {dist.get_rank(): me, rank: theirs}
    a, b = (f"{said[r]['mesh']} of ranks {said[r]['members']} on rank {r}" for r in sorted(said))
    return f"{what}: the mesh must be the same on all ranks, got {a} and {b}"


def _store() -> Any:
    """Of the default group. torch before 2.9 has no public way to it."""
    found = getattr(dist.group.WORLD, "get_group_store", None)
    return dist.distributed_c10d._get_default_store() if found is None else found()


def _say(said: dict[str, Any], *keys: str) -> None:
    text = json.dumps(said)
    for key in (*keys, "last"):
        _store().set(f"ksae/mesh/{dist.get_rank()}/{key}", text)


def _hear(rank: int, key: str = "last") -> dict[str, Any] | None:
    name = f"ksae/mesh/{rank}/{key}"
    if not _store().check([name]):
        return None
    heard: dict[str, Any] = json.loads(_store().get(name))
    return heard


def time_limit() -> float:
    """The time-out of the default group in seconds, which its store has as well, unless the user
    has made the store."""
    limit = getattr(_store(), "timeout", None)
    return TIMEOUT if limit is None else float(limit.total_seconds())
