"""Documents with small images that tests share: every image is of one colour, by which it is known again."""

import io

import numpy as np
from PIL import Image

from gpt4moe.config.data import DataConfig, ImageConfig, SourceConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data.documents import Document

IMAGES = ImageConfig(height=4, width=6, per_row=2, workers=0)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The file that Pillow writes of `image`."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(red: int, size: tuple[int, int] = (6, 4), kind: str = "PNG") -> bytes:
    """A file of one colour, whose red is `red`."""
    return encoded(Image.new("RGB", size, (red, 10, 20)), kind)


def reds(images: np.ndarray) -> np.ndarray:
    """The red of every image of a batch, [B, I] or [B, I, F]: 0 where there is none."""
    return images[..., 0, 0, 0]


def config_of(documents, length=16, images=IMAGES, **changes) -> DataConfig:
    """One source of these documents, of byte tokens, nothing held out."""
    source = SourceConfig("pictures", documents=lambda: documents, max_epochs=1)
    defaults = {"sources": (source,), "sequence_length": length, "held_out_fraction": 0.0, "images": images}
    return DataConfig(**defaults | {"tokenizer": TokenizerConfig(byte_level_only=True)} | changes)


def many(count: int = 40, per_document: int = 1) -> list[Document]:
    """Documents that are all different, `per_document` images each; their reds count on from 1."""
    return [
        Document(
            "<image>".join(
                [f"{index}:", *(chr(97 + (index + part) % 26) * (index % 7) for part in range(per_document))]
            ),
            images=tuple(picture(1 + (index * per_document + part) % 255) for part in range(per_document)),
        )
        for index in range(count)
    ]
