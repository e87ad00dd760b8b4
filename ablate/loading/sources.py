"""What a spec may say about models and data: one class per source, each with exactly the keys that it knows."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stores.storage.places import user_path


class Source(BaseModel):
    """A table with a `source`: the name of the loader, and what it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("path", "root", "checkpoint", "cache", "tokenizer", check_fields=False)
    @classmethod
    def _home(cls, value: Any) -> Any:
        return str(user_path(value)) if isinstance(value, str) and value.startswith("~") else value

    @classmethod
    def tag(cls) -> str:
        """Returns the name of this source, as `source` has it."""
        return str(get_args(cls.model_fields["source"].annotation)[0])


class WithWeights(Source):
    """A model whose weights may come from a file; `checkpoint_key`: which, of a file that holds several sets."""

    checkpoint: str | None = None
    checkpoint_key: str | None = None

    @model_validator(mode="after")
    def _a_key_needs_a_file(self) -> Self:
        if self.checkpoint_key is not None and self.checkpoint is None:
            raise ValueError("checkpoint_key needs a checkpoint, the file whose weights it names")
        return self


class DigitsModel(Source):
    """The demo's residual CNN on handwritten digits, trained by seed and cached."""

    source: Literal["digits"]
    seed: int = Field(default=0, ge=0)
    cache: str | None = None


class TorchvisionModel(WithWeights):
    """A torchvision classification model by name. Weights: a local checkpoint, or random by seed."""

    source: Literal["torchvision"]
    name: str
    classes: int = Field(default=1000, ge=2)
    seed: int = Field(default=0, ge=0)


class TimmModel(WithWeights):
    """A timm model by name. Weights: a local checkpoint, or random by seed.

    `image_size`: in pixels, for transformers that are made for one size; None: the model's own.
    """

    source: Literal["timm"]
    name: str
    classes: int = Field(default=1000, ge=2)
    image_size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)


class OpenClipModel(WithWeights):
    """An open_clip model by name: a zero-shot classifier of texts, or without texts the visual tower alone.

    Classes are `prompts`, one text each, or `classes`, each put into the {} of every one of `templates`. The checkpoint
    is of the whole model, both towers. `tokenizer`: a local folder, for a model whose own does not ship with open_clip.
    """

    source: Literal["open_clip"]
    name: str
    prompts: tuple[str, ...] | None = Field(default=None, min_length=2)
    classes: tuple[str, ...] | None = Field(default=None, min_length=2)
    templates: tuple[str, ...] = Field(default=("a photo of a {}.",), min_length=1)
    tokenizer: str | None = None
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_way(self) -> OpenClipModel:
        if self.prompts is not None and (self.classes is not None or "templates" in self.model_fields_set):
            raise ValueError("give either prompts, or classes and templates")
        if self.classes is None and "templates" in self.model_fields_set:
            raise ValueError("templates need classes to be put into them")
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong:
            raise ValueError(f"the template {wrong[0]!r} needs one {{}}, where the class goes")
        return self

    @property
    def has_classes(self) -> bool:
        """Whether the model gives logits, not embeddings."""
        return self.prompts is not None or self.classes is not None

    @property
    def texts(self) -> list[list[str]]:
        """The texts of each class; none for the visual tower alone."""
        if self.prompts is not None:
            return [[prompt] for prompt in self.prompts]
        return [[t.replace("{}", name) for t in self.templates] for name in self.classes or ()]


class TransformersModel(WithWeights):
    """A causal language model of transformers: a local folder, or a configuration with random weights by seed."""

    source: Literal["transformers"]
    path: str | None = None
    config: dict[str, Any] | None = None
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_way(self) -> TransformersModel:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path, a local folder with a config.json, or config with a model_type")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, e.g. 'gpt2'")
        return self


class PackagedModel(Source):
    """A trained network whose weights ship inside an installed package, by its name in `networks/packaged.py`."""

    source: Literal["packaged"]
    name: str


class FactoryModel(WithWeights):
    """A user's own model: `module:function`, called without arguments, returns an nn.Module or (model, transform)."""

    source: Literal["factory"]
    factory: str
    seed: int = Field(default=0, ge=0)


class DigitsData(Source):
    """Examples of the digits task: the first so many of each group, or a whole split."""

    source: Literal["digits"]
    seed: int = Field(default=0, ge=0)
    train_per_group: int = Field(default=0, ge=0)
    test_per_group: int = Field(default=0, ge=0)
    split: Literal["train", "validation", "test"] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> DigitsData:
        if (self.split is None) == (self.train_per_group + self.test_per_group == 0):
            raise ValueError("give either split, or train_per_group and test_per_group")
        return self


class ArraysData(Source):
    """A .npz file with `inputs`, `targets` and, if wanted, `ids`, `groups`, and `mean` and `std` of uint8 images."""

    source: Literal["arrays"]
    path: str


class ImageFolderData(Source):
    """A folder with one sub-folder of images per class, prepared as the model wants its images.

    `classes`: which label each folder has: "folders", "index", "imagenet", the names of the model's classes in their
    order, or a file of them. `white`: the number that is white, of images with more than 8 bits.
    """

    source: Literal["imagefolder"]
    path: str
    classes: str | tuple[str, ...] | None = None
    white: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class TorchvisionData(Source):
    """A torchvision data set whose files lie under `root`, prepared as the model wants its images."""

    source: Literal["torchvision"]
    name: str
    root: str
    split: str | None = None


class HuggingFaceData(Source):
    """Images of a Hugging Face data set on disk (`save_to_disk`), prepared as the model wants its images."""

    source: Literal["datasets"]
    path: str
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    group_column: str | None = None


class WildsData(Source):
    """Waterbirds or CelebA as WILDS lays them out under `root`, prepared as the model wants its images."""

    source: Literal["wilds"]
    name: Literal["waterbirds", "celebA"]
    root: str
    split: Literal["train", "val", "test"]


class TextData(Source):
    """A text file or a folder of .txt files, for language models: windows of `length` tokens, or lines.

    `tokenizer`: a folder with a tokenizer.json, or that file; None: the model's own, if it brings one, else bytes.
    """

    source: Literal["text"]
    path: str
    tokenizer: str | None = None
    length: int = Field(default=128, ge=1)
    per: Literal["window", "line"] = "window"


class FactoryData(Source):
    """A user's own data: `module:function` returns a Dataset, (inputs, targets, ...) or Examples.

    Called without arguments, or with the model's `transform` if it has a parameter of that name.
    """

    source: Literal["factory"]
    factory: str


AnyModel = DigitsModel | TorchvisionModel | TimmModel | OpenClipModel | TransformersModel | PackagedModel | FactoryModel
AnyData = (
    DigitsData | ArraysData | ImageFolderData | TorchvisionData | HuggingFaceData | WildsData | TextData | FactoryData
)
MODEL_SOURCES: tuple[type[Source], ...] = get_args(AnyModel)
DATA_SOURCES: tuple[type[Source], ...] = get_args(AnyData)
ModelSource = Annotated[AnyModel, Field(discriminator="source")]
DataSource = Annotated[AnyData, Field(discriminator="source")]
