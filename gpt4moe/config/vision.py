"""What the vision adapter is: image encoder, resampler, gated cross-attention."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.check import (
    require,
    require_count,
    require_flag,
    require_instance,
    require_number,
    require_positive,
)

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu")
POSITIONS = ("learned", "rotary")
NORMS = ("rms", "layer")
GATES = ("scalar", "vector")
SEEN = ("latest", "all")
# Scores among the features of a frame are as many squared for every head: beyond this it is a mistake of a size.
MOST_FEATURES = 65_536


def _choice(setting: str, value: object, choices: tuple[str, ...]) -> None:
    require(value in choices, setting, value, f"must be in {choices}")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A vision transformer (Dosovitskiy et al. 2021): an image to one feature a patch, and its leading tokens.

    `height` and `width` are pixels, multiples of a patch's: `patch_size` high and `patch_width` wide, None for as wide
    as high (PARSeq, Bautista and Atienza 2022, reads text in patches of 4 x 8), of at most `MOST_FEATURES` features a
    frame. `positions` are a learned table, or rotary over rows and columns (half of a head's dims each). `class_token`
    and `num_registers` learned tokens stand before the patches and are features too. `max_frames` above 1 adds a
    learned embedding to the features of each frame of a clip or tile of a page, which are alike otherwise, whatever
    their order. `norm_before` normalises what goes into the blocks (CLIP), `norm_after` what comes out (SigLIP). Pixels
    arrive as bytes and are scaled to [0, 1], less `pixel_mean`, over `pixel_std`, on the device.
    """

    height: int
    width: int
    patch_size: int
    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    patch_width: int | None = None
    positions: str = "learned"
    class_token: bool = False
    num_registers: int = 0
    max_frames: int = 1
    patch_bias: bool = True
    norm_before: bool = False
    norm_after: bool = True
    activation: str = "gelu_tanh"
    norm_epsilon: float = 1e-6
    rope_theta: float = 100.0
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("height", "width", "patch_size", "dim", "num_layers", "num_heads", "hidden_dim", "max_frames"):
            require_count(f"EncoderConfig.{name}", getattr(self, name))
        require_count("EncoderConfig.num_registers", self.num_registers, least=0)
        if self.patch_width is not None:
            require_count("EncoderConfig.patch_width", self.patch_width)
        of_width = "patch_size" if self.patch_width is None else "patch_width"
        for name, of, patch in zip(("height", "width"), ("patch_size", of_width), self.patch, strict=True):
            constraint, value = f"must be a multiple of {of} ({patch})", getattr(self, name)
            require(value % patch == 0, f"EncoderConfig.{name}", value, constraint, f"change {name} or {of}")
        constraint = f"cuts a frame of {self.height} x {self.width} pixels into {self.num_features:,} features, above "
        mend = "raise it, or lower height and width"
        few = self.num_features <= MOST_FEATURES
        require(few, "EncoderConfig.patch_size", self.patch_size, f"{constraint}{MOST_FEATURES:,}", mend)
        constraint = f"must be a multiple of num_heads ({self.num_heads})"
        require(self.dim % self.num_heads == 0, "EncoderConfig.dim", self.dim, constraint)
        _choice("EncoderConfig.positions", self.positions, POSITIONS)
        quarters = self.positions != "rotary" or self.dim // self.num_heads % 4 == 0
        constraint = f"must be a multiple of 4 for each of {self.num_heads} heads where positions are rotary"
        require(quarters, "EncoderConfig.dim", self.dim, constraint)
        for name in ("class_token", "patch_bias", "norm_before", "norm_after"):
            require_flag(f"EncoderConfig.{name}", getattr(self, name))
        _choice("EncoderConfig.activation", self.activation, ACTIVATIONS)
        require_positive("EncoderConfig.norm_epsilon", self.norm_epsilon)
        require_positive("EncoderConfig.rope_theta", self.rope_theta)
        for name, check in (("pixel_mean", require_number), ("pixel_std", require_positive)):
            given = getattr(self, name)
            three = isinstance(given, (tuple, list)) and len(given) == 3
            require(three, f"EncoderConfig.{name}", given, "must be three numbers, of red, green and blue")
            for value in given:
                check(f"EncoderConfig.{name}", value)
            object.__setattr__(self, name, tuple(given))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch[0], self.width // self.patch[1]

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.patch_size, self.patch_width or self.patch_size

    @property
    def patch_values(self) -> int:
        """Values of one patch, of three colours."""
        return 3 * self.patch[0] * self.patch[1]

    @property
    def num_leading(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + self.num_registers

    @property
    def num_features(self) -> int:
        """Features of one image: its patches and leading tokens."""
        return self.grid[0] * self.grid[1] + self.num_leading


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """A Perceiver resampler (Alayrac et al. 2022): `num_latents` learned queries that read the features of an image.

    Few latents are cheap and enough for a caption; reading needs about as many as there are patches, or no resampler.
    `head_dim` None: dim / num_heads. `qk_norm` normalises queries and keys by head. `max_frames` above 0 adds a learned
    embedding to the features of each frame (or tile), `max_images` above 0 to those of each image of a row.
    """

    num_latents: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    head_dim: int | None = None
    activation: str = "squared_relu"
    qk_norm: bool = False
    max_frames: int = 0
    max_images: int = 0
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("num_latents", "num_layers", "num_heads", "hidden_dim"):
            require_count(f"ResamplerConfig.{name}", getattr(self, name))
        if self.head_dim is not None:
            require_count("ResamplerConfig.head_dim", self.head_dim)
        for name in ("max_frames", "max_images"):
            require_count(f"ResamplerConfig.{name}", getattr(self, name), least=0)
        _choice("ResamplerConfig.activation", self.activation, ACTIVATIONS)
        require_flag("ResamplerConfig.qk_norm", self.qk_norm)
        require_positive("ResamplerConfig.norm_epsilon", self.norm_epsilon)


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig:
    """Gated cross-attention and a gated dense feed-forward (Alayrac et al. 2022) before every `every`-th decoder layer.

    Before layers `offset`, `offset` + `every`, ... (counted from 0, after the leading dense ones). Both are added to
    the residual stream times tanh of a gate that starts at `gate_init`: at 0 the model is the text model.
    `num_kv_heads` None: as many as heads. `activation` None: SwiGLU. A token `sees` the latest image before it in its
    document, or all of them. A token that sees none is left as it is, or, where `feed_forward_without_image`, goes
    through the gated feed-forward all the same, as in OpenFlamingo and Idefics.
    """

    every: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    num_kv_heads: int | None = None
    offset: int = 0
    activation: str | None = None
    norm: str = "rms"
    qk_norm: bool = True
    gate: str = "scalar"
    gate_init: float = 0.0
    sees: str = "latest"
    feed_forward_without_image: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "num_heads", "head_dim", "hidden_dim"):
            require_count(f"CrossAttentionConfig.{name}", getattr(self, name))
        if self.num_kv_heads is not None:
            require_count("CrossAttentionConfig.num_kv_heads", self.num_kv_heads)
        require_count("CrossAttentionConfig.offset", self.offset, least=0)
        constraint = f"must be below every ({self.every})"
        require(self.offset < self.every, "CrossAttentionConfig.offset", self.offset, constraint)
        constraint = f"must divide num_heads ({self.num_heads})"
        require(self.num_heads % self.kv_heads == 0, "CrossAttentionConfig.num_kv_heads", self.num_kv_heads, constraint)
        _choice("CrossAttentionConfig.activation", self.activation, (None, *ACTIVATIONS))
        _choice("CrossAttentionConfig.norm", self.norm, NORMS)
        _choice("CrossAttentionConfig.gate", self.gate, GATES)
        require_number("CrossAttentionConfig.gate_init", self.gate_init)
        _choice("CrossAttentionConfig.sees", self.sees, SEEN)
        for name in ("qk_norm", "feed_forward_without_image"):
            require_flag(f"CrossAttentionConfig.{name}", getattr(self, name))

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads


