"""Proximal policy optimisation, token by token, as in reinforcement learning from human feedback.

    maximise   E_pi[r(y)] - KL(pi || pi_ref) / beta

whose optimum is the RLHF policy, pi_ref(y) exp(beta r(y)) / Z. The details, each as in Ziegler et al. (2019, arXiv
1909.08593) and Stiennon et al. (2020, arXiv 2009.01325) unless it says otherwise:

1. *Reward.* -(log pi - log pi_ref) / beta at every token, with beta fixed, and r(y) of the whole text at its last one.
   A response that is cut at the length limit gets the reward of what stands there.
2. *Advantages.* Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438) with gamma 1 and lambda 0.95,
   whitened over the tokens of a batch.
3. *Value function.* A network of its own, which starts from the reward model (Stiennon), read at the prefix before the
   token.
4. *Loss.* Clipped ratio and clipped value, 0.2 both; 4 passes over each batch, in minibatches.
5. *Dropout* is off, or the ratio of the first pass would not be one.
6. Not here: adaptive KL, a separate entropy bonus, reward normalisation.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pargs_min.codec import left_pad
from pargs_min.decode import ModelPolicy, response_log_probs, response_rewards, row_uniforms
from pargs_min.methods import plain
from pargs_min.reward_model import prefix_rewards
from pargs_min.scoring import RewardFn


def gae(rewards: Tensor, values: Tensor, written: Tensor, lam: float = 0.95, gamma: float = 1.0) -> Tensor:
    """Advantages of each token, by generalised advantage estimation.

        A_t = sum_k (gamma lam)^k delta_{t+k},   delta_t = r_t + gamma V(s_{t+1}) - V(s_t),   V = 0 after the end

    Args:
        rewards: (B, T) reward of each token.
        values: (B, T) value of the prefix before each token.
        written: (B, T) whether the token belongs to the response; right padded.

    Returns:
        (B, T), 0 at padding.

    Source: Schulman et al. (2016), arXiv 1506.02438, equation 16.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[True, True]]), lam=0.5)
    tensor([[0.1250, 0.7500]])
    """
    rewards, values = rewards * written, values * written
    later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas, advantage, advantages = rewards + gamma * later - values, torch.zeros_like(values[:, 0]), []
    for delta in deltas.flip(1).unbind(1):
        advantage = delta + gamma * lam * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1], 1) * written


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) of each token, with ratio = pi / pi_old.

    Source: Schulman et al. (2017), arXiv 1707.06347, equation 7.

    >>> clipped_policy_loss(torch.tensor([0.5, -0.5]), torch.zeros(2), torch.tensor([1.0, 1.0]), clip=0.2)
    tensor([-1.2000, -0.6065])
    """
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 of each token.

    >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip=0.2)
    tensor([0.3200])
    """
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


@dataclass(frozen=True)
class PPOSettings:
    """How to train. Raises ValueError for a number that cannot be."""

    beta: float = field(
        default=1.0, metadata={"help": "Weight of the reward, in nats per unit of reward: 1 / the KL coefficient."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of the longest response."})
    updates: int = field(default=200, metadata={"help": "Batches of texts."})
    batch_size: int = field(default=64, metadata={"help": "Texts a batch."})
    passes: int = field(default=4, metadata={"help": "Over each batch."})
    minibatch_size: int = field(default=16, metadata={"help": "Texts a step of the optimizer."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Of Adam, constant."})
    clip: float = field(default=0.2, metadata={"help": "How far the ratio may leave 1, and a value its old one."})
    value_weight: float = field(default=0.1, metadata={"help": "Of the value loss."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the advantages."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Longer gradients are cut to it."})
    seed: int = field(default=0, metadata={"help": "Of texts and batches."})

    def __post_init__(self) -> None:
        for name in ("beta", "learning_rate", "clip", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not (math.isfinite(self.value_weight) and self.value_weight >= 0 and 0 <= self.lam <= 1):
            raise ValueError(
                f"value_weight must be a number of at least 0, and lam in 0..1, got {self.value_weight} and {self.lam}"
            )
        for name in ("max_new_tokens", "updates", "batch_size", "passes", "minibatch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def train_ppo(
    model: PreTrainedModel,
    value_model: PreTrainedModel,
    reward_fn: RewardFn,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    settings: PPOSettings,
    checkpoint: str | os.PathLike | None = None,
    save_every: int = 20,
) -> Iterator[dict[str, float]]:
    """Train a language model in place; yields after every update what it wrote before it.

    Args:
        model: a causal language model, the reference before it is trained.
        value_model: a causal reward model (`load_reward_model`), changed in place.
        reward_fn: reward of whole texts.
        prompts: token ids; each update draws some of them, every prompt once before any comes again.
        ends: ids that end a response.
        checkpoint: a file to keep models and optimizer in, every `save_every` updates; if it is there, the run goes on
            from it, to the weights of a run that was never interrupted.

    Yields:
        update; reward, mean of a text; kl, mean of log pi / pi_ref of a text in nats; length in tokens; policy_loss,
        value_loss; clipped, share of tokens whose ratio left the interval.

    Raises:
        ValueError: if there are no prompts, `save_every` is below 1, the value model has no value at every token, or
            the checkpoint was made with other settings, prompts, ends or another reward.
        FloatingPointError: if a reward is not finite.
    """
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    ref = copy.deepcopy(model).eval()
    models = torch.nn.ModuleList([model.eval(), value_model.eval()])  # eval: no dropout
    optimizer = torch.optim.Adam(models.parameters(), lr=settings.learning_rate, eps=1e-5)
    first, asked = 0, hashlib.sha256(json.dumps([prompts, ends]).encode()).hexdigest()
    if checkpoint is not None and Path(checkpoint).exists():
        first = _load(checkpoint, models, optimizer, settings, ref, asked, reward_fn)
    for update in range(first, settings.updates):
        batch = rollout(model, value_model, ref, reward_fn, prompts, ends, settings, update)
        order = torch.Generator().manual_seed(settings.seed * 1_000_003 + update)
        losses = []
        for _ in range(settings.passes):
            for rows in torch.randperm(settings.batch_size, generator=order).split(settings.minibatch_size):
                part = {name: x[rows.to(x.device)] for name, x in batch.items()}
                loss, numbers = _loss(model, value_model, part, settings)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(models.parameters(), settings.max_grad_norm)
                optimizer.step()
                losses.append(numbers)
        if checkpoint is not None and ((update + 1) % save_every == 0 or update + 1 == settings.updates):
            seen = {name: batch[name].cpu() for name in ("ids", "mask", "scores")}
            state = {"models": models.state_dict(), "optimizer": optimizer.state_dict(), "ref": ref.state_dict()}
            state |= {"settings": vars(settings), "asked": asked, "seen": seen, "updates": update + 1}
            _save(checkpoint, state)
        means = torch.tensor(losses).mean(0).tolist()
        yield {
            "update": update + 1,
            "reward": batch["scores"].mean().item(),
            "kl": batch["kl"].mean().item(),
            "length": batch["written"].sum(1).float().mean().item(),
            **dict(zip(("policy_loss", "value_loss", "clipped"), means, strict=True)),
        }


@torch.no_grad()
def rollout(model, value_model, ref, reward_fn, prompts, ends, settings, update: int) -> dict[str, Tensor]:
    """A batch of texts of the current policy, with all that the update needs to know of them."""
    numbers = range(update * settings.batch_size, (update + 1) * settings.batch_size)
    asked = [_prompt_number(number, len(prompts), settings.seed) for number in numbers]
    prompt_ids, mask = (x.to(model.device) for x in left_pad([prompts[number] for number in asked]))
    uniforms = row_uniforms(settings.seed, asked, numbers, settings.max_new_tokens)
    limits = dict(top_k=0, max_new_tokens=settings.max_new_tokens, eos=ends, uniforms=uniforms)
    texts = plain(ModelPolicy(model), prompt_ids, mask, **limits)
    scores = response_rewards(reward_fn, prompt_ids, mask, texts)
    tokens, lengths = texts.tokens, texts.lengths
    written = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    batch = {
        "ids": torch.cat([prompt_ids, tokens], 1),
        "mask": torch.cat([mask, written.to(mask.dtype)], 1),
        "written": written,
        "scores": scores,
    }
    old_log_probs, old_values = _log_probs(model, batch), _values(value_model, batch)
    log_ratios = (old_log_probs - _log_probs(ref, batch)) * written
    last = torch.arange(tokens.shape[1], device=tokens.device) == lengths[:, None] - 1
    advantages = gae(scores[:, None] * last - log_ratios / settings.beta, old_values, written, settings.lam)
    ours = advantages[written]
    whitened = (advantages - ours.mean()) / (ours.std(correction=min(1, len(ours) - 1)) + 1e-8)  # one has no spread
    return batch | {
        "kl": log_ratios.sum(1),
        "old_log_probs": old_log_probs,
        "old_values": old_values,
        "returns": advantages + old_values,
        "advantages": whitened,
    }


def _prompt_number(number: int, prompts: int, seed: int) -> int:
    """Text after text goes through all prompts, in an order drawn anew for each round."""
    turn, place = divmod(number, prompts)
    return int(torch.randperm(prompts, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))[place])


def _loss(model, value_model, batch: dict[str, Tensor], settings: PPOSettings) -> tuple[Tensor, list[float]]:
    written, log_probs = batch["written"], _log_probs(model, batch)
    policy = clipped_policy_loss(log_probs, batch["old_log_probs"], batch["advantages"], settings.clip)
    value = clipped_value_loss(_values(value_model, batch), batch["old_values"], batch["returns"], settings.clip)
    left = ((log_probs - batch["old_log_probs"]).exp() - 1).abs() > settings.clip
    policy, value, left = (x[written].mean() for x in (policy, value, left.float()))
    return policy + settings.value_weight * value, [policy.item(), value.item(), left.item()]


def _log_probs(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return response_log_probs(model, batch["ids"], batch["mask"], batch["written"].shape[1])


def _values(value_model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) value of the prefix before each response token."""
    n = batch["written"].shape[1]
    return prefix_rewards(value_model, batch["ids"], batch["mask"])[:, -n - 1 : -1]


