"""What `vlmport.json` says: the manifest of a package as frozen dataclasses.

Preprocessing, prompt, positions and cache are data here. The runtime holds one function a named strategy and never asks
which family a package came from. Pixel counts are in pixels, patch and merge sizes in pixels and patches a side.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "ROLES",
    "SCHEMA",
    "SQUARE_STRATEGIES",
    "Allocation",
    "CacheSpec",
    "Calibration",
    "ConnectorSpec",
    "FileEntry",
    "GenerationDefaults",
    "GraphFile",
    "ImageSpec",
    "Manifest",
    "PositionSpec",
    "PromptSpec",
    "RangeRecord",
    "RatioTileSpec",
    "SliceSpec",
    "Source",
    "SquareSpec",
    "TensorInfo",
    "TileTags",
    "TileTokens",
    "Variant",
    "VideoSpec",
    "VisionSpec",
]

SCHEMA = "vlmport-package/1"
SQUARE_STRATEGIES = ("center_crop", "pad_square", "stretch")
ROLES = ("vision_encoder", "projector", "classifier", "patch_embed", "embed_tokens", "decoder")


@dataclass(frozen=True)
class Source:
    """The checkpoint that a package was made from."""

    name: str  # folder name of the checkpoint
    model_type: str
    dtype: Literal["float32", "float16", "bfloat16"]  # of the stored weights
    num_parameters: int
    files: dict[str, "FileEntry"]  # config and weight files as they were read


@dataclass(frozen=True)
class FileEntry:
    sha256: str  # hex
    size: int  # bytes


@dataclass(frozen=True)
class SliceSpec:
    """How a large image is cut into an overview and tiles (runtime/slices.py)."""

    scale_resolution: int  # pixels; a tile has about as many as a square of this side
    max_slices: int  # the most tiles of an image, the overview aside
    enabled: bool = True  # False: images go in at their own size

    def __post_init__(self) -> None:
        _above_zero(self, "scale_resolution", "max_slices")


@dataclass(frozen=True)
class RatioTileSpec:
    """How an image becomes a grid of squares as near to its shape as can be (runtime/ratio_tiles.py)."""

    side: int  # pixels of a tile
    min_tiles: int
    max_tiles: int  # of the grid; a grid of several has the whole image behind it, in one more tile

    def __post_init__(self) -> None:
        _above_zero(self, "side", "min_tiles", "max_tiles")
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} is over max_tiles {self.max_tiles}")


@dataclass(frozen=True)
class SquareSpec:
    """How an image of any shape becomes a square (runtime/square.py)."""

    side: int  # pixels; what is left of a merge block at the right and bottom is cut off after that
    resized: int  # pixels of the short side before what is over `side` is cut off; `side` where nothing is
    fill: tuple[int, int, int] = (0, 0, 0)  # RGB of what is added around an image, where its strategy adds

    def __post_init__(self) -> None:
        _above_zero(self, "side", "resized")
        if self.resized < self.side:
            raise ValueError(f"resized is {self.resized}, less than side {self.side}; there is nothing to fill it with")
        if any(not 0 <= value < 256 for value in self.fill):
            raise ValueError(f"fill is {list(self.fill)}; a colour has three numbers from 0 to 255")


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes patches. `strategy` names a function of runtime/image.py."""

    strategy: str
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    small_sides_any_ratio: bool = False  # no limit of the sides' ratio where one is under a merge block
    slices: SliceSpec | None = None  # of the strategy "slices", which has no pixel limits
    max_sides: tuple[int, int] | None = None  # of the strategy "native": height and width of the largest image
    square: SquareSpec | None = None  # of the strategies of runtime/square.py, which have no pixel limits
    ratio_tiles: RatioTileSpec | None = None  # of the strategy "ratio_tiles", which has no pixel limits

    def __post_init__(self) -> None:
        _above_zero(self, "patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels")
        if (self.strategy == "slices") != (self.slices is not None):
            raise ValueError(f"slices does not go with strategy {self.strategy!r}; export the checkpoint again")
        if (self.strategy == "ratio_tiles") != (self.ratio_tiles is not None):
            raise ValueError(f"ratio_tiles does not go with strategy {self.strategy!r}; export the checkpoint again")
        if (self.strategy == "native") != (self.max_sides is not None):
            raise ValueError(f"max_sides does not go with strategy {self.strategy!r}; export the checkpoint again")
        if (self.strategy in SQUARE_STRATEGIES) != (self.square is not None):
            raise ValueError(f"square does not go with strategy {self.strategy!r}; export the checkpoint again")
        if self.square is not None and self.square.side < self.patch_size * self.merge_size:
            raise ValueError(f"square.side is {self.square.side}; it has to be a merge block at least")
        if self.max_sides is not None and any(side < 1 or side % self.patch_size for side in self.max_sides):
            raise ValueError(f"max_sides is {list(self.max_sides)}; both have to be multiples of the patch size")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std is {list(self.std)}; each has to be above 0")


