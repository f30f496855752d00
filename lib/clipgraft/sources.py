"""Sources: the settings of where images and captions come from, one class per form people have them in.

A source says which columns, keys or files hold what; several captions of an image are told apart by a kind
(`caption`, `recaption`, `long`), and training says how often each kind is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails

Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Template = Annotated[str, Field(pattern=r"\{c\}")]
Patterns = str | Annotated[list[str], Field(min_length=1)]


class Settings(BaseModel):
    """Base of every section: no unknown keys, no changes after validation."""

    model_config = ConfigDict(extra="forbid", defer_build=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null(cls, raw: Any) -> Any:
        """`null` takes back what an overlay inherits; where it means something, it stays."""
        if not isinstance(raw, Mapping):
            return raw
        return {
            key: value for key, value in raw.items() if value is not None or not cls._is_back(key)
        }

    @classmethod
    def _is_back(cls, key: object) -> bool:
        """Whether a setting without a value is one that was not given."""
        field = cls.model_fields.get(str(key))
        return field is not None and type(None) not in get_args(field.annotation)

    @model_validator(mode="wrap")
    @classmethod
    def _booleans(cls, raw: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Pydantic takes `true` for 1."""
        found = handler(raw)
        for key, value in raw.items() if isinstance(raw, Mapping) else ():
            if _is_counted(value, getattr(found, key, None)):
                wrong = InitErrorDetails(type="float_type", loc=(key,), input=value)
                raise ValidationError.from_exception_data(cls.__name__, [wrong])
        return found


def _is_counted(raw: Any, got: Any) -> bool:
    """Whether a boolean has become a number, also in a list or mapping."""
    if isinstance(raw, Mapping) and isinstance(got, Mapping):
        raw, got = list(raw.values()), list(got.values())
    if isinstance(raw, list) and isinstance(got, list | tuple):
        return any(map(_is_counted, raw, got))
    return isinstance(raw, bool) and type(got) in (int, float)


Attribute = Literal["colour", "shape", "texture", "size", "position", "background"]


class ShapesSource(Settings):
    """The built-in generator: one object per picture, captions from templates (`data/shapes.py`)."""

    kind: Literal["shapes"]
    split: Literal["train", "renders", "combinations"] = Field(
        "train",
        description="renders: unseen pictures of the training combinations; combinations: held-out ones.",
    )
    num_samples: PositiveInt = 12_000
    image_size: PositiveInt = Field(64, description="Side of the picture in pixels.")
    noise: NonNegativeFloat = Field(
        0.03, description="Standard deviation of the pixel noise, 0..1."
    )
    num_captions: PositiveInt = 1
    mention: dict[Attribute, Fraction] = Field(
        default_factory=dict,
        description="How often a caption names an attribute, e.g. {texture: 0.7}; others keep their default.",
    )


# Published tables: the URL column, caption columns by kind, the column that names a sample, and the columns of a
# table without header.
PRESETS: dict[str, dict[str, Any]] = {
    "cc3m": {"captions": {"caption": "caption"}, "columns": ["caption", "url"]},
    "cc12m": {"captions": {"caption": "caption"}, "columns": ["url", "caption"]},
    "laion": {"url_column": "URL", "captions": {"caption": "TEXT"}},
    "datacomp": {"captions": {"caption": "text"}, "uid_column": "uid"},
    "dfn_2b": {"captions": {"caption": "text"}, "uid_column": "uid"},
    "recap_datacomp": {"captions": {"caption": "org_caption", "recaption": "re_caption"}},
}


class UrlSource(Settings):
    """A table of image URLs and captions, downloaded by img2dataset."""

    kind: Literal["urls"]
    table: Patterns = Field(
        description="Parquet, CSV, TSV or JSON lines (also .gz): paths, globs, {a,b} or fsspec URLs."
    )
    preset: Literal["cc3m", "cc12m", "laion", "datacomp", "dfn_2b", "recap_datacomp"] | None = (
        Field(
            None,
            exclude=True,
            description="Columns of a published table; the keys below override it.",
        )
    )
    columns: list[str] | None = Field(None, description="Columns of a CSV or TSV without header.")
    url_column: str = "url"
    captions: dict[Name, str] = Field(
        {"caption": "caption"}, description="Caption kind: column. Empty cells are no captions."
    )
    uid_column: str | None = Field(None, description="Column that names the samples.")
    image_size: PositiveInt = Field(256, description="Longer images are shrunk to this short side.")
    min_success: Fraction = Field(
        0.5, description="Fail if a smaller share of the URLs could be had. Part of no version."
    )
    allow_local_files: bool = Field(False, description="Let `file://` URLs read local files.")
    allow_private_addresses: bool = Field(
        False, description="Let URLs reach loopback, private and link-local addresses."
    )
    timeout_seconds: PositiveInt = 10
    retries: NonNegativeInt = 1

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, raw: Any) -> Any:
        """Fill in what the preset says, so that versions depend on the columns, not on a name."""
        known = PRESETS.get(raw.get("preset") or "", {}) if isinstance(raw, dict) else {}
        return {**known, **raw} if known else raw


