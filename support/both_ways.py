"""A check before training: does the fast way (compiled, or half precision on MPS) compute the right gradient?"""

from contextlib import nullcontext

import torch

from support.cli import UserError
from support.runtime import sync_gradients

LONGEST = 2**15 - 2  # terms of a sum that MPS computes right, see model.long_product


def refuse_wrong_products(net, rt, batch_size, dropout):
    """Computes one micro-batch in the fast and in the plain way: eager, and on MPS in float32. UserError where the loss
    or the norm of the gradient differ, or where the micro-batch is too large for MPS.

    torch 2.11 compiled the gradients of an earlier version of this model to zeros, and had wrong products in half
    precision on MPS (pytorch issue 180776); the loss looked right. `net` has model, step_model and optimizer; its
    weights and gradients and torch's random state stay as they are. batch_size: rows of a micro-batch."""
    if rt.device.type == "mps" and batch_size * net.model.config.block_size > LONGEST:
        raise UserError(
            f"on MPS a micro-batch of more than {LONGEST:,} tokens can give wrong gradients (pytorch issue 193487); "
            "lower --batch_size: the global batch stays the same"
        )
    compiled = getattr(net.step_model, "module", net.step_model) is not net.model  # module: DDP's
    half = rt.device.type == "mps" and rt.dtype != "float32"
    if not (compiled or half):
        return
    config = net.model.config
    tokens = torch.arange(batch_size * (config.block_size + 1), device=rt.device) * 7919 % config.valid_vocab_size
    tokens = tokens.view(batch_size, -1)
    # with the strides of a training batch, one row too, so that the code compiled here is the one that trains
    x, y = (t.clone(memory_format=torch.contiguous_format) for t in (tokens[:, :-1], tokens[:, 1:]))

    def both(model, precision):
        with sync_gradients(model, now=False):  # entered through DDP, for which the compiler divides the graph
            with precision:
                loss = model(x, y) / y.numel()
            loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.model.parameters()])
        net.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    net.step_model.train()
    kept = net.model.grad_checkpoint
    with torch.random.fork_rng([rt.device] if rt.device.type == "cuda" else []):
        loss, norm = both(net.step_model, rt.autocast())
        net.model.grad_checkpoint = True  # eager code takes more memory than compiled code
        try:
            plain_loss, plain_norm = both(net.model, nullcontext() if half else rt.autocast())
        finally:
            net.model.grad_checkpoint = kept
    far = 0.5 if dropout else 0.02 if rt.dtype == "float32" else 0.1  # dropout: other masks in each way
    if not (plain_norm / (1 + far) <= norm <= plain_norm * (1 + far) and abs(loss - plain_loss) <= far * plain_loss):
        raise UserError(
            f"torch {torch.__version__} computes a wrong training step here: loss {loss:.4f} and gradient norm "
            f"{norm:.4g}, where {'float32' if half else 'eager code'} gives {plain_loss:.4f} and {plain_norm:.4g}; "
            f"add {'--dtype float32' if half else '--compile off'}, or use another version of torch"
        )
