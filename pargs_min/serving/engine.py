"""Texts for many clients at once: all that run are written together, one token each per step, by one thread.

Texts join and leave between steps. When some join, the models read all running texts again, in one pass: so every way
of scoring works as it stands, and in float32 a text does not depend on those that it runs beside.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from pargs_min.codec import left_pad
from pargs_min.decode import Drawn, PolicyStepper, RewardScorer, Step, greedy, row_uniforms, sample
from pargs_min.memory import is_out_of_memory
from pargs_min.methods import Method
from pargs_min.policy import guided_log_probs, keep_rest, likely_enough, tempered, top_k_candidates, truncate_rest
from pargs_min.serving import SHOWN
from pargs_min.texts import Tokens

JOIN_EVERY = 8  # steps, at least, between two times that the running texts are read again for others to join


class Busy(Exception):
    """Too many texts wait already."""


class Closing(Exception):
    """What runs is finished, and nothing else is taken."""


@dataclass(eq=False)
class Text:
    """One text that is asked for, and what has been written of it.

    Args:
        prompt_ids: token ids.
        method: one that writes token by token: whether it is guided, its draw and its tilt count.
        how: its settings, but for `guide_below`, since texts are guided together.
        numbers: seed, prompt number and sample number, which determine its draws (`row_uniforms`).
        hear: called in the engine's thread with each `Step` and the text's row in it; at the end with None, or with the
            error that ended it.
    """

    prompt_ids: list[int]
    method: Method
    how: Tokens
    numbers: tuple[int, int, int]
    hear: Callable[[tuple[Step, int] | Exception | None], None]
    ids: list[int] = field(default_factory=list)
    wanted: bool = True  # False once nobody waits for it any more

    def __post_init__(self) -> None:
        seed, prompt, sample_number = self.numbers
        self.uniforms = row_uniforms(seed, [prompt], [sample_number], self.how.max_new_tokens)[0]


class Engine:
    """Writes texts in the order in which they are submitted.

    Args:
        policy: the reference, as for `generate`.
        scorer: the reward of prefixes; None where no text will be guided.
        ends: ids that end a response.
        device: of the ids that policy and scorer read.
        rows: texts that run together, at most; fewer from then on, where memory runs out.
        room: texts that wait, at most.
        shown: candidates that each `Step` has, at least.
    """

    def __init__(
        self,
        policy: PolicyStepper,
        scorer: RewardScorer | None,
        ends: Iterable[int],
        *,
        device: torch.device | str = "cpu",
        rows: int = 32,
        room: int = 64,
        shown: int = SHOWN,
    ):
        self.policy, self.scorer, self.ends, self.device = policy, scorer, {*ends}, device
        self.rows, self.room, self.shown = rows, room, shown
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []
        self.guide: RewardScorer | None = None  # the scorer, while some of the running texts are guided
        self.unread = self.closing = False  # unread: the models have yet to read the running texts
        self.steps = 0  # since texts joined
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def submit(self, texts: Sequence[Text]) -> None:
        """Take all of these texts, or none.

        Raises:
            Busy: if too many wait.
            Closing: after `close`.
        """
        with self.changed:
            if self.closing:
                raise Closing
            if len(self.waiting) + len(texts) > self.room:
                raise Busy
            self.waiting.extend(texts)
            self.changed.notify()

    def close(self) -> None:
        """Refuse what waits and what comes. The thread ends when what runs is finished."""
        with self.changed:
            self.closing = True
            refused, self.waiting = self.waiting, deque()
            self.changed.notify()
        for text in refused:
            text.hear(Closing())

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.running or self.closing)
                if not (self.waiting or self.running):
                    return
            try:
                self.turn()
            except Exception as error:  # whatever it is, nobody is left waiting
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Out of memory: go on with half of the texts, the others wait. Anything else ends all that run."""
        half = len(self.running) // 2 if is_out_of_memory(error) else 0
        ended, self.running, self.unread = self.running[half:], self.running[:half], True
        if half:
            self.rows = half
            with self.changed:
                self.waiting.extendleft(reversed(ended))
        else:
            for text in ended:
                text.hear(error)

    @torch.inference_mode()
    def turn(self) -> None:
        """Let those join that wait, then write one token of each running text."""
        if not self.running or self.steps >= JOIN_EVERY:
            self._join()
        if self.unread and self.running:
            self._read()
        if self.running:
            self._step()

    def _join(self) -> None:
        with self.changed:
            wanted = [text for text in self.waiting if text.wanted]
            room = max(0, self.rows - len(self.running))
            joining, self.waiting = wanted[:room], deque(wanted[room:])
        self.running += joining
        self.unread |= bool(joining)

    def _read(self) -> None:
        """Let the models read all running texts from the beginning; the scorer only where some are guided."""
        tensors = [tensor.to(self.device) for tensor in left_pad([text.prompt_ids + text.ids for text in self.running])]
        self.guide = self.scorer if any(text.method.guided for text in self.running) else None
        for stepper in self._steppers():
            stepper.start(*tensors)
        self.steps, self.unread = 0, False

    def _steppers(self) -> list[PolicyStepper | RewardScorer]:
        return [self.policy] if self.guide is None else [self.policy, self.guide]

    def _step(self) -> None:
        groups: dict[tuple[Method, Tokens], list[int]] = {}  # settings -> rows
        for row, text in enumerate(self.running):
            groups.setdefault((text.method, replace(text.how, max_new_tokens=1)), []).append(row)

        # The reference as each text samples it, and rewards of as many candidates as any of them needs.
        reference = self.policy.log_probs()
        for (_, how), rows in groups.items():
            reference[rows] = how.warp(reference[rows])
        needed = [how.top_k or reference.shape[1] for method, how in groups if method.guided]
        ref_log_probs, candidates = top_k_candidates(reference, max([min(self.shown, reference.shape[1]), *needed]))
        rewards = torch.full_like(ref_log_probs, torch.nan)
        if self.guide:
            rewards = self.guide.score(candidates, ref_log_probs).to(rewards)

        # The policy of each text, from its own number of candidates.
        log_probs, eligible = reference.clone(), torch.zeros_like(candidates, dtype=torch.bool)
        for (method, how), rows in groups.items():
            if method.guided:
                k = how.top_k or candidates.shape[1]
                asked = candidates[rows, :k], rewards[rows, :k]
                log_probs[rows], rewards[rows, :k], eligible[rows, :k] = _guided(method, how, reference[rows], *asked)
            log_probs[rows] = tempered(log_probs[rows], how.temperature)
        broken = (eligible & ~rewards.isfinite()).any(-1) | log_probs.isnan().any(-1)

        # One token for each.
        uniforms = torch.stack([text.uniforms[len(text.ids)] for text in self.running]).to(self.device)
        likeliest = torch.tensor([text.method.greedy for text in self.running], device=self.device)
        tokens = greedy(log_probs, uniforms).where(likeliest, sample(log_probs, uniforms))
        rewards = rewards.masked_fill(~eligible, torch.nan)
        drawn = Drawn.of(tokens, reference, log_probs, candidates, rewards)
        seen = ref_log_probs, rewards, log_probs.gather(1, candidates)
        self._tell(Step(self.steps, candidates, *seen, drawn, ~broken, eligible))
        self.steps += 1

    def _tell(self, step: Step) -> None:
        """Hand out what was drawn, and go on with the texts that have not ended."""
        going = []
        for row, (text, token, right) in enumerate(
            zip(self.running, step.drawn.tokens.tolist(), step.alive.tolist(), strict=True)
        ):
            if not right:
                text.hear(FloatingPointError("a reward is not finite, or a log-probability is not a number"))
                continue
            text.ids.append(token)
            text.hear((step, row))
            if token in self.ends or len(text.ids) == text.how.max_new_tokens:
                text.hear(None)
            elif text.wanted:
                going.append(row)
        before, self.running = len(self.running), [self.running[row] for row in going]  # an error finds those alone
        if not any(text.method.guided for text in self.running):
            self.guide = None
        rows = torch.tensor(going, dtype=torch.long, device=self.device)
        for stepper in self._steppers() if going else ():
            if len(going) < before:
                stepper.select(rows)
            stepper.push(step.drawn.tokens[rows])


def _guided(
    method: Method, how: Tokens, reference: Tensor, candidates: Tensor, rewards: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, V) log-probabilities of the guided policy, (B, K) rewards as the method takes them, and the candidates."""
    ref_log_probs = likely_enough(reference.gather(1, candidates), how.min_ref_prob)
    known = SimpleNamespace(score=lambda *_: rewards, start=None, push=None, select=None)
    scorer, beta = method.tilt(known, how.beta)
    rewards = scorer.score(candidates, ref_log_probs)
    among = guided_log_probs(ref_log_probs, rewards, beta)
    spread = truncate_rest if how.truncate else keep_rest
    return spread(reference, candidates, among), rewards, ~ref_log_probs.isneginf()
