"""The model against independent definitions: transformers, torch's fused functions, and algebra written out here.

Parity with another implementation comes first, because a model that is only compared with itself can be
wrong everywhere in the same way.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import export_hf
import model as model_file
from model import (
    GPT,
    IGNORE,
    GPTConfig,
    KVCache,
    LayerNorm,
    LinearCrossEntropy,
    RMSNorm,
    gelu,
    layer_norm,
    rms_norm,
    rope_angles,
    rotate,
    rotate_complex,
)
from toy import spread

VALID = 89  # ids of the tiny vocabulary; rows 89 to 95 of its embedding are padding


def tiny(**changes):
    sizes = {"block_size": 48, "vocab_size": 96, "valid_vocab_size": VALID, "n_layer": 3, "n_head": 4, "n_embd": 32}
    return GPTConfig(**sizes | {"dropout": 0.0} | changes)


def build(seed=0, **changes):
    """A tiny model with large random weights, biases and norms: nothing is zero, one or too small to matter."""
    torch.manual_seed(seed)
    return spread(GPT(tiny(**changes)))


def tokens(*shape, seed=1, high=VALID):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))


class Watch(TorchDispatchMode):
    """Records every tensor that an operation returns while it is active."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.tensors += [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


# ---------------------------------------------------------------------------------------
# Parity with transformers.


def in_transformers(model):
    """The same weights as Starcoder2 (LayerNorm) or Arcee (RMSNorm), with attention written out ("eager")."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**export_hf.hf_config(model.config))
    other = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    theirs = export_hf.to_hf(model.state_dict(), model.config)
    missing, unexpected = other.load_state_dict(theirs, strict=False)
    assert set(missing) <= {export_hf.HEAD} and not unexpected  # the head is tied
    return other.eval()


@pytest.mark.parametrize("rope_theta", [10000.0, 300.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@torch.no_grad()
def test_logits_equal_those_of_transformers(norm, bias, rope_theta):
    """Guards every formula at once: order of norms, rotation, scale of attention, GELU, head, eps, theta."""
    model = build(norm=norm, bias=bias, rope_theta=rope_theta)
    idx = tokens(3, 48)
    ours, theirs = model(idx), in_transformers(model)(idx).logits
    assert ours.std() > 0.3, "the comparison needs logits of some size"
    close(ours, theirs)


@torch.no_grad()
def test_parity_sees_a_wrong_pairing_of_channels(monkeypatch):
    """The comparison above must be able to fail: without the permutation of q and k the logits differ."""
    model = build()
    idx = tokens(1, 48)
    monkeypatch.setattr(export_hf, "half_split", lambda weight, n_head: weight)
    unpermuted = in_transformers(model)(idx).logits
    assert (model(idx) - unpermuted).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------
# Definitions.


def test_rope_angles_are_position_times_theta_to_the_minus_2i_over_d():
    """Guards the exponent: pair i turns by theta^(-2i/D), with 2i the channel and not the pair."""
    angles = rope_angles(torch.tensor([0, 1, 5]), head_size=4, theta=100.0)
    close(angles, torch.tensor([[0, 0], [1, 0.1], [5, 0.5]], dtype=torch.float64), 1e-12)


def test_rope_tables_are_exact_at_the_last_position():
    """Guards against angles multiplied in float32 (wrong by 3e-5 at position 1,023) or in bfloat16."""
    model = GPT(tiny(block_size=1024, n_layer=1))
    for i in range(4):
        angle = 1023 * 10000 ** (-2 * i / 8)
        assert model.cos[1023, 0, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert model.sin[1023, 0, i].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_rotation_turns_adjacent_channels_counter_clockwise():
    """Guards the pairing (2i, 2i+1) and the sign, which relative positions alone cannot see."""
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    angles = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    expected = torch.tensor([math.cos(0.3), math.sin(0.3), -math.sin(0.7), math.cos(0.7)]).view(1, 1, 1, 4)
    close(rotate_complex(x, angles), expected, 1e-6)
    close(rotate(x, angles.cos().float()[:, None], angles.sin().float()[:, None]), expected, 1e-6)


@pytest.mark.parametrize("head_size", [2, 8, 64])
def test_real_rotation_equals_the_complex_definition(head_size):
    """Guards what runs against the textbook form, at random positions up to a million."""
    torch.manual_seed(head_size)
    x = torch.randn(2, 40, 3, head_size)
    angles = rope_angles(torch.randint(1_000_000, (40,)), head_size, 10000.0)
    ours = rotate(x, angles.cos().float()[:, None], angles.sin().float()[:, None])
    torch.testing.assert_close(ours, rotate_complex(x, angles), rtol=0, atol=1e-6)


def test_rotation_keeps_the_type_of_what_it_turns():
    """Guards against q and k silently becoming float32 (twice the memory, no flash kernel) under bfloat16."""
    angles = rope_angles(torch.arange(3), 4, 10000.0)
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    x = torch.randn(1, 3, 2, 4).bfloat16()
    assert rotate(x, cos, sin).dtype == rotate_complex(x, angles).dtype == torch.bfloat16


def test_product_of_rotated_q_and_k_depends_on_the_distance_only():
    """Guards the point of RoPE: the same for every common shift, and different for another distance."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)

    def product(at_q, at_k):
        angles = rope_angles(torch.tensor([at_q, at_k]), 16, 10000.0)
        turned = rotate(torch.stack((q, k)).view(1, 2, 1, 16), angles.cos()[:, None], angles.sin()[:, None])
        return (turned[0, 0, 0] @ turned[0, 1, 0]).item()

    for shift in (1, 17, 1000, 100_000):
        assert product(9 + shift, 4 + shift) == pytest.approx(product(9, 4), abs=1e-9)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3
    assert abs(product(9, 4) - product(4, 9)) > 1e-3


