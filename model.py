"""The model: a GPT-2-style decoder with rotary position embeddings (RoPE), whole, in one file.

    model = GPT(GPTConfig())
    loss = model(idx, targets)        # sum of the losses in nats; logits without targets

Blocks normalize their input (pre-norm). There is no table of positions: RoPE turns q and k instead. The embedding
matrix is also the output head. The training loss works on a block of rows at a time, so the full table of logits never
exists.

Shapes: B batch, T tokens, C = n_embd channels, H heads, D = C/H channels per head, L layers, V = vocab_size rows of the
embedding.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # the target that asks for no prediction
LOSS_ROWS = 1024  # rows of logits alive at once in the loss
LOSS_ROWS_FUSED = 8192  # the same where the compiler makes one kernel of a block's softmax and gradient: on CUDA
INIT_STD = 0.02
MPS_TERMS = 2**14  # of a sum in a matrix product on MPS, see `long_product`


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides the shape of the weights and what they mean."""

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # embedding rows: GPT-2's 50,257 padded to a multiple of 64
    valid_vocab_size: int = 50257  # ids the tokenizer can produce; the rest are padding
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1
    bias: bool = False  # biases in Linear and LayerNorm
    norm: str = "layernorm"  # or "rmsnorm"
    rope_theta: float = 10000.0

    def problems(self) -> list[str]:
        """Every reason why no model can be built from this, one line each; [] if it can."""
        found = []
        for name in ("block_size", "vocab_size", "valid_vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_head >= 1 and self.n_embd % self.n_head:
            found.append(f"n_embd {self.n_embd} does not divide by n_head {self.n_head}")
        elif self.n_head >= 1 and self.n_embd // self.n_head % 2:
            head = self.n_embd // self.n_head
            found.append(f"a head has {head} channels (n_embd / n_head); RoPE needs an even number")
        if self.valid_vocab_size > self.vocab_size:
            found.append(f"valid_vocab_size {self.valid_vocab_size} exceeds vocab_size {self.vocab_size}")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.norm not in NORMS:
            found.append(f"norm is {self.norm!r}; it must be one of {', '.join(NORMS)}")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            found.append(f"rope_theta is {self.rope_theta}; it must be positive")
        return found


# ---------------------------------------------------------------------------------------
# Definitions, written out to be read. What runs is a faster form of each, and tests hold the two equal.


def layer_norm(x, weight, bias=None, eps=1e-5):
    """Zero mean and unit variance over the channels, then scale and shift (Ba et al. 2016)."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + eps) * weight
    return x if bias is None else x + bias


def rms_norm(x, weight, eps=1e-5):
    """Unit root mean square over the channels, then scale (Zhang & Sennrich 2019)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def gelu(x):
    """x times the chance that a standard normal lies below x, in its tanh form (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rope_angles(positions, head_size, theta):
    """The angle by which RoPE turns each pair of channels at each position.

    positions (T,) -> (T, D/2) in float64: position times theta^(-2i/D) for pair i, so the
    first pair turns one radian per token and the last one about 1/theta.
    """
    pair = torch.arange(0, head_size, 2, dtype=torch.float64, device=positions.device)
    return torch.outer(positions.double(), theta ** (-pair / head_size))


def rotate_complex(x, angles):
    """RoPE as defined (Su et al. 2021): channels (2i, 2i+1) are one complex number, times e^(i·angle).

    x (B, T, H, D) float, angles (T, D/2) -> (B, T, H, D). The dot product of a turned q and a
    turned k then depends on their positions only through the difference.
    """
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[:, None, :]).flatten(-2).type_as(x)


# ---------------------------------------------------------------------------------------
# What runs.


def rotate(x, cos, sin):
    """`rotate_complex` in real arithmetic: (a + ib)(cos + i·sin), which a compiler can fuse.

    x (B, T, H, D); cos, sin (T, 1, D/2), or (B, T, 1, D/2) where rows have their own positions.
    """
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


class LayerNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)  # = layer_norm()


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)  # = rms_norm()


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017) over rotated queries and keys."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, H, D) each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # position enters here and nowhere else
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, past + T, D)
        y = F.scaled_dot_product_attention(  # softmax(q k^T / sqrt(D)) v over the keys allowed
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=mask is None and k.size(2) == T
        )
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers, four times wider between them, with GELU."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # = gelu()
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention lets tokens exchange information, the MLP works on each alone; both add to x."""

    def __init__(self, config, layer):
        super().__init__()
        norm = NORMS[config.norm]
        self.ln_1, self.attn = norm(config), Attention(config, layer)
        self.ln_2, self.mlp = norm(config), MLP(config)

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), cos, sin, mask, cache)
        return x + self.mlp(self.ln_2(x))