class TarSource(Settings):
    """WebDataset tars: `KEY.jpg` with `.txt`, `.json` (captions, labels) or `.cls` (class number)."""

    kind: Literal["tars"]
    tars: Patterns = Field(
        description="Paths, globs, {000..099} or fsspec URLs (s3://, https://, hf://), which are copied; "
        "environment variables allowed."
    )
    captions: dict[Name, str] | None = Field(
        None,
        description="Caption kind: key of the sample's JSON, or `txt`. Default: `captions`, else .txt, else `caption`.",
    )
    uid_key: str | None = Field(
        None, description="Key of the JSON that names the samples, e.g. FastCLIP's `key`."
    )
    classes: str | None = Field(
        None, description="Text file with one class name per line (line = .cls)."
    )


class FolderSource(Settings):
    """A folder of images, each with a caption beside it, `x.jpg` and `x.txt`, as img2dataset's `files` too."""

    kind: Literal["folder"]
    folder: str


class ClassFolderSource(Settings):
    """A folder per class: `dog/1.jpg`. For training, captions are made from templates."""

    kind: Literal["class_folder"]
    folder: str
    class_names: dict[str, str] = Field(
        default_factory=dict, description="Folder: class name, e.g. {n02084071: dog}."
    )
    templates: Annotated[list[Template], Field(min_length=1)] = Field(
        ["a photo of a {c}"], description="Captions, with {c} for the class."
    )


class CocoSource(Settings):
    """COCO's caption JSON, or Karpathy's splits of COCO and Flickr (`dataset_coco.json`)."""

    kind: Literal["coco"]
    annotations: str = Field(description="The JSON file.")
    images: str = Field(description="Folder of the images.")
    split: list[str] | None = Field(
        None, description="Karpathy: images of these splits, e.g. [train, restval]."
    )


class ShareGpt4vSource(Settings):
    """ShareGPT4V's JSON: conversations about images; kinds `long`, and `short` (its first sentence)."""

    kind: Literal["sharegpt4v"]
    annotations: str = Field(description="The JSON file.")
    images: str = Field(description="Folder that the names of images start from.")


class ParquetSource(Settings):
    """Parquet files with image bytes inside, as Hugging Face data sets ship them."""

    kind: Literal["parquet"]
    files: Patterns = Field(description="Paths, globs, {a,b} or fsspec URLs (hf://, s3://).")
    image_column: str = "image"
    captions: dict[Name, str] = Field(
        default_factory=dict, description="Caption kind: column; a list is several captions."
    )
    label_column: str | None = Field(
        None, description="Column of class numbers or names; names come from the file's metadata."
    )
    classes: str | None = Field(
        None, description="Text file with one class name per line, if the metadata has none."
    )
    uid_column: str | None = Field(None, description="Column that names the samples.")

    @model_validator(mode="after")
    def _has_text(self) -> ParquetSource:
        if not self.captions and self.label_column is None:
            raise ValueError(
                "neither captions nor label_column is given. Hint: captions: {caption: COLUMN}"
            )
        return self


OneSource = Annotated[
    ShapesSource
    | UrlSource
    | TarSource
    | FolderSource
    | ClassFolderSource
    | CocoSource
    | ShareGpt4vSource
    | ParquetSource,
    Discriminator("kind"),
]


class MixedSource(Settings):
    """Several sources as one data set; each is downloaded by a job of its own."""

    kind: Literal["mixed"]
    sources: Annotated[dict[Name, OneSource], Field(min_length=1)] = Field(
        description="By name; samples remember which they came from."
    )


Source = Annotated[OneSource | MixedSource, Discriminator("kind")]
SOURCE_KINDS = {
    get_args(source.model_fields["kind"].annotation)[0]
    for source in (*get_args(get_args(OneSource)[0]), MixedSource)
}
