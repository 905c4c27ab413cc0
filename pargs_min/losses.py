"""Bradley-Terry losses on whole responses (ARGS) and on every prefix of them (PARGS); losses of values, win rates and
likelihoods of prefixes, and of what is distilled from another guide.

The paper writes the partial loss in one line. An implementation must also decide the following, and the paper's own
code decides it silently. What is chosen here, and why:

1. *What a response is.* A response ends with an end token, and its last prefix includes it. A prefix always includes
   the whole prompt.
2. *Unequal lengths.* `tail="extend"` (default): the shorter response is continued with end tokens, which the model
   sees, up to the length of the longer one; every length is compared. The paper's code pads this way, and of the
   treatments here it is the one for which the partial reward orders siblings by the win rate of their completions
   (`theory/`, T5-T8).
   `tail="min"`: stop at the shorter response; for responses that were cut at a length limit and never ended.
3. *First prefix.* Length 1, unless `lengths` says otherwise. The paper's code starts at one or at two tokens, depending
   on the task.
4. *Weights.* `reduction="prefix"` (default): every prefix counts once, so a long pair weighs more, as in the paper's
   code. `reduction="pair"`: every pair counts once; opponents are then weighted by their length, and siblings are no
   longer ordered by win rate (T8).
5. *Identical prefixes.* Up to their first difference both responses have the same reward: loss log 2, no gradient.
   They are kept, so a reported loss includes them.
6. *Which token.* r(y_1:i) is read at token i itself. The paper's code re-tokenises the text of each prefix, and for
   one task puts a quotation mark behind it; here a prefix is a slice of token ids.
7. *Labels.* Every prefix inherits the label of its whole response.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Negative log-likelihood that the chosen responses win, for one reward per response.

        L = -mean log sigmoid(r(chosen) - r(rejected))

    Args:
        chosen_rewards, rejected_rewards: (B,) rewards of whole responses.

    Returns:
        Scalar, in nats per pair.

    Raises:
        ValueError: if the shapes differ.

    Source: Bradley and Terry (1952); Ouyang et al. (2022), arXiv 2203.02155; the reward that ARGS decodes with.

    >>> bradley_terry_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    tensor(0.4100)
    """
    _check_shapes(chosen_rewards, rejected_rewards)
    return F.softplus(rejected_rewards - chosen_rewards).mean()


def full_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    """The Bradley-Terry loss of whole responses, which reads the reward at the last token of each (ARGS).

        L = -mean log sigmoid(r(chosen_1:n) - r(rejected_1:m)),   n, m their lengths

    Args:
        chosen_rewards, rejected_rewards: (B, T) r(y_1:i) of each response, right padded.
        chosen_lengths, rejected_lengths: (B,) number of tokens of each.

    Returns:
        Scalar, in nats per pair.

    >>> full_loss(torch.tensor([[9.0, 2.0]]), torch.tensor([[1.0, 9.0]]), torch.tensor([2]), torch.tensor([1]))
    tensor(0.3133)
    """
    return bradley_terry_loss(
        chosen_rewards.gather(1, chosen_lengths[:, None] - 1), rejected_rewards.gather(1, rejected_lengths[:, None] - 1)
    )