@torch.no_grad()
def test_logits_do_not_change_when_all_positions_shift():
    """Guards against a second, absolute way for positions to enter the network."""
    model, idx = build(), tokens(2, 10)
    close(model(idx, positions=torch.arange(10).add(30).expand(2, 10), mask=causal(10)), model(idx))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])  # the small one makes eps matter
def test_norms_equal_those_of_torch(scale):
    """Guards the written-out definitions and the modules that run, eps and its place included."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 7, 32) * scale + scale, torch.randn(32), torch.randn(32)
    close(layer_norm(x, weight, bias), F.layer_norm(x, (32,), weight, bias, 1e-5))
    close(layer_norm(x, weight), F.layer_norm(x, (32,), weight, None, 1e-5))
    close(rms_norm(x, weight), F.rms_norm(x, (32,), weight, 1e-5))
    for module in (LayerNorm(tiny()), LayerNorm(tiny(bias=True)), RMSNorm(tiny(norm="rmsnorm"))):
        for p in module.parameters():
            torch.nn.init.normal_(p)
        defined = rms_norm if isinstance(module, RMSNorm) else layer_norm
        close(module(x), defined(x, *module.parameters()))


def test_gelu_equals_the_tanh_form_of_torch():
    """Guards the constants; the exact (erf) form, which is another function, must not pass."""
    x = torch.linspace(-10, 10, 10_001)
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
    assert (gelu(x) - F.gelu(x)).abs().max() > 1e-4


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


def attention_written_out(module, x, angles, allowed):
    """Attention one row, one head and one query at a time."""
    B, T, C = x.shape
    D = C // module.n_head
    out = torch.zeros(B, T, C)
    for b in range(B):
        for h in range(module.n_head):
            rows = slice(h * D, (h + 1) * D)
            q, k, v = (x[b] @ w[rows].t() for w in module.c_attn.weight.chunk(3))
            q, k = (rotate_complex(t.view(1, T, 1, D), angles).view(T, D) for t in (q, k))
            for t in range(T):
                keys = [s for s in range(T) if allowed[b, t, s]]
                score = torch.stack([q[t] @ k[s] for s in keys]) / math.sqrt(D)
                share = score.exp() / score.exp().sum()
                out[b, t, rows] = sum(p * v[s] for p, s in zip(share, keys))
    return out @ module.c_proj.weight.t()


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_attention_equals_softmax_written_out(masked):
    """Guards the scale, the causal mask, the order of q, k, v and heads, and that True in a mask means "may look"."""
    model = build()
    attention, T = model.h[1].attn, 7
    x, angles = torch.randn(2, T, 32), rope_angles(torch.arange(T), 8, 10000.0)
    allowed = causal(T).expand(2, T, T)
    if masked:
        allowed = torch.rand(2, T, T).gt(0.5) | torch.eye(T, dtype=torch.bool)
    given = allowed[:, None] if masked else None
    close(attention(x, model.cos[:T], model.sin[:T], given), attention_written_out(attention, x, angles, allowed))


# ---------------------------------------------------------------------------------------
# Who sees whom.


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@torch.no_grad()
def test_a_token_changes_its_own_and_later_logits_and_none_before(norm):
    """Guards causality at every position (a leak makes the loss look better than it is), and that the past is used."""
    model, T = build(norm=norm), 12
    idx = tokens(1, T).repeat(T, 1)
    base = model(idx)
    idx[range(T), range(T)] = (idx[range(T), range(T)] + 1) % VALID  # row t differs from the others in token t
    change = (model(idx) - base).abs().amax(-1)  # (t, position)
    before = torch.ones(T, T).tril(-1).bool()  # position < t
    assert change[before].max() < 1e-5, "a later token changed an earlier logit"
    assert change[~before].min() > 1e-4, "a token did not change the logits at or behind it"


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 24])
@torch.no_grad()
def test_cached_logits_equal_uncached_at_every_position(chunk):
    """Guards the offset of positions and the mask of a chunk behind a past; rows of the batch differ."""
    model, T = build(), 24
    idx = tokens(3, T)
    cache = KVCache(model.config, 3, capacity=T)
    parts = [model(part, cache=cache) for part in idx.split(chunk, dim=1)]
    assert cache.length == T
    close(torch.cat(parts, 1), model(idx))


@torch.no_grad()
def test_cache_runs_from_a_prefill_to_the_end_of_the_block():
    """Guards the last positions of the default capacity, and prefill followed by single tokens as sampling does it."""
    model = build()
    idx = tokens(2, 48)
    cache = KVCache(model.config, 2)
    parts = [model(idx[:, :13], cache=cache)]
    parts += [model(idx[:, t : t + 1], cache=cache) for t in range(13, 48)]
    close(torch.cat(parts, 1), model(idx))
    with pytest.raises(ValueError, match="49 tokens exceed block_size 48"):
        model(idx[:, :1], cache=cache)


@torch.no_grad()
def test_a_repeated_cache_continues_every_row_on_its_own():
    """Guards samples of one prompt that share its prefill: the copies must not write into each other."""
    model = build()
    prompt, rest = tokens(1, 9), tokens(4, 6, seed=2)
    cache = KVCache(model.config, 1, capacity=20)
    model(prompt, cache=cache)
    cache = cache.repeat(4)
    assert cache.length == 9
    got = torch.cat([model(rest[:, t : t + 1], cache=cache) for t in range(6)], 1)
    close(got, model(torch.cat((prompt.expand(4, -1), rest), 1))[:, 9:])


@torch.no_grad()
def test_a_full_cache_is_an_error():
    """Guards against tokens dropped in silence: a slice beyond the end is empty, and one token broadcasts into it."""
    model, idx = build(), tokens(1, 7)
    cache = KVCache(model.config, 1, capacity=6)
    for t in range(6):
        model(idx[:, t : t + 1], cache=cache)
    with pytest.raises(ValueError, match="6"):
        model(idx[:, 6:], cache=cache)


@torch.no_grad()
def test_cache_is_filled_in_training_mode_with_grad_checkpoint_too():
    """Guards sampling during training without model.eval(): recomputed blocks must not lose their cache."""
    model, idx = build().train(), tokens(2, 8)
    model.grad_checkpoint = True
    cache = KVCache(model.config, 2)
    got = torch.cat([model(idx[:, :5], cache=cache), model(idx[:, 5:], cache=cache)], 1)
    close(got, model(idx))


@torch.no_grad()
def test_packed_rows_give_the_logits_of_each_document_alone():
    """Guards evaluation rows that hold several texts: positions restart, and no text sees another."""
    model = build()
    a, b, c, d = (tokens(1, length, seed=length) for length in (5, 9, 3, 11))
    rows = torch.cat((torch.cat((a, b), 1), torch.cat((c, d), 1)))
    lengths = [(5, 9), (3, 11)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    mask = torch.stack([torch.block_diag(*[causal(n) for n in row]).bool() for row in lengths])[:, None]
    packed = model(rows, positions=positions, mask=mask)
    alone = [torch.cat((model(a), model(b)), 1), torch.cat((model(c), model(d)), 1)]
    close(packed, torch.cat(alone))
    assert (model(rows, positions=positions, mask=causal(14)) - packed).abs().max() > 1e-3


@torch.no_grad()
def test_endings_packed_behind_a_shared_context_give_their_logits_alone():
    """Guards positions given per row: every ending continues the context's, whatever lies between them."""
    model = build()
    context, *endings = (tokens(2, length, seed=length) for length in (6, 4, 5, 3))
    row = torch.cat((context, *endings), 1)
    positions = torch.cat([torch.arange(6)] + [6 + torch.arange(e.size(1)) for e in endings]).expand(2, -1)
    owner = torch.cat([torch.full((part.size(1),), i) for i, part in enumerate((context, *endings))])
    mask = causal(18) & ((owner == owner[:, None]) | (owner == 0))
    packed = model(row, positions=positions, mask=mask)
    for i, ending in enumerate(endings, start=1):
        close(packed[:, owner == i], model(torch.cat((context, ending), 1))[:, 6:])
    assert (model(row, mask=mask) - packed).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------