def _save(file, state: dict) -> None:
    unfinished = Path(f"{file}.unfinished")  # so that the file, once there, is whole
    torch.save(state, unfinished)
    unfinished.rename(file)


@torch.no_grad()
def _load(file, models, optimizer, settings: PPOSettings, ref: PreTrainedModel, asked: str, reward_fn: RewardFn) -> int:
    """The number of updates done.

    Raises:
        ValueError: if they were done with other settings, prompts or ends, or by another reward: one that scores the
            last texts otherwise.
    """
    state = torch.load(file, weights_only=True, map_location="cpu")
    same = {**state["settings"], "updates": settings.updates}
    if same != vars(settings):
        raise ValueError(f"{file} was made with other settings ({state['settings']}): choose another folder")
    if state["asked"] != asked:
        raise ValueError(f"{file} was made with other prompts or end tokens: give the same, or choose another folder")
    ids, mask, scores = (state["seen"][name].to(ref.device) for name in ("ids", "mask", "scores"))
    if not torch.allclose(reward_fn(ids, mask).to(scores.dtype), scores, rtol=1e-2, atol=1e-2):  # devices differ a bit
        raise ValueError(f"{file} was made with another reward model: give the same, or choose another folder")
    models.load_state_dict(state["models"])
    optimizer.load_state_dict(state["optimizer"])
    ref.load_state_dict(state["ref"])
    return state["updates"]
