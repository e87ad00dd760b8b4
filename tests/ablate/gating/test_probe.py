"""Law 5 for models: what the engine finds out on two examples, what it refuses, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablate
from ablate.gating.layouts import ExampleLayout, find_layout
from ablate.gating.probe import probe
from ablate.index.components import ComponentIndex
from ablate.index.table import Port

EXAMPLES, CLASSES = 5, 3
KINDS = ["conv_filter", "linear_neuron", "qkv_neuron"]
INFLUENCE = "The examples of a batch influence each other: two examples together give other logits than one by one. "
NORM_ADVICE = (
    "Put batch norm into eval mode with its own statistics, or wrap the model so that each example's logits depend "
    "on that example alone."
)
ADVICE = "Wrap the model so that each example's logits depend on that example alone."
RANDOM = "The model is random in eval mode: the same two examples gave different logits. The randomness is in "
RANDOM_ADVICE = (
    "Make it deterministic in eval mode (`if self.training:`); an ablation's effect cannot be told from noise "
    "otherwise."
)
INPUT_ADVICE = "Give inputs as the model takes them: number of channels, image size, floating images or integer tokens."


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(EXAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets() -> Tensor:
    return torch.arange(EXAMPLES) % CLASSES


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )


class Pooled(nn.Module):
    """Means of channels through two linear layers; subclasses use the first one's weight in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.gelu(self.hidden(x.mean(dim=(2, 3)))))
        return logits

    def hidden(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


class Matmul(Pooled):
    def hidden(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight.T


class Standardised(Pooled):
    def hidden(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        return F.linear(x, weight / (1 + weight.norm(dim=1, keepdim=True)), self.fc.bias)


class Unused(Pooled):
    def hidden(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1))


class OneByOne(Pooled):
    def hidden(self, x: Tensor) -> Tensor:
        return torch.cat([self.fc(row[None]) for row in x])


class Reversed(Pooled):
    def hidden(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.flip(0)).flip(0)
        return y


class Sorted(Pooled):
    """Routes every example through one of two layers, as a mixture of experts does."""

    def hidden(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 4, dtype=x.dtype)
        chosen = x[:, 0] > x[:, 1]
        y[chosen] = self.fc(x[chosen])
        return y


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)  # training=True is its default


class Stubborn(nn.BatchNorm2d):
    """Stays in training mode."""

    def train(self, mode: bool = True) -> Self:
        return super().train(True)


def _with_norm(norm: nn.Module) -> nn.Module:
    model = _net()
    model[1] = norm
    return model


class ByHand(Pooled):
    """Takes the batch's mean by a function: no batch norm to name."""

    def hidden(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y - y.mean(dim=0)


class FirstOnly(Pooled):
    def hidden(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)[:1].expand(len(x), -1)
        return y


class Extra(nn.Module):
    """Attention with a learnt key and value, which is not taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)
        self.patch, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x.flatten(2).transpose(1, 2))
        logits: Tensor = self.head(self.attention(x, x, x)[0].mean(dim=1))
        return logits


class Clumsy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _net()

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no luck today.\nMore of it.")


def _message(model: nn.Module, error: type[Exception], *data: Any, **options: Any) -> str:
    index = ComponentIndex.from_model(model, KINDS)
    engine = ablate.Engine(model, index, **options)
    with pytest.raises(error) as caught:
        engine.outputs(np.ones((1, len(index)), dtype=bool), *data)
    return str(caught.value)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout by a function": (
        lambda: nn.Sequential(_net(), nn.Sequential(nn.Identity(), Dropping())),
        f"{RANDOM}module '1.1'. {RANDOM_ADVICE}",
    ),
    "norm without statistics": (
        lambda: _with_norm(nn.BatchNorm2d(4, track_running_stats=False)),
        f"{INFLUENCE}Batch norm '1' uses the statistics of the batch. {NORM_ADVICE}",
    ),
    "norm in training mode": (
        lambda: _with_norm(Stubborn(4)),
        f"{INFLUENCE}Batch norm '1' uses the statistics of the batch. {NORM_ADVICE}",
    ),
    "norm by a function": (ByHand, f"{INFLUENCE}They mix in the model itself. {ADVICE}"),
    "examples that depend on the first": (FirstOnly, f"{INFLUENCE}They mix in the model itself. {ADVICE}"),
    "attention with an extra key": (
        Extra,
        "Module 'attention' is nn.MultiheadAttention with bias_k, which is not taken apart. Leave it out with "
        "exclude=['attention'].",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name: str, inputs: Tensor, targets: Tensor) -> None:
    build, message = REFUSED[name]
    assert _message(build(), ablate.errors.GatingError, inputs, targets) == message
    same = inputs[:1].expand_as(inputs)  # a data set that starts with equal examples must not hide it
    assert _message(build(), ablate.errors.GatingError, same, targets) == message
    unknown = inputs.clone()
    unknown[:2] = float("nan")
    assert _message(build(), ablate.errors.GatingError, unknown, targets) == message


def test_randomness_in_the_models_own_forward(inputs: Tensor, targets: Tensor) -> None:
    class Itself(Pooled):
        def hidden(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x))

    message = _message(Itself(), ablate.errors.GatingError, inputs, targets)
    assert message == f"{RANDOM}the model itself. {RANDOM_ADVICE}"


NOT_RUN: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], str]] = {
    "channels": (
        _net,
        lambda x: x[:, :2],
        "The model fails on inputs of shape (2, 2, 8, 8) and type float32: module '0', a Conv2d(3, 4, "
        "kernel_size=(3, 3), stride=(1, 1)), raised RuntimeError: Given groups=1, weight of size [4, 3, 3, 3], "
        "expected input[2, 2, 8, 8] to have 3 channels, but got 2 channels instead.",
    ),
    "integers": (
        _net,
        lambda x: (9 * x).long(),
        "The model fails on inputs of shape (2, 3, 8, 8) and type int64: module '0', a Conv2d(3, 4, "
        "kernel_size=(3, 3), stride=(1, 1)), raised RuntimeError: Input type (long int) and bias type (float) should "
        "be the same.",
    ),
    "size": (
        _net,
        lambda x: x[..., :1, :1],
        "The model fails on inputs of shape (2, 3, 1, 1) and type float32: module '0', a Conv2d(3, 4, "
        "kernel_size=(3, 3), stride=(1, 1)), raised RuntimeError: Calculated padded input size per channel: (1 x 1). "
        "Kernel size: (3 x 3). Kernel size can't be greater than actual input size.",
    ),
    "its own error": (
        Clumsy,
        lambda x: x,
        "The model fails on inputs of shape (2, 3, 8, 8) and type float32: the Clumsy itself raised ValueError: no "
        "luck today.",
    ),
}


@pytest.mark.parametrize("name", NOT_RUN)
def test_inputs_that_the_model_does_not_take(name: str, inputs: Tensor, targets: Tensor) -> None:
    build, change, message = NOT_RUN[name]
    assert _message(build(), ablate.DataError, change(inputs), targets) == f"{message} {INPUT_ADVICE}"


def test_inputs_on_another_device(inputs: Tensor, targets: Tensor) -> None:
    assert _message(_net(), ablate.DataError, inputs.to("meta"), targets) == (
        "Inputs: the tensor is on device meta, without data, expected a plain one. Give a tensor that holds numbers."
    )


def test_targets_that_are_missing_or_of_another_form(inputs: Tensor, targets: Tensor) -> None:
    assert _message(_net(), ablate.DataError, inputs) == (
        "Labels are missing: give targets, one integer per example, beside the inputs."
    )
    assert _message(_net(), ablate.DataError, inputs, targets, output="token_margin") == (
        "Output 'token_margin' needs a target per token (examples, tokens), got targets of shape (5,). Use "
        "output='margin', or give other targets."
    )


@pytest.mark.parametrize(
    ("build", "problem", "used_by"),
    [
        (Matmul, "its weight 'fc.weight' is used by .T in 'the model itself'", ".T in 'the model itself'"),
        (Standardised, "its weight 'fc.weight' is used by norm in 'the model itself'", "norm in 'the model itself'"),
        (Unused, "it was never used when the model ran on two examples", "nothing"),
    ],
)
def test_modules_that_cannot_be_gated_per_example(
    build: Callable[[], nn.Module], problem: str, used_by: str, inputs: Tensor, targets: Tensor, randomise: Any
) -> None:
    model = randomise(build(), 1).eval()
    index = ComponentIndex.from_model(model, KINDS)
    keep = ablate.KeepPlan(len(index), 4, 0.3).take(0, 4)
    expected = ablate.reference_outputs(model, index, keep, inputs, targets)
    engine = ablate.Engine(model, index)
    torch.testing.assert_close(engine.outputs(keep, inputs, targets), expected)
    gates = np.ones((EXAMPLES, len(index)))
    for refused in (engine.example_outputs, engine.gate_gradients):
        with pytest.raises(ablate.errors.GatingError) as caught:
            refused(gates, inputs, targets)
        assert str(caught.value) == (
            f"Module 'fc' cannot be gated per example: {problem}. Leave it out with exclude=['fc'], or use outputs() "
            "in mode 'weight'."
        )
    row = engine.explain().iloc[0]
    assert (row["module"], row["used by"], row["activation gating"]) == ("fc", used_by, f"refused: {problem}")
    torch.testing.assert_close(engine.outputs(keep, inputs, targets), expected)

    others = ComponentIndex.from_model(model, KINDS, exclude=["fc"])
    outputs, _ = ablate.Engine(model, others).gate_gradients(np.ones((EXAMPLES, len(others))), inputs, targets)
    with torch.no_grad():
        torch.testing.assert_close(outputs, ablate.Margin()(model(inputs), targets))


@pytest.mark.parametrize("build", [OneByOne, Reversed, Sorted])
def test_modules_that_are_gated_one_example_at_a_time(
    build: Callable[[], nn.Module], inputs: Tensor, targets: Tensor, randomise: Any
) -> None:
    model = randomise(build(), 1).eval()
    index = ComponentIndex.from_model(model, KINDS)
    keep = ablate.KeepPlan(len(index), EXAMPLES, 0.3).take(0, EXAMPLES)
    expected = ablate.reference_outputs(model, index, keep, inputs, targets)
    engine = ablate.Engine(model, index)
    torch.testing.assert_close(engine.outputs(keep, inputs, targets), expected)
    gates = torch.tensor(keep).float()
    torch.testing.assert_close(engine.example_outputs(gates, inputs, targets), expected.diagonal())
    row = engine.explain().iloc[0]
    assert row["module"] == "fc"
    assert row["notes"].startswith("one example per forward: its examples were not found in the output of linear in")


def test_an_embedding_that_is_the_head_too(randomise: Any) -> None:
    """Ablating rows of a tied head ablates words of the embedding: by weights that is exact, per example it is not."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc = nn.Embedding(6, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.fc(self.words(x)).mean(dim=1))
            return logits

    model = randomise(Tied(), 1).eval()
    words, targets = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 3, 5]]), torch.tensor([0, 1, 5])
    index = ComponentIndex.from_model(model, ["linear_neuron"])
    keep = ablate.KeepPlan(len(index), 4, 0.3).take(0, 4)
    engine = ablate.Engine(model, index)
    expected = ablate.reference_outputs(model, index, keep, words, targets)
    torch.testing.assert_close(engine.outputs(keep, words, targets), expected)
    with pytest.raises(ablate.errors.GatingError, match=r"^Module 'head' .* its weight '\S+' is used by embedding in "):
        engine.example_outputs(np.ones((3, len(index))), words, targets)
    table = engine.explain().set_index("module")
    assert "weight shared with " in str(table.loc["head", "notes"])


