"""Your own training loop, your own model: one plan per batch, one attention op in every layer.

python examples/training_loop.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mem1_kernels import BlockPlan, Layout, Segment, Trajectory, pack, trajectory_attention

VOCABULARY, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, plan: BlockPlan) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        return self.out(trajectory_attention(query, key, value, plan=plan).flatten(-2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(512, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, layout: Layout, plan: BlockPlan) -> Tensor:
        x = (self.tokens(layout.token_ids) + self.positions(layout.position_ids))[None]
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, (WIDTH,)), plan)
        return self.head(F.rms_norm(x, (WIDTH,)))[0]


def episode(length: int, generator: torch.Generator) -> Trajectory:
    """A state that counts the turns: it can be known from the state before it alone."""
    start = int(torch.randint(4, 30, (), generator=generator))
    segments = [Segment("prompt", [1, 2])]
    for turn in range(1, length + 1):
        noise = torch.randint(4, VOCABULARY, (12,), generator=generator)
        segments += [Segment("state", [start + turn], turn), Segment("action", [3], turn)]
        segments += [Segment("info", noise.tolist() + [start + turn + 1], turn)]
    return Trajectory(segments)  # retention: mem1


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        layout = pack([episode(8, generator) for _ in range(8)])  # expiry keeps them apart
        plan = BlockPlan.of(layout)
        logits = model(layout, plan)
        mask = layout.loss_mask  # True for the tokens that the policy writes
        before = layout.predecessor[mask]  # whose logits predict each of them
        loss = F.cross_entropy(logits[before], layout.token_ids[mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3}  loss {losses[-1]:.3f}")
    print(f"{layout}: {layout.visible_pairs:,} pairs visible, peak {layout.peak_context} tokens")
    return losses


if __name__ == "__main__":
    main()
