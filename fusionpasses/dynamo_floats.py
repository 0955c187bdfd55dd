"""Makes the eps of a norm a constant again when Dynamo has made it an input.

Under ``torch.compile(dynamic=True)`` Dynamo turns Python floats that it reads from modules, such as an eps, into graph
inputs, so that changing them does not recompile. A fused op takes eps as a number, so without this no norm whose eps
is a module attribute would ever fuse there. Inductor has the same need for floats it cannot handle, and Dynamo a way
to ask for it: name the symbol, and restart the analysis; the float then becomes a guarded constant. Only the eps of
norms in graphs that hold a quant are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fusionpasses.anchors import Anchor

_STEPS = 4  # from a float to the rsqrt: item, add, and casts or views in between


def specialize_norm_eps(gm: fx.GraphModule, anchors: tuple[Anchor, ...]) -> None:
    """Restart Dynamo's analysis if a float input of ``gm`` is the eps of a norm.

    Raises:
        torch._dynamo.exc.TensorifyScalarRestartAnalysis: caught by Dynamo, which calls the backend again.
    """
    targets = {anchor.target for anchor in anchors}
    targets |= {target.overloadpacket for target in targets}
    if not any(node.target in targets for node in gm.graph.nodes):
        return
    wanted = {symbol for item, symbol in _float_inputs(gm.graph) if _reaches_norm(item)}
    if not wanted:
        return
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    new = [symbol for symbol in wanted if not TensorifyState.should_specialize(symbol)]
    if new:
        for symbol in new:
            TensorifyState.specialize(symbol)
        raise TensorifyScalarRestartAnalysis


def _float_inputs(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """``item()`` of inputs that hold a Python float, and the name of its symbol."""
    for node in graph.find_nodes(op="placeholder"):
        memo: Any = getattr(node.meta.get("example_value"), "item_memo", None)
        if not isinstance(memo, torch.SymFloat):
            continue
        name = getattr(memo.node._expr, "name", None)  # not .expr: the symbol, not what replaced it
        if name is not None:
            for user in node.users:
                if user.target == "item":
                    yield user, name


def _reaches_norm(node: fx.Node) -> bool:
    frontier = [node]
    for _ in range(_STEPS):
        frontier = [user for n in frontier for user in n.users]
        if any(getattr(n.target, "__name__", n.target) in ("rsqrt", "rms_norm") for n in frontier):
            return True
    return False