class KVCache:
    """Keys and values of the tokens seen so far, so that a new token costs one position of work.

    Preallocated: k, v (L, B, H, capacity, D). `length` positions are filled.
    """

    def __init__(self, config, batch_size, capacity=None, device=None, dtype=torch.float32):
        shape = (config.n_layer, batch_size, config.n_head)
        shape += (capacity or config.block_size, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer, k, v):
        """Stores (B, H, T, D) of one layer behind the past; returns past and new, (B, H, past + T, D).
        ValueError where they exceed the capacity."""
        end = self.length + k.size(2)
        if end > self.k.size(3):
            raise ValueError(f"{end} tokens exceed the cache's capacity of {self.k.size(3)}")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def repeat(self, n):
        """n copies of a one-row cache: samples of one prompt share its prefill."""
        self.k, self.v = (t.repeat(1, n, 1, 1, 1) for t in (self.k, self.v))
        return self


def long_product(a, b):
    """a @ b. On MPS in parts: torch before 2.14 computes sums of 32,767 or more terms wrong on an Apple M1 or M2
    (pytorch issue 193487), and here a sum has as many terms as the vocabulary has rows."""
    if a.device.type != "mps":
        return a @ b
    return sum(part @ rows for part, rows in zip(a.split(MPS_TERMS, 1), b.split(MPS_TERMS)))


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(x Wᵀ)[target] over the rows that have a target, a block of rows at a time.

    The logits of a 124M model are its largest tensor: 16 x 1,024 rows of 50,304 floats are
    3.3 GB, and autograd would keep them, their softmax and its gradient. But the gradient of
    a cross-entropy is known as soon as its logits are (softmax minus one-hot). So forward
    computes each block's part of the gradients of x and W at once, and frees its logits. Products
    run in autocast's dtype; the softmax, the sum and the gradient of W are float32.

    x (N, C), weight (V, C), targets (N,) in [0, valid) or IGNORE -> scalar. Rows of W from
    `valid` on (padding) take no probability and receive no gradient. `train`: whether gradients
    are wanted at all.

    No tensor is changed in place: the compiler of torch 2.11 gave all gradients as zero where one was.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, valid, train):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w, column = weight.to(dtype), torch.arange(len(weight), device=x.device)
        rows = LOSS_ROWS_FUSED if x.is_cuda and torch.compiler.is_compiling() else LOSS_ROWS
        total = torch.zeros((), device=x.device)
        if train:
            grad_x, grad_w = [], torch.zeros_like(weight, dtype=torch.float32)
        for x_rows, target in zip(x.to(dtype).split(rows), targets[:, None].split(rows)):
            chosen = target != IGNORE
            target = target.masked_fill(~chosen, 0)  # any valid id: the loss of such a row is multiplied by 0
            logits = torch.where(column < valid, (x_rows @ w.t()).float(), -math.inf)  # (rows, V)
            log_p = F.log_softmax(logits, -1)
            total = total - (log_p.gather(1, target) * chosen).sum()
            if train:
                d_logits = (log_p.exp() - (column == target).float()).to(dtype)
                grad_x.append(long_product(d_logits, w) * chosen)
                grad_w = grad_w + d_logits.t() @ (x_rows * chosen)
            logits = log_p = d_logits = None  # free this block's memory before the next block needs it
        if train:
            ctx.save_for_backward(torch.cat(grad_x).to(x.dtype), grad_w)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None, None, None


