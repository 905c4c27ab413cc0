"""The whole method on one page: a reward of unfinished texts, learned from pairs, steers a language model as it writes.

Read this first. Everything else in the package is the same computation made fast, a way to train or measure it, or a
rival. There is no cache here, no batch and no option: each prefix and each candidate is a text of its own, read from
its first token. The tests compare the fast code with these functions.

Source: A Critical Look At Tokenwise Reward-Guided Text Generation, arXiv 2406.07780.

>>> from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
>>> _ = torch.manual_seed(0)
>>> config = GPT2Config(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=1, num_labels=1)
>>> lm, reward_model = GPT2LMHeadModel(config).eval(), GPT2ForSequenceClassification(config).eval()
>>> END, prompt = 0, torch.tensor([1, 2])
>>> pairs = [(prompt, torch.tensor([7, 3, END]), torch.tensor([8, END]))]  # the response that starts with 7 wins
>>> optimizer = torch.optim.Adam(reward_model.parameters(), lr=0.01)
>>> for _ in range(50):
...     optimizer.zero_grad()
...     prefix_loss(reward_model, pairs, END).backward()
...     optimizer.step()
>>> prefix_loss(reward_model, pairs, END) < 0.1
tensor(True)
>>> log_probs = guided_policy(lm, reward_model, prompt, beta=2.0, k=9)
>>> bool(log_probs[7] > log_probs[8])
True
>>> responses = [generate(lm, reward_model, prompt, END, beta=4.0, k=9, max_new_tokens=1).item() for _ in range(50)]
>>> responses.count(7) > 3 * responses.count(8)
True
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

Pair = tuple[Tensor, Tensor, Tensor]  # token ids of a prompt, of the response that won, and of the one that lost


def reward(reward_model: nn.Module, ids: Tensor) -> Tensor:
    """r(ids), the reward of a text (T,), finished or not: the single label of a sequence classifier.

    The classifier reads it at the last token that is not padding, so its padding token, if it has one, must not be the
    end token.
    """
    return reward_model(input_ids=ids[None]).logits[0, 0]


def prefix_loss(reward_model: nn.Module, pairs: list[Pair], end: int) -> Tensor:
    """How badly the reward predicts, from every prefix of both responses, which of them won; in nats per prefix.

        L = -mean_i log sigmoid(r(x, y_w,1:i) - r(x, y_l,1:i))

    The mean is over all prefixes of all pairs, and a prefix inherits the label of its whole response. Responses include
    their end token; the shorter one goes on with end tokens up to the length of the longer one.
    """
    margins = []
    for prompt, won, lost in pairs:
        for i in range(1, max(len(won), len(lost)) + 1):
            r_won, r_lost = (reward(reward_model, torch.cat([prompt, prefix(y, i, end)])) for y in (won, lost))
            margins.append(r_won - r_lost)
    return -logsigmoid(torch.stack(margins)).mean()


def prefix(response: Tensor, i: int, end: int) -> Tensor:
    """The first i tokens of a response; after its end more end tokens.

    >>> prefix(torch.tensor([5, 0]), 3, end=0)
    tensor([5, 0, 0])
    """
    return torch.cat([response[:i], response.new_full((max(i - len(response), 0),), end)])


def guided_policy(lm: nn.Module, reward_model: nn.Module, ids: Tensor, beta: float, k: int) -> Tensor:
    """The log-probability of each token of the vocabulary (V,) that may follow a text (T,).

        pi(t | ids) = pi_ref(t | ids) exp(beta r(ids + t)) / Z(ids)

    beta weighs the reward, in nats per unit of reward: it is the inverse of the beta of DPO and TRL. The k likeliest
    tokens share the probability that they have together, and all others keep theirs, so k trades strength for cost.
    (The paper draws from the k tokens alone.)
    """
    log_probs = lm(input_ids=ids[None]).logits[0, -1].log_softmax(-1)
    ref_log_probs, candidates = log_probs.topk(k)
    rewards = torch.stack([reward(reward_model, torch.cat([ids, token[None]])) for token in candidates])
    guided = (ref_log_probs + beta * rewards).log_softmax(-1) + ref_log_probs.logsumexp(-1)
    return log_probs.scatter(0, candidates, guided)


@torch.no_grad()
def generate(
    lm: nn.Module, reward_model: nn.Module, prompt: Tensor, end: int, beta: float, k: int, max_new_tokens: int
) -> Tensor:
    """A response to a prompt (T,), drawn token by token from the guided policy; its end token is its last."""
    ids = prompt
    while len(ids) < len(prompt) + max_new_tokens:
        token = torch.multinomial(guided_policy(lm, reward_model, ids, beta, k).exp(), 1)
        ids = torch.cat([ids, token])
        if token == end:
            break
    return ids[len(prompt) :]
