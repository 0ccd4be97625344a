"""MedCoT in sections, for the hierarchy: the same rows, rewards and metric, and units to write.

The units are the parts that the generator of `mdmrl.tasks.medcot` puts a text together from. Their
classes give the four tags, the paragraph breaks and the first words of every part, by which the
tiny models, who have learnt whole texts alone, know it. So the format and depth of the reward are
the hierarchy's gift, and only its accuracy and the true metric, both of the assembled whole, can be
compared with texts that were written whole.

Descriptions of 8 tokens reach the condition, which the later sections need. Without the masks that
stand for the rest of earlier sections tiny-mdm answers far fewer questions right.
"""

from dataclasses import replace
from functools import wraps
from pathlib import Path

from mdmrl.sampling.hierarchy import Unit
from mdmrl.tasks import medcot
from mdmrl.tasks.base import Task

STOPS = (".", "\n", "</")
SECTIONS = (
    Unit("findings", "<reasoning>Both", ".\n\n", STOPS),
    Unit("mechanism", "Adding", ".\n\n", STOPS),
    Unit("signs", "In", ".\n\n", STOPS),
    Unit("test", "To confirm it,", ".</reasoning>\n\n", STOPS),
    Unit("answer", "<answer>", "</answer>", ("</", "\n")),
)


@wraps(medcot.task, assigned=())  # so that its options are known
def task(data: str | Path | None = None, **reward_options) -> Task:
    """`medcot.task` with `units`."""
    plain = medcot.task(data, **reward_options)
    return replace(plain, name="medcot-sections", units=SECTIONS)
