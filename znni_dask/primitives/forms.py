"""Changes of an array's form: sixteen channels side by side, or each for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, final

from znni_dask.kernels import blocks
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Input, Layer
from znni_dask.primitives.base import Array, Form, Primitive, Problem


@final
@dataclass(frozen=True)
class FormChange(Primitive):
    """Brings an array into a form. No layer is computed so: schedules put it in between."""

    into: Form
    name: ClassVar[str] = "change of form"
    layer: ClassVar[type[Layer]] = Input

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        other = Form.PLAIN if self.into is Form.BLOCKED else Form.BLOCKED
        return other, self.into

    def prepared_bytes(self, layer: Layer) -> int:
        return 0

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        change = blocks.block if self.into is Form.BLOCKED else blocks.unblock

        def work(first: int, last: int) -> None:
            change(inputs[0], out, first, last)

        team.share(work, prod(Form.BLOCKED.stored(problem.output)[:3]))