@dataclass(frozen=True)
class VideoSpec:
    """How a clip becomes frames. `sampling` names a function of runtime/video.py; frames then go through ImageSpec."""

    sampling: str
    fps: float  # frames a second to aim for
    min_frames: int
    max_frames: int
    frame_multiple: int  # the number of sampled frames is a multiple of this
    default_fps: float  # of a list of frames that comes without one
    min_pixels: int | None = None  # a frame; None: frames of a clip keep their size until ImageSpec's strategy
    max_pixels: int | None = None  # a frame
    total_pixels: int | None = None  # over all frames of a clip
    max_slices: int | None = None  # of each frame of a sampled clip, unless the request says; None: as for images
    use_ids: bool | None = None  # the same for the numbers of pictures
    num_frames: int | None = None  # of "midpoints": sample so many of any clip, unless the request says
    gif_fps: float | None = None  # what a .gif is taken for, whatever it says; None: what it says

    def __post_init__(self) -> None:
        if (self.sampling == "midpoints") != (self.num_frames is not None):
            raise ValueError(f"num_frames does not go with sampling {self.sampling!r}; export the checkpoint again")
        limits = {"min_pixels", "max_pixels", "total_pixels", "max_slices", "num_frames", "gif_fps"}
        given = {name for name in limits if getattr(self, name) is not None}
        _above_zero(self, *vars(self).keys() - {"sampling", "use_ids"} - limits | given)


@dataclass(frozen=True)
class ConnectorSpec:
    """How a projector makes tokens of several frames (runtime/connector.py).

    "windows": of each block of `kernel` frames, rows and columns one token, with `padding` places of zeros around all
    of them. "mean": the frames of a clip become one, each place of it a token.
    """

    strategy: Literal["windows", "mean"]
    num_frames: int  # that an image stands for
    kernel: tuple[int, int, int] = (1, 1, 1)
    padding: int = 0

    def __post_init__(self) -> None:
        _above_zero(self, "num_frames")
        if min(self.kernel) < 1 or not 0 <= self.padding <= 1:
            raise ValueError(f"kernel {list(self.kernel)} and padding {self.padding} do not go together")


@dataclass(frozen=True)
class VisionSpec:
    """Index inputs of the vision encoder (or patch embedding) and the projector, and how many rows come of an image.

    Each name is a function of runtime/vision_inputs.py.
    """

    inputs: tuple[str, ...]
    merge_size: int
    window_blocks: int  # side of an attention window, in merge blocks; 0 where there are no windows
    projector_inputs: tuple[str, ...] = ()
    position_side: int = 0  # rows and columns of a table of learned positions; 0 where there is none
    first_rows: int = 0  # tokens in front of an image's merge blocks
    row_ends: int = 0  # tokens at the end of each row of its merge blocks
    connector: ConnectorSpec | None = None  # a projector that takes several frames at once

    def __post_init__(self) -> None:
        if min(self.first_rows, self.row_ends) < 0:
            raise ValueError(f"first_rows {self.first_rows} or row_ends {self.row_ends} is negative")


