"""pargs-min: a reward model of prefixes steers a language model while it writes.

    pi(t | prefix)  proportional to  pi_ref(t | prefix) * exp(beta * r(prefix + t))

The ground floor is the method; read it in this order:

    minimal.py         the whole method on one page, slow and plain
    policy.py          the equation
    losses.py          how r is trained: Bradley-Terry on every prefix
    reward_model.py    r of all prefixes in one forward pass
    scoring.py         r of k candidates in one pass over one cache
    decode.py          the loop, and the same inside transformers' generate
    smc.py             the same loop with many particles, towards the RLHF policy
    methods.py         the table of methods
    data.py train.py lora.py      from preference pairs to a reward model (trainer.py: transformers' Trainer, watched)
    distil.py                     from a scalar head to one for the whole vocabulary
    trunk.py frozen.py            a guide whose lower layers are the language model's: decoding, and training
    texts.py trace.py             texts for many prompts; one text token by token
    static.py                     compiled steppers for the same loop

Everything enters and leaves by three doors (models, text, files):

    models.py              models and tokenizers, from a folder or a hub id
    codec.py               text to token ids, and back
    records.py store.py    files that are read, and files that are written

memory.py, progress.py, plots.py and markdown.py are small helpers. Beside the ground floor stand wings, which it does
not import:

    evaluation/    what texts are worth: statistics, judges, comparisons
    world/         the embedded world: a grammar with a gold reward, and its exact values
    baselines/     rivals that fine-tune the language model: DPO, PPO
    benchmark/     what a guided token costs
    serving/       a guided model behind OpenAI's interface
    experiments/   grids of experiments, a file for each question, the demonstration
    cli/           the command line

The names below are the public ones; they are imported when they are first used, so that `import pargs_min` is instant.
"""

from importlib import import_module

_HOME = {
    "policy": ["guided_log_probs", "keep_rest", "tempered", "top_k_candidates", "truncate_rest"],
    "losses": ["bradley_terry_loss", "partial_bradley_terry_loss"],
    "reward_model": ["final_rewards", "prefix_rewards"],
    "models": ["load_guide", "load_reward_model", "save_reward_model"],
    "codec": ["check_vocabularies", "encode_prompt", "end_tokens"],
    "reading": ["text_rewards"],
    "scoring": ["LanguageModelScorer", "ReencodeScorer", "SiblingScorer", "model_rewards"],
    "decode": [
        "Generation",
        "ModelPolicy",
        "RewardGuidance",
        "Warp",
        "WarpedPolicy",
        "generate",
        "greedy",
        "row_uniforms",
        "sample",
    ],
    "data": ["encode_preferences", "split_by_prompt"],
    "records": ["read_preferences", "read_prompts"],
    "train": ["prefix_accuracy", "train_reward_model"],
    "texts": ["generate_texts"],
}
__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name: str):
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"pargs_min.{module}"), name)
    raise AttributeError(f"module 'pargs_min' has no attribute {name!r}")
