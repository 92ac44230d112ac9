"""Trade time for memory in training: keep a layer's inputs and compute the rest again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def again(run: Callable[..., Any], *args: Any, training: bool) -> Any:
    """Call ``run``; under autograd keep its inputs alone and call it again in the backward pass.

    Args:
        run: What to call.
        *args: Its arguments.
        training: Whether it draws random numbers, which must then be the same both times.
    """
    if not torch.is_grad_enabled():
        return run(*args)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=training)