@dataclass(frozen=True)
class TileTokens:
    """How a picture of an overview and tiles is spelled: `start`, `filler` as often as a tile has features, `end`.

    Tiles have `tile_start` and `tile_end` instead, and a line break after each row of the grid but the last. The number
    of the picture in the conversation, from 0, comes first where ids are used.
    """

    start: str
    end: str
    tile_start: str
    tile_end: str
    filler: str
    num_fillers: int
    id_start: str
    id_end: str
    use_ids: bool  # unless the request says

    def __post_init__(self) -> None:
        _above_zero(self, "num_fillers")


@dataclass(frozen=True)
class TileTags:
    """How a picture is spelled whose tiles have texts of their own: `start`, the tiles, the whole image, `end`.

    In front of a tile stands `tile` with its number, from 1, for "{number}", and in front of the whole image `whole`.
    These are text to the tokenizer. Behind each stands `filler`, a token, as often as a tile has features.
    """

    start: str
    end: str
    tile: str
    whole: str
    filler: str
    num_fillers: int

    def __post_init__(self) -> None:
        _above_zero(self, "num_fillers")
        if "{number}" not in self.tile:
            raise ValueError(f"tile is {self.tile!r}, without {{number}}; export the checkpoint again")


@dataclass(frozen=True)
class PromptSpec:
    """How messages become token ids. The template is chat_template.jinja of the package."""

    image_placeholder: str  # the text that stands once for an image in the rendered template
    video_placeholder: str
    protected_tokens: tuple[str, ...]  # never special when they come from a user's text
    template_options: dict[str, Any]  # defaults of the template's own switches
    joiner: str | None = None  # between the parts of a message, for a template that takes texts; None: it takes parts
    image_placeholder_id: int | None = None  # below 0: the placeholder is no token, and this stands for it in ids
    video_placeholder_id: int | None = None
    max_tokens: int | None = None  # prompts with images are cut off after so many, as upstream does; None: never
    tiles: TileTokens | None = None  # pictures of several tiles; None: a picture is its placeholder, repeated
    tile_tags: TileTags | None = None  # the same for tiles that have texts of their own
    leading_tokens: tuple[str, ...] = ()  # in front of every prompt whose text does not begin with the first of them

    def __post_init__(self) -> None:
        for name in ("image_placeholder_id", "video_placeholder_id"):
            value = getattr(self, name)
            if value is not None and value >= 0:
                raise ValueError(f"{name} is {value}; it has to be below 0, where no token is")
        if self.max_tokens is not None:
            _above_zero(self, "max_tokens")
        if self.tiles is not None and self.tile_tags is not None:
            raise ValueError("tiles and tile_tags are both given; a picture is spelled in one way")


@dataclass(frozen=True)
class PositionSpec:
    """How tokens get positions. `strategy` names a function of runtime/positions.py."""

    strategy: str  # "sequential" or "mrope"
    video_rule: str | None = None  # mrope: one of positions.VIDEO_RULES
    tokens_per_second: float | None = None  # mrope: None counts frames, not seconds
    hidden_token_ids: tuple[int, ...] = ()  # sequential: of a prompt, unseen by all others and without a position


@dataclass(frozen=True)
class CacheSpec:
    """Key/value cache of the decoder, [batch, num_kv_heads, length, head_dim] a layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Literal["float32", "float16"]
    max_length: int  # tokens; the longest sequence that the model was made for

    def __post_init__(self) -> None:
        _above_zero(self, "num_layers", "num_kv_heads", "head_dim", "max_length")


@dataclass(frozen=True)
class GenerationDefaults:
    """generation_config.json, as far as the runtime obeys it."""

    eos_token_ids: tuple[int, ...]
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    penalty_sees_prompt: bool = True  # False: the penalty counts generated tokens alone


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph. `shape` has a text a dimension: a number, or the name of a dynamic axis."""

    dtype: str  # numpy's name: "float32", "int64"
    shape: tuple[str, ...]


