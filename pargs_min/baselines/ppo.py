"""Proximal policy optimisation, token by token, as in reinforcement learning from human feedback.

    maximise   E_pi[r(y)] - KL(pi || pi_ref) / beta

The optimum is the RLHF policy, pi_ref(y) exp(beta r(y)) / Z. The details are those of Ziegler et al. (2019, arXiv
1909.08593) and Stiennon et al. (2020, arXiv 2009.01325) unless stated otherwise:

1. *Reward.* -(log pi - log pi_ref) / beta at every token, with beta fixed, and r(y) of the whole text at its last one.
   A response that is cut at the length limit gets the reward of the text as it stands.
2. *Advantages.* Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438) with lambda 0.95 and gamma 1,
   whitened over the tokens of a batch.
3. *Value function.* A network of its own, which starts from the reward model (Stiennon) and is read at the
   prefix before each token.
4. *Loss.* Clipped ratio and clipped value, both at 0.2; 4 passes over each batch, in minibatches.
5. *Dropout* is off; otherwise the ratio of the first pass would not be one.
6. Not included: adaptive KL, a separate entropy bonus, reward normalisation.
"""

import copy
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pargs_min.codec import left_pad
from pargs_min.decode import ModelPolicy, generate, response_log_probs, response_rewards, row_uniforms
from pargs_min.reward_model import prefix_rewards
from pargs_min.scoring import RewardFn
from pargs_min.store import aside, saving
from pargs_min.trainer import check_finite