def partial_bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    tail: str = "extend",
    reduction: str = "prefix",
    lengths: tuple[int, int | None] = (1, None),
    labels: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood that the chosen response wins, read at every prefix length.

        L = -mean_i log sigmoid(r(chosen_1:i) - r(rejected_1:i))

    With soft labels p it is the cross-entropy, -mean_i [p log sigmoid(d_i) + (1 - p) log sigmoid(-d_i)], d_i the
    difference of rewards.

    Args:
        chosen_rewards, rejected_rewards: (B, T) reward at each response token, right padded. With `tail="extend"`
            the shorter row must go on with the rewards of its appended end tokens.
        chosen_lengths, rejected_lengths: (B,) number of tokens of each response, its own end token included.
        tail: "extend" compares up to the longer response, "min" up to the shorter one.
        reduction: "prefix" averages over all prefixes of the batch, "pair" over each pair first.
        lengths: first and last prefix length to compare, in tokens; None for no last one.
        labels: (B,) probability that the chosen response wins; None means 1.

    Returns:
        Scalar, in nats per prefix (or per pair); a pair that compares nothing counts 0.

    Raises:
        ValueError: for an unknown `tail` or `reduction`, shapes that differ, response lengths outside 1..T, or a last
            of `lengths` below the first.

    Source: arXiv 2406.07780, the Bradley-Terry loss on partial sequences.

    >>> chosen, rejected = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]])
    >>> partial_bradley_terry_loss(chosen, rejected, torch.tensor([2]), torch.tensor([1]))
    tensor(0.4100)
    >>> partial_bradley_terry_loss(chosen, rejected, torch.tensor([2]), torch.tensor([1]), tail="min")
    tensor(0.6931)
    >>> partial_bradley_terry_loss(chosen, rejected, torch.tensor([2]), torch.tensor([1]), labels=torch.tensor([0.5]))
    tensor(0.9100)
    """
    _check_shapes(
        chosen_rewards, rejected_rewards, chosen_lengths, rejected_lengths, *[] if labels is None else [labels]
    )
    compared = compared_prefixes(chosen_lengths, rejected_lengths, chosen_rewards.shape[1], tail, lengths)
    # Masked before the softplus: whatever stands at padding, NaN included, touches neither the loss nor its gradient.
    behind = (rejected_rewards - chosen_rewards).masked_fill(~compared, 0.0)
    losses = F.softplus(behind) * compared
    if labels is not None:
        losses = losses - (1 - labels)[:, None] * behind
    if reduction == "prefix":
        return losses.sum() / compared.sum().clamp(min=1)
    if reduction == "pair":
        return (losses.sum(-1) / compared.sum(-1).clamp(min=1)).mean()
    raise ValueError(f'reduction must be "prefix" or "pair", got {reduction!r}')


def prefix_value_loss(values: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    """Squared error of each prefix's value as a prediction of the reward that its whole text received.

        L = mean_i (V(y_1:i) - r(y))^2

    Over samples of the reference it is least at V(a) = E_ref[r(Y) | Y begins with a].

    Args:
        values: (B, T) value at each response token, right padded.
        rewards: (B,) reward of each whole text.
        lengths: (B,) number of tokens of each response, its own end token included.

    Returns:
        Scalar, in squared units of reward per prefix.

    Raises:
        ValueError: if the shapes do not fit, or for lengths outside 1..T.

    Source: Mudgal et al. (2024), arXiv 2310.17022, CD-FUDGE; after Yang and Klein (2021), arXiv 2104.05218.

    >>> prefix_value_loss(torch.tensor([[1.0, 3.0], [0.0, 9.0]]), torch.tensor([3.0, 1.0]), torch.tensor([2, 1]))
    tensor(1.6667)
    """
    written = written_tokens(values, lengths, rewards)
    return (values - rewards[:, None]).masked_fill(~written, 0.0).square().sum() / written.sum()


def soft_value_loss(values: Tensor, rewards: Tensor, lengths: Tensor, lam: float, highest: float) -> Tensor:
    """Poisson deviance of each prefix's soft value, against the weight of the reward that its whole text received.

        L = mean_i exp(u(y_1:i)) - w u(y_1:i),   u = lam V,   w = exp(lam r(y))

    It is convex in u. Over samples of the reference it is least at V(a) = log E_ref[exp(lam r(Y)) | Y begins with a] /
    lam, whose tilt at beta = lam is the RLHF policy. What is taken off all rewards of a prompt is taken off V, and
    leaves the tilt as it is: rewards whose weights average 1 over each prompt's texts (`data.centred`) let every prompt
    count. Where V exceeds the highest reward by more than 3 / lam, which no soft value does, the exponential goes on as
    its tangent: gradients stay finite, and the loss bounded below.

    Args:
        values: (B, T) V at each response token, right padded, in units of reward.
        rewards: (B,) reward of each whole text.
        lengths: (B,) number of tokens of each response, its own end token included.
        lam: weight of the reward, in nats per unit of reward.
        highest: max r over all texts trained on, never over a batch, or the optimum moves.

    Returns:
        Scalar, per prefix.

    Raises:
        ValueError: if the shapes do not fit, or for lengths outside 1..T.

    Source: here (`theory/`, T20); of Poisson regression.

    >>> values, rewards = torch.tensor([[0.0, 1.0]]), torch.tensor([0.0])
    >>> soft_value_loss(values, rewards, torch.tensor([2]), lam=0.5, highest=0.0)  # w = 1
    tensor(1.0744)
    """
    written = written_tokens(values, lengths, rewards)
    u, top = lam * values.masked_fill(~written, 0.0), 3.0 + lam * highest
    low, weights = u.clamp(max=top), (lam * rewards).exp()
    return ((low.exp() * (1 + u - low) - weights[:, None] * u) * written).sum() / written.sum()


def likelihood_loss(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Negative log-likelihood of the response tokens under a language model.

        L = -mean_i log pi(y_i | y_<i)

    On samples of the reference that were drawn again with probability proportional to exp(beta r) (`reweighted`) it is
    least at the RLHF policy.

    Args:
        log_probs: (B, T) log pi of each response token, right padded.
        lengths: (B,) number of tokens of each response, its own end token included.

    Returns:
        Scalar, in nats per token.

    Raises:
        ValueError: if the shapes do not fit, or for lengths outside 1..T.

    Source: reward-weighted regression, Peters and Schaal (2007); `theory/`, T20.

    >>> likelihood_loss(torch.tensor([[-1.0, -3.0], [-2.0, 9.0]]), torch.tensor([2, 1]))
    tensor(2.)
    """
    written = written_tokens(log_probs, lengths)
    return -log_probs.masked_fill(~written, 0.0).sum() / written.sum()


