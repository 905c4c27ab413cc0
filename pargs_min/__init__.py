"""pargs-min: a language model steered while it writes, by a reward model of prefixes.

    pi(t | prefix)  proportional to  pi_ref(t | prefix) * exp(beta * r(prefix + t))

Read it in this order:

    policy.py         the equation
    losses.py         how r is trained: Bradley-Terry on every prefix
    reward_model.py   r of all prefixes in one forward pass
    scoring.py        r of k candidates in one pass over one cache
    decode.py         the loop, and the same inside transformers' generate
    methods.py        the named methods, each a call of the loop
    smc.py            the same loop with many particles, towards the RLHF policy
    static.py         compiled steppers for the same loop
    records.py, data.py, train.py                 preference pairs, and training on them
    journey.py, exact.py, toy.py, demo.py         the embedded world, its exact values, the main job on it
    texts.py, trace.py                            files of texts; one text token by token
    memory.py                                     what is said where it runs out
    evaluate.py, judges.py, compare.py, report.py what texts are worth
    dpo.py, ppo.py                                fine-tuned rivals
    siblings.py, lab.py, study.py, attributes.py  what reward models know; grids of experiments; nine questions
    naive.py, cost.py, benchmark.py, targets.py   what a token costs, beside the published loops

The names below are the public ones; they are imported when they are first used, so that `import pargs_min` is instant.
"""

from importlib import import_module

_HOME = {
    "policy": ["guided_log_probs", "top_k_candidates"],
    "losses": ["bradley_terry_loss", "partial_bradley_terry_loss"],
    "reward_model": ["final_rewards", "load_reward_model", "prefix_rewards", "save_reward_model"],
    "scoring": ["ReencodeScorer", "SiblingScorer", "check_vocabularies", "model_rewards", "text_rewards"],
    "decode": ["Generation", "ModelPolicy", "RewardGuidance", "generate", "greedy", "row_uniforms", "sample"],
    "data": ["encode_preferences", "encode_prompt", "split_by_prompt"],
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