class Hungry(nn.Module):
    """Raises as torch does when a device's memory is full: for more than `most` examples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.body, self.most = _net(), most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        logits: Tensor = self.body(x)
        return logits


@pytest.mark.parametrize("most", [1, 2, 3])
def test_memory_that_does_not_suffice(most: int, inputs: Tensor, targets: Tensor) -> None:
    message = _message(Hungry(most), ablate.errors.OutOfMemoryError, inputs, targets, batch_size=4)
    assert message == (
        "The memory of cpu did not suffice for 4 examples per forward. Lower batch_size (now 4, try 2) or data_budget, "
        "or use precision='bfloat16'. Nothing of this call was kept; earlier results stay."
    )
    if most > 1:
        model = Hungry(most)
        index = ComponentIndex.from_model(model, KINDS)
        outputs = ablate.Engine(model, index, batch_size=2).outputs(
            np.ones((1, len(index)), dtype=bool), inputs, targets
        )
        assert outputs.shape == (1, EXAMPLES)


def test_a_first_call_that_fails_leaves_the_engine_usable(inputs: Tensor, targets: Tensor) -> None:
    model = _net().eval()
    index = ComponentIndex.from_model(model, KINDS)
    keep = ablate.KeepPlan(len(index), 4, 0.3).take(0, 4)
    expected = ablate.Engine(model, index).outputs(keep, inputs, targets)
    engine = ablate.Engine(model, index)
    for _ in range(2):
        with pytest.raises((ablate.DataError, RuntimeError), match="to have 3 channels, but got 1"):
            engine.outputs(keep, inputs[:, :1], targets)
        with pytest.raises(ablate.LabelError):
            engine.outputs(keep, inputs, targets + 3)
        with pytest.raises(ablate.NonFiniteOutputError):
            engine.outputs(keep, inputs * float("nan"), targets)
        assert torch.equal(engine.outputs(keep, inputs, targets), expected)
    assert engine.example_outputs(np.ones((EXAMPLES, len(index))), inputs, targets).isfinite().all()


def test_a_first_call_with_unusable_numbers_teaches_nothing_wrong(inputs: Tensor, targets: Tensor) -> None:
    """Of NaN or equal examples no layout can be learnt: examples are behind one another, not in turn."""

    class InTurn(Pooled):
        def hidden(self, x: Tensor) -> Tensor:
            x = x[None] + torch.arange(3, dtype=x.dtype)[:, None, None]  # (3, B, C)
            y: Tensor = self.fc(x.reshape(-1, 3)).view(3, -1, 4).sum(dim=0)
            return y

    model = InTurn().eval()
    index = ComponentIndex.from_model(model, KINDS)
    gates = np.random.default_rng(0).random((EXAMPLES, len(index)))
    expected = ablate.Engine(model, index).example_outputs(gates, inputs, targets)
    for first in (inputs * float("nan"), inputs[:1].expand_as(inputs), torch.zeros_like(inputs)):
        engine = ablate.Engine(model, index)
        try:
            engine.example_outputs(gates, first, targets)
        except ablate.NonFiniteOutputError:
            assert first.isnan().any()
        assert torch.equal(engine.example_outputs(gates, inputs, targets), expected)


def test_a_layer_of_zeros_has_the_layout_of_its_input(inputs: Tensor, targets: Tensor) -> None:
    """Residual branches often start at zero: what they give tells nothing, what they get does."""

    class ZeroInTurn(Pooled):
        def hidden(self, x: Tensor) -> Tensor:
            x = x[None] + torch.arange(3, dtype=x.dtype)[:, None, None]  # (3, B, C)
            y: Tensor = self.fc(x.reshape(-1, 3)).view(3, -1, 4).sum(dim=0)
            return y

    model = ZeroInTurn().eval()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    index = ComponentIndex.from_model(model, KINDS)
    engine = ablate.Engine(model, index, example_inputs=inputs)
    assert engine.explain()["notes"].tolist() == ["examples along axis 0, interleaved", "examples along axis 0"]
    engine.gate_gradients(np.ones((EXAMPLES, len(index))), inputs, targets)


def test_a_single_example_is_enough(inputs: Tensor, targets: Tensor) -> None:
    model = _net().eval()
    index = ComponentIndex.from_model(model, KINDS)
    keep = ablate.KeepPlan(len(index), 4, 0.3).take(0, 4)
    expected = ablate.Engine(model, index, batch_size=1).outputs(keep, inputs, targets)
    alone = ablate.Engine(model, index, batch_size=1).outputs(keep, inputs[:1], targets[:1])
    assert torch.equal(alone, expected[:, :1])


def test_example_inputs_are_checked_at_construction(inputs: Tensor, targets: Tensor) -> None:
    model = _net()
    index = ComponentIndex.from_model(model, KINDS)
    with pytest.raises(ablate.DataError, match="expected input"):
        ablate.Engine(model, index, example_inputs=inputs[:, :2])
    engine = ablate.Engine(model, index, example_inputs=inputs)
    assert list(engine.explain()["module"]) == ["0", "5"]
    examples = ablate.Examples(inputs, targets)
    assert ablate.Engine(model, index, example_inputs=examples).explain().equals(engine.explain())


def test_nothing_is_explained_before_anything_ran() -> None:
    model = _net()
    engine = ablate.Engine(model, ComponentIndex.from_model(model, KINDS))
    with pytest.raises(ablate.errors.GatingError) as caught:
        engine.explain()
    assert str(caught.value) == ("Nothing is known yet: give the engine example_inputs=, or call outputs() first.")


def test_compiled_and_scripted_models(inputs: Tensor, targets: Tensor) -> None:
    compiled: Any = torch.compile(_net())
    with pytest.raises(ablate.errors.GatingError) as caught:
        ablate.Engine(compiled, ComponentIndex.from_model(compiled, KINDS))
    assert str(caught.value) == (
        "This OptimizedModule is compiled: pass the module it was made of (model._orig_mod). The engine gates first "
        "and compiles after."
    )


# How the layouts of tensors are told: `a` and `b` alone, and both together.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], ExampleLayout | None]] = {
    "batch first": ((1, 3, 4), lambda a, b: torch.cat([a, b]), ExampleLayout(0)),
    "time-major": ((3, 1, 4), lambda a, b: torch.cat([a, b], 1), ExampleLayout(1)),
    "blocked": ((3, 4), lambda a, b: torch.cat([a, b]), ExampleLayout(0)),
    "in turn": ((3, 4), lambda a, b: torch.stack([a, b], 1).flatten(0, 1), ExampleLayout(0, blocked=False)),
    "in turn, inner": ((2, 3, 4), lambda a, b: torch.stack([a, b], 2).flatten(1, 2), ExampleLayout(1, blocked=False)),
    "reversed": ((3, 4), lambda a, b: torch.cat([b, a]), None),
    "along channels": ((3, 4), lambda a, b: torch.cat([a, b], 1), None),
    "mixed": ((3, 4), lambda a, b: torch.cat([a + b, b]), None),
    "another rank": ((3, 4), lambda a, b: torch.stack([a, b]), None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    shape, join, expected = LAYOUTS[name]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    assert find_layout(a, b, join(a, b), -1) == expected
    a[..., 1] = b[..., 1] = float("nan")
    a[..., 2] = b[..., 2] = float("inf")
    if name != "mixed":
        assert find_layout(a, b, join(a, b), -1) == expected
    constant = torch.zeros(3, 4)
    assert find_layout(constant, constant, torch.zeros(6, 4), -1) is None, "blocked or in turn: nothing tells"
    assert find_layout(None, b, b, -1) is None


def _report(model: nn.Module, inputs: Tensor) -> Any:
    model = model.double().eval()
    return probe(model, ComponentIndex.from_model(model, KINDS), inputs[:2].double())


def test_which_norms_may_be_folded(inputs: Tensor) -> None:
    assert _report(_net(), inputs).folds == [("0", "1")]
    assert _report(_with_norm(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))), inputs).folds == []

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = _net()

        def forward(self, x: Tensor) -> Tensor:
            between = self.body[0](x)
            logits: Tensor = self.body[1:](between) + between.mean()  # reads what is between
            return logits

    class EachAlone(Hooked):
        def forward(self, x: Tensor) -> Tensor:
            between = self.body[0](x)
            logits: Tensor = self.body[1:](between) + between.mean(dim=(1, 2, 3))[:, None]
            return logits

    assert _report(EachAlone(), inputs).folds == []
    with pytest.raises(ablate.errors.GatingError, match="influence each other"):
        _report(Hooked(), inputs)


def test_the_head_and_attention_are_found(inputs: Tensor) -> None:
    report = _report(_net(), inputs)
    assert (report.head, report.attention) == ("5", False)
    report = _report(nn.Sequential(_net(), nn.Softmax(dim=1)), inputs)
    assert report.head is None


def test_the_self_check_sees_a_broken_gate(inputs: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail checks nothing: each way of gating broken in turn."""
    from ablate.gating import gates, weights

    model = _net()
    index = ComponentIndex.from_model(model, KINDS)

    def forgets_the_bias(values: Tensor, gate: Tensor, baseline: Tensor | None, *rest: Any) -> Tensor:
        return apply(values, gate, None, *rest)

    def sets_half(self: Any, gates: Tensor) -> None:
        set_gates(self, gates)
        self.weight[: len(self.weight) // 2] = self.master[: len(self.weight) // 2]

    apply, set_gates = gates.apply_gate, weights._Weight.set_gates
    with monkeypatch.context() as patch:
        patch.setattr(weights._Weight, "set_gates", sets_half)
        message = _message(model, ablate.errors.GatingError, inputs, targets)
        assert message.startswith("Weight gating of this Sequential does not give what zeroing the weights by hand ")
        engine = ablate.Engine(model, index, self_check=False)
        engine.outputs(np.ones((1, len(index)), dtype=bool), inputs, targets)
    keep = ablate.KeepPlan(len(index), EXAMPLES, 0.3).take(0, EXAMPLES)
    with monkeypatch.context() as patch:
        patch.setattr(gates, "apply_gate", forgets_the_bias)
        engine = ablate.Engine(model, index)
        expected = ablate.reference_outputs(model, index, keep, inputs, targets)
        torch.testing.assert_close(engine.outputs(keep, inputs, targets), expected)  # weights are not at fault
        with pytest.raises(ablate.GatingError, match=r"^Module '0' cannot be gated per example: its gates do not do "):
            engine.example_outputs(keep.astype(np.float32), inputs, targets)
    ablate.Engine(model, index, example_inputs=inputs)


def test_a_model_that_keeps_a_copy_of_a_weight_is_refused(inputs: Tensor, targets: Tensor) -> None:
    class Cached(Pooled):
        kept: Tensor | None = None

        def hidden(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = self.fc.weight.detach().clone()
            return F.linear(x, self.kept, self.fc.bias)

    message = _message(Cached(), ablate.errors.GatingError, inputs, targets)
    assert "does not give what zeroing the weights by hand gives" in message


def test_an_index_of_another_axis_is_refused_per_example(inputs: Tensor, targets: Tensor) -> None:
    """A port that calls input channels outputs: right by weights, where only the slice counts, refused per example."""
    model = _net().eval()
    index = ComponentIndex([Port("linear_neuron", 0, "5", "5.weight", "out", 1, 4, 1, 3)])
    with pytest.raises(ablate.errors.GatingError, match=r"axis 1 of its weight is no out port of linear"):
        ablate.Engine(model, index).example_outputs(np.ones((EXAMPLES, 4)), inputs, targets)
    index = ComponentIndex([Port("linear_input", 0, "0", "0.weight", "in", 1, 3, 1, 36)])
    with pytest.raises(ablate.errors.GatingError, match=r"in ports of conv2d are not gated"):
        ablate.Engine(model, index).example_outputs(np.ones((EXAMPLES, 3)), inputs, targets)
    keep = ~np.eye(3, dtype=bool)
    expected = ablate.reference_outputs(model, index, keep, inputs, targets)
    torch.testing.assert_close(ablate.Engine(model, index).outputs(keep, inputs, targets), expected)


def test_a_model_that_changes_its_inputs_is_refused(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x.sub_(0.5))
            return logits

    before = images.clone()
    assert _message(Greedy(), ablate.errors.GatingError, images, labels) == (
        "This Greedy changes its inputs in place (an operation like x.sub_() or relu(inplace=True) on what it was "
        "given): the next keep-vector would see other inputs. Let its forward work on a copy."
    )
    assert torch.equal(images, before)


@pytest.mark.parametrize("seed", [43, 54, 161])
def test_dropout_that_does_the_same_twice_is_noticed_all_the_same(seed: int, inputs: Tensor, targets: Tensor) -> None:
    torch.manual_seed(seed)  # with these two runs drop the same of six logits
    model = REFUSED["dropout by a function"][0]()
    assert _message(model, ablate.errors.GatingError, inputs, targets).startswith(RANDOM)


class MovingAverage(nn.Module):
    """Subtracts a moving average that goes on moving in eval mode."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean())
        return x - self.mean


class Returning(nn.Module):
    """Returns something else than logits."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.made = _net(), made

    def forward(self, x: Tensor) -> Tensor:
        return self.made(self.net(x))


def test_a_buffer_that_goes_on_changing_is_named(inputs: Tensor, targets: Tensor) -> None:
    message = _message(nn.Sequential(MovingAverage(), *_net()), ablate.errors.GatingError, inputs, targets)
    assert message.startswith(
        "The model changes its buffer '0.mean' in eval mode, at every forward, so that its outputs"
    )


def test_complex_and_sparse_logits_are_named(inputs: Tensor, targets: Tensor) -> None:
    message = _message(Returning(lambda logits: logits * (1 + 1j)), ablate.DataError, inputs, targets)
    assert message.startswith("The model returned complex logits (complex")
    message = _message(Returning(torch.Tensor.to_sparse), ablate.DataError, inputs, targets)
    assert message.startswith("The model returns a sparse tensor of shape (2, ")