def prefix_win_loss(
    chosen_logits: Tensor, rejected_logits: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    """Cross-entropy of each prefix's win rate: won after a prefix of the chosen response, lost after one of the other.

        L = -mean [log sigmoid(s(chosen_1:i)) for all i, log sigmoid(-s(rejected_1:i)) for all i]

    On pairs of samples of the reference it is least at sigmoid(s(a)) = W(a), the probability that a text that begins
    with a wins against another sample.

    Args:
        chosen_logits, rejected_logits: (B, T) s at each response token, right padded.
        chosen_lengths, rejected_lengths: (B,) number of tokens of each response, its own end token included.

    Returns:
        Scalar, in nats per prefix.

    Raises:
        ValueError: if the shapes do not fit, or for lengths outside 1..T.

    Source: here (`theory/`, T6 and T18).

    >>> prefix_win_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 9.0]]), torch.tensor([2]), torch.tensor([1]))
    tensor(0.5044)
    """
    _check_shapes(chosen_logits, rejected_logits, chosen_lengths, rejected_lengths)
    written = written_tokens(torch.cat([chosen_logits, rejected_logits]), torch.cat([chosen_lengths, rejected_lengths]))
    behind = torch.cat([-chosen_logits, rejected_logits]).masked_fill(~written, 0.0)
    return (F.softplus(behind) * written).sum() / written.sum()


def distillation_loss(rewards: Tensor, guide_rewards: Tensor, ref_log_probs: Tensor, beta: float) -> Tensor:
    """Cross-entropy of the policy that a guide makes of the reference among its candidates, and the one that r makes.

        L = -mean_a sum_c p(c | a) log q(c | a),
        p(c | a) proportional to pi_ref(c | a) exp(beta guide(ac)),   q(c | a) to pi_ref(c | a) exp(beta r(ac))

    It is convex in r, and least, at the mean entropy of p, where r and the guide's rewards of the candidates of each
    prefix differ by a constant.

    Args:
        rewards, guide_rewards: (..., K) r and the guide's reward of the prefixes that end in each candidate.
        ref_log_probs: (..., K) log pi_ref of each, in nats; -inf for what is no candidate.
        beta: weight of the reward, in nats per unit of reward.

    Returns:
        Scalar, in nats per prefix; one without candidates does not count.

    Raises:
        ValueError: if the shapes differ.

    Source: here; of the distillation of Hinton et al. (2015), arXiv 1503.02531.

    >>> ref, guide = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0]])
    >>> distillation_loss(guide + 3.0, guide, ref, beta=2.0), distillation_loss(0 * guide, guide, ref, beta=2.0)
    (tensor(0.3653), tensor(0.6931))
    """
    if not rewards.shape == guide_rewards.shape == ref_log_probs.shape:
        shapes = ", ".join(str(tuple(of.shape)) for of in (rewards, guide_rewards, ref_log_probs))
        raise ValueError(f"rewards, guide_rewards and ref_log_probs must have one shape, got {shapes}")
    out = ref_log_probs.isneginf()
    asked = ~out.all(-1)
    ref_log_probs = ref_log_probs.masked_fill(~asked[..., None], 0.0)
    p = (ref_log_probs + beta * guide_rewards).softmax(-1)
    log_q = (ref_log_probs + beta * rewards).log_softmax(-1).masked_fill(out, 0.0)
    return -(p * log_q).sum() / asked.sum().clamp(min=1)


def written_tokens(values: Tensor, lengths: Tensor, rewards: Tensor | None = None) -> Tensor:
    """(B, T) mask of the response tokens of right-padded (B, T) values; all True up to each of the (B,) lengths.

    Raises:
        ValueError: if the shapes do not fit, or for lengths outside 1..T.

    >>> written_tokens(torch.zeros(2, 3), torch.tensor([2, 3]))
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    if values.ndim != 2 or {lengths.shape, (lengths if rewards is None else rewards).shape} != {values.shape[:1]}:
        shapes = [tuple(values.shape), *(tuple(of.shape) for of in (rewards, lengths) if of is not None)]
        raise ValueError(f"values must be (B, T), rewards and lengths (B,), got {', '.join(map(str, shapes))}")
    if lengths.min() < 1 or lengths.max() > values.shape[1]:
        raise ValueError(
            f"lengths must lie in 1..{values.shape[1]} (the width of values), "
            f"got {int(lengths.min())}..{int(lengths.max())}"
        )
    return torch.arange(values.shape[1], device=values.device) < lengths[:, None]


def compared_prefixes(
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    width: int,
    tail: str = "extend",
    lengths: tuple[int, int | None] = (1, None),
) -> Tensor:
    """(B, width) mask of the prefix lengths at which a pair is compared (choices 2 and 3 above).

    Raises:
        ValueError: for an unknown `tail`, response lengths outside 1..width, or a last of `lengths` below the first.

    >>> compared_prefixes(torch.tensor([3]), torch.tensor([1]), width=4)
    tensor([[ True,  True,  True, False]])
    >>> compared_prefixes(torch.tensor([3]), torch.tensor([1]), width=4, lengths=(2, None))
    tensor([[False,  True,  True, False]])
    """
    first, final = lengths
    if first < 1 or (final is not None and final < first):
        raise ValueError(f"lengths must be (first, last) with 1 <= first <= last, got {lengths}")
    if tail not in ("extend", "min"):
        raise ValueError(f'tail must be "extend" or "min", got {tail!r}')
    both = torch.stack([chosen_lengths, rejected_lengths])
    if both.min() < 1 or both.max() > width:
        raise ValueError(
            f"chosen_lengths and rejected_lengths must lie in 1..{width} (the width of the rewards), "
            f"got {int(both.min())}..{int(both.max())}"
        )
    last = (both.amax(0) if tail == "extend" else both.amin(0)).clamp(max=width if final is None else final)
    place = torch.arange(1, width + 1, device=last.device)
    return (place >= first) & (place <= last[:, None])


def _check_shapes(chosen_rewards: Tensor, rejected_rewards: Tensor, *lengths: Tensor) -> None:
    if chosen_rewards.shape != rejected_rewards.shape:
        raise ValueError(
            f"chosen_rewards and rejected_rewards must have one shape, "
            f"got {tuple(chosen_rewards.shape)} and {tuple(rejected_rewards.shape)}"
        )
    if lengths and (chosen_rewards.ndim != 2 or {of.shape for of in lengths} != {chosen_rewards.shape[:1]}):
        shapes = " and ".join(str(tuple(of.shape)) for of in lengths)
        raise ValueError(
            f"rewards must be (B, T) and chosen_lengths, rejected_lengths (B,), got {tuple(chosen_rewards.shape)} and "
            f"{shapes}"
        )