# Loss.


def fused_loss(x, weight, targets, valid):
    return LinearCrossEntropy.apply(x, weight, targets, valid, torch.is_grad_enabled())


def reference_loss(x, weight, targets, valid):
    """Through autograd, with the whole table of logits."""
    return F.cross_entropy(x @ weight[:valid].t(), targets, reduction="sum", ignore_index=IGNORE)


def loss_inputs(rows=23, ignored=6, C=16, V=40, valid=37):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, C, generator=g).requires_grad_()
    weight = torch.randn(V, C, generator=g).requires_grad_()
    targets = torch.randint(valid, (rows,), generator=g)
    targets[torch.randperm(rows, generator=g)[:ignored]] = IGNORE
    return x, weight, targets, valid


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("ignored", [0, 6, 22, 23])
@pytest.mark.parametrize("block", [1, 8, 23, 1024])
def test_loss_and_gradients_equal_autograd_through_cross_entropy(monkeypatch, block, ignored, scale):
    """Guards the gradient written by hand: ragged last block, rows without target, all of them, a factor behind."""
    monkeypatch.setattr(model_file, "LOSS_ROWS", block)
    x, weight, targets, valid = loss_inputs(ignored=ignored)
    ours, expected = fused_loss(x, weight, targets, valid), reference_loss(x, weight, targets, valid)
    close(ours, expected)
    assert ignored < 23 or ours == 0
    got = torch.autograd.grad(ours * scale, (x, weight))
    for a, b in zip(got, torch.autograd.grad(expected * scale, (x, weight))):
        close(a, b)
    assert not got[0][targets == IGNORE].any() and not got[1][valid:].any()


