"""What `pargs train` makes of transformers' settings."""

import pytest
from transformers import TrainingArguments

from pargs_min import train
from pargs_min.cli.train import keep_best
from pargs_min.train import train_value_model
from tests.strategies import tiny_tokenizer
from tests.test_train import arguments, random_texts, reward_model


@pytest.mark.parametrize(
    ("given", "strategy", "steps"),
    [
        ({}, "steps", 0.1),
        (dict(save_strategy="no"), "steps", 0.1),
        (dict(save_strategy="steps"), "steps", 0.1),
        (dict(save_strategy="steps", save_steps=2), "steps", 2),
        (dict(save_strategy="epoch"), "epoch", None),
        (dict(eval_strategy="steps", eval_steps=3, save_strategy="steps"), "steps", 3),
        (dict(eval_strategy="epoch"), "epoch", None),
    ],
)
def test_checkpoints_are_saved_when_they_are_evaluated(tmp_path, given, strategy, steps):
    args = TrainingArguments(str(tmp_path), **given)
    keep_best(args)
    assert (args.save_strategy, args.eval_strategy) == (strategy, strategy)
    assert steps is None or (args.save_steps, args.eval_steps) == (steps, steps)


def test_the_best_checkpoint_is_kept_not_the_last(tmp_path):
    """With steps far too large the held-out loss soon rises."""
    model, held_out = reward_model(), random_texts(16, seed=1)
    args = arguments(tmp_path, max_steps=10, learning_rate=0.3, save_total_limit=1)
    keep_best(args)
    logged = []

    class Remember(train.ValueTrainer):
        def evaluate(self, *inputs, **settings):
            logged.append(super().evaluate(*inputs, **settings))
            return logged[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "ValueTrainer", Remember)
        metrics = train_value_model(model, tiny_tokenizer(), random_texts(16), held_out, args=args)
    losses = [found["eval_loss"] for found in logged]
    assert len(losses) == 11
    assert metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-9)
    assert min(losses) < losses[-2]
