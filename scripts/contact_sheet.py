"""Draws a contact sheet of a data set in Jester's layout: a row per class, frames left to right.

python scripts/contact_sheet.py --config=configs/gestures.py --output=docs/gestures.jpg
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from PIL import Image, ImageDraw

from input_pipeline import jester
from input_pipeline.transforms import decode_image, resize_array

CAPTION_WIDTH = 220


def draw_sheet(split: jester.Split, num_frames: int, side: int) -> Image.Image:
    """The first clip of each class of a split with labels."""
    height = side * len(split.class_names)
    sheet = Image.new("RGB", (CAPTION_WIDTH + num_frames * side, height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(split.class_names):
        pen.text((6, row * side + side // 2), name, fill="black", anchor="lm", font_size=13)
        (clips,) = np.nonzero(split.labels == row)
        if not len(clips):
            continue
        files = jester.frame_files(str(Path(split.frames_dir) / split.ids[clips[0]]))
        for column, index in enumerate(np.linspace(0, len(files) - 1, num_frames).round()):
            frame = Image.fromarray(resize_array(decode_image(files[int(index)]), side))
            sheet.paste(frame, (CAPTION_WIDTH + column * side, row * side))
    return sheet


def define_flags() -> None:
    """Not at import: absl's flags are one set for the whole process, tests included."""
    config_flags.DEFINE_config_file("config", None, "Config file, and a variant after a colon")
    flags.DEFINE_string("output", None, "Picture to write; its ending gives the format.")
    flags.DEFINE_enum("split", "test", jester.SPLITS, "Split to take the clips from.")
    flags.DEFINE_integer("frames", 9, "Frames of each clip, evenly spaced.", 2)
    flags.DEFINE_integer("side", 72, "Width and height of each frame, in pixels.", 16)
    flags.mark_flags_as_required(["config", "output"])


def main(_: list[str]) -> None:
    """Reads the split and writes the picture."""
    args = flags.FLAGS
    dataset = args.config.dataset
    split = jester.read_split(
        dataset.data_dir, args.split, tuple(dataset.classes), name=dataset.name
    )
    if split.labels is None:
        raise app.UsageError(f"the {args.split} split has no labels: name another with --split")
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(split, args.frames, args.side).save(output)
    print(output)


if __name__ == "__main__":
    define_flags()
    app.run(main)
