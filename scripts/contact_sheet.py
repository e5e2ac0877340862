"""Draws a contact sheet of a data set in Jester's layout: a row per class, frames left to right.

python scripts/contact_sheet.py --config=configs/gestures.py --output=docs/gestures.jpg
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input_pipeline.command_line import check_output_file, leave_at_once, own_flags, require

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

import input_pipeline
from input_pipeline import jester
from input_pipeline.transforms import decode_image, resize_array
from rvit_jax.command import ArgumentError, parse, run, start

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


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command's flags; `argv` tells which config keys are set."""
    values = own_flags(argv)
    flags.DEFINE_string(
        "output", None, "Picture to write; its ending gives the format.", flag_values=values
    )
    flags.DEFINE_enum(
        "split", "test", jester.SPLITS, "Split to take the clips from.", flag_values=values
    )
    flags.DEFINE_integer("frames", 9, "Frames of each clip, evenly spaced.", 2, flag_values=values)
    flags.DEFINE_integer(
        "side", 72, "Width and height of each frame, in pixels.", 16, flag_values=values
    )
    return values


def parse_flags(argv: list[str]) -> flags.FlagValues:
    """The flags' values; raises ArgumentError where one is unknown, missing or does not fit."""
    values = define_flags(argv)
    parse(values, argv, __doc__)
    require(values, config="configs/gestures.py", output="sheet.jpg")
    return values


def _work(argv: list[str]) -> None:
    values = parse_flags(argv)
    output = Path(values.output).expanduser()
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ArgumentError(f"--output={output}: its ending is no picture's; take .jpg or .png")
    if output.is_dir():
        check_output_file(output)
    dataset = values.config.dataset
    data_dir = Path(dataset.data_dir).expanduser()
    if dataset.name == "gestures" and not data_dir.is_dir():
        raise FileNotFoundError(input_pipeline.how_to_draw(values.config))
    split = jester.read_split(data_dir, values.split, tuple(dataset.classes), name=dataset.name)
    if split.labels is None:
        raise ArgumentError(f"the {values.split} split has no labels: name another with --split")
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(split, values.frames, values.side).save(output)
    print(output)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    return run(_work, sys.argv if argv is None else argv)


if __name__ == "__main__":
    start(main)
