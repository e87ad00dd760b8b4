"""Task (a): the demo's spurious cue. Stripes behind the digit agree with the label in 95 % of the training images.

Exemplars are images where the cue disagrees, x', beside the same digits on the stripes that would agree, x; the network
was not trained on them: those it was it has learned by heart, and there would be nothing to tune. What should stay:
images where the cue agrees. Held out: the same disagreement, with bars of a phase or width never seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ablate import Examples
from ablate.digits import CUE_STRENGTH, MINORITY_GROUPS, digits_split
from experiments.edit_comparison.images import stripes
from experiments.edit_comparison.networks import Lesson, usual_lesson
from experiments.edit_comparison.tasks import Case, Pairs, Split, Task, image_id, renamed

SIZE = 16
DISAGREES = "cue disagrees"
HELD_OUT = "cue disagrees, held-out bars"


def lessons(network: str, seed: int) -> tuple[Lesson, ...]:
    """Returns how a network is trained: on the demo's training split, in two classes.

    The ViT alone would learn the stripes and nothing else: it first sees the same digits over stripes at random.
    """
    train = digits_split("train", seed)
    if network == "cnn":
        return (usual_lesson(network, train),)
    against = torch.tensor([group in MINORITY_GROUPS for group in train.groups])
    digits = train.inputs() - _bars((train.targets == 1) ^ against)
    chance = torch.rand(len(train), generator=torch.Generator().manual_seed(seed)) < 0.5
    balanced = Examples(digits + _bars(chance), train.targets, train.ids)
    return Lesson(balanced, 30, 1e-3), Lesson(train, 12, 1e-3)


def _bars(horizontal: Tensor, width: int = 2, phase: int = 0) -> Tensor:
    """Returns the stripes behind each image, (n, 1, size, size), in the demo's strength."""
    both = torch.stack([stripes(SIZE, width, False, phase), stripes(SIZE, width, True, phase)])
    return both[horizontal.long()][:, None] * CUE_STRENGTH


def without(examples: Examples, others: Pairs) -> Examples:
    """Returns the examples that are not among the others."""
    shown = {image_id(name) for name in others.examples.ids}
    return examples.take([i for i, name in enumerate(examples.ids) if image_id(name) not in shown])


def disagreeing(examples: Examples, width: int = 2, phase: int = 0) -> Pairs:
    """Returns the images where cue and label disagree, x', beside the same digits over the cue that agrees, x.

    With a width and phase other than the demo's (2 and 0), x' has such bars. Masks are 1 where the two cues differ.
    """
    chosen = examples.take([i for i, group in enumerate(examples.groups) if group in MINORITY_GROUPS])
    labels = chosen.targets
    drawn = chosen.inputs()
    agreeing, against = _bars(labels == 1), _bars(labels == 0)
    x = drawn - against + agreeing
    shown = _bars(labels == 0, width, phase)
    inputs = drawn if (width, phase) == (2, 0) else drawn - against + shown
    masks = (shown != agreeing)[:, 0].float()
    # adding and taking off bars rounds: outside of the mask x is x', to the bit
    originals = torch.where(masks[:, None].bool(), x, inputs)
    return Pairs(renamed(chosen, inputs, f"bars-{width}-{phase}"), originals, masks)


def agreeing_images(examples: Examples) -> Examples:
    """Returns the images where cue and label agree."""
    return examples.take([i for i, group in enumerate(examples.groups) if group not in MINORITY_GROUPS])


def task(network: str, model: nn.Module, seed: int, exemplars: int = 20) -> Task:
    """Returns the task of a seed; `exemplars` images of each of the two groups where the cue disagrees.

    They are drawn from the demo's validation split, and are not used to choose settings.
    """
    train = digits_split("train", seed)
    against = disagreeing(digits_split("validation", seed))
    first = [
        i
        for group in MINORITY_GROUPS
        for i in [j for j, name in enumerate(against.examples.groups) if name == group][:exemplars]
    ]
    shown = against.take(first)
    reference = agreeing_images(train).take(range(200))

    def split(name: str) -> Split:
        examples = without(digits_split(name, seed), shown)
        half = disagreeing(examples)
        held_out = [disagreeing(examples, width, phase) for width, phase in ((2, 1), (4, 0))]
        # every other image has the one, the rest the other
        mixed = Pairs(
            _interleaved([pairs.examples for pairs in held_out]),
            _mixed([pairs.originals for pairs in held_out if pairs.originals is not None]),
            _mixed([pairs.masks for pairs in held_out if pairs.masks is not None]),
        )
        case = Case("digits over stripes", shown, {DISAGREES: half, HELD_OUT: mixed})
        kept = agreeing_images(examples)
        return Split((case,), kept, kept)

    return Task(
        name="cue",
        title="Spurious cue: stripes that disagree with the label",
        network=network,
        seed=seed,
        train=train,
        reference=reference,
        validation=split("validation"),
        test=split("test"),
        success=DISAGREES,
        kept="ordinary",
        held_out=(HELD_OUT,),
        notes={"exemplars": len(shown)},
    )


def _mixed(parts: list[Tensor]) -> Tensor:
    which = torch.arange(len(parts[0])) % len(parts)
    return torch.stack(parts)[which, torch.arange(len(which))]


def _interleaved(parts: list[Examples]) -> Examples:
    ids = [parts[i % len(parts)].ids[i] for i in range(len(parts[0]))]
    return Examples(_mixed([part.inputs() for part in parts]), parts[0].targets, ids, parts[0].groups)