def test_loss_survives_logits_beyond_the_range_of_exp():
    """Guards against exp overflowing where log-sum-exp is not shifted by the maximum."""
    x, weight, targets, valid = loss_inputs()
    with torch.no_grad():
        x *= 100
    ours, expected = fused_loss(x, weight, targets, valid), reference_loss(x, weight, targets, valid)
    assert ours.isfinite()
    close(ours, expected)
    for a, b in zip(torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(expected, (x, weight))):
        close(a, b, 1e-4)


@torch.no_grad()
def test_autocast_casts_the_embedding_once_not_for_each_token():
    """Bug: a slice of the weights is cast anew by each call, which is most of what a sampled token reads."""
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(1, 1))
        with Watch() as later:
            model(tokens(1, 1))
    size = model.wte.weight[:VALID].numel()
    assert not [t.shape for t in later.tensors if t.dtype == torch.bfloat16 and t.numel() >= size and t.is_contiguous()]


def test_loss_under_bfloat16_is_as_close_to_float32_as_autograd_is(monkeypatch):
    """Guards the softmax and the sums, which must stay float32 under autocast."""
    monkeypatch.setattr(model_file, "LOSS_ROWS", 100)
    x, weight, targets, valid = loss_inputs(rows=1000, ignored=100, C=64, V=256, valid=250)
    with torch.no_grad():
        weight *= 0.2
    exact = reference_loss(x, weight, targets, valid)
    exact = (exact, *torch.autograd.grad(exact, (x, weight)))
    errors = {}
    for function in (fused_loss, reference_loss):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(x, weight, targets, valid)
        result = (loss, *torch.autograd.grad(loss, (x, weight)))
        assert all(t.dtype == torch.float32 for t in result)
        errors[function] = [((a - b).norm() / b.norm()).item() for a, b in zip(result, exact)]
    for ours, theirs, limit in zip(errors[fused_loss], errors[reference_loss], (1e-4, 1e-2, 1e-2)):
        assert ours < limit and ours < 1.5 * theirs + 1e-5


