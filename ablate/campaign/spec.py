"""CampaignSpec: everything a campaign is, from Python objects or a TOML file; all its problems are reported at once."""

from __future__ import annotations

import copy
import os
import tomllib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Annotated, Any, Self

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from torch import nn

from ablate.ablation import Ablation, MeanAblation, ScaleAblation
from ablate.campaign.problems import FRACTION_TAGS, check_names, check_place, explain, short
from ablate.data.examples import Examples
from ablate.devices import check_device_name
from ablate.engine.checks import require_device
from ablate.engine.engine import Engine
from ablate.engine.gated_model import Speed
from ablate.errors import SpecError
from ablate.immutable import FrozenDict, Immutable
from ablate.index.components import ComponentIndex
from ablate.index.flow import seen_with
from ablate.loading.load import check_tokens, load_data, load_model
from ablate.loading.sources import AnyData, AnyModel, DataSource, ModelSource, OpenClipModel
from ablate.outputs import Output, get_output
from stores.format.groups import Location
from stores.storage.places import is_remote, resolve, user_path


class ComponentsSpec(BaseModel):
    """Which components: the arguments of `ComponentIndex.from_model`, or of `from_preset`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str | None = None
    kinds: tuple[str, ...] | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()


class SpeedSpec(BaseModel):
    """How the model runs: the arguments of `Speed`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fold: bool | None = None
    channels_last: bool | None = None
    compile: bool | str | None = None
    attention: str | None = None


Fraction = Annotated[float, Field(gt=0, lt=1)]
LOADED = ("model", "data", "output")  # what the model and the examples follow from


def _one_or_several(value: Any) -> str:
    return FRACTION_TAGS[isinstance(value, (list, tuple))]


class _Settings(BaseModel):
    """The part of a spec that is the same in TOML and Python."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)

    rows: int | None = Field(default=None, ge=1)
    passes: Any = 100
    ablate_fraction: Annotated[
        Annotated[Fraction, Tag("one")] | Annotated[tuple[Fraction, ...], Field(min_length=1), Tag("several")],
        Discriminator(_one_or_several),
    ]
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: str = "float32"
    mode: str = "auto"
    output_key: str | int | None = None
    ablation_factor: float | None = Field(default=None, allow_inf_nan=False)
    batch_size: int | None = Field(default=None, ge=1)
    memory_budget: int | None = Field(default=None, ge=1)
    speed: SpeedSpec = SpeedSpec()
    block_rows: int = Field(default=64, ge=1)
    device: str = "auto"
    store: str | None = None
    storage: Annotated[dict[str, str | int | float | bool], AfterValidator(FrozenDict)] = FrozenDict()
    compact: bool = False
    components: ComponentsSpec = ComponentsSpec()

    @field_validator("passes")
    @classmethod
    def _passes(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 2):
            raise ValueError(f"got {short(value)}, expected 'auto' or an integer of at least 2")
        return value

    @field_validator("ablate_fraction")
    @classmethod
    def _fractions_differ(cls, value: Any) -> Any:
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise ValueError(f"got {short(list(value))}, expected numbers that differ")
        return value

    @field_validator("device")
    @classmethod
    def _a_device(cls, name: str) -> str:
        try:
            torch.device("cpu" if name == "auto" else name)
        except RuntimeError:
            raise ValueError(f"got {name!r}, expected auto, cpu, cuda or cuda:0, cuda:1, ...") from None
        return name


def _or(is_object: Callable[[Any], bool]) -> WrapValidator:
    """Lets such a Python object through as it is; everything else must be what a file may say."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return value if is_object(value) else handler(value)

    return WrapValidator(validate)


def _is_data(value: Any) -> bool:
    return isinstance(value, Examples) or (hasattr(value, "__getitem__") and not isinstance(value, (Mapping, str)))


class _FileSpec(_Settings):
    model: ModelSource
    data: DataSource
    output: str = "margin"
    ablation: str = "zero"


class _PythonSpec(_Settings):
    model: Annotated[ModelSource, _or(lambda value: isinstance(value, nn.Module))]
    data: Annotated[DataSource, _or(_is_data)]
    output: Annotated[str, _or(lambda value: isinstance(value, Output))] = "margin"
    ablation: Annotated[str, _or(lambda value: isinstance(value, Ablation))] = "zero"
    index: ComponentIndex | None = None


