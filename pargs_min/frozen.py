"""A shared trunk while its guide is trained: frozen, and read once for each text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pargs_min.scoring import alike
from pargs_min.trunk import layers_of, trunk_parameters

ROOM = 4 * 2**30  # bytes of features that are kept in memory; texts beyond are read anew


@contextmanager
def frozen_trunk(model: PreTrainedModel, layers: int | None) -> Iterator[None]:
    """Context manager: embeddings and the lowest layers are not trained, and these layers read each text once.

    Args:
        layers: N >= 1; or None, which changes nothing.

    Raises:
        ValueError: as `trunk_parameters`.
    """
    if layers is None:
        yield
        return
    frozen = trunk_parameters(model, layers).values()
    features = _FeaturesOfTexts(model, layers)
    for weight in frozen:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        features.remove()
        for weight in frozen:
            weight.requires_grad_(True)


class _FeaturesOfTexts:
    """What enters layer N, kept for each text that a model reads: training does not change it.

    A batch of known texts passes over the layers below. The first is read in both ways, evaluating and training; where
    they differ (dropout, layers that look at what those below have kept) all texts are read as usual.
    """

    def __init__(self, model: PreTrainedModel, layers: int):
        found = layers_of(model)
        body = next(module for module in model.modules() if found in module.children())
        self.lower, first = found[:layers], found[layers]
        self.kept: dict[tuple[bool, tuple[int, ...]], Tensor] = {}  # (n, D) of (training, ids of n tokens)
        self.room, self.usable, self.compared = ROOM, True, set[bool]()
        self.texts: list[tuple[bool, tuple[int, ...]]] = []  # of the batch that is read now
        self.known: Tensor | None = None  # (B, T, D), its features, if all texts are known
        self.hooks = [
            body.register_forward_pre_hook(self.begin, with_kwargs=True),
            first.register_forward_pre_hook(self.enter),
        ]
        self.forwards = [vars(layer).get("forward") for layer in self.lower]
        for layer in self.lower:
            layer.forward = self.unless_known(layer.forward)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for layer, forward in zip(self.lower, self.forwards, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward

    def begin(self, body: nn.Module, args: tuple, settings: dict) -> None:
        """Before a batch is read: look up its texts."""
        ids, mask = args[0] if args else settings.get("input_ids"), settings.get("attention_mask")
        self.known, self.texts = None, []
        if not self.usable or ids is None or mask is None or ids.shape != mask.shape:
            return
        self.mask = mask.bool().cpu()
        self.texts = [(body.training, tuple(row[own].tolist())) for row, own in zip(ids.cpu(), self.mask, strict=True)]
        if not all(text in self.kept for text in self.texts):
            return
        features = torch.cat([self.kept[text] for text in self.texts])
        known = features.new_zeros(*ids.shape, features.shape[1])
        known[self.mask] = features
        self.known = known
        if body.training not in self.compared:
            self.compare(body, args, settings)
            self.known = known if self.usable else None

    def enter(self, layer: nn.Module, args: tuple) -> tuple | None:
        """At layer N: give it what is known, or keep what comes."""
        if self.known is not None:
            return self.known.to(args[0]), *args[1:]
        for number, text in enumerate(self.texts):
            if self.room > 0 and text not in self.kept:
                self.kept[text] = args[0][number].detach().cpu()[self.mask[number]]
                self.room -= self.kept[text].nbytes
        return None

    def unless_known(self, forward: Callable) -> Callable:
        """The forward of a layer below, passed over where features are known."""

        def forward_or_not(hidden: Tensor, *args, **settings):
            if self.known is not None:
                return hidden
            output = forward(hidden, *args, **settings)
            self.usable &= isinstance(output, Tensor)  # some older families return more
            return output

        return forward_or_not

    @torch.no_grad()
    def compare(self, body: nn.Module, args: tuple, settings: dict) -> None:
        """A batch of known texts, read in both ways."""
        self.compared.add(body.training)
        try:
            ours = body(*args, **settings).last_hidden_state[self.mask]
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError):
            ours = None
        self.usable = False
        theirs = body(*args, **settings).last_hidden_state[self.mask]
        self.usable = ours is not None and alike(ours, theirs, ours.dtype)