def test_loss_of_bfloat16_weights_is_not_rounded_to_bfloat16():
    """Guards the float32 softmax where no autocast provides it: ln(37) is 3.6109, in bfloat16 3.6094."""
    x, weight, targets, valid = loss_inputs(ignored=0)
    loss = fused_loss(x.bfloat16(), weight.bfloat16() * 0, targets, valid) / 23
    assert loss.item() == pytest.approx(math.log(valid), abs=1e-6)


def test_loss_never_holds_the_whole_table_of_logits(monkeypatch):
    """Guards the reason for the function: autograd keeps N x V logits, we keep LOSS_ROWS x V."""
    monkeypatch.setattr(model_file, "LOSS_ROWS", 10)
    x, weight, targets, valid = loss_inputs(rows=100, C=4, V=64, valid=60)
    with Watch() as watch:
        fused_loss(x, weight, targets, valid).backward()
    assert max(t.numel() for t in watch.tensors) == 10 * 64


class OnMPS(torch.Tensor):
    """A tensor that says it is on MPS, and notes how many terms its products add up."""

    device, terms = property(lambda self: torch.device("mps")), []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            cls.terms.append(args[0].size(-1))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_long_product_is_added_up_in_parts_on_mps(monkeypatch):
    """Bug: with GPT-2's vocabulary, torch before 2.14 gave wrong gradients on an Apple M1 or M2, and the right loss."""
    monkeypatch.setattr(model_file, "MPS_TERMS", 16)
    a, b = torch.randn(3, 40), torch.randn(40, 5)
    parts = model_file.long_product(a.as_subclass(OnMPS), b)
    assert OnMPS.terms == [16, 16, 8]
    torch.testing.assert_close(parts.as_subclass(torch.Tensor), a @ b)


@torch.no_grad()
def test_loss_without_gradient_does_no_work_for_one():
    """Guards the cost of evaluation: under no_grad a parameter still says that it requires a gradient."""
    model, idx, targets = build(), tokens(2, 12), tokens(2, 12, seed=2)
    weight = model.wte.weight
    with Watch() as watch:
        loss = model(idx, targets)
    close(loss, F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), reduction="sum"))
    assert not loss.requires_grad
    new = [t for t in watch.tensors if t.shape == weight.shape and t.data_ptr() != weight.data_ptr()]
    assert not new, "a gradient of the embedding was computed"


def test_a_target_in_the_padding_has_an_infinite_loss():
    """Guards against an id of the padding that counts as predicted: its probability is zero."""
    x, weight, targets, valid = loss_inputs(ignored=0)
    targets[3] = valid
    assert fused_loss(x, weight, targets, valid).item() == math.inf


def test_a_negative_target_other_than_ignore_is_an_error():
    """Guards against targets of another convention (-1 for "none") trained on as token 0."""
    x, weight, targets, valid = loss_inputs(ignored=0)
    targets[3] = -1
    with pytest.raises((IndexError, RuntimeError)):
        fused_loss(x, weight, targets, valid)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_loss_of_the_model_equals_cross_entropy_of_its_logits(norm):
    """Guards the two ways through forward, in value and in the gradient of every parameter."""
    model, idx, targets = build(norm=norm, bias=True), tokens(3, 20), tokens(3, 20, seed=2)
    targets[1, 5:] = IGNORE
    loss = model(idx, targets)
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    close(loss, expected)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4, msg=name)