@dataclasses.dataclass(frozen=True)
class SpellingConfig:
    """A second objective in training: the features of an image spell its transcript, each of them a letter or nothing.

    For a source that is `spelled`, where features in reading order are text in reading order: of a line, or of a page
    cut into its lines (`ImageConfig.fit`); see `gpt4moe.train.spelling`.
    `num_ids` are the ids that may be spelled, from 0: of the tokenizers made here those of special tokens and bytes.
    `weight` is that of its nats, per target of the batch, beside those of the decoder.
    """

    weight: float = 1.0
    num_ids: int = 272

    def __post_init__(self) -> None:
        require_positive("SpellingConfig.weight", self.weight)
        require_count("SpellingConfig.num_ids", self.num_ids)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Encoder, resampler (None: the decoder reads the encoder's features themselves) and cross-attention.

    `spelling`: what helps the encoder to tell letters apart in training (None: nothing but the decoder's loss).
    """

    encoder: EncoderConfig
    cross_attention: CrossAttentionConfig
    resampler: ResamplerConfig | None = None
    spelling: SpellingConfig | None = None

    def __post_init__(self) -> None:
        require_instance("encoder", self.encoder, EncoderConfig)
        require_instance("cross_attention", self.cross_attention, CrossAttentionConfig)
        require_instance("resampler", self.resampler, ResamplerConfig, optional=True)
        require_instance("spelling", self.spelling, SpellingConfig, optional=True)
        both = self.resampler is not None and self.spelling is not None
        require(not both, "spelling", self.spelling, "spells the encoder's features, not a resampler's", "drop one")

    def features_per_image(self, frames: int = 1) -> int:
        """How many features of one image (or clip, or tiled page, of `frames`) cross-attention reads."""
        return self.resampler.num_latents if self.resampler else frames * self.encoder.num_features