def _checked(values: Mapping[str, Any], where: str, schema: type[_Settings]) -> _Settings:
    """Returns a spec's values as its settings, or raises SpecError with everything that is wrong with them."""
    problems: list[str] = []
    settings: Any = None
    try:
        settings = schema.model_validate(values)
    except ValidationError as error:
        problems += explain(error, schema)
    problems += [*check_names(values), *check_place(values)]
    if values.get("index") is not None and "components" in values:
        problems.append("components: given beside index. Give one of the two.")
    if problems:
        raise SpecError(where, problems)
    return settings  # type: ignore[no-any-return]


class CampaignSpec(Immutable):
    """A campaign: model, data, components, output, keep plan, and how to run it.

    Keyword Args:
      model: An `nn.Module`, or a table like `{"source": "torchvision", "name": "resnet18"}`.
      data: `(inputs, targets)`, a `Dataset`, `Examples`, or a table like `{"source": "arrays", "path": "x.npz"}`.
      rows: Number of keep-vectors that a campaign runs; an estimate from gradients needs none.
      passes: Passes of the gradient estimator, or "auto"; a campaign needs none.
      ablate_fraction: Share of components switched off in each keep-vector; of several, row i has number
        i % their count.
      seed: Of the keep-vectors; row i depends on (seed, i) alone.
      output: A registered name or an instance of a subclass of `Output`.
      output_key: As for `Engine`.
      components: `{"kinds": [...], "include": [...], "exclude": [...]}`, or `{"preset": "coar-resnet"}`.
      index: A ready ComponentIndex, instead of `components`.
      ablation: `zero`, `mean` (over the campaign's own examples), `scale` (by `ablation_factor`), or an instance.
      precision, mode, batch_size, memory_budget: As for `Engine`.
      speed: `{"fold": ..., "channels_last": ..., "compile": ..., "attention": ...}`, as for `Speed`.
      device: As for `Engine`; `auto` is CUDA where there is one, else the CPU.
      block_rows: Keep-vectors per block, the unit that is computed, stored and resumed.
      store: Where the campaign is stored: a path, or s3://, gs://, az:// or memory://.
      storage: Options of object storage, e.g. `{"endpoint": "https://...", "region": "..."}`; never credentials, which
        are taken from the environment. Not written into the store.
      compact: Add copies for reading single examples when the campaign is finished (`coar compact`). Workers of a job
        array leave that to you.

    Raises:
      SpecError: With every problem of the spec, not only the first.
    """

    def __init__(self, *, where: str = "CampaignSpec", **values: Any) -> None:
        self.settings: _Settings = _checked(values, where, _PythonSpec)
        self._values: Any = self.settings
        self._where = where

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> CampaignSpec:
        """Returns the spec in a TOML file. Paths in it are relative to the working directory.

        Raises:
          SpecError: The file is missing, is no TOML, or has problems: all of them.
        """
        file = user_path(path)
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(str(file), [f"cannot be read: {error.strerror}"]) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SpecError(str(file), [f"is no TOML: {error}"]) from error
        except ValueError as error:  # a path that no system knows
            raise SpecError(repr(str(file)), [f"cannot be read: {error}"]) from error
        values.pop("edit", None)  # the same file may say how to edit the model: no part of the campaign
        return cls.from_dict(values, str(file))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> CampaignSpec:
        """Returns the spec that `describe` gave, e.g. from a store's header; its model and data must be loadable."""
        spec = cls.__new__(cls)
        return spec._holding(_checked(values, where, _FileSpec), where)

    def place(self, store: Location | None = None) -> Location | None:
        """Returns where the campaign is stored: at `store`, or where the spec says, with the spec's storage options.

        Raises:
          stores.StoreError: There can be no store there.
        """
        location = self.settings.store if store is None else store
        if location is None:
            return None
        return resolve(location, self.settings.storage if is_remote(location) or store is None else None)

    def with_storage(self, storage: Mapping[str, str | int | float | bool]) -> CampaignSpec:
        """Returns the same campaign with these options of object storage before its own. Mutates nothing."""
        return self.replace(storage={**self.settings.storage, **storage})

    def replace(self, **values: Any) -> Self:
        """Returns the same campaign but for these keywords; a model and data once loaded are kept. Mutates nothing.

        Raises:
          SpecError: With every problem of what comes out.
        """
        given = {name: getattr(self.settings, name) for name in self.settings.model_fields_set}
        changed = copy.copy(self)._holding(_checked({**given, **values}, self._where, _PythonSpec), self._where)
        if not values.keys().isdisjoint(LOADED):
            vars(changed).pop("_loaded", None)
        return changed

    def _holding(self, settings: _Settings, where: str) -> Self:
        """Gives a spec that is being made its settings."""
        vars(self).update(settings=settings, _values=settings, _where=where, _closed=True)
        return self

    def load(self) -> tuple[nn.Module, Examples]:
        """Returns the model and the examples; loads them on the first call."""
        return self._loaded

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Examples]:
        model, data = self._values.model, self._values.data
        transform = None
        embeds = isinstance(model, OpenClipModel) and not model.has_classes
        if isinstance(model, AnyModel):
            model, transform = load_model(model)
        if isinstance(data, AnyData):
            data = load_data(data, transform, None if embeds else model)
        examples = Examples.of(data, labelled=get_output(self.output).needs_labels)
        check_tokens(model, examples)
        return model, examples

    def make_index(self, model: nn.Module) -> ComponentIndex:
        """Returns the component index the spec asks for."""
        given = getattr(self._values, "index", None)
        if given is not None:
            return given  # type: ignore[no-any-return]
        chosen = self.settings.components
        if chosen.preset is not None:
            return ComponentIndex.from_preset(model, chosen.preset, include=chosen.include, exclude=chosen.exclude)
        with nullcontext() if self._loaded is None else seen_with(model, self._loaded[1].model_inputs(0, 1)):
            return ComponentIndex.from_model(model, chosen.kinds, include=chosen.include, exclude=chosen.exclude)

    def make_engine(self, model: nn.Module, index: ComponentIndex, examples: Examples | None = None) -> Engine:
        """Returns the engine the spec asks for; device `auto` is CUDA where there is one, else where the model is.

        `examples` are what mean ablation takes its means from.
        """
        settings = self.settings
        device: str | None = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else None
        require_device(device)
        return Engine(
            model,
            index,
            self.output,
            output_key=settings.output_key,
            device=device,
            precision=settings.precision,
            ablation=self._ablation(examples),
            mode=settings.mode,
            batch_size=settings.batch_size,
            memory_budget=settings.memory_budget,
            speed=Speed(**settings.speed.model_dump()),
        )

    def _ablation(self, examples: Examples | None) -> str | Ablation:
        if self._values.ablation == "mean":
            return MeanAblation(self.load()[1] if examples is None else examples)
        if self._values.ablation == "scale":
            return ScaleAblation(self.settings.ablation_factor or 0.0)
        return self._values.ablation  # type: ignore[no-any-return]

    @property
    def output(self) -> str | Output:
        """The output's name or instance."""
        return self._values.output  # type: ignore[no-any-return]

    @property
    def loadable(self) -> bool:
        """Whether model, data and output are named, so that the spec alone can run the campaign again."""
        named = isinstance(self._values.model, BaseModel) and isinstance(self._values.data, BaseModel)
        by_name = isinstance(self.output, str) and isinstance(self._values.ablation, str)
        return named and by_name and getattr(self._values, "index", None) is None

    def describe(self) -> dict[str, Any]:
        """Returns the spec as JSON-able values; Python objects by their type."""
        elsewhere = {"model", "data", "output", "ablation", "index"}
        values = self.settings.model_dump(mode="json", exclude=elsewhere | {"storage", "compact"})
        for name in ("model", "data"):
            value = getattr(self._values, name)
            values[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else _python_object(value)
        ablation = self._values.ablation
        values["output"] = self.output.name if isinstance(self.output, Output) else self.output
        values["ablation"] = ablation.describe() if isinstance(ablation, Ablation) else ablation
        return values


def _python_object(value: Any) -> dict[str, str]:
    return {"source": "python", "type": f"{type(value).__module__}.{type(value).__qualname__}"}


class PlacedSpec(CampaignSpec):
    """A spec that runs on another device than it says, and describes itself as before.

    Where a worker runs is no part of the campaign: stores filled by `cuda:0` and `cuda:1` are one.
    """

    _given: CampaignSpec

    def replace(self, **values: Any) -> Self:
        """Returns the same campaign on the same device, but for these keywords. Mutates nothing."""
        changed = super().replace(**values)
        vars(changed)["_given"] = self._given.replace(**values)
        return changed

    def describe(self) -> dict[str, Any]:
        """Returns the spec as it was given."""
        return self._given.describe()


def on_device(spec: CampaignSpec, device: str | None) -> CampaignSpec:
    """Returns the same campaign to be run on a device; on its own one if that is None. Mutates nothing."""
    if device is None:
        return spec
    check_device_name(device)
    placed = PlacedSpec.__new__(PlacedSpec)
    vars(placed).update({**vars(spec.replace(device=device)), "_given": spec})
    return placed