def test_tied_weight_is_one_tensor_with_both_gradients():
    """Guards the tying: one matrix in memory and in the file, and its gradient is that of the input plus the head."""
    model, idx, targets = build(), tokens(3, 20), tokens(3, 20, seed=2)
    assert {name for name in model.state_dict() if not name.startswith("h.")} == {"wte.weight", "ln_f.weight"}
    head = model.wte.weight.detach().clone().requires_grad_()
    loss = reference_loss(model.features(idx).flatten(0, 1), head, targets.flatten(), VALID)
    as_input, as_head = torch.autograd.grad(loss, (model.wte.weight, head))
    assert as_input.norm() > 0.1 * as_head.norm() and as_head.norm() > 0.1 * as_input.norm()
    close(gradients(model, model(idx, targets))["wte.weight"], as_input + as_head, 1e-4)


def test_padding_rows_do_not_exist():
    """Guards ids that no tokenizer produces: no logit, no probability, no gradient, whatever their rows hold."""
    model, idx, targets = build(), tokens(2, 20), tokens(2, 20, seed=2)
    logits, loss = model(idx), model(idx, targets)
    before = gradients(model, loss)
    assert logits.shape == (2, 20, VALID)
    with torch.no_grad():
        model.wte.weight[VALID:] = 1e4
    assert model(idx).equal(logits) and model(idx, targets).equal(loss)
    after = gradients(model, model(idx, targets))
    assert not after["wte.weight"][VALID:].any()
    assert all(after[name].equal(before[name]) for name in before)


# ---------------------------------------------------------------------------------------
# The start of training.


@pytest.mark.parametrize(
    "changes", [{}, {"n_embd": 128}, {"n_layer": 12, "n_embd": 64, "bias": True, "norm": "rmsnorm"}]
)
@torch.no_grad()
def test_initial_loss_is_that_of_a_uniform_guess(changes):
    """Guards the initialisation, and that padding ids take no part: ln(valid), not ln(vocab_size)."""
    torch.manual_seed(0)
    model = GPT(tiny(**{"vocab_size": 1024, "valid_vocab_size": 600} | changes)).eval()
    loss = model(tokens(64, 48, high=600), tokens(64, 48, seed=2, high=600)) / (64 * 48)
    assert loss.item() == pytest.approx(math.log(600), abs=0.1)


@torch.no_grad()
def test_initial_loss_of_the_124m_model_is_that_of_a_uniform_guess():
    """Guards the width at which people train: with N(0, 0.02) for the embedding it would start 0.2 too high."""
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    idx = tokens(2, 129, high=50257)
    loss = model(idx[:, :-1], idx[:, 1:]) / 256
    assert loss.item() == pytest.approx(math.log(50257), abs=0.1)


