"""Prepares 20BN-Jester as a TFDS data set (ArrayRecord), from the download's parts or folders.

    python scripts/prepare_jester.py --source=DIR --data_dir=DIR [--labels=DIR]
        [--limit=N] [--classes=NAME,NAME,...] [--debug]

`--source` holds the parts `20bn-jester-v1-00`, `-01`, ... as downloaded, or the extracted clips in
one of the layouts of the README; of both, the parts are read. They are read once, as the one
archive that they are, and never unpacked to disk. `--labels` holds the CSV files; without it they
are looked for in `--source`. The data set is written to `DATA_DIR/jester/1.0.0`, about as large as
the source, and `preparation_report.json` in it says what was found; the same is printed.

An interrupted run leaves nothing that counts as finished: the same command starts again. A set
that is finished is left as it is.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input_pipeline.command_line import leave_at_once, own_flags, require

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

from absl import flags

from input_pipeline.jester import SPLITS
from input_pipeline.source import few
from rvit_jax.command import parse, run, start


def define_flags() -> flags.FlagValues:
    """The command's flags."""
    values = own_flags()
    flags.DEFINE_string("source", None, "Folder of the parts, or the clips.", flag_values=values)
    flags.DEFINE_string(
        "data_dir", None, "Folder of TFDS data sets to write to.", flag_values=values
    )
    flags.DEFINE_string(
        "labels", "", "Folder of the CSV files; by default --source.", flag_values=values
    )
    flags.DEFINE_integer(
        "limit", None, "Clips a split, the first of its CSV; by default all.", 1, flag_values=values
    )
    flags.DEFINE_list("classes", [], "Only clips of these classes.", flag_values=values)
    return values


def render(report: dict[str, Any]) -> str:
    """The report of `jester_dataset_builder.prepare` as lines of text."""
    lines = []
    for split in SPLITS:
        if split not in report["splits"]:
            lines.append(f"{split}: no CSV, so no split")
            continue
        found = report["splits"][split]
        frames = found["frames_per_clip"]
        lines.append(
            f"{split}: {found['num_clips']} clips of {frames['min']} to {frames['max']} frames "
            f"(median {frames['median']:g}){'' if found['clips_per_class'] else ', no labels'}"
        )
        counts = sorted((found["clips_per_class"] or {}).items())
        lines += [f"  {count:8d}  {class_name}" for class_name, count in counts]
        if found["missing_ids"]:
            lines.append(_ids("missing (in the CSV, not in the data)", found["missing_ids"], "  "))
    for key, what in (
        ("extra_ids", "in the data, in no CSV"),
        ("empty_ids", "clips without a frame"),
        ("odd_ids", "ids that are no numbers"),
        ("ids_in_several_splits", "ids in several splits"),
        ("ids_with_gaps_in_frame_numbers", "clips whose frames are not numbered 1, 2, 3, ..."),
        ("ids_with_frames_that_are_no_jpeg", "clips with frames that are no JPEG"),
    ):
        if report[key]:
            lines.append(_ids(what, report[key]))
    if report["num_other_files"]:
        names = few(report["other_files"])
        lines.append(f"files that are no frames: {report['num_other_files']}: {names}")
    return "\n".join(lines)


def _ids(what: str, ids: list[str], indent: str = "") -> str:
    return f"{indent}{what}: {len(ids)}: {few(ids)}"


def _prepare(argv: list[str]) -> None:
    values = define_flags()
    parse(values, argv, __doc__)
    require(values, source="DIR", data_dir="DIR")
    from input_pipeline import jester_dataset_builder as builder  # TFDS takes a second

    try:
        report = builder.prepare(
            values.source,
            values.data_dir,
            labels=values.labels,
            classes=values.classes,
            limit=values.limit,
        )
    except ValueError as error:  # checks that a config's key shares with this flag
        raise ValueError(str(error).replace("dataset.classes", "--classes")) from error
    print(render(report))
    folder = builder.dataset_folder(values.data_dir)
    had = "it was prepared before" if report["already_prepared"] else "prepared"
    print(f"{folder}: {had}; report: {folder / builder.REPORT_NAME}")
    left_out = {split: len(r["missing_ids"]) for split, r in report["splits"].items()}
    if any(left_out.values()) or report["empty_ids"]:
        print(
            f"warning: {sum(left_out.values())} clips of the CSV files are missing, "
            f"{len(report['empty_ids'])} have no frame; they are left out (see the report)",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    return run(_prepare, sys.argv if argv is None else argv)


if __name__ == "__main__":
    start(main)
