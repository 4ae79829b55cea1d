"""Recurrent PPO on CartPole without its velocities: a policy that must remember, learned from whole rollouts.

    python examples/recurrent_ppo.py                   # learns, or says "not solved" and exits with 1
    python examples/recurrent_ppo.py --unroll loop     # the same in more time; so does segments
    python examples/recurrent_ppo.py --speed           # one update against a Python loop, for 0, 1 and 10 % resets

Episodes end inside a rollout [T, B], each at another step. With `reset=` the fused loop starts a new episode where one
begins; without it, a learner loops over the steps in Python, or calls its layer for each stretch without a reset.
PPO: Schulman et al. 2017, arXiv:1707.06347, with the advantages of arXiv:1506.02438. Needs gymnasium.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import fused_rnn
from fused_rnn.commands import machine

ENVS, STEPS, HIDDEN = 16, 128, 64  # B, T, H
GAMMA, LAMBDA, CLIP, RATE, EPOCHS, PARTS = 0.98, 0.9, 0.2, 5e-3, 10, 2
DECAY = 150  # updates in which the rate falls to a tenth
SOLVED = 475.0
SCALE = torch.tensor([2.4, 0.2095])  # where an episode ends: metres, radians
Unroll = Callable[[nn.Module, Tensor, Any, Tensor], tuple[Tensor, Any]]


def fused(rnn: nn.Module, x: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
    """x [T, B, D], state as the layer's, reset [T, B] bool → y [T, B, H], the state after the last step."""
    return rnn(x, state, reset=reset)


