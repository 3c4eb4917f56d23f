"""The cone of a block: all blocks of all passes that it depends on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cdd_dask.blocks import with_halo
from cdd_dask.plans import Pass, Plan
from cdd_dask.working import uses


class Needs:
    """Blocks of working arrays that are needed, by the array's name; None is all of them."""

    def __init__(self) -> None:
        self._blocks: dict[str, set[int] | None] = {}

    def add(self, more: Mapping[str, set[int] | None]) -> None:
        """Need these, too."""
        for name, some in more.items():
            before = self._blocks.get(name, set())
            self._blocks[name] = None if some is None or before is None else before | some

    def among(self, names: set[str], blocks: set[int]) -> set[int]:
        """Those of `blocks` that are needed of any of these arrays."""
        found: set[int] = set()
        for name in names & self._blocks.keys():
            some = self._blocks[name]
            found |= blocks if some is None else blocks & some
        return found


def cone(plan: Plan, wanted: Mapping[int, set[int]]) -> list[set[int]]:
    """The blocks of every pass that the `wanted` ones depend on, by number of the pass."""
    passes, needs = plan.passes, Needs()
    blocks: list[set[int]] = [set() for _ in passes]
    for number in reversed(range(len(passes))):
        one = passes[number]
        _, writes = uses(plan, one)
        blocks[number] = set(wanted.get(number, ())) | needs.among(writes, set(range(one.tasks)))
        needs.add(reads_of(plan, one, blocks[number]))
    return blocks


def reads_of(plan: Plan, one: Pass, blocks: set[int]) -> dict[str, set[int] | None]:
    """Blocks of working arrays that some blocks of a pass read; None where it may be all of them.

    With halos these are neighbours; what runs on cells depends on all of them.
    """
    reads, _ = uses(plan, one)
    if not blocks:
        return {}
    if len(blocks) == one.tasks:
        return dict.fromkeys(reads, None)
    if one.kind == "diffuse":
        stage = next(stage for stage in plan.stages if stage.number == one.stages[0])
        around: set[int] = set()
        for block in blocks:
            shape, boundary = plan.grid.shape, plan.parameters.boundary
            halo = with_halo(plan.grid.core(block), shape, stage.blank_depth, boundary)
            touched = np.array(plan.grid.touched(halo.outer)).T
            around |= set(np.ravel_multi_index(tuple(touched), plan.grid.counts).tolist())
        return dict.fromkeys(reads, around)
    by_voxels = one.kind in ("gather", "scatter", "relax")
    return {name: blocks if by_voxels and name.startswith("field") else None for name in reads}
