"""What Tesseract reads of the held-out images of a run: the character error rate to beat, source by source.

    python experiments/vision/tesseract.py runs/lines [--limit 256]

The same images, references and counting as the table that `gpt4moe train` ends with. Needs the program `tesseract`
(apt-get install tesseract-ocr). A source whose name has "pages" in it is read as a page, "strips" as one block, any
other as one line.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess

from gpt4moe import checkpoint
from gpt4moe.configure import saved_run
from gpt4moe.data.images import frames_of
from gpt4moe.data.tokenizer import load_tokenizer
from gpt4moe.infer.transcribe import edit_distance, held_out_images, normalised
from gpt4moe.train.evaluate import trained_store

MODES = {"pages": "3", "strips": "6"}  # Tesseract's page segmentation: automatic, one block; else "7", one line


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
        mode = next((mode for name, mode in MODES.items() if name in source), "7")
        edits, length, exact = 0, 0, 0
        for ids, image in zip(references, images, strict=True):
            text = normalised(tokenizer.decode(ids))
            command = ["tesseract", "stdin", "stdout", "--psm", mode]
            done = subprocess.run(command, input=frames_of(image)[0], capture_output=True, check=True)
            made = edit_distance(text, normalised(done.stdout.decode()))
            edits, length, exact = edits + made, length + len(text), exact + (made == 0)
        if images:
            wrong, right = edits / length, exact / len(images)
            print(f"{source:16} {wrong:7.1%} of characters wrong, {right:6.1%} exact, {len(images)} images", flush=True)


if __name__ == "__main__":
    main()