def test_initial_weights_have_the_deviations_described():
    """Guards the scaling of the residual projections by 1/sqrt(2L), and each exception from N(0, 0.02)."""
    torch.manual_seed(0)
    model = GPT(tiny(n_layer=5, n_embd=128, vocab_size=512, bias=True))
    seen = set()
    for name, p in model.named_parameters():
        kind = name.split(".", 2)[-1] if name.startswith("h.") else name
        seen.add(kind)
        if p.dim() == 2:
            expected = {"attn.c_proj.weight": 0.02 / math.sqrt(10), "mlp.c_proj.weight": 0.02 / math.sqrt(10)}
            expected["wte.weight"] = 0.25 / math.sqrt(128)
            assert p.std().item() == pytest.approx(expected.get(kind, 0.02), rel=0.05), name
            assert abs(p.mean().item()) < 0.1 * p.std().item(), name
        elif "ln_" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
    assert {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"} < seen


def test_biases_start_at_zero():
    """Guards against the default of nn.Linear, uniform noise of 1/sqrt(C), where GPT-2 has zeros."""
    model = GPT(tiny(bias=True))
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 3 * 6 + 1
    assert not [name for name, p in biases.items() if p.any()]


@pytest.mark.parametrize(
    "norm, bias", [("layernorm", False), ("layernorm", True), ("rmsnorm", False), ("rmsnorm", True)]
)
def test_number_of_parameters_follows_the_formula(norm, bias):
    """Guards against a second embedding, a position table or a bias that nobody asked for."""
    C, L, V = 32, 3, 96
    expected = V * C + L * (12 * C * C + 2 * C) + C
    if bias:
        expected += L * (3 + 1 + 4 + 1) * C
        if norm == "layernorm":
            expected += (2 * L + 1) * C
    assert GPT(tiny(norm=norm, bias=bias)).num_parameters() == expected


def test_default_model_has_124m_parameters_and_its_flops():
    """Guards the figures that the MFU and the documentation rest on: 124M, not the 13M or 163M of miscounts."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_parameters() == 123_587_328 == 50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    assert model.flops_per_token() == 6 * 123_587_328 + 12 * 12 * 768 * 1024 == 854_770_176


# ---------------------------------------------------------------------------------------
# Training: dropout, checkpointing, groups, compilation.


def noisy(p=0.2, **changes):
    return build(dropout=p, **changes).train()


def test_dropout_acts_in_training_only():
    """Guards attention, whose dropout is an argument and not a module, and so does not follow eval() by itself."""
    model, idx = noisy(0.5), tokens(2, 20)
    assert not model(idx).equal(model(idx))
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert model.eval()(idx).equal(plain(idx))
    assert plain.train()(idx).equal(plain.eval()(idx)), "dropout 0 must not depend on the mode"


def test_dropout_acts_in_every_place(monkeypatch):
    """Guards each of the four: embedding, attention weights, and the outputs of attention and MLP."""
    model, idx, p = noisy(0.25), tokens(8, 48), 0.25
    seen = {}
    block = model.h[0]
    block.register_forward_pre_hook(lambda module, args: seen.update(embedding=args[0]))
    block.attn.register_forward_hook(lambda module, args, out: seen.update(attention=out))
    block.mlp.register_forward_hook(lambda module, args, out: seen.update(mlp=out))
    model(idx)
    for name, x in seen.items():
        assert (x == 0).float().mean().item() == pytest.approx(p, abs=0.02), name
    kept = seen["embedding"] != 0
    close(seen["embedding"][kept], (model.wte(idx) / (1 - p))[kept])
    monkeypatch.setattr(F, "dropout", lambda x, p, training: x)  # what is left is inside attention
    assert not model(idx).equal(model(idx))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grad_checkpoint_changes_no_bit(p):
    """Guards the recomputation: same loss, same gradients, same dropout masks. Counts calls, so that it cannot idle."""
    model, idx, targets = noisy(p), tokens(4, 24), tokens(4, 24, seed=2)
    calls = []
    for block in model.h:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for model.grad_checkpoint in (False, True):
        torch.manual_seed(7)
        calls.clear()
        loss = model(idx, targets)
        results.append((loss, gradients(model, loss), len(calls)))
    (loss, grads, count), (loss_2, grads_2, count_2) = results
    assert (count, count_2) == (3, 6)
    assert loss.equal(loss_2) and all(grads[name].equal(grads_2[name]) for name in grads)


@pytest.mark.parametrize("norm, bias", [("layernorm", False), ("layernorm", True), ("rmsnorm", True)])
def test_weight_decay_falls_on_matrices_exactly(norm, bias):
    """Guards against decayed norms and biases, and against a parameter left out or given twice."""
    model = GPT(tiny(norm=norm, bias=bias))
    groups = model.parameter_groups(0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    vectors = ("bias", "ln_1.weight", "ln_2.weight", "ln_f.weight")
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if name.endswith(vectors) else 0.1), name


@pytest.mark.parametrize(
    "vocabulary, rows, grad_checkpoint, block",
    [(512, 8, False, 1024), (8192, 4, False, 1024), (8192, 4, False, 128), (512, 8, True, 1024)],
)
def test_training_takes_the_memory_that_is_estimated(monkeypatch, vocabulary, rows, grad_checkpoint, block):
    """Guards a published table of memory, by torch's own count of what is allocated and freed. Two micro-batches, so
    that gradients are there while the second one's activations are; no dropout, with which attention on a CPU is
    computed in another way than on a GPU."""
    monkeypatch.setattr(model_file, "LOSS_ROWS", block)  # 128: four blocks, of which one at a time has its logits
    sizes = dict(vocab_size=vocabulary, valid_vocab_size=vocabulary, block_size=128, n_layer=4, n_head=2, n_embd=64)
    model = GPT(GPTConfig(**sizes, dropout=0.0)).train()
    model.grad_checkpoint = grad_checkpoint
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), fused=True)
    idx = tokens(rows, 128)

    def step():
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(idx, idx)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes AdamW's averages
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = max(itertools.accumulate(changes)) + 12 * model.num_parameters()
    assert model.training_bytes(rows) == pytest.approx(peak, rel=0.03)


def test_state_dict_holds_parameters_only():
    """Guards the file format: tables that the config decides are recomputed, never stored."""
    model = GPT(tiny())
    assert set(model.state_dict()) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_gradients_equal_the_eager_ones(monkeypatch, backend, autocast):
    """Bug: torch 2.11 gives every compiled gradient as zero, beside a correct loss, where the loss changes the tensor
    that it returns in place. The compiler's first two stages show it in seconds; no code is generated."""
    torch.compiler.reset()
    monkeypatch.setattr(model_file, "LOSS_ROWS", 50)  # 96 rows: two blocks, the second one shorter
    model, idx, targets = build().train(), tokens(4, 24), tokens(4, 24, seed=2)
    targets[1, 3:7] = IGNORE

    def step(forward):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = forward(idx, targets)
        return loss, gradients(model, loss)

    loss, grads = step(model)
    loss_2, grads_2 = step(torch.compile(model, backend=backend, fullgraph=True))
    assert loss_2.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, g in grads.items():
        assert g.norm() > 0
        assert (grads_2[name] - g).norm() <= (1e-2 if autocast else 1e-5) * g.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training_step_equals_the_plain_one(autocast):
    """Guards the path that people train on: one graph (fullgraph raises on a break), same loss and gradients."""
    torch.compiler.reset()
    model, idx, targets = build().train(), tokens(4, 48), tokens(4, 48, seed=2)

    def step(forward):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = forward(idx, targets)
        return loss, gradients(model, loss)

    loss, grads = step(model)
    loss_2, grads_2 = step(torch.compile(model, fullgraph=True))
    tolerance = 0.05 if autocast else 1e-4
    assert loss_2.item() == pytest.approx(loss.item(), rel=tolerance / 10)
    for name, g in grads.items():
        assert (grads_2[name] - g).norm() <= tolerance * g.norm(), name


# ---------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 0},
        {"vocab_size": -1, "valid_vocab_size": -1},
        {"n_layer": 0},
        {"n_head": 0},
        {"n_embd": 0},
        {"n_embd": 30},
        {"n_embd": 12},
        {"valid_vocab_size": 97},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": math.nan},
        {"norm": "batchnorm"},
        {"rope_theta": 0.0},
        {"rope_theta": math.nan},
        {"rope_theta": math.inf},
    ],
)
def test_an_impossible_config_is_refused_by_field(changes):
    """Guards each check: the message names the field and its value, and nothing else is complained about."""
    config = tiny(**changes)
    problems = config.problems()
    assert len(problems) == len(changes)
    for (field, value), problem in zip(changes.items(), problems):
        assert field in problem and (str(value) in problem or field == "n_embd")
    with pytest.raises(ValueError) as error:
        GPT(config)
    assert all(problem in str(error.value) for problem in problems)


