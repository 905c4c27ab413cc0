"""A head with one number for each next token: one query per step, and the numbers of reading every text by itself."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from pargs_min.cli import main
from pargs_min.decode import ModelPolicy, RewardGuidance, generate, greedy, row_uniforms, sample
from pargs_min.losses import partial_bradley_terry_loss
from pargs_min.models import load_reward_model, save_reward_model
from pargs_min.reward_model import prefix_rewards
from pargs_min.scoring import ReencodeScorer, SiblingScorer, VocabularyScorer, model_rewards
from pargs_min.texts import choose_scorer
from pargs_min.train import train_reward_model, train_value_model
from tests.strategies import left_padded, tiny_lm, tiny_reward_model, tiny_tokenizer

EXACT = dict(rtol=0, atol=1e-12)
VOCABULARY, END = 11, 1


def vocabulary_model(family="llama", **changes):
    return tiny_reward_model(family, VOCABULARY, num_labels=VOCABULARY, **changes)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "opt", "gpt_neox"])
def test_the_reward_of_a_prefix_is_read_one_token_before_its_end(family):
    """By hand: the logits of the whole text but its last token, at the entry of that token; padded on either side."""
    model = vocabulary_model(family)
    ids, mask = left_padded(8, 5)
    rewards = prefix_rewards(model, ids, mask)
    turned = prefix_rewards(model, ids[1:].roll(-3, 1), mask[1:].roll(-3, 1))  # row 1 with its padding on the right
    for row, first in ((0, 0), (1, 3)):
        text = ids[row, first:]
        for t in range(1, len(text)):
            hidden = model.base_model(input_ids=text[None, :t]).last_hidden_state[0, -1]
            expected = model.score(hidden)[text[t]]
            assert_close(rewards[row, first + t], expected, **EXACT)
            if row == 1:
                assert_close(turned[0, t], expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("mistral", dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, sliding_window=3)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("draw", [sample, greedy])
def test_one_query_a_step_decodes_as_whole_texts_do(family, changes, draw):
    """The whole vocabulary, three rows with left padding: the same tokens and rewards, one query instead of eleven."""
    lm, model = tiny_lm("gpt2", VOCABULARY), vocabulary_model(family, **changes)
    ids, mask = left_padded(6, 2, 4)
    settings = dict(beta=2.0, top_k=0, max_new_tokens=12, eos=END, pad=0, draw=draw)
    settings["uniforms"] = row_uniforms(0, range(3), [0] * 3, 12)
    slow = generate(ModelPolicy(lm), ReencodeScorer(model_rewards(model)), ids, mask, **settings)
    queries = []
    model.base_model.register_forward_hook(lambda _, __, output: queries.append(output.last_hidden_state.shape[1]))
    fast = generate(ModelPolicy(lm), VocabularyScorer(model), ids, mask, **settings)
    assert torch.equal(fast.tokens, slow.tokens)
    assert_close(fast.rewards, slow.rewards, **EXACT)
    assert_close(fast.log_probs, slow.log_probs, **EXACT)
    assert queries == [6] + [1] * (fast.tokens.shape[1] - 1)


@torch.no_grad()
def test_a_few_candidates_get_the_rewards_they_have_among_all(monkeypatch):
    """Looked up in the head, they are what multiplying all of it gives."""
    monkeypatch.setattr("pargs_min.scoring.FEW", 3)
    model = vocabulary_model().float()
    candidates = torch.tensor([[7, 2, 1], [0, 9, 9]])
    rewards = []
    for asked in (candidates, torch.arange(VOCABULARY).expand(2, -1)):
        scorer = VocabularyScorer(model)
        scorer.start(*left_padded(5, 3))
        rewards.append(scorer.score(asked))
    assert_close(rewards[0], rewards[1].gather(1, candidates))
    assert rewards[0].dtype == torch.float32


@torch.no_grad()
def test_rewards_are_not_rounded_to_the_backbones_bfloat16():
    model = vocabulary_model().bfloat16()
    scorer = VocabularyScorer(model)
    scorer.start(*left_padded(5))
    rewards = scorer.score(torch.arange(VOCABULARY)[None])
    assert rewards.dtype == torch.float32
    assert not torch.equal(rewards, rewards.bfloat16().float())
    assert_close(rewards[0, 4], prefix_rewards(model, *extended(*left_padded(5), 4))[0, -1])


def extended(ids, mask, token):
    return torch.cat([ids, torch.full_like(ids[:, :1], token)], 1), torch.cat([mask, mask[:, :1]], 1)


@torch.no_grad()
def test_it_guides_transformers_own_generate():
    lm, model = tiny_lm("gpt2", VOCABULARY), vocabulary_model()
    ids, mask = left_padded(6, 2, 4)
    guidance = RewardGuidance(VocabularyScorer(model), mask, beta=2.0, top_k=0)
    settings = dict(max_new_tokens=8, eos_token_id=END, pad_token_id=0, do_sample=False)
    theirs = lm.generate(ids, attention_mask=mask, logits_processor=[guidance], **settings)[:, 6:]
    settings = dict(beta=2.0, top_k=0, max_new_tokens=8, eos=END, pad=0, draw=greedy)
    assert torch.equal(theirs, generate(ModelPolicy(lm), VocabularyScorer(model), ids, mask, **settings).tokens)


def test_the_loss_of_all_prefixes_reaches_head_and_backbone_as_rows_of_their_own_do():
    model = vocabulary_model().float()
    ids, mask = left_padded(9, 9, 9, 9)
    prompt, lengths = 4, torch.tensor([5, 5])
    rewards = prefix_rewards(model, ids, mask)[:, prompt:]
    one_pass = partial_bradley_terry_loss(rewards[:2], rewards[2:], lengths, lengths)
    rows = [model.score(model.base_model(input_ids=ids[:, :t]).last_hidden_state[:, -1]) for t in range(prompt, 9)]
    rows = torch.stack([row.gather(1, ids[:, t, None])[:, 0] for t, row in zip(range(prompt, 9), rows, strict=True)], 1)
    expanded = torch.nn.functional.softplus(rows[2:] - rows[:2]).mean()
    assert_close(one_pass, expanded, rtol=0, atol=1e-6)
    gradients = (torch.autograd.grad(loss, list(model.parameters())) for loss in (one_pass, expanded))
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_language_model_gets_a_head_of_zeros_as_wide_as_its_vocabulary_and_padding(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.unk_token = None  # so that a row is added
    tiny_lm("llama", 14).float().save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, tokenizer, head="vocab")
    assert model.score.weight.shape == (15, 16)
    assert not model.score.weight.any()
    torch.nn.init.normal_(model.score.weight)
    save_reward_model(model, tokenizer, tmp_path / "rm", objective="partial")
    again = load_reward_model(tmp_path / "rm", tokenizer)
    ids, mask = left_padded(6, 3)
    assert_close(prefix_rewards(again.eval(), ids, mask), prefix_rewards(model.eval(), ids, mask))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")(ids[:1]).logits
    assert_close(theirs[0, 9], prefix_rewards(again, *extended(ids[:1], mask[:1], 9))[0, -1])


def test_each_scorer_refuses_the_other_head_and_the_right_one_is_chosen():
    scalar, vocabulary = tiny_reward_model(), vocabulary_model()
    with pytest.raises(ValueError, match="use SiblingScorer"):
        VocabularyScorer(scalar)
    with pytest.raises(ValueError, match="use VocabularyScorer"):
        SiblingScorer(vocabulary)
    with pytest.raises(ValueError, match="ReencodeScorer"):
        prefix_rewards(tiny_reward_model(num_labels=3), *left_padded(3))
    assert isinstance(choose_scorer(scalar, 20), SiblingScorer)
    assert isinstance(choose_scorer(vocabulary, 20), VocabularyScorer)
    with pytest.raises(ValueError, match="training mode"):
        VocabularyScorer(vocabulary.train()).start(*left_padded(3))


def test_a_scalar_reward_model_gets_no_vocabulary_head(tmp_path):
    tiny_reward_model().float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="start a vocabulary head from a language model"):
        load_reward_model(tmp_path, head="vocab")
    with pytest.raises(ValueError, match='head must be "scalar" or "vocab"'):
        load_reward_model(tmp_path, head="vocabulary")


def test_losses_that_teach_it_little_are_refused():
    """A row of the head gets a gradient only where its token came, by any loss of the prefixes that were written."""
    how = dict(model=vocabulary_model().float(), tokenizer=tiny_tokenizer(), args=None)
    for train in (train_reward_model, train_value_model):
        with pytest.raises(ValueError, match="LlamaForSequenceClassification has a vocabulary head, which would learn"):
            train(**how, **{"pairs" if train is train_reward_model else "texts": []})


@pytest.mark.trains
@pytest.mark.parametrize("seed", range(3))
def test_it_is_trained_and_decoded_with_from_the_command_line(tmp_path, seed):
    """The chosen response is a, the rejected one b: the head learns it, and guided texts begin with a.

    The reward of a is ahead by 1 or more, which at beta 50 is 50 nats; the reference has 3 nats against it.
    """
    tiny_lm(vocabulary=14, seed=seed).float().save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    (tmp_path / "prompts.txt").write_text("c d\ne f\n")
    records = [{"prompt": f"{w} {v}", "chosen": "a", "rejected": "b"} for w in "cdefg" for v in "cdefg"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    steps = ["--max-steps", "40", "--learning-rate", "1e-2", "--save-strategy", "no", "--disable-tqdm", "True"]
    files = ["--dataset", str(tmp_path / "pairs.jsonl"), "--output-dir", str(tmp_path / "rm"), "--use-cpu", "True"]
    options = [
        "--model",
        str(tmp_path / "lm"),
        "--objective",
        "farma",
        "--no-append-eos",
        "--seed",
        str(seed),
        *files,
        *steps,
    ]
    assert main(["train", *options]) == 0
    files = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "texts.jsonl")]
    models = ["--model", str(tmp_path / "lm"), "--reward-model", str(tmp_path / "rm")]
    assert (
        main(
            ["generate", *models, *files, "--top-k", "0", "--beta", "50", "--max-new-tokens", "1", "--method", "farma"]
        )
        == 0
    )
    assert [json.loads(line)["response"] for line in (tmp_path / "texts.jsonl").open()] == ["a", "a"]
