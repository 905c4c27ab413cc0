"""A shared trunk: a guide whose embeddings and lowest layers are the language model's own.

`pargs train --shared-layers N` trains it so, and records it as `shared_layers`. Next to its language model it needs
memory for its upper layers alone; and if one query per step answers for all candidates, it computes those alone, since
the language model's own pass over the last token has computed what enters them.
"""

import copy
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pargs_min.decode import ModelPolicy
from pargs_min.reward_model import read, recorded
from pargs_min.scoring import LanguageModelScorer, VocabularyScorer, alike, rehearsed

OneQuery = LanguageModelScorer | VocabularyScorer


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model's backbone. Raises ValueError if they cannot be told."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} layers, and so cannot share some")


def trunk_parameters(model: PreTrainedModel, layers: int) -> dict[str, nn.Parameter]:
    """All that the features above the lowest layers depend on, by name within the backbone: embeddings, too.

    Raises:
        ValueError: if `layers` does not lie between 1 and one less than the model has.
    """
    found, most = layers_of(model), len(layers_of(model)) - 1
    if not 1 <= layers <= most:
        raise ValueError(
            f"shared_layers (--shared-layers) must lie between 1 and {most}, one layer less than "
            f"{type(model).__name__} has, got {layers}"
        )
    entering: list[Tensor] = []
    hook = found[layers].register_forward_pre_hook(lambda layer, args: entering.append(args[0]))
    with torch.enable_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        read(model.base_model, token, torch.ones_like(token), token, use_cache=False)
    hook.remove()
    todo, seen = [entering[0].grad_fn], set()
    while todo:  # back through what was computed
        if (node := todo.pop()) is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    ids = {id(node.variable) for node in seen if hasattr(node, "variable")}
    ids |= {id(weight) for layer in found[:layers] for weight in layer.parameters()}
    return {name: weight for name, weight in model.base_model.named_parameters() if id(weight) in ids}


@torch.no_grad()
def copy_trunk(model: PreTrainedModel, lm: PreTrainedModel, layers: int) -> None:
    """Give a model the trunk of a language model of the same shape. Raises ValueError if their shapes differ."""
    for name, mine, theirs in _pairs(model, lm, layers):
        if mine.shape[1:] != theirs.shape[1:] or len(mine) < len(theirs):
            raise ValueError(
                f"shared_layers (--shared-layers) needs a guide of the language model's shape, and {name} is "
                f"{tuple(mine.shape)} in the one and {tuple(theirs.shape)} in the other"
            )
        mine[: len(theirs)] = theirs


def share_trunk(lm: PreTrainedModel, guide: PreTrainedModel) -> int:
    """Let a guide use the language model's tensors where its record says that they are the same.

    Returns:
        N, the layers that are shared now; 0 where the guide's record names none, or, with a warning, where the two are
        held in different types or on different devices.

    Raises:
        ValueError: if they are not the same: the guide was trained on top of another language model.
    """
    layers = recorded(guide).get("shared_layers", 0)
    if not layers:
        return 0
    pairs = _pairs(guide, lm, layers)
    for name, mine, theirs in pairs:
        rows = min(len(mine), len(theirs))  # training may have added one to the embedding, for padding
        if mine is not theirs and not torch.equal(mine[:rows].to(theirs), theirs[:rows].to(mine.dtype).to(theirs)):
            raise ValueError(
                f"the guide {guide.name_or_path} was trained on the lowest {layers} layers of its language model, and "
                f"{name} of {lm.name_or_path} differs: give the language model that it was trained from, or remove "
                "shared_layers from `pargs` in the guide's config.json, to read it whole"
            )
    if (mine.dtype, mine.device) != (theirs.dtype, theirs.device):
        warnings.warn(
            f"the guide shares {layers} layers with its language model, but is read whole, since one is {mine.dtype} "
            f"on {mine.device} and the other {theirs.dtype} on {theirs.device}: load both alike (--dtype)",
            stacklevel=2,
        )
        return 0
    same = {id(mine): theirs for _, mine, theirs in pairs if mine.shape == theirs.shape}
    for module in guide.modules():
        for name, weight in module._parameters.items():
            module._parameters[name] = same.get(id(weight), weight)  # also where a head is tied to it
    return layers


