"""Rows found by optimisation: inputs whose gradient points where the update went.

An update of one step is −η ∇L(rows). From a random start, inputs x̂ are moved until their gradient has the direction of
the update (Geiping et al., arXiv 2003.14053, equation 4; without its prior for pictures):

    minimise over x̂:  1 − ⟨∇L(x̂, y), −Δ⟩ / (‖∇L(x̂, y)‖ ‖Δ‖)

Unlike the attack on a first linear layer, this one reads rows out of any model that can be differentiated twice. The
labels y are given to it, because they are told by the last layer or found by trying. It reads few rows at a time.
"""

from __future__ import annotations

import torch

from fedqueue.leak.row_data import Rows
from fedqueue.task import Task
from fedqueue.tensors.frame import Frame

MOST_ROWS = 4
"""Rows of an update that are looked for together; of more, hardly any comes out."""
MOST_UPDATES = 8
STEPS = 600
STARTS = 2
RATE = 0.1


def rows_by_optimisation(
    task: Task, model: torch.nn.Module, base: Frame, delta: Frame, labels: torch.Tensor, like: Rows, seed: int
) -> torch.Tensor:
    """Return the inputs that explain `delta` best, float (n, …), for n labels, int64 (n,).

    `base` is written into `model`. `like` are other rows of the kind: their range bounds the inputs, and their mean and
    spread the random starts.
    """
    assert like.inputs is not None
    base.write(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    delta.frozen = base.frozen
    changes = delta.state_dict()
    target = torch.cat([-changes[names[id(parameter)]].flatten().float() for parameter in parameters])
    target = target / torch.linalg.vector_norm(target).clamp_min(torch.finfo(target.dtype).tiny)
    low, high = like.inputs.amin(0), like.inputs.amax(0)
    generator = torch.Generator().manual_seed(seed)
    best, found = float("inf"), like.inputs.mean(0).expand(len(labels), *like.inputs.shape[1:]).clone()
    for _ in range(STARTS):
        noise = torch.randn(found.shape, generator=generator)
        inputs = (like.inputs.mean(0) + like.inputs.std(0) * noise).requires_grad_()
        optimizer = torch.optim.Adam([inputs], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            gradients = torch.autograd.grad(task.loss(model, [inputs, labels]), parameters, create_graph=True)
            gradient = torch.cat([part.flatten() for part in gradients])
            distance = 1 - torch.nn.functional.cosine_similarity(gradient, target, dim=0)
            (inputs.grad,) = torch.autograd.grad(distance, [inputs])
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                inputs.clamp_(low, high)
        if (reached := distance.item()) < best:
            best, found = reached, inputs.detach()
    return found