def test_possible_configs_have_no_problems():
    """Guards against a check that refuses what works."""
    assert GPTConfig().problems() == tiny().problems() == tiny(valid_vocab_size=96, dropout=0.99).problems() == []


@pytest.mark.parametrize(
    "broken",
    [
        {"n_embd": 30},
        {"n_layer": 0},
        {"n_head": 0},
    ],
)
def test_all_problems_of_a_config_come_at_once(broken):
    """Guards against one message per attempt, whichever check comes first."""
    problems = tiny(**broken, valid_vocab_size=97, dropout=1.5, norm="x", rope_theta=-1.0).problems()
    for field in (*broken, "valid_vocab_size", "dropout", "norm", "rope_theta"):
        assert any(problem.startswith(field) for problem in problems), field
    assert len(problems) == 5


@torch.no_grad()
def test_more_tokens_than_the_block_are_refused():
    """Guards against positions beyond the tables, alone or behind a cache; the last legal length works."""
    model = build()
    assert model(tokens(1, 48)).shape == (1, 48, VALID)
    with pytest.raises(ValueError, match="49 tokens exceed block_size 48"):
        model(tokens(1, 49))
    cache = KVCache(model.config, 1)
    model(tokens(1, 40), cache=cache)
    with pytest.raises(ValueError, match="49 tokens exceed block_size 48"):
        model(tokens(1, 9), cache=cache)