@dataclass(frozen=True)
class GraphFile:
    """One ONNX graph: file names inside onnx/, and the label of the recipe its weights were stored by.

    Inputs, outputs and formats are here so that a package can be looked at without loading its graphs.
    """

    graph: str
    data: str
    precision: str
    inputs: dict[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])
    outputs: dict[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])
    formats: dict[str, str] = field(default_factory=dict[str, str])  # parameter -> how it is stored: "float32", "int4"
    shared: tuple[str, ...] = ()  # data files of other graphs that this one reads too: a tied table is stored once

    @property
    def files(self) -> tuple[str, ...]:
        """All names: the graph, its data, and data that it shares."""
        return (self.graph, self.data, *self.shared)


@dataclass(frozen=True)
class Calibration:
    """The data that codes of a variant were found on, and how their rows counted."""

    name: str  # of the folder
    sha256: str  # of the samples and their images
    num_samples: int
    num_tokens: int  # of prompts and answers
    seed: int  # that drew the samples from the folder
    image_weight: float  # of a row of the decoder
    text_weight: float
    answer_weight: float


@dataclass(frozen=True)
class Allocation:
    """How bits were chosen weight by weight.

    KL is KL(float || variant) of answer tokens, with images in context, in nats.
    """

    kl_calibration: float  # mean over the samples that bits were chosen by
    kl_promised: float  # what the mean over other samples like them stays under: a bound of 95 %
    kl_held_out: float  # mean over samples that bits were not chosen by
    num_samples: int
    num_held_out: int
    num_answer_tokens: int  # of both
    calibration: Calibration  # the data
    sensitivity: dict[str, dict[str, float]]  # "role/parameter" -> bits -> mean KL where it alone has so many
    max_bytes: int | None = None  # the budget: one of the two
    max_kl: float | None = None


@dataclass(frozen=True)
class RangeRecord:
    """What stays float32 in a variant that computes in float16, as it leaves, or nearly, its range on calibration data.

    Empty where nothing did. Names are "role/module input", "role/module output", or those of a value between modules.
    """

    limit: float  # largest absolute value that counts as safe
    exceeded: dict[str, float]  # what went beyond it -> its largest absolute value
    float32: tuple[str, ...]  # "role/parameter": weights that are computed with in float32
    num_operators: int  # that compute in float32 for it, those of these weights among them


@dataclass(frozen=True)
class Variant:
    name: str
    recipe: dict[str, Any]  # quant.recipe.Recipe as JSON
    graphs: dict[str, GraphFile]  # by role
    calibration: Calibration | None = None  # None where no method of the recipe looks at data
    allocation: Allocation | None = None  # None where the recipe's author chose the bits
    ranges: RangeRecord | None = None  # None where nobody watched how large values get


@dataclass(frozen=True)
class Manifest:
    schema: str
    family: str  # informative: nothing branches on it
    target: Literal["cpu", "cuda"]
    source: Source
    roles: tuple[str, ...]
    variants: dict[str, Variant]
    versions: dict[str, str]
    files: dict[str, FileEntry]  # every file of the package but the manifest and parity/
    image: ImageSpec | None = None
    video: VideoSpec | None = None
    vision: VisionSpec | None = None
    prompt: PromptSpec | None = None
    positions: PositionSpec | None = None
    cache: CacheSpec | None = None
    generation: GenerationDefaults | None = None
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema!r} is not {SCHEMA!r}: export the checkpoint again with this version")
        if not self.variants:
            raise ValueError("variants is empty; export the checkpoint again")
        unknown = sorted(set(self.roles) - set(ROLES))
        if unknown:
            raise ValueError(f"unknown role {unknown[0]!r}; known roles are {', '.join(ROLES)}")
        for name, variant in self.variants.items():
            if set(variant.graphs) != set(self.roles):
                raise ValueError(f"variant {name!r} has graphs for {sorted(variant.graphs)}, not {sorted(self.roles)}")


def _above_zero(spec: Any, *names: str) -> None:
    """Raises ValueError naming the first field, by name, that is not a finite number above 0."""
    for name in sorted(names):
        value = getattr(spec, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it has to be above 0")
