"""Muon: an optimizer that steps equally far along every direction of a matrix's gradient (Jordan et al. 2024).

    optimizer = Muon(model.parameter_groups(weight_decay=0.1), lr=2.4e-3, betas=(0.9, 0.95))

A few directions dominate the gradient of a weight matrix, and the steps of AdamW mostly repeat these. Muon takes the
momentum of the gradient and sets all of its singular values to about one, by five matrix polynomials and without a
decomposition. It is for the matrices inside the blocks. The embedding and all vectors stay with AdamW, from which this
class inherits, so that a run has one optimizer. torch.optim.Muon has the same rule, one matrix at a time and always in
bfloat16, which CPUs without such instructions multiply many times more slowly than float32. A test compares the two.
"""

import torch
import torch.distributed as dist

from support.runtime import gathered, laid_out_like

A, B, C = 3.4445, -4.7750, 2.0315  # steepest at zero, and settling between 0.7 and 1.2 (Jordan et al. 2024)


def orthogonalize(x, steps=5):
    """U Vᵀ, nearly, of each x = U S Vᵀ: singular values between 0.7 and 1.2 (0 stays 0). x (n, rows, columns).

    Each step is an odd polynomial of x, so it acts on the singular values alone: s -> A s + B s^3 + C s^5."""
    wide = x if x.size(-2) <= x.size(-1) else x.mT  # the smaller of the two products x xᵀ
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # now no singular value exceeds 1
    wide = wide.half() if x.is_cuda else wide  # nothing exceeds 8, and float16 has three bits more than bfloat16
    for _ in range(steps):
        square = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(square, square, square, beta=B, alpha=C), wide, beta=A)
    return wide if x.size(-2) <= x.size(-1) else wide.mT


def orthogonalize_together(x):
    """`orthogonalize`, with the n matrices shared out to the processes of a run.

    At 124M parameters it is as much work as training on 1,900 tokens, which eight processes would otherwise each do.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return orthogonalize(x)
    padded = torch.cat([x, x.new_zeros(-len(x) % world, *x.shape[1:])])
    mine = orthogonalize(padded.chunk(world)[dist.get_rank()]).contiguous()
    whole = mine.new_empty(padded.shape)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    gather(whole, mine)
    return whole[: len(x)]


class Muon(torch.optim.AdamW):
    """AdamW, except for parameter groups with a key `parts`: Muon moves those.

    `parts` is the number of matrices that each of the group's parameters holds one below the other
    (3 for queries, keys and values). A step has the root mean square 0.2 lr per entry, which is AdamW's usual one, so
    that learning rate and weight decay keep their meaning (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(self, groups, momentum=0.95, **adamw):
        super().__init__(groups, **adamw)
        self.momentum = momentum

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's own looks for its keys everywhere

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients; those of the matrices are gone afterwards."""
        for group in self.param_groups:
            if "parts" in group:
                self.move(group)
        super().step(closure)

    def move(self, group):
        same = {}  # matrices of one shape are worked on together: a few large products, not hundreds of small ones
        for p in group["params"]:
            if p.grad is not None:
                direction = self.direction(p).unflatten(0, (group["parts"], -1))
                same.setdefault(direction.shape, []).append((p, direction))
                p.grad = None  # nothing is left for AdamW
        for (parts, *shape), members in same.items():
            steps = orthogonalize_together(torch.cat([direction for _, direction in members]))
            for (p, _), step in zip(members, steps.split(parts)):
                decayed = p * (1 - group["lr"] * group["weight_decay"])
                step = laid_out_like(p, step.flatten(0, 1))
                self.replace(p, decayed.add_(step, alpha=-0.2 * max(shape) ** 0.5 * group["lr"]))

    def replace(self, old, new):
        """Writes `new` over `old`, unless AdamW's found_inf asks for no update; the device decides that."""
        skip = getattr(self, "found_inf", None)
        old.copy_(new if skip is None else torch.where(skip > 0, old, new))

    def direction(self, p):
        """Nesterov's momentum of the gradient, whole where it is sharded."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp(p.grad, 1 - self.momentum)
        self.replace(state["momentum_buffer"], average)
        return gathered(p.grad.lerp(average, self.momentum))
