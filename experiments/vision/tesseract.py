"""What Tesseract reads of the held-out images of a run: the character error rate to beat, source by source.

    python experiments/vision/tesseract.py runs/lines [--limit 256]

The same images, references and counting as the table that `gpt4moe train` ends with. Needs the program `tesseract`
(apt-get install tesseract-ocr). Images up to 64 pixels high are read as a line, others as a page and as a block, of
which the better one counts.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess

from gpt4moe import checkpoint
from gpt4moe.configure import saved_run
from gpt4moe.data.images import frames_of, rgb_image
from gpt4moe.data.tokenizer import load_tokenizer
from gpt4moe.infer.transcribe import edit_distance, held_out_images, normalised
from gpt4moe.train.evaluate import trained_store

# Tesseract's page segmentation: one line; automatic, one block.
LINE, PAGE = ("7",), ("3", "6")
LINE_HEIGHT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="work directory of a run that reads images")
    parser.add_argument("--limit", type=int, default=256, help="images of each source at most")
    arguments = parser.parse_args()
    if shutil.which("tesseract") is None:
        parser.error("tesseract is not installed: apt-get install tesseract-ocr")
    store = trained_store(saved_run(arguments.workdir)[0], arguments.workdir, checkpoint.latest_step(arguments.workdir))
    tokenizer = load_tokenizer(f"{arguments.workdir}/tokenizer.json")
    for source in store.source_names:
        _, references, images = held_out_images(store, source, arguments.limit)
        if not images:
            continue
        texts = [normalised(tokenizer.decode(ids)) for ids in references]
        files = [frames_of(image)[0] for image in images]
        is_line = max(rgb_image(file).height for file in files) <= LINE_HEIGHT
        edits = min((edits_of(files, texts, mode) for mode in (LINE if is_line else PAGE)), key=sum)
        wrong, right = sum(edits) / sum(map(len, texts)), edits.count(0) / len(edits)
        print(f"{source:16} {wrong:7.1%} of characters wrong, {right:6.1%} exact, {len(images)} images", flush=True)


def edits_of(files: list[bytes], texts: list[str], mode: str) -> list[int]:
    """What Tesseract has wrong of each image."""
    command, edits = ["tesseract", "stdin", "stdout", "--psm", mode], []
    for file, text in zip(files, texts, strict=True):
        done = subprocess.run(command, input=file, capture_output=True, check=True)
        edits.append(edit_distance(text, normalised(done.stdout.decode())))
    return edits


if __name__ == "__main__":
    main()