def _pairs(guide: PreTrainedModel, lm: PreTrainedModel, layers: int) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, the guide's, the language model's) of each parameter of their trunks."""
    mine, theirs = trunk_parameters(guide, layers), trunk_parameters(lm, layers)
    if mine.keys() != theirs.keys():
        raise ValueError(
            f"{type(guide).__name__} and {type(lm).__name__} share no layers: they are of different families"
        )
    return [(name, mine[name], theirs[name]) for name in mine]


def one_query_scorer(
    lm: PreTrainedModel | None, guide: PreTrainedModel, make: Callable[[PreTrainedModel], OneQuery]
) -> "OneQuery | TrunkScorer":
    """`make(guide)`, or a `TrunkScorer` where the guide shares layers with this language model.

    It falls back to the first, with a warning, where a family cannot be cut in two.

    Args:
        lm: None for one whose passes cannot be watched, such as a compiled one.

    Raises:
        ValueError: as `share_trunk`.
    """
    layers = 0 if lm is None else share_trunk(lm, guide)
    if lm is None or not layers:
        return make(guide)
    try:
        return TrunkScorer(lm, guide, layers, make)
    except ValueError as error:
        warnings.warn(f"{error}. Falling back to the whole guide, all layers of which are computed", stacklevel=2)
        return make(guide)


class TrunkScorer:
    """A scorer that asks once per step, and computes the upper layers of its guide alone.

        r = upper(f),   f = lower(ids): what entered layer N in the language model's own pass over the same tokens

    The language model must be read just before each `score`, as our loop does and transformers' `generate` with
    `RewardGuidance`; on the tokens that are pushed, and nothing else.

    Args:
        lm, guide: with N equal layers (`share_trunk`).
        layers: N.
        make: of a model, its scorer, such as `VocabularyScorer`.

    Raises:
        ValueError: if this is not what the whole guide says, in one small comparison.
    """

    def __init__(
        self, lm: PreTrainedModel, guide: PreTrainedModel, layers: int, make: Callable[[PreTrainedModel], OneQuery]
    ):
        self.features = _Features()
        hook = layers_of(lm)[layers].register_forward_pre_hook(self.features.add)
        weakref.finalize(self, hook.remove)
        self.scorer = make(upper_part(guide, layers, self.features))
        self.model, self.max_length = self.scorer.model, self.scorer.max_length
        self.score, self.push, self.select = self.scorer.score, self.scorer.push, self.scorer.select
        _check_trunk(self, make(guide), lm)

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        """Take the prompts: (B, P) ids, padded on the left, and their mask."""
        self.features.start(prompt_ids)
        self.scorer.start(prompt_ids, mask)


def upper_part(guide: PreTrainedModel, layers: int, features: "_Features") -> PreTrainedModel:
    """A copy of a guide, on the same tensors, without its lowest layers; `features` enter the first that is left."""
    tensors = {id(tensor): tensor for tensor in (*guide.parameters(), *guide.buffers())}
    upper = copy.deepcopy(guide, tensors)
    config, left = upper.config.get_text_config(), layers_of(upper)
    del left[:layers]
    config.num_hidden_layers -= layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layers:]
    for module in left.modules():
        if "layer_idx" in vars(module):
            vars(module)["layer_idx"] -= layers  # its place in the cache
    left[0].register_forward_pre_hook(lambda layer, args: (features.take(args[0]), *args[1:]))
    return upper


class _Features:
    """What entered a layer of the language model, and the guide has not read yet."""

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []  # (B, T, D) of each pass

    def add(self, layer: nn.Module, args: tuple) -> None:
        """A forward pre-hook."""
        if args[0].shape[1] > 1:
            self.waiting.clear()  # another text begins
        self.waiting.append(args[0].detach())

    def start(self, prompt_ids: Tensor) -> None:
        """Forget earlier texts: the prompts may have been read already, or will be next."""
        self.waiting = [last for last in self.waiting[-1:] if last.shape[:2] == prompt_ids.shape]

    def take(self, like: Tensor) -> Tensor:
        """The last features, as many as a (B, T, D) tensor has."""
        found, missing = list[Tensor](), like.shape[1]
        while missing > 0 and self.waiting:
            found.append(self.waiting.pop())
            missing -= found[-1].shape[1]
        self.waiting.clear()
        if missing or any(len(one) != len(like) for one in found):
            raise RuntimeError("the language model has not read the same tokens as its guide: read it before each step")
        return torch.cat(found[::-1], 1)


def _check_trunk(fast: TrunkScorer, whole: OneQuery, lm: PreTrainedModel) -> None:
    """The upper layers against the whole guide: no untested model family is silently wrong."""
    model, rows = whole.model, lm.get_input_embeddings().num_embeddings
    try:
        ours, theirs = rehearsed([fast, whole], model, ModelPolicy(lm, rows))
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{model.config.model_type} cannot be cut above a shared trunk ({error})") from error
    if not alike(ours, theirs, model.dtype):
        raise ValueError(
            f"{model.config.model_type} says something else above a shared trunk than as a whole (by up to "
            f"{float((ours - theirs).abs().max()):.2g})"
        )
