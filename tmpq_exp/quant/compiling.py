"""How networks are compiled: once, whole, and to the same arithmetic as without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

OPTIONS = {
    "deterministic": True,  # no kernel is chosen by its speed of the moment
    "eager_numerics.division_rounding": True,  # a quotient off by one unit would round to another integer
}
"""Settings of inductor, of those that this version of torch has."""


def compiled(network: nn.Module) -> Callable[..., Any]:
    """A network as one graph, compiled at its first call for each kind of input; the network itself stays as it is.

    Raises:
        torch._dynamo.exc.TorchDynamoException: When called, if the network cannot be traced whole.
    """
    known = torch._inductor.list_options()
    options: dict[str, Any] = {name: value for name, value in OPTIONS.items() if name in known}
    call: Callable[..., Any] = torch.compile(network, fullgraph=True, options=options)
    return call
