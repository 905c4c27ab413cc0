"""A trunk that is not trained: nothing below changes, and each text is read once, which changes nothing either."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainingArguments

from pargs_min import frozen
from pargs_min.data import Pair, Text
from pargs_min.frozen import frozen_trunk
from pargs_min.lora import low_rank
from pargs_min.train import train_language_model, train_reward_model
from pargs_min.trunk import layers_of, trunk_parameters
from tests.strategies import tiny_lm, tiny_reward_model, tiny_tokenizer
from tests.test_trunk import FAMILIES, language_model, three_layers

PAIRS = [Pair([2, 3][: 1 + n % 2], [4, 2 + n, 1], [5, 3, n, 4, 1][n % 3 :]) for n in range(6)]
TEXTS = [Text([2], [4, 2 + n, 1][: 1 + n], reward=float(n)) for n in range(4)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_nothing_below_is_trained_or_differentiated(family):
    model, entering = language_model(family).train(), []
    below = trunk_parameters(model, 2)
    with frozen_trunk(model, 2):
        layers_of(model)[2].register_forward_pre_hook(lambda layer, args: entering.append(args[0].requires_grad))
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
        assert all(weight.grad is None for weight in below.values())
        assert any(weight.grad is not None for weight in layers_of(model)[2].parameters())
    assert entering == [False]
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(ValueError, match="must lie between 1 and 2"), frozen_trunk(model, 0):
        pass


def test_layers_are_left_as_they_were():
    """Also one with a forward of its own, as accelerate gives where layers lie on several devices."""
    model = language_model("llama")
    first, second, _ = layers_of(model)
    first.forward = own = partial(first.forward)
    with pytest.raises(KeyboardInterrupt), frozen_trunk(model, 2):
        raise KeyboardInterrupt
    assert vars(first)["forward"] is own
    assert "forward" not in vars(second)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_stand_above_it(family):
    model = language_model(family)
    with frozen_trunk(model, 2), low_rank(model, 2):
        names = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert names
        assert all(".2." in name and "lora" in name for name in names)
    assert all(weight.requires_grad for weight in model.parameters())


def trained(train, model, data, folder, **settings):
    """Its weights after three passes, evaluated after each; and how often layer 0 was read, training and evaluating."""
    read, model = [], model.float()
    torch.manual_seed(0)  # adapters
    pace = dict(num_train_epochs=3, per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=0.01)
    quiet = dict(eval_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
    args = TrainingArguments(str(folder), seed=1, **pace, **quiet, **settings)
    with frozen_trunk(model, 2):
        first = next(layers_of(model)[0].children())
        first.register_forward_hook(lambda *_: read.append(model.base_model.training))
        metrics = train(model, tiny_tokenizer(), data, data[:2], args=args)
    return dict(model.named_parameters()), metrics["eval_loss"], (read.count(True), read.count(False))


def compared(train, make, data, folder, monkeypatch, **settings):
    """Training that reads each text once against training that reads it each time: how often each read layer 0."""
    weights, loss, read = trained(train, make(), data, folder, **settings)
    monkeypatch.setattr(frozen, "ROOM", 0)
    others, other_loss, always = trained(train, make(), data, folder, **settings)
    assert_close(weights, others, rtol=0, atol=1e-5)
    assert loss == pytest.approx(other_loss, abs=1e-5)
    return read, always


PARTIAL = partial(train_reward_model, lora_rank=2)
BY_LIKELIHOOD = partial(train_language_model, beta=0.1)


@pytest.mark.filterwarnings("ignore:at beta 0.1 only")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_is_read_once_and_training_is_the_same(family, tmp_path, monkeypatch):
    """Two steps in each of three passes, one batch to evaluate behind each; one pass more of either to compare."""
    dropout = {"gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), "opt": dict(dropout=0.0)}
    sizes = three_layers(family) | dropout.get(family, {})
    make = partial(tiny_reward_model, family, **sizes)
    # pairs of the first pass may be other texts when they meet a longer response: all passes have the same batches
    order = dict(train_sampling_strategy="sequential")
    assert compared(PARTIAL, make, PAIRS, tmp_path, monkeypatch, **order) == ((3, 2), (6, 4))
    lm = partial(language_model, family, **dropout.get(family, {}))
    monkeypatch.undo()
    assert compared(BY_LIKELIHOOD, lm, TEXTS, tmp_path, monkeypatch)[0] == (2, 2)


def test_so_it_is_with_gradient_checkpointing(tmp_path, monkeypatch):
    settings = dict(train_sampling_strategy="sequential", gradient_checkpointing=True)
    make = partial(tiny_reward_model, "llama", **three_layers("llama"))
    read, always = compared(PARTIAL, make, PAIRS, tmp_path, monkeypatch, **settings)
    assert read < always


@pytest.mark.filterwarnings("ignore:at beta 0.1 only")
@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_texts_are_read_each_time_where_that_makes_a_difference(family, tmp_path):
    """GPT-2 drops features out at random while it trains; Bloom's layers give more than features."""
    bloom = dict(hidden_size=16, n_layer=3, n_head=2, hidden_dropout=0.0, attention_dropout=0.0)
    model = tiny_lm(family, **bloom if family == "bloom" else three_layers(family))
    assert trained(BY_LIKELIHOOD, model, TEXTS, tmp_path)[2][0] >= 3  # a step in each pass


@pytest.mark.filterwarnings("ignore:at beta 0.1 only")
@pytest.mark.parametrize("fails", [False, True])
def test_or_where_a_layer_above_looks_at_what_one_below_has_kept(fails, tmp_path, monkeypatch):
    def make():
        model, seen = language_model("llama"), []
        lowest, *_, highest = layers_of(model)
        next(lowest.children()).register_forward_hook(lambda *_: seen.append(1.0))

        def add(layer, args, output):
            return output + (seen.pop() if seen or fails else 0.0)

        highest.register_forward_hook(add)
        return model

    read, always = compared(BY_LIKELIHOOD, make, TEXTS, tmp_path, monkeypatch)
    assert read[0] == always[0] + 1  # the comparison


def test_there_is_room_for_so_many_texts(monkeypatch):
    """Those that were read first; a batch with another one is read as a whole."""
    monkeypatch.setattr(frozen, "ROOM", 3 * 16 * 4)  # the first text has three tokens of 16 numbers
    model, read = language_model("llama").float(), []
    ids = torch.tensor([[2, 3, 4], [5, 6, 7]])
    with frozen_trunk(model, 2), torch.no_grad():
        next(layers_of(model)[0].children()).register_forward_hook(lambda *_: read.append(1))
        for batch, times in ((ids, 1), (ids, 1), (ids[1:], 1), (ids[:1], 1), (ids[:1], 0)):
            model(input_ids=batch, attention_mask=torch.ones_like(batch))
            assert len(read) == times
            read.clear()
