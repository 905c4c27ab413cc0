"""A guide above a shared trunk: what it says is what the whole guide says, at the cost of its upper layers."""

import gc
import json
import warnings
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig

from pargs_min.benchmark.ways import weight_bytes
from pargs_min.cli import main
from pargs_min.decode import ModelPolicy, RewardGuidance, generate, greedy, row_uniforms
from pargs_min.models import give_vocabulary_head, load_guide, load_language_model
from pargs_min.reward_model import is_language_model
from pargs_min.scoring import LanguageModelScorer, VocabularyScorer
from pargs_min.texts import counted_passes, generate_texts
from pargs_min.trunk import TrunkScorer, copy_trunk, layers_of, one_query_scorer, share_trunk, trunk_parameters
from tests.strategies import SHAPES, left_padded, tiny_lm, tiny_reward_model, tiny_tokenizer

EXACT = dict(rtol=0, atol=1e-12)
GROUPED = dict(hidden_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {family: {} for family in SHAPES} | {
    "gemma": GROUPED | dict(head_dim=4),  # scales its embeddings
    "gemma3_text": GROUPED
    | dict(head_dim=4, sliding_window=3, layer_types=["full_attention", "full_attention", "sliding_attention"]),
}


def three_layers(family):
    return FAMILIES[family] | {"n_layer" if family == "gpt2" else "num_hidden_layers": 3}


def language_model(family="llama", seed=0, **changes):
    return tiny_lm(family, seed=seed, **three_layers(family) | changes)


def guide_above(lm, kind, layers=2):
    """A guide of random weights, with the trunk of a language model; and its scorer."""
    family = lm.config.model_type
    if kind == "language model":
        guide, record = language_model(family, seed=7), dict(objective="reweighted", beta=2.0)
        make = partial(LanguageModelScorer, beta=2.0)
    else:
        guide, record, make = tiny_reward_model(family, seed=7, **three_layers(family)), {}, VocabularyScorer
        give_vocabulary_head(guide)
        torch.nn.init.normal_(guide.score.weight, generator=torch.Generator().manual_seed(8))
    copy_trunk(guide, lm, layers)
    guide.config.pargs = record | dict(shared_layers=layers)
    return guide, make


both = pytest.mark.parametrize("kind", ["language model", "vocabulary head"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trunk_is_the_embeddings_and_the_lowest_layers(family):
    """Read off what moves the features: they change with each parameter of the trunk, and with no other."""
    lm = language_model(family)
    trunk = trunk_parameters(lm, 2)

    def features():
        found = []
        hook = layers_of(lm)[2].register_forward_pre_hook(lambda layer, args: found.append(args[0].clone()))
        with torch.no_grad():
            lm(input_ids=torch.tensor([[1, 2, 3]]))
        hook.remove()
        return found[0]

    before = features()
    for name, weight in lm.base_model.named_parameters():
        kept = weight.data.clone()
        weight.data = kept + torch.randn(kept.shape, generator=torch.Generator().manual_seed(0), dtype=kept.dtype)
        moved = not torch.equal(features(), before)
        weight.data = kept
        keys_bias = name.endswith("k_proj.bias")  # attention does not see it
        assert (name in trunk) == (moved or (keys_bias and "layers.2" not in name)), name


@torch.no_grad()
@both
@pytest.mark.parametrize("family", FAMILIES)
def test_it_decodes_as_the_whole_guide_does(family, kind):
    """Three left-padded rows, particles that change places, twelve tokens: the same tokens, rewards, log-probabilities;
    one pass per step of the upper layer alone."""
    lm = language_model(family)
    guide, make = guide_above(lm, kind)
    prompts = left_padded(6, 2, 4)
    settings = dict(beta=0.5, top_k=0, max_new_tokens=12, pad=0, uniforms=row_uniforms(0, range(3), [0] * 3, 12))
    turns = torch.tensor([[2, 2, 0], [1, 0, 2], [0, 1, 2]])

    def write(scorer):
        steps = iter(range(12))
        return generate(
            ModelPolicy(lm),
            scorer,
            *prompts,
            resample=lambda *_: turns[n % 3] if (n := next(steps)) % 2 else None,
            **settings,
        )

    whole = write(make(guide))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = one_query_scorer(lm, guide, make)
    assert isinstance(scorer, TrunkScorer)
    lower = []
    for layer in layers_of(guide)[:2]:
        layer.register_forward_hook(lambda *_: lower.append(1))
    with counted_passes(lm, scorer.model) as passes:
        ours = write(scorer)
    assert torch.equal(ours.tokens, whole.tokens)
    assert len(ours.tokens.unique()) > 2
    assert_close(ours.rewards, whole.rewards, **EXACT)
    assert_close(ours.log_probs, whole.log_probs, **EXACT)
    if family != "opt":  # whose language models call a part of their backbone
        assert passes == dict(passes=24, rows=72, tokens=2 * 3 * (6 + 11))
    assert not lower
    assert len(layers_of(scorer.model)) == 1


@torch.no_grad()
@both
def test_it_guides_transformers_own_generate(kind):
    """The scorer starts when the prompts have been read already."""
    lm = language_model()
    guide, make = guide_above(lm, kind)
    (ids, mask), tokens = left_padded(6, 2, 4), []
    for scorer in (make(guide), one_query_scorer(lm, guide, make)):
        for _ in range(2):  # the second text begins where the first has ended
            guidance = RewardGuidance(scorer, mask, beta=2.0, top_k=5)
            settings = GenerationConfig(max_new_tokens=8, eos_token_id=11, pad_token_id=0)
            tokens.append(
                lm.generate(ids, attention_mask=mask, generation_config=settings, logits_processor=[guidance])
            )
    assert all(torch.equal(found, tokens[0]) for found in tokens)
    scorer = one_query_scorer(lm, guide, make)
    ours = generate(ModelPolicy(lm), scorer, ids, mask, beta=2.0, top_k=5, max_new_tokens=8, draw=greedy)
    assert torch.equal(ours.tokens, tokens[0][:, 6:])


@torch.no_grad()
def test_a_language_model_that_has_read_something_else_is_an_error():
    lm = language_model()
    scorer = one_query_scorer(lm, *guide_above(lm, "vocabulary head"))
    ids, mask = left_padded(6, 2, 4)
    scorer.start(ids, mask)
    with pytest.raises(RuntimeError, match="has not read the same tokens"):
        scorer.score(ids)
    lm(input_ids=ids[:2])
    scorer.start(ids, mask)
    with pytest.raises(RuntimeError, match="has not read the same tokens"):
        scorer.score(ids)


def test_a_scorer_that_is_gone_leaves_no_hook():
    lm = language_model()
    scorer = one_query_scorer(lm, *guide_above(lm, "vocabulary head"))
    assert layers_of(lm)[2]._forward_pre_hooks
    del scorer
    gc.collect()
    assert not layers_of(lm)[2]._forward_pre_hooks


@both
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_lower_layers_are_in_memory_once(family, kind):
    """gpt2 ties the head of its language models to the embedding."""
    lm = language_model(family)
    guide, _ = guide_above(lm, kind)
    below = {id(weight) for weight in trunk_parameters(guide, 2).values()}
    upper = sum(weight.nbytes for weight in guide.parameters() if id(weight) not in below)
    buffers = sum(buffer.nbytes for buffer in guide.buffers())
    assert share_trunk(lm, guide) == 2
    assert weight_bytes(lm, guide) - weight_bytes(lm) == upper + buffers
    assert share_trunk(lm, guide) == 2  # again


def test_scalar_guides_share_memory_too():
    lm, guide = language_model(vocabulary=14), tiny_reward_model("llama", 14, seed=7, num_hidden_layers=3)
    copy_trunk(guide, lm, 2)
    how = dict(prompts=[{"prompt_ids": [2, 3, 4]}], reward_model=guide, method="pargs", top_k=4, max_new_tokens=8)
    guide.config.pargs = dict(objective="partial")
    (before,) = generate_texts(lm, tiny_tokenizer(), **how)
    assert guide.model.embed_tokens.weight is not lm.model.embed_tokens.weight
    guide.config.pargs["shared_layers"] = 2
    (after,) = generate_texts(lm, tiny_tokenizer(), **how)
    assert guide.model.embed_tokens.weight is lm.model.embed_tokens.weight
    assert after["response_ids"] == before["response_ids"]
    assert after["reward"] == before["reward"]


def test_other_weights_below_are_refused():
    lm = language_model()
    guide, make = guide_above(lm, "vocabulary head")
    guide.base_model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-9
    with pytest.raises(ValueError, match=r"was trained on the lowest 2 layers .* layers\.1\.mlp\.up_proj\.weight of"):
        one_query_scorer(lm, guide, make)
    with pytest.raises(ValueError, match="share no layers: they are of different families"):
        share_trunk(language_model("gpt2"), guide)
    guide.config.pargs = dict(shared_layers=3)
    with pytest.raises(ValueError, match=r"\(--shared-layers\) must lie between 1 and 2, .* got 3"):
        share_trunk(lm, guide)


def test_other_weights_above_are_the_guides_own():
    lm = language_model()
    guide, make = guide_above(lm, "vocabulary head")
    assert not torch.equal(guide.base_model.layers[2].mlp.up_proj.weight, lm.base_model.layers[2].mlp.up_proj.weight)
    assert isinstance(one_query_scorer(lm, guide, make), TrunkScorer)
    assert isinstance(one_query_scorer(None, guide, make), VocabularyScorer)


def test_models_of_two_types_are_read_whole():
    lm = language_model()
    guide, make = guide_above(lm, "vocabulary head")
    lm, guide = lm.float(), guide.float().double()
    with pytest.warns(UserWarning, match=r"read whole, since one is torch.float64 on cpu and the other torch.float32"):
        assert isinstance(one_query_scorer(lm, guide, make), VocabularyScorer)


def test_a_family_that_cannot_be_cut_is_read_whole():
    """Bloom takes positions from the mask, padding and all."""
    sizes = dict(hidden_size=16, n_layer=3, n_head=2)
    lm, guide = tiny_lm("bloom", **sizes), tiny_lm("bloom", seed=7, **sizes)
    copy_trunk(guide, lm, 2)
    guide.config.pargs = dict(objective="reweighted", beta=2.0, shared_layers=2)
    with pytest.warns(UserWarning, match="Falling back to the whole guide"):
        assert isinstance(one_query_scorer(lm, guide, LanguageModelScorer), LanguageModelScorer)


# ---- training ----


@pytest.fixture
def folder(tmp_path):
    """A reference, pairs and texts of it, in a folder."""
    tiny_lm(vocabulary=14, n_layer=3).float().save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    records = [{"prompt": f"{w} {v}", "chosen": f"a {w}", "rejected": f"b {v}"} for w in "cdefg" for v in "cdefg"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "prompts.txt").write_text("c d\ne f\n")
    return tmp_path


def pargs(folder, command, output, *more):
    """The status of a command."""
    options = dict(model=folder / "lm", seed=0)
    if command == "train":
        options |= {"output-dir": folder / output, "max-steps": 2, "learning-rate": 0.01, "use-cpu": True}
        options |= {"save-strategy": "steps", "save-steps": 1, "disable-tqdm": True}
    else:
        options |= {"prompts": folder / "prompts.txt", "output": folder / output, "max-new-tokens": 6}
        options |= {"prompt-format": "text"}
    return main([command, *(str(part) for name, value in options.items() for part in (f"--{name}", value)), *more])


def test_every_guide_is_trained_above_it_and_guides_as_a_whole_one_does(folder, capsys):
    pairs, texts = ["--dataset", str(folder / "pairs.jsonl")], ["--dataset", str(folder / "texts.jsonl")]
    rated, below = [*texts, "--reward-model", str(folder / "full")], ["--shared-layers", "2"]
    assert pargs(folder, "generate", "texts.jsonl", "--method", "plain", "--num-samples", "4") == 0
    assert pargs(folder, "train", "full", *pairs, "--objective", "full") == 0
    made = {
        "pargs": [*pairs, *below],
        "genarm": [*pairs, *below, "--objective", "autoregressive", "--lora-rank", "2"],
        "reweighted": [*rated, *below, "--objective", "reweighted"],
        "args": [*texts, *below, "--distil-from", str(folder / "full")],
    }
    for method, options in made.items():
        assert pargs(folder, "train", method, *options) == 0
        guide, lm = load_guide(folder / method), load_language_model(folder / "lm")
        assert guide.config.pargs["shared_layers"] == 2
        for name, weight in trunk_parameters(guide, 2).items():
            assert torch.equal(weight[:14], lm.base_model.get_parameter(name)[:14]), name
        mine, theirs = (layers_of(model)[2].state_dict() for model in (guide, lm))
        assert not all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert is_language_model(guide) == (method in ("reweighted", "genarm"))

        shared = ["--reward-model", str(folder / method), "--method", method, "--beta", "3", "--dtype", "float32"]
        assert pargs(folder, "generate", f"{method}.jsonl", *shared) == 0
        config = json.loads((folder / method / "config.json").read_text())
        del config["pargs"]["shared_layers"]
        (folder / method / "config.json").write_text(json.dumps(config))
        assert pargs(folder, "generate", f"{method}-whole.jsonl", *shared) == 0
        files = (folder / f"{method}.jsonl", folder / f"{method}-whole.jsonl")
        ours, whole = ([json.loads(line) for line in file.open()] for file in files)
        assert [text["response_ids"] for text in ours] == [text["response_ids"] for text in whole]
        assert [text["cost"]["model_calls"] for text in ours] == [text["cost"]["model_calls"] for text in whole]
    assert pargs(folder, "train", "pargs", *pairs, "--resume", "--shared-layers", "1") == 2
    assert "shared_layers 2 there, 1 now" in capsys.readouterr().err
    assert pargs(folder, "train", "none", *pairs, "--shared-layers", "3") == 2
    assert "shared_layers (--shared-layers) must lie between 1 and 2" in capsys.readouterr().err