def loop(rnn: nn.Module, x: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
    """The same by a Python loop over the steps, a cell of torch's each."""
    is_lstm = isinstance(state, tuple)
    keep = (~reset).to(x.dtype)[..., None]
    state = tuple(s[0] for s in state) if is_lstm else state[0]
    ys = []
    for x_t, keep_t in zip(x, keep, strict=True):
        if is_lstm:
            state = torch.lstm_cell(x_t, [s * keep_t for s in state], *rnn.all_weights[0])
            ys.append(state[0])
        else:
            state = torch.gru_cell(x_t, state * keep_t, *rnn.all_weights[0])
            ys.append(state)
    return torch.stack(ys), tuple(s[None] for s in state) if is_lstm else state[None]


def segments(rnn: nn.Module, x: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
    """The same by a call of torch's layer for each stretch of steps in which no sequence is reset."""
    keep = (~reset).to(x.dtype)[..., None]
    starts = [0, *(reset[1:].any(1).nonzero()[:, 0] + 1).tolist(), len(x)]
    ys = []
    for start, end in pairwise(starts):
        state = tuple(s * keep[start] for s in state) if isinstance(state, tuple) else state * keep[start]
        y, state = rnn(x[start:end], state)
        ys.append(y)
    return torch.cat(ys), state


# By name: whose layer, and how it is unrolled.
UNROLLS: dict[str, tuple[Any, Unroll]] = {"fused": (fused_rnn, fused), "loop": (nn, loop), "segments": (nn, segments)}


class Policy(nn.Module):
    """x [T, B, 2], state, reset [T, B] → logits [T, B, 2], values [T, B], the state after the last step."""

    def __init__(self, cell: str, unroll: str) -> None:
        super().__init__()
        library, self.unroll = UNROLLS[unroll]
        self.rnn = getattr(library, cell)(2, HIDDEN)
        self.actor = nn.Linear(HIDDEN, 2)
        self.critic = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Tensor, Any]:
        y, state = self.unroll(self.rnn, x, state, reset)
        return self.actor(y), self.critic(y)[..., 0], state

    def start(self, batch: int) -> Any:
        zeros = self.actor.weight.new_zeros(1, batch, HIDDEN)
        return (zeros, zeros) if self.rnn.mode == "LSTM" else zeros


@dataclass
class Rollout:
    """What a learner needs of T steps in B environments: all [T, B, ·] but the state before the first step."""

    x: Tensor
    reset: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    state: Any

    def part(self, rows: Tensor) -> "Rollout":
        """Some of the environments, each with all its steps."""
        state = tuple(s[:, rows] for s in self.state) if isinstance(self.state, tuple) else self.state[:, rows]
        names = ("x", "reset", "actions", "log_probs", "advantages", "returns")
        return Rollout(*(getattr(self, name)[:, rows] for name in names), state)


class Actor:
    """Plays, and remembers where it was: the environments, their last observation, the policy's state."""

    def __init__(self, policy: Policy, seed: int) -> None:
        import gymnasium
        from gymnasium.vector import AutoresetMode

        options = {"autoreset_mode": AutoresetMode.SAME_STEP}  # what a last step returns is the next episode's first x
        self.envs = gymnasium.make_vec("CartPole-v1", ENVS, vectorization_mode="sync", vector_kwargs=options)
        self.policy, self.state = policy, policy.start(ENVS)
        self.dtype = policy.actor.weight.dtype
        self.x = self.positions(self.envs.reset(seed=seed)[0])
        self.reset = torch.ones(ENVS, dtype=torch.bool)
        self.running = torch.zeros(ENVS)
        self.episodes: list[float] = []  # undiscounted returns, in the order in which they ended

    def positions(self, observation: Any) -> Tensor:
        return (torch.from_numpy(observation)[:, ::2] / SCALE).to(self.dtype)

    @torch.no_grad()
    def play(self) -> Rollout:
        before, rows, rewards = self.state, [], []
        for _ in range(STEPS):
            logits, value, self.state = self.policy(self.x[None], self.state, self.reset[None])
            probs = logits[0].softmax(-1)
            actions = (torch.rand(ENVS) < probs[:, 1]).long()
            rows.append((self.x, self.reset, actions, probs.gather(1, actions[:, None])[:, 0].log(), value[0]))
            observation, reward, terminated, truncated, _ = self.envs.step(actions.numpy())
            self.x, self.reset = self.positions(observation), torch.from_numpy(terminated | truncated)
            rewards.append((1 - GAMMA) * torch.from_numpy(reward).to(self.dtype))  # so that values lie in [0, 1]
            self.running += torch.from_numpy(reward)
            self.episodes += self.running[self.reset].tolist()
            self.running[self.reset] = 0
        x, reset, actions, log_probs, values = (torch.stack(column) for column in zip(*rows, strict=True))
        _, last, _ = self.policy(self.x[None], self.state, self.reset[None])
        following = torch.cat([values[1:], last]) * torch.cat([~reset[1:], ~self.reset[None]])
        advantages = torch.stack(rewards) + GAMMA * following - values
        for t in range(STEPS - 2, -1, -1):
            advantages[t] += GAMMA * LAMBDA * ~reset[t + 1] * advantages[t + 1]
        return Rollout(x, reset, actions, log_probs, advantages, advantages + values, before)


def update(policy: Policy, optimiser: torch.optim.Optimizer, rollout: Rollout) -> None:
    """One step of the optimiser on whole sequences, by PPO's clipped objective."""
    logits, values, _ = policy(rollout.x, rollout.state, rollout.reset)
    log_probs = -cross_entropy(logits.flatten(0, 1), rollout.actions.flatten(), reduction="none").view_as(values)
    ratio = (log_probs - rollout.log_probs).exp()
    advantages = (rollout.advantages - rollout.advantages.mean()) / (rollout.advantages.std() + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    loss = 0.5 * mse_loss(values, rollout.returns) - gain
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
    optimiser.step()


def train(
    unroll: str, cell: str = "LSTM", updates: int = 200, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[float]:
    """The returns of all episodes, in the order in which they ended; stops when the last 100 average SOLVED."""
    torch.manual_seed(seed)
    policy = Policy(cell, unroll).to(dtype)
    optimiser = torch.optim.Adam(policy.parameters(), RATE)
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, DECAY)  # else what was learned is lost again
    actor = Actor(policy, seed)
    begin, learning = time.perf_counter(), 0.0
    for number in range(updates):
        rollout = actor.play()
        start = time.perf_counter()
        for _ in range(EPOCHS):
            for rows in torch.randperm(ENVS).chunk(PARTS):
                update(policy, optimiser, rollout.part(rows))
        slower.step()
        learning += time.perf_counter() - start
        solved = is_solved(actor.episodes)
        if number % 10 == 9 or number == updates - 1 or solved:
            steps, now = (number + 1) * STEPS * ENVS, time.perf_counter() - begin
            recent = mean(actor.episodes[-100:] or [0])
            print(f"{steps:7d} steps   return {recent:6.1f}   {now:6.1f} s, learning {learning:6.1f} s", flush=True)
        if solved:
            break
    return actor.episodes


def is_solved(episodes: list[float]) -> bool:
    """Whether the last 100 of these returns average SOLVED."""
    return len(episodes) >= 100 and mean(episodes[-100:]) >= SOLVED


def speed(cell: str, resets: float, repeats: int = 25) -> dict[str, float]:
    """The processor's seconds for one update on a rollout [T, B] of that share of resets, by each way, taking turns."""
    torch.manual_seed(0)
    policies = {name: Policy(cell, name) for name in UNROLLS}
    optimisers = {name: torch.optim.Adam(policy.parameters(), RATE) for name, policy in policies.items()}
    reset = torch.rand(STEPS, ENVS) < resets
    actions = torch.randint(2, (STEPS, ENVS))
    normal = torch.randn(2, STEPS, ENVS)
    x = torch.randn(STEPS, ENVS, 2)
    rollout = Rollout(x, reset, actions, torch.full((STEPS, ENVS), -0.7), *normal, policies["fused"].start(ENVS))
    seconds: dict[str, list[float]] = {name: [] for name in UNROLLS}
    for _ in range(repeats):
        for name, policy in policies.items():
            start = time.process_time()
            update(policy, optimisers[name], rollout)
            seconds[name].append(time.process_time() - start)
    return {name: median(times[2:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unroll", choices=UNROLLS, default="fused")
    parser.add_argument("--cell", choices=("LSTM", "GRU"), default="LSTM")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--json", type=Path, help="with --speed: where to write the figures")
    options = parser.parse_args()
    if not options.speed:
        if find_spec("gymnasium") is None:
            sys.exit("recurrent_ppo.py: gymnasium is not installed: pip install gymnasium")
        episodes = train(options.unroll, options.cell, options.updates, options.seed, getattr(torch, options.dtype))
        if not is_solved(episodes):
            sys.exit(f"not solved in {options.updates} updates: the last 100 episodes average less than {SOLVED:.0f}")
        print("solved")
        return
    print(f"one update, T={STEPS}, B={ENVS}, H={HIDDEN}: ms, and how many times fused's that is")
    rows = []
    for cell in ("LSTM", "GRU"):
        for resets in (0.0, 0.01, 0.1):
            ms = {name: 1e3 * s for name, s in speed(cell, resets).items()}
            rows.append({"cell": cell, "resets": resets, **ms})
            times = "".join(f"   {name} {t:7.2f} ({t / ms['fused']:4.1f}×)" for name, t in ms.items())
            print(f"{cell:<5}{resets:4.0%} resets{times}")
    if options.json:
        facts = machine.describe("cpu") | {"threads": torch.get_num_threads(), "T": STEPS, "B": ENVS, "H": HIDDEN}
        options.json.write_text(json.dumps({"run": facts, "update_ms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
