"""A check before training: does the fast way (compiled, or half precision on MPS) compute the right gradient?"""

from contextlib import nullcontext

import torch

from support.cli import UserError


def refuse_wrong_products(net, rt, batch_size, dropout):
    """Computes one micro-batch in the fast and in the plain way: eager, and on MPS in float32. UserError where the loss
    or the norm of the gradient differ.

    torch 2.11 compiled the gradients of an earlier version of this model to zeros, and had wrong products in half
    precision on MPS (pytorch issue 180776); the loss looked right. `net` has model, step_model and optimizer; its
    weights and gradients and torch's random state stay as they are. batch_size: rows of a micro-batch."""
    step_model = getattr(net.step_model, "module", net.step_model)  # DDP's
    half = rt.device.type == "mps" and rt.dtype != "float32"
    if step_model is net.model and not half:
        return
    config = net.model.config
    tokens = torch.arange(batch_size * (config.block_size + 1), device=rt.device) * 7919 % config.valid_vocab_size
    tokens = tokens.view(batch_size, -1)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def both(model, precision):
        with precision:
            loss = model(x, y) / y.numel()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.model.parameters()])
        net.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    net.step_model.train()
    kept = net.model.grad_checkpoint
    with torch.random.fork_rng([rt.device] if rt.device.type == "cuda" else []):
        loss, norm = both(step_model, rt.autocast())
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
