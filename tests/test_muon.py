"""Muon beside torch's own, beside a singular value decomposition, and in a run that is resumed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import checkpoint
import train as train_module
from model import GPT, GPTConfig
from muon import Muon, orthogonalize
from support.cli import UserError
from toy import trace
from train import train

SMALL = GPTConfig(block_size=16, vocab_size=64, valid_vocab_size=60, n_layer=2, n_head=2, n_embd=32, dropout=0.0)


@pytest.fixture
def toy(toy, device):
    """The toy run on each device; on CUDA equal bits are what --deterministic promises."""
    return replace(toy, device=device, deterministic=device == "cuda")


@pytest.mark.parametrize("rows, columns", [(24, 24), (48, 24), (24, 48)])
def test_orthogonalize_keeps_directions_and_evens_out_their_lengths(rows, columns):
    """Bugs: the wrong product for tall matrices; a norm taken over the whole stack, so that one matrix rules others."""
    torch.manual_seed(0)
    x = torch.randn(3, rows, columns) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    y = orthogonalize(x)
    u, length, v = torch.linalg.svd(x.double(), full_matrices=False)
    length = length / length.norm(dim=-1, keepdim=True)
    for _ in range(5):
        length = 3.4445 * length - 4.7750 * length**3 + 2.0315 * length**5
    assert torch.allclose(y, (u * length[:, None] @ v).float(), atol=1e-4)
    assert (length.median(-1)[0] - 0.95).abs().max() < 0.3
    assert torch.allclose(y[1], orthogonalize(x[1:2])[0], atol=1e-5)
    assert orthogonalize(torch.zeros(1, 4, 4)).abs().max() == 0


@pytest.mark.parametrize("shape", [(30, 10), (10, 30), (16, 16)])
def test_steps_are_those_of_torch(shape):
    """Parity: momentum, Nesterov's look ahead, weight decay and the length of a step; torch works in bfloat16."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    a = Muon([{"params": [ours], "weight_decay": 0.1, "parts": 1}], lr=1e-2)
    b = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step(), b.step()
    moved = (theirs - 1).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_parts_move_as_matrices_of_their_own():
    """Bug: queries, keys and values in one matrix share one orthogonalization."""
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(36, 12))
    thirds = [nn.Parameter(t.clone()) for t in whole.detach().split(12)]
    a = Muon([{"params": [whole], "weight_decay": 0.1, "parts": 3}], lr=1e-2)
    b = Muon([{"params": thirds, "weight_decay": 0.1, "parts": 1}], lr=1e-2)
    for _ in range(3):
        whole.grad = torch.randn(36, 12)
        for p, gradient in zip(thirds, whole.grad.clone().split(12)):
            p.grad = gradient
        a.step(), b.step()
    assert torch.allclose(whole, torch.cat(thirds), atol=1e-6)


def build(kind, seed=0):
    torch.manual_seed(seed)
    model = GPT(SMALL)
    return model, kind(model.parameter_groups(0.1), lr=1e-2, fused=True)


def backward(model):
    idx = torch.randint(0, 60, (2, 17))
    model(idx[:, :-1], idx[:, 1:]).backward()


def test_embedding_and_norms_stay_with_adamw():
    """Bugs: AdamW moves the matrices a second time; Muon orthogonalizes the embedding."""
    (a, muon), (b, adamw) = build(Muon), build(torch.optim.AdamW)
    torch.manual_seed(1)
    backward(a)
    for p, q in zip(a.parameters(), b.parameters()):
        q.grad = p.grad.clone()
    muon.step(), adamw.step()
    assert torch.equal(a.wte.weight, b.wte.weight) and torch.equal(a.ln_f.weight, b.ln_f.weight)
    assert not torch.equal(a.h[0].mlp.c_fc.weight, b.h[0].mlp.c_fc.weight)
    kept = checkpoint.optimizer_tensors(a, muon)
    assert {"h.0.mlp.c_fc.weight/momentum_buffer", "h.1.attn.c_attn.weight/momentum_buffer"} <= kept.keys()
    assert {"wte.weight/exp_avg", "ln_f.weight/exp_avg"} <= kept.keys()
    assert not {"h.0.mlp.c_fc.weight/exp_avg", "wte.weight/momentum_buffer"} & kept.keys()


def test_a_step_that_fp16s_scaler_skips_moves_nothing():
    """Bug: a fused optimizer is told of the overflow instead of being skipped, and Muon would not listen."""
    model, optimizer = build(Muon)
    before = {name: p.clone() for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu")
    idx = torch.randint(0, 60, (2, 17))
    scaler.scale(model(idx[:, :-1], idx[:, 1:])).backward()
    model.h[0].mlp.c_fc.weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_run_with_muon_resumes_exactly(toy):
    """Bug: the momentum is not saved, or lands on another matrix."""
    toy = replace(toy, optimizer="muon", max_steps=20)
    train(toy)
    half = replace(toy, run_name="half")
    real_step = train_module.train_step

    def dying_step(c, rt, net, batch, at):
        if at.step == 13:
            raise KeyboardInterrupt
        return real_step(c, rt, net, batch, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "train_step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            train(half)
    train(half)
    assert trace(half) == trace(toy)


def test_a_run_does_not_change_its_optimizer(toy):
    train(replace(toy, max_steps=5))
    with pytest.raises(UserError, match=r"optimizer \(was adamw, now muon\)"):
        train(replace(toy, optimizer="muon"))