def gae(rewards: Tensor, values: Tensor, written: Tensor, lam: float = 0.95) -> Tensor:
    """The advantage of each token, by generalised advantage estimation.

        A_t = sum_k lam^k delta_{t+k},   delta_t = r_t + V(s_{t+1}) - V(s_t),   V = 0 after the end

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
    deltas, advantage, advantages = rewards + later - values, torch.zeros_like(values[:, 0]), []
    for delta in deltas.flip(1).unbind(1):
        advantage = delta + lam * advantage
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
    """How to train.

    Args:
        beta: Weight of the reward, in nats per unit of reward: 1 / the KL coefficient.
        max_new_tokens: Tokens of the longest response.
        updates: Batches of texts.
        batch_size: Texts per batch.
        passes: Over each batch.
        minibatch_size: Texts per step of the optimizer.
        learning_rate: Of Adam, constant.
        clip: How far the ratio may move from 1, and a value from its old one.
        value_weight: Of the value loss.
        lam: Lambda of the advantages.
        max_grad_norm: Longer gradients are cut to it.
        seed: Of texts and batches.

    Raises:
        ValueError: if a number is out of range.
    """

    beta: float = 1.0
    max_new_tokens: int = 64
    updates: int = 200
    batch_size: int = 64
    passes: int = 4
    minibatch_size: int = 16
    learning_rate: float = 1e-5
    clip: float = 0.2
    value_weight: float = 0.1
    lam: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("beta", "learning_rate", "clip", "max_grad_norm"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name in ("max_new_tokens", "updates", "batch_size", "passes", "minibatch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (0 <= self.value_weight < math.inf and 0 <= self.lam <= 1):
            raise ValueError(f"value_weight must be at least 0 and lam in 0..1, got {self.value_weight} and {self.lam}")


class Models(NamedTuple):
    """The policy and its value function, which are trained, and the reference."""

    policy: PreTrainedModel
    value: PreTrainedModel
    ref: PreTrainedModel
    vocabulary: int | None = None  # as of `ModelPolicy`


def train_ppo(
    model: PreTrainedModel,
    value_model: PreTrainedModel,
    reward_fn: RewardFn,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    settings: PPOSettings,
    checkpoint: str | os.PathLike | None = None,
    save_every: int = 20,
    vocabulary: int | None = None,
) -> Iterator[dict[str, float]]:
    """Train a language model in place; yields what each update saw and did.

    Args:
        model: a causal language model, the reference before it is trained.
        value_model: a causal reward model (`load_reward_model`), changed in place.
        reward_fn: reward of whole texts.
        prompts: token ids; each update draws some of them, every prompt once before any is drawn again.
        ends: ids that end a response.
        checkpoint: a file for models and optimizer, written every `save_every` updates. Where it exists, the run
            continues from it, to the weights of a run that was never interrupted.
        vocabulary: as of `ModelPolicy`.

    Yields:
        update, from 1; of the texts drawn before the update, means per text: reward, kl (log pi / pi_ref in nats),
        length (tokens); of its steps: policy_loss, value_loss, and clipped, the share of tokens whose ratio left the
        interval.

    Raises:
        ValueError: if there are no prompts, `save_every` is below 1, the value model has no value at every token, or
            the checkpoint was made with other settings, prompts, ends or another reward.
        FloatingPointError: if a reward is not finite, or training diverges.
    """
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    models = Models(model.eval(), value_model.eval(), copy.deepcopy(model).eval(), vocabulary)  # eval: no dropout
    trained = torch.nn.ModuleList([models.policy, models.value])
    optimizer = torch.optim.Adam(trained.parameters(), lr=settings.learning_rate, eps=1e-5)
    parts = {"models": trained, "optimizer": optimizer, "ref": models.ref}
    task = {"settings": vars(settings), "asked": [[*prompts], [*ends]]}
    first = 0 if checkpoint is None or not Path(checkpoint).exists() else _load(checkpoint, parts, task, reward_fn)

    for update in range(first, settings.updates):
        # Draw texts from the policy, and find out how much better than expected each of their tokens was.
        batch = rollout(models, reward_fn, prompts, ends, settings, update)

        # Make the better tokens more likely, and the values more accurate.
        order, losses = torch.Generator().manual_seed(settings.seed * 1_000_003 + update), []
        for _ in range(settings.passes):
            for rows in torch.randperm(settings.batch_size, generator=order).split(settings.minibatch_size):
                minibatch = {name: tensor[rows.to(tensor.device)] for name, tensor in batch.items()}
                loss, numbers = _loss(models, minibatch, settings)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.parameters(), settings.max_grad_norm)
                optimizer.step()
                losses.append(numbers)
        check_finite(f"update {update + 1}", trained.parameters())

        # Report, and save, so that an interruption costs `save_every` updates at most, and none that was not reported.
        done, means = update + 1, torch.tensor(losses).mean(0).tolist()
        yield {
            "update": done,
            "reward": batch["scores"].mean().item(),
            "kl": batch["kl"].mean().item(),
            "length": batch["written"].sum(1).float().mean().item(),
            **dict(zip(("policy_loss", "value_loss", "clipped"), means, strict=True)),
        }
        if checkpoint is not None and (done % save_every == 0 or done == settings.updates):
            seen = {name: batch[name].cpu() for name in ("ids", "mask", "scores")}
            state = {name: part.state_dict() for name, part in parts.items()}
            with saving(checkpoint), aside(checkpoint) as unfinished:
                torch.save(state | task | {"seen": seen, "updates": done}, unfinished)


@torch.no_grad()
def rollout(
    models: Models,
    reward_fn: RewardFn,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    settings: PPOSettings,
    update: int,
) -> dict[str, Tensor]:
    """A batch of B texts of the policy, and what its update has to know about them.

    Returns:
        ids, mask: (B, P + T) prompts and responses; written: (B, T) which tokens belong to the responses; scores, kl:
        (B,) of whole responses; old_log_probs, old_values, returns, advantages: (B, T) of their tokens.
    """
    # Draw a response to each prompt.
    numbers = range(update * settings.batch_size, (update + 1) * settings.batch_size)
    asked = [_prompt_number(number, len(prompts), settings.seed) for number in numbers]
    prompt_ids, mask = (tensor.to(models.ref.device) for tensor in left_pad([prompts[number] for number in asked]))
    uniforms = row_uniforms(settings.seed, asked, numbers, settings.max_new_tokens)
    limits: dict[str, Any] = dict(max_new_tokens=settings.max_new_tokens, eos=ends, uniforms=uniforms)
    texts = generate(ModelPolicy(models.policy, models.vocabulary), None, prompt_ids, mask, beta=0.0, top_k=0, **limits)

    # The reward model scores whole texts; policy, reference and value function look at each token.
    scores = response_rewards(reward_fn, prompt_ids, mask, texts)
    places, lengths = torch.arange(texts.tokens.shape[1], device=mask.device), texts.lengths[:, None]
    written = places < lengths
    batch = {"ids": torch.cat([prompt_ids, texts.tokens], 1), "mask": torch.cat([mask, written.to(mask.dtype)], 1)}
    batch |= {"written": written, "scores": scores}
    size = settings.minibatch_size
    parts = [{name: tensor[i : i + size] for name, tensor in batch.items()} for i in range(0, len(scores), size)]
    log_probs, ref_log_probs = (
        torch.cat([_log_probs(model, part, models.vocabulary) for part in parts])
        for model in (models.policy, models.ref)
    )
    values = torch.cat([_values(models.value, part) for part in parts])
    log_ratios = (log_probs - ref_log_probs) * written

    # A token is rewarded for staying close to the reference, the last one also for the whole response.
    rewards = scores[:, None] * (places == lengths - 1) - log_ratios / settings.beta
    advantages = gae(rewards, values, written, settings.lam)
    ours = advantages[written]
    whitened = (advantages - ours.mean()) / (ours.std(correction=min(1, len(ours) - 1)) + 1e-8)  # one has no spread
    batch |= {"old_log_probs": log_probs, "old_values": values, "kl": log_ratios.sum(1)}
    return batch | {"returns": advantages + values, "advantages": whitened}


def _prompt_number(number: int, prompts: int, seed: int) -> int:
    """Text after text goes through all prompts, in an order drawn anew for each round."""
    turn, place = divmod(number, prompts)
    return int(torch.randperm(prompts, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))[place])


def _loss(models: Models, batch: dict[str, Tensor], settings: PPOSettings) -> tuple[Tensor, list[float]]:
    """The loss, and for the report: policy loss, value loss, share of clipped ratios; all are means over tokens."""
    log_probs, values = _log_probs(models.policy, batch, models.vocabulary), _values(models.value, batch)
    policy = clipped_policy_loss(log_probs, batch["old_log_probs"], batch["advantages"], settings.clip)
    value = clipped_value_loss(values, batch["old_values"], batch["returns"], settings.clip)
    left = ((log_probs - batch["old_log_probs"]).exp() - 1).abs() > settings.clip
    policy, value, left = (each[batch["written"]].mean() for each in (policy, value, left.float()))
    return policy + settings.value_weight * value, [policy.item(), value.item(), left.item()]


def _log_probs(model: PreTrainedModel, batch: dict[str, Tensor], vocabulary: int | None) -> Tensor:
    """(B, T) log pi of each response token, in nats."""
    return response_log_probs(model, batch["ids"], batch["mask"], batch["written"].shape[1], vocabulary=vocabulary)


def _values(value_model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) value of the prefix before each response token."""
    return prefix_rewards(value_model, batch["ids"], batch["mask"])[:, -1 - batch["written"].shape[1] : -1]


@torch.no_grad()
def _load(file: str | os.PathLike, parts: dict, task: dict, reward_fn: RewardFn) -> int:
    """Load the state of all parts; the number of updates done.

    Raises:
        ValueError: if they were done with other settings, prompts or ends, or with another reward: one that scores the
            last texts differently; if the file is damaged.
    """
    try:
        state, device = torch.load(file, weights_only=True, map_location="cpu"), parts["ref"].device
    except Exception as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}): choose another folder, or delete it") from error
    if state["settings"] | {"updates": task["settings"]["updates"]} != task["settings"]:
        raise ValueError(f"{file} was made with other settings ({state['settings']}): choose another folder")
    if state["asked"] != task["asked"]:
        raise ValueError(f"{file} was made with other prompts or end tokens: give the same, or choose another folder")
    ids, mask, scores = (state["seen"][name].to(device) for name in ("ids", "mask", "scores"))
    if not torch.allclose(reward_fn(ids, mask).to(scores.dtype), scores, rtol=1e-2, atol=1e-2):  # devices differ a bit
        raise ValueError(f"{file} was made with another reward model: give the same, or choose another folder")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["updates"]