class GPT(nn.Module):
    """Token ids in, next-token logits or the training loss out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.problems():
            raise ValueError("; ".join(config.problems()))
        self.config = config
        self.grad_checkpoint = False  # True: recompute each block in the backward pass, to save memory
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head (Press & Wolf 2017)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = NORMS[config.norm](config)
        angles = rope_angles(torch.arange(config.block_size), config.n_embd // config.n_head, config.rope_theta)
        self.register_buffer("cos", angles.cos().float()[:, None], persistent=False)  # (block_size, 1, D/2)
        self.register_buffer("sin", angles.sin().float()[:, None], persistent=False)
        self.initialize()

    def initialize(self):
        """GPT-2's N(0, 0.02), with two exceptions. The 2L projections that add to the residual stream
        start smaller, so that its variance does not grow with depth. The embedding starts at
        1/(4 sqrt(C)), so that the first logits have deviation 1/4 at every width and the first loss is
        ln(V) + 0.03; with 0.02 it would be ln(V) + 0.2 at C = 768, and worse for wider models."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=INIT_STD / math.sqrt(2 * self.config.n_layer) if residual else INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.normal_(self.wte.weight, std=0.25 / math.sqrt(self.config.n_embd))

    def features(self, idx, positions=None, mask=None, cache=None):
        """The network up to the last norm: idx (B, T) -> (B, T, C).

        With a `cache` the T tokens continue those in it. Packed rows give `positions` (B, T)
        and a `mask`, True where a query may look, that broadcasts to (B, H, T, T).
        Raises ValueError where the last position would lie beyond block_size.
        """
        past, T = (cache.length if cache else 0), idx.size(1)
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens exceed block_size {self.config.block_size}")
        where = slice(past, past + T) if positions is None else positions
        cos, sin = self.cos[where], self.sin[where]
        if past and T > 1 and mask is None:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=idx.device).tril(past)
        x = F.dropout(self.wte(idx), self.config.dropout, self.training)
        for block in self.h:
            if self.grad_checkpoint and self.training and cache is None:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache)
        if cache:
            cache.length += T
        return self.ln_f(x)

    def logits(self, x):
        """(..., C) -> (..., valid_vocab_size): the padding rows do not exist for a caller."""
        return F.linear(x, self.wte.weight)[..., : self.config.valid_vocab_size]  # autocast keeps a whole matrix's copy

    def forward(self, idx, targets=None, positions=None, mask=None, cache=None):
        """Logits (B, T, valid_vocab_size); or, given targets (B, T), the SUM of the losses in nats
        over the targets that are not IGNORE, so that the caller divides by the whole batch's count."""
        x = self.features(idx, positions, mask, cache)
        if targets is None:
            return self.logits(x)
        valid, train = self.config.valid_vocab_size, torch.is_grad_enabled()
        return LinearCrossEntropy.apply(x.flatten(0, 1), self.wte.weight, targets.flatten(), valid, train)

    def num_parameters(self):
        """The number of parameters; the embedding counts once, as it is stored once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating-point operations of one forward and backward pass, per token: 6N + 12·L·C·T.

        6 per parameter (multiply and add, once forward and twice backward; the embedding counts
        as the output head) and the two T-long products of attention, causality not subtracted
        (PaLM, Chowdhery et al. 2022, appendix B).
        """
        c = self.config
        return 6 * self.num_parameters() + 12 * c.n_layer * c.n_embd * c.block_size

    def training_bytes(self, sequences):
        """Estimate of the GPU memory that training takes, with `sequences` of block_size tokens in a micro-batch.

        Counted from this file for 16-bit products, AdamW, and no compiler. A parameter has 16 bytes: its value, its
        gradient and AdamW's two averages, in float32. The matrices of the blocks are also cast to 16 bits. Per token a
        block keeps 42 C + 4 H + 16 bytes for the backward pass (with dropout; 40 C without): the inputs of its
        norms, linear layers, attention and GELU. The loss has five float32 tables of LOSS_ROWS rows of logits, and
        the embedding's gradient in the making. With grad_checkpoint a block keeps only its input, 4 C bytes, and in
        the backward pass, when the loss is done, one block at a time has the rest.
        """
        c, tokens = self.config, sequences * self.config.block_size
        matrices = sum(p.numel() for p in self.h.parameters() if p.dim() == 2)
        loss = c.vocab_size * (6 * c.n_embd + 20 * min(LOSS_ROWS, tokens))
        block = tokens * ((42 if c.dropout else 40) * c.n_embd + 4 * c.n_head + 16)
        ends = tokens * (13 * c.n_embd + 24)  # before the first block and after the last
        if self.grad_checkpoint:
            activations = c.n_layer * tokens * 4 * c.n_embd + max(loss, block)
        else:
            activations = c.n_layer * block + loss
        return 16 * self.num_parameters() + 2 * matrices + ends + activations

    def parameter_groups(self, weight_decay, embed_scale=1.0, vector_scale=1.0):
        """For the optimizer: decay on matrices only; norms and biases have nothing to gain from it. The matrices of
        the blocks stand apart, and say how many (`parts`) lie in each one below the other: muon.Muon asks for that.

        `lr_scale` of a group times the run's learning rate is the group's. The shared embedding has `embed_scale`,
        norms and biases have `vector_scale`."""
        inside = [(name, p) for name, p in self.h.named_parameters() if p.dim() == 2]
        attention = [p for name, p in inside if "c_attn" in name]
        others = [p for name, p in inside if "c_attn" not in name]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return [
            {"params": [self.wte.weight], "weight_decay": weight_decay, "lr_scale": embed_scale},
            {"params": attention, "weight_decay": weight_decay, "lr_scale": 1.0, "parts": 3},
            {"params": others, "weight_decay": weight_decay, "lr_scale": 1.0, "parts": 1},
            {"params": vectors, "weight_decay": 0.0, "lr_scale": vector_scale},
        ]
