"""Layers with a backward pass of their own, against autograd's."""

import pytest
import torch
import torch.nn.functional as F

from vertebra.backbones.layers.mlp import SwiGLU
from vertebra.backbones.layers.norm import RMSNorm


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7)])
def test_rms_norm_has_autograds_gradients(shape):
    norm = RMSNorm(7).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    with torch.no_grad():
        plain = norm(x)
    expected = F.rms_norm(x.float(), (7,), norm.weight.float(), norm.eps).to(x.dtype)
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(norm(x), expected)
    upstream = torch.randn(shape, dtype=torch.double)
    inputs = (x, norm.weight)
    own, theirs = (torch.autograd.grad(y, inputs, upstream) for y in (norm(x), expected))
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)


def test_swiglu_has_autograds_gradients():
    mlp = SwiGLU(6, 9).double()
    x = torch.randn(2, 5, 6, dtype=torch.double, requires_grad=True)
    expected = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)
    inputs = (x, *mlp.parameters())
    own, theirs = (torch.autograd.grad(y.pow(2).sum(), inputs) for y in (mlp(x), expected))
    torch.testing.assert_close(own, theirs)
    torch.autograd.gradcheck(mlp, (x,))
