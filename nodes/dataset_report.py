"""Dataset Report: a data set looked through before anything is trained on it."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..comfy_host.answers import answer
from ..comfy_host.progress import NodeWatch, contact_sheet, image_tensor
from ..comfy_host.training_files import data_set_option, data_set_state, inside
from ..training import options
from ..training.options import TaskOptions
from .search_words import found_by
from .training import GROUP, data_set_input, option_inputs


class DatasetReport(io.ComfyNode):
    """A data set looked through before anything is trained on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraDatasetReport",
            **found_by("dataset", "captions", "training images", "check data set"),
            display_name="Dataset Report",
            category=GROUP,
            description="Counts and names what a data set holds: images, captions, buckets; broken images, empty "
            "or missing captions, duplicates.",
            inputs=[
                data_set_input(),
                *option_inputs(TaskOptions, ("resolution", "train_batch_size")),
                *option_inputs(TaskOptions, ("clip_frames",), optional=True),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="Counts and names."),
                io.Image.Output("pictures", display_name="pictures", tooltip="The first 48 images."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, data_set, **_):
        return data_set_state(data_set)

    @classmethod
    def execute(cls, data_set, resolution, train_batch_size, clip_frames=0) -> io.NodeOutput:
        from ..training.data import dataset  # imported when it runs, as what trains
        from ..training.data.images import thumbnail

        values = {"resolution": resolution, "train_batch_size": train_batch_size, "clip_frames": clip_frames}
        values |= data_set_option(data_set)
        found = dataset.scan(inside(options.load(TaskOptions, None, values)), NodeWatch(cls).read)
        line, report = dataset.summary(found), dataset.format_report(found)
        more = dataset.format_contents(found)
        sheet = contact_sheet([thumbnail(p.path, 96) for p in found.images[:48]], 96, 8)
        image = image_tensor(sheet)
        shown = answer(line, more, **ui.PreviewImage(image, cls=cls).as_dict())
        return io.NodeOutput(f"{line}\n{report}", image, ui=shown)
